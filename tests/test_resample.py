"""A trial made into a confounded log keeps its covariates and its effect given them."""

from __future__ import annotations

import numpy as np
import pytest

from deconfound_jax.simulate.resample import confound_trial


def test_acceptance_by_hand():
    # A quarter treated: ratios .8 / .25, .2 / .75, .4 / .75, .4 / .75 over their maximum 3.2.
    kept = confound_trial([1, 0, 0, 0], [0.8, 0.8, 0.6, 0.6], seed=0)
    np.testing.assert_allclose(kept.accept_n, [1, 1 / 12, 1 / 6, 1 / 6])
    assert 0 in kept.index_m


def test_the_log_is_confounded_and_its_effect_given_the_covariate_is_the_trials():
    rng = np.random.default_rng(0)
    n = 200_000
    c, t = rng.integers(0, 2, n), (rng.random(n) < 0.3).astype(int)
    y = 0.5 * t + 2.0 * c + 1.0 * t * c + rng.normal(size=n)  # average effect 1
    kept = confound_trial(t, np.where(c == 1, 0.85, 0.15), seed=1).index_m
    c, t, y = c[kept], t[kept], y[kept]
    assert (np.diff(kept) > 0).all() and 20_000 < len(kept) < 100_000
    np.testing.assert_allclose([t[c == 1].mean(), t[c == 0].mean()], [0.85, 0.15], atol=0.01)
    np.testing.assert_allclose(c.mean(), 0.5, atol=0.01)
    given = [y[(t == 1) & (c == v)].mean() - y[(t == 0) & (c == v)].mean() for v in (0, 1)]
    np.testing.assert_allclose(np.mean(given), 1.0, atol=0.04)
    assert y[t == 1].mean() - y[t == 0].mean() > 2


def test_the_seed_decides_the_coins():
    t, q = np.arange(100) % 2, np.full(100, 0.3)
    one, two = confound_trial(t, q, seed=1).index_m, confound_trial(t, q, seed=2).index_m
    np.testing.assert_array_equal(one, confound_trial(t, q, seed=1).index_m)
    assert list(one) != list(two)


@pytest.mark.parametrize(
    ("treatment", "propensity", "message"),
    [
        ([0, 2], [0.5, 0.5], "treatment: expected 0 and 1"),
        ([0, 1], [0.5, 1.0], "propensity: expected"),
        ([0, 1], [0.5], "propensity: expected"),
    ],
)
def test_what_is_wrong_is_named(treatment, propensity, message):
    with pytest.raises(ValueError, match=message):
        confound_trial(treatment, propensity)
