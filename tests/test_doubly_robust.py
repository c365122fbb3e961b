"""GLM, cross-fitting and the doubly robust estimators: hand numbers, and what each must be indifferent to."""

from __future__ import annotations

import numpy as np
import pytest

from deconfound_jax.causal.classical.crossfit import group_folds, logistic_predictions, ridge_predictions, standardised
from deconfound_jax.causal.classical.doubly_robust import aipw, partially_linear
from deconfound_jax.causal.classical.glm import logit, poisson
from deconfound_jax.causal.classical.linear import with_intercept

N = 120


@pytest.fixture(scope="module")
def log():
    """Two controls, an outcome, clusters."""
    rng = np.random.default_rng(0)
    c = rng.normal(size=(N, 2))
    return {"c": c, "y": c @ [1.0, 2.0] + rng.normal(size=N), "cluster": rng.integers(0, 20, N)}


TABLE = {(1, 1): 30, (1, 0): 10, (0, 1): 15, (0, 0): 45}  # (exposed, case) -> rows


def test_logit_of_a_table_is_its_log_odds_ratio():
    rows = np.array([key for key, count in TABLE.items() for _ in range(count)], float)
    found = logit(rows[:, 1], with_intercept(rows[:, 0]))
    np.testing.assert_allclose(found.coefficient_k[1], np.log(30 * 45 / (10 * 15)), rtol=1e-10)
    np.testing.assert_allclose(found.error_k[1], np.sqrt(1 / 30 + 1 / 10 + 1 / 15 + 1 / 45), rtol=1e-10)
    counts = logit([30.0, 15.0], with_intercept([1.0, 0.0]), trials_n=[40.0, 60.0])
    np.testing.assert_allclose(counts.covariance_kk, found.covariance_kk, rtol=1e-9)
    np.testing.assert_allclose(counts.mean_n, [30.0, 15.0], rtol=1e-10)
    weighted = logit([1.0, 0.0, 1.0, 0.0], with_intercept([1.0, 1.0, 0.0, 0.0]), weight_n=[30.0, 10.0, 15.0, 45.0])
    np.testing.assert_allclose(weighted.coefficient_k, found.coefficient_k, rtol=1e-9)


def test_poisson_of_two_groups_is_their_log_rate_ratio():
    found = poisson([30.0, 12.0], with_intercept([1.0, 0.0]), exposure_n=[10.0, 8.0])
    np.testing.assert_allclose(found.coefficient_k, [np.log(12 / 8), np.log(3 / 1.5)], rtol=1e-10)
    np.testing.assert_allclose(found.error_k[1], np.sqrt(1 / 30 + 1 / 12), rtol=1e-10)


def test_glm_sandwich_by_hand_and_rows_as_clusters(log):
    rng = np.random.default_rng(3)
    x, y = with_intercept(log["c"]), rng.poisson(np.exp(0.5 * log["c"][:, 0] + 1)).astype(float)
    found = poisson(y, x, robust=True)
    bread = np.linalg.inv(x.T @ (found.mean_n[:, None] * x))
    scores = (y - found.mean_n)[:, None] * x
    np.testing.assert_allclose(scores.sum(0), 0, atol=1e-9)
    np.testing.assert_allclose(found.covariance_kk, bread @ scores.T @ scores @ bread, rtol=1e-8)
    np.testing.assert_allclose(poisson(y, x, cluster_n=np.arange(N)).error_k, found.error_k, rtol=1e-10)
    assert not np.allclose(poisson(y, x, cluster_n=log["cluster"]).error_k, found.error_k, rtol=1e-3)


def test_glm_refuses_what_has_no_maximum():
    x = with_intercept(np.arange(6.0))
    with pytest.raises(RuntimeError, match="separate"):
        logit([0.0, 0, 0, 1, 1, 1], x)
    with pytest.raises(RuntimeError, match="others determine"):
        poisson([1.0, 2, 0, 1, 1, 3], np.concatenate([x, x[:, 1:]], 1))
    assert np.isfinite(logit([0.0, 0, 0, 1, 1, 1], x, penalty_k=[0.0, 1.0]).coefficient_k).all()
    with pytest.raises(ValueError, match="successes from 0"):
        logit([0.0, 0, 0, 1, 1, 2], x)


def test_folds_keep_groups_whole_and_even():
    group = np.random.default_rng(0).integers(0, 40, 500)
    fold = group_folds(group, 5, seed=1)
    assert all(len(set(fold[group == g])) == 1 for g in np.unique(group))
    assert np.ptp(np.bincount(fold)) <= np.bincount(group).max()
    assert (group_folds(group, 5, seed=2) != fold).any()
    with pytest.raises(ValueError, match="2 to 3, the number of groups, got 5"):
        group_folds(np.array(["a", "b", "c", "a"]), 5)


@pytest.mark.parametrize("predict", [ridge_predictions, logistic_predictions])
def test_a_prediction_does_not_see_its_own_fold(log, predict):
    y, fold = (log["y"] > 0).astype(float), np.arange(N) % 4
    before = predict(y, log["c"], fold)
    after = predict(np.where(fold == 2, 1 - y, y), log["c"], fold)
    np.testing.assert_array_equal(after[fold == 2], before[fold == 2])
    assert (np.abs(after - before)[fold != 2] > 1e-6).all()
    train = np.arange(N) < 100
    only = predict(y, log["c"], fold, train)
    np.testing.assert_array_equal(only, predict(np.where(train, y, 1 - y), log["c"], fold, train))


