"""Scores against the truth, by hand-made numbers."""

import itertools
import math

import numpy as np
import pytest

from deconfound_jax.evaluate.truth import at_kl, expected_best, kl, probe_r2, true_share


def test_expected_best_equals_enumeration():
    value_n = np.asarray([0.3, -1.0, 2.0, 2.0, 0.7, -0.2])
    for m in range(1, 7):
        by_hand = np.mean([max(draw) for draw in itertools.combinations(value_n, m)])
        np.testing.assert_allclose(expected_best(value_n, m), by_hand)


def test_expected_best_does_not_overflow():
    # Of 0..n-1 the maximum of m draws without replacement has mean m (n + 1) / (m + 1) - 1.
    np.testing.assert_allclose(expected_best(np.arange(50_000.0), 8), 8 * 50_001 / 9 - 1)


def test_true_share_by_hand():
    reference = [0.0, 0.0, 0.0, 4.0]  # mean 1; best of 2: 4 with chance 1/2 -> 2
    assert true_share([1.0, 1.0], reference, best_of=2) == 0.0
    assert true_share([2.0], reference, best_of=2) == 1.0
    assert true_share([0.0, 1.0], reference, best_of=2) == -0.5


@pytest.mark.parametrize(
    "policy, reference, best_of, message",
    [
        ([1.0], [1.0, 2.0], 8, "best_of: expected 1 to 2"),
        ([1.0], [2.0, 2.0], 2, "reference_f: expected values that differ"),
        ([], [1.0, 2.0], 2, "policy_f: expected at least one"),
    ],
)
def test_true_share_undefined(policy, reference, best_of, message):
    with pytest.raises(ValueError, match=message):
        true_share(policy, reference, best_of)


def test_kl_by_hand():
    mean, error = kl([-1.0, -2.0, -3.0], [-2.0, -2.0, -5.0])
    assert mean == 1.0
    np.testing.assert_allclose(error, 1 / math.sqrt(3))
    with pytest.raises(ValueError, match="at least 2 samples"):
        kl([-1.0], [-1.0])


def test_kl_estimates_the_kl_of_two_normals():
    x = np.random.default_rng(0).normal(0.5, 1.0, size=20_000)
    mean, error = kl(-((x - 0.5) ** 2) / 2, -(x**2) / 2)
    assert abs(mean - 0.125) < 3 * error and 0.003 < error < 0.004


@pytest.mark.parametrize(
    "curve, target, expected",
    [
        ([(0.0, 0.0), (0.5, 1.0), (1.5, 3.0)], 1.0, 2.0),
        ([(0.0, 0.0), (0.5, 1.0), (1.5, 3.0)], 0.5, 1.0),
        ([(0.0, 0.2), (1.0, 1.0)], 0.0, 0.2),
        ([(0.0, 0.0), (1.2, 1.2), (0.8, 5.0), (2.0, 9.0)], 1.0, 1.0),  # the first crossing
        ([(0.0, 0.0), (0.0, 0.5), (1.0, 1.0)], 0.5, 0.75),
        ([(0.0, 0.0), (0.9, 1.0)], 1.0, None),
        ([(1.0, 0.4)], 1.0, 0.4),
        ([(0.0, 0.0), (1.0, 0.4), (1.0, 0.9)], 1.0, 0.4),
        ([], 1.0, None),
    ],
)
def test_at_kl(curve, target, expected):
    found = at_kl(curve, target)
    assert found == expected if expected is None else math.isclose(found, expected)


def test_at_kl_refuses_nan():
    with pytest.raises(ValueError, match="finite"):
        at_kl([(0.0, 0.0), (math.nan, 1.0)], 0.5)


def test_probe_tells_what_features_carry():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2000, 5))
    carried = 3.0 + 2 * features[:, 0] - features[:, 3]
    half = features[:, 1] + rng.normal(size=2000)
    absent = rng.normal(size=2000)
    found = probe_r2(features, np.stack([carried, half, absent], axis=1))
    np.testing.assert_allclose(found, [1.0, 0.5, 0.0], atol=0.05)
    assert found[0] > 1 - 1e-9


def test_probe_is_scored_on_rows_it_never_saw():
    rng = np.random.default_rng(1)
    found = probe_r2(rng.normal(size=(100, 45)), rng.normal(size=(100, 1)))
    assert found[0] < -1, "45 features of pure noise fit 50 rows and predict none"


def test_probe_with_collinear_and_constant_features_is_finite():
    column = np.random.default_rng(2).normal(size=(200, 1))
    found = probe_r2(np.concatenate([column, column, np.ones((200, 1))], axis=1), column)
    np.testing.assert_allclose(found, [1.0], atol=1e-6)


def test_probe_errors():
    features = np.random.default_rng(3).normal(size=(20, 2))
    with pytest.raises(ValueError, match="column 1 is constant"):
        probe_r2(features, np.stack([features[:, 0], np.ones(20)], axis=1))
    with pytest.raises(ValueError, match="train_share"):
        probe_r2(features, features, train_share=0.99)
    with pytest.raises(ValueError, match="finite"):
        probe_r2(features, np.full((20, 1), np.nan))