def test_ridge_and_logistic_ridge_are_what_they_say(log):
    x, y, fold = standardised(log["c"]), (log["y"] > 0).astype(float), np.arange(N) % 4
    train, design = fold != 0, with_intercept(x)
    b = np.linalg.solve(design[train].T @ design[train] + 3 * np.diag([0, 1, 1]), design[train].T @ y[train])
    np.testing.assert_allclose(
        ridge_predictions(y, 5 + 2 * x, fold, penalty=3.0)[~train], design[~train] @ b, rtol=1e-9
    )
    b = logit(y[train], design[train], penalty_k=[0.0, 3.0, 3.0]).coefficient_k
    expected = 1 / (1 + np.exp(-design[~train] @ b))
    np.testing.assert_allclose(logistic_predictions(y, x, fold, penalty=3.0)[~train], expected, rtol=1e-7)
    np.testing.assert_allclose(x.std(0), 1)
    assert (standardised(np.full((4, 1), 0.1)) == 0).all()


@pytest.fixture(scope="module")
def confounded():
    """c moves treatment and outcome; the effect is 2."""
    rng = np.random.default_rng(5)
    c = rng.normal(size=(3000, 2))
    chance = 1 / (1 + np.exp(-1.5 * c[:, 0]))
    d = (rng.random(3000) < chance).astype(float)
    return c, chance, d, 2 * d + 3 * c[:, 0] + rng.normal(size=3000)


def test_dml_by_hand_and_on_a_confounded_log(confounded):
    y, d = np.array([1.0, 3.0, 2.0, 5.0]), np.array([0.0, 1.0, 0.0, 1.0])
    found = partially_linear(y, d, fold_n=[0, 1, 0, 1], outcome_hat_n=[2.0] * 4, treatment_hat_n=[0.5] * 4)
    # (d - m)(y - l) = .5, .5, 0, 1.5 over (d - m)^2 = .25 each.
    np.testing.assert_allclose(found.effect, 2.5)
    scores = np.array([-0.5, 0.5, -0.5, 0.5]) * (y - 2 - 2.5 * np.array([-0.5, 0.5, -0.5, 0.5]))
    np.testing.assert_allclose(found.error, np.sqrt(scores @ scores))
    c, _, d, y = confounded
    found = partially_linear(y, d, c)
    assert abs(found.effect - 2) < 3 * found.error < 0.2
    assert y[d == 1].mean() - y[d == 0].mean() > 4


def test_aipw_is_right_if_either_nuisance_is(confounded):
    c, chance, d, y = confounded
    zero, flat = np.zeros(3000), np.full(3000, 0.5)
    right = {"control_hat_n": 3 * c[:, 0], "treated_hat_n": 3 * c[:, 0] + 2}
    by_propensity = aipw(y, d, control_hat_n=zero, treated_hat_n=zero, propensity_n=chance)
    by_outcome = aipw(y, d, propensity_n=flat, **right)
    neither = aipw(y, d, control_hat_n=zero, treated_hat_n=zero, propensity_n=flat)
    fitted = aipw(y, d, c)
    for found in (by_propensity, by_outcome, fitted):
        assert abs(found.effect - 2) < 3 * found.error
    assert neither.effect - 2 > 10 * neither.error
    assert fitted.error < by_propensity.error
    np.testing.assert_allclose(fitted.control_hat_n, right["control_hat_n"], atol=0.4)
    np.testing.assert_allclose(fitted.treated_hat_n, right["treated_hat_n"], atol=0.4)
    np.testing.assert_allclose(fitted.propensity_n, chance, atol=0.1)


def test_clipping_is_counted_and_named(confounded):
    c, _, d, y = confounded
    loose, tight = aipw(y, d, c, clip=0.0), aipw(y, d, c, clip=0.2)
    assert loose.clipped == 0
    assert tight.clipped == ((loose.propensity_n < 0.2) | (loose.propensity_n > 0.8)).sum() > 100
    assert tight.propensity_n.min() == 0.2 and tight.clip == 0.2


@pytest.mark.parametrize("estimator", [partially_linear, aipw])
def test_every_row_twice_in_one_group_says_nothing_new(confounded, estimator):
    c, _, d, y = (a[:600] for a in confounded)
    twice = np.repeat(np.arange(600), 2)
    fold = group_folds(np.arange(600))
    once = estimator(y, d, c, fold, penalty=1.0)
    both = estimator(y[twice], d[twice], c[twice], fold[twice], twice, penalty=2.0)
    np.testing.assert_allclose([both.effect, both.error], [once.effect, once.error], rtol=1e-6)
    fooled = estimator(y[twice], d[twice], c[twice], fold[twice], penalty=2.0)
    np.testing.assert_allclose(fooled.error, once.error / np.sqrt(2), rtol=1e-6)


def test_doubly_robust_estimators_name_what_is_wrong(confounded):
    c, _, d, y = (a[:6] for a in confounded)
    with pytest.raises(ValueError, match="every group inside one fold, got group 7"):
        partially_linear(y, d, c, fold_n=[0, 1, 0, 1, 0, 1], group_n=[5, 6, 5, 7, 7, 6])
    with pytest.raises(ValueError, match="outcome_hat: expected the nuisance, or confounders"):
        partially_linear(y, d, fold_n=[0, 1, 0, 1, 0, 1])
    with pytest.raises(ValueError, match="d: expected 0 and 1"):
        aipw(y, d + 1, c)
    with pytest.raises(ValueError, match="clip: expected"):
        aipw(y, d, c, clip=0.5)
