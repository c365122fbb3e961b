"""Least squares, absorbed levels, instruments: hand numbers, dense algebra, what each must be indifferent to."""

from __future__ import annotations

import numpy as np
import pytest

from deconfound_jax.causal.classical.absorb import residualise
from deconfound_jax.causal.classical.linear import absorbed_df, liml, ols, two_stage, with_intercept

N = 120


@pytest.fixture(scope="module")
def log():
    """Two endogenous variables, three instruments, two controls, two categories, weights, clusters."""
    rng = np.random.default_rng(0)
    u, z, c = rng.normal(size=N), rng.normal(size=(N, 3)), rng.normal(size=(N, 2))
    p = np.stack([z @ [1.0, 0.5, 0] + u + rng.normal(size=N), 100 + 40 * z[:, 2] + 30 * u], 1)
    codes = np.stack([rng.integers(0, 12, N), rng.integers(0, 5, N)], 1)
    y = c @ [1.0, 2.0] + p @ [0.5, 0.01] + u + (1 + abs(c[:, 0])) * rng.normal(size=N) + 0.3 * codes[:, 0]
    weight, cluster = rng.uniform(0.2, 3, N), rng.integers(0, 20, N)
    return {"y": y, "c": c, "p": p, "z": z, "codes": codes, "weight": weight, "cluster": cluster}


def dense(controls_nq, codes_nc):
    """[1, controls, indicators], columns of size one."""
    parts = [np.ones((N, 1)), controls_nq - controls_nq.mean(0)]
    parts += [(column[:, None] == np.unique(column)[None, :]).astype(float) for column in codes_nc.T]
    columns = np.concatenate(parts, 1)
    return columns / np.maximum(np.abs(columns).max(0), 1e-300)


@pytest.mark.parametrize("categories", [0, 1, 3])
def test_residuals_are_those_of_dense_least_squares(log, categories):
    # A control that is the sum of two, a constant, one the first category determines; a category nested in another.
    first = log["codes"][:, :1]
    controls = np.concatenate([log["c"], log["c"].sum(1, keepdims=True), np.full((N, 1), 7.0), 1e4 + 5.0 * first], 1)
    codes = np.concatenate([log["codes"], first // 3], 1)[:, :categories]
    found = residualise(log["p"], controls, codes, log["weight"])
    root = np.sqrt(log["weight"])[:, None]
    columns = dense(controls, codes)
    fitted = columns @ np.linalg.lstsq(root * columns, root * log["p"], rcond=1e-10)[0]
    np.testing.assert_allclose(found, log["p"] - fitted, atol=1e-8)


def test_residuals_take_weight_two_for_the_row_twice(log):
    twice = np.r_[np.arange(N), np.arange(40)]
    found = residualise(log["y"][twice], log["c"][twice], log["codes"][twice])[:N]
    weight = np.where(np.arange(N) < 40, 2.0, 1.0)
    np.testing.assert_allclose(residualise(log["y"], log["c"], log["codes"], weight), found, atol=1e-9)
    gone = np.where(np.arange(N) < 40, 0.0, 1.0)
    kept = residualise(log["y"], log["c"], log["codes"], gone)
    assert np.isfinite(kept).all()
    alone = residualise(log["y"][40:], log["c"][40:], log["codes"][40:])
    np.testing.assert_allclose(kept[40:], alone, atol=1e-9)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"values_nk": [1.0, np.nan]}, "values: expected finite"),
        ({"controls_nq": np.zeros((3, 1))}, r"controls: expected \(2, columns\)"),
        ({"codes_nc": [1, 2, 3]}, "codes: expected 2 rows, got 3"),
        ({"weight_n": [1.0, -1.0]}, "weight: expected 2 weights >= 0"),
    ],
)
def test_residualise_names_what_is_wrong(bad, message):
    with pytest.raises(ValueError, match=message):
        residualise(**{"values_nk": [1.0, 2.0], **bad})


def test_ols_by_hand():
    # y = 5/6 + 1.5 x, residuals 1/6, -1/3, 1/6: s^2 = 1/6, var of the slope s^2 / 2.
    found = ols([1.0, 2.0, 4.0], with_intercept([0.0, 1.0, 2.0]), robust=False)
    np.testing.assert_allclose(found.coefficient_k, [5 / 6, 1.5])
    np.testing.assert_allclose(found.error_k[1], np.sqrt(1 / 12))
    np.testing.assert_allclose(found.residual_n, [1 / 6, -1 / 3, 1 / 6])
    assert found.residual_df == 1


@pytest.mark.parametrize("kind", ["robust", "clustered"])
def test_ols_sandwiches_are_the_sums_they_say(log, kind):
    x, w = with_intercept(log["c"], log["p"]), log["weight"]
    cluster = log["cluster"] if kind == "clustered" else np.arange(N)
    bread = np.linalg.inv(x.T @ (w[:, None] * x))
    b = bread @ x.T @ (w * log["y"])
    scores = np.stack([(w * (log["y"] - x @ b))[cluster == g] @ x[cluster == g] for g in np.unique(cluster)])
    groups = len(scores)
    factor = groups / (groups - 1) * (N - 1) / (N - 5) if kind == "clustered" else N / (N - 5)
    found = ols(log["y"], x, weight_n=w, cluster_n=cluster if kind == "clustered" else None)
    np.testing.assert_allclose(found.coefficient_k, b, rtol=1e-9)
    np.testing.assert_allclose(found.covariance_kk, factor * bread @ scores.T @ scores @ bread, rtol=1e-8)


def test_absorbed_levels_are_dummies_by_another_name(log):
    x = np.concatenate([log["c"], log["p"]], 1)
    found = ols(log["y"], x, log["codes"], log["weight"], robust=False)
    dummies = [(c[:, None] == np.unique(c)[None, 1:]).astype(float) for c in log["codes"].T]
    full = ols(log["y"], with_intercept(*dummies, x), None, log["weight"], robust=False)
    np.testing.assert_allclose(found.coefficient_k, full.coefficient_k[-4:], rtol=1e-8)
    np.testing.assert_allclose(found.error_k, full.error_k[-4:], rtol=1e-8)
    assert found.residual_df == full.residual_df == N - 4 - 12 - 5 + 1


def test_absorbed_degrees_of_freedom():
    assert absorbed_df(np.array([[0, 0], [0, 1], [1, 2], [1, 3]])) == 4  # two islands: 2 + 4 - 2
    assert absorbed_df(np.array([0, 0, 1, 2])) == 3
    assert absorbed_df(np.array([0, 0, 1, 2]), cluster_n=np.array([0, 0, 1, 1])) == 0  # levels inside clusters
    assert absorbed_df(np.array([0, 0, 1, 2]), cluster_n=np.array([0, 1, 1, 1])) == 3


def test_two_stage_with_one_binary_instrument_is_walds_ratio():
    z, p = np.array([0, 0, 0, 1, 1, 1.0]), np.array([0, 0, 1, 1, 1, 0.0])
    y = np.array([1, 2, 3, 4, 6, 2.0])
    found = two_stage(y, np.ones((6, 1)), p, z)
    np.testing.assert_allclose(found.coefficient_k[1], (4.0 - 2.0) / (2 / 3 - 1 / 3))
    # First stage: R^2 = 1/9 on 6 rows, F = R^2 / (1 - R^2) * 4.
    np.testing.assert_allclose(found.first_stage_f_m, [0.5])


@pytest.mark.parametrize("estimator", [two_stage, liml])
@pytest.mark.parametrize("kind", ["unadjusted", "clustered"])
def test_instruments_against_dense_algebra(log, estimator, kind):
    root = np.sqrt(log["weight"])[:, None]
    exogenous, y = root * with_intercept(log["c"]), root[:, 0] * log["y"]
    x = np.concatenate([exogenous, root * log["p"]], 1)
    z = np.concatenate([exogenous, root * log["z"]], 1)

    def annihilator(columns):
        return np.eye(N) - columns @ np.linalg.pinv(columns)

    m, kappa = annihilator(z), 1.0
    if estimator is liml:
        both = np.concatenate([y[:, None], root * log["p"]], 1)
        pencil = np.linalg.solve(both.T @ m @ both, both.T @ annihilator(exogenous) @ both)
        kappa = np.linalg.eigvals(pencil).real.min()
    bread = np.linalg.inv(x.T @ (np.eye(N) - kappa * m) @ x)
    b = bread @ x.T @ (np.eye(N) - kappa * m) @ y
    e = y - x @ b
    cluster = log["cluster"] if kind == "clustered" else None
    found = estimator(
        log["y"], with_intercept(log["c"]), log["p"], log["z"], None, log["weight"], cluster, robust=False
    )
    np.testing.assert_allclose(found.coefficient_k, b, rtol=1e-6)
    np.testing.assert_allclose(found.kappa, kappa, rtol=1e-8)
    meat = e @ e / N * np.linalg.inv(bread)
    if kind == "clustered":
        sums = np.stack([(e[:, None] * (x - m @ x))[cluster == g].sum(0) for g in np.unique(cluster)])
        meat = sums.T @ sums
    np.testing.assert_allclose(found.covariance_kk, bread @ meat @ bread, rtol=1e-5)


def test_liml_does_not_care_which_variable_is_the_outcome(log):
    y, p, z, one = log["y"], log["p"][:, 0], log["z"], np.ones((N, 1))
    forth, back = (liml(a, one, b, z).coefficient_k[1] for a, b in ((y, p), (p, y)))
    np.testing.assert_allclose(forth * back, 1.0, rtol=1e-8)
    forth, back = (two_stage(a, one, b, z).coefficient_k[1] for a, b in ((y, p), (p, y)))
    assert abs(forth * back - 1) > 1e-3
    just = [f(y, one, p, z[:, 0]).coefficient_k[1] for f in (liml, two_stage)]
    np.testing.assert_allclose(*just, rtol=1e-9)


def test_two_stage_finds_what_least_squares_misses():
    rng = np.random.default_rng(1)
    u, z = rng.normal(size=(2, 4000))
    p = z + u + rng.normal(size=4000)
    y = 3 * p + 2 * u + rng.normal(size=4000)
    instrumented = two_stage(y, np.ones((4000, 1)), p, z)
    plain = ols(y, with_intercept(p))
    assert abs(instrumented.coefficient_k[1] - 3) < 3 * instrumented.error_k[1]
    assert plain.coefficient_k[1] - 3 > 20 * plain.error_k[1]


def test_instruments_with_absorbed_levels_are_instruments_with_dummies(log):
    dummies = with_intercept((log["codes"][:, :1] == np.arange(1, 12)[None, :]).astype(float))
    full = two_stage(log["y"], np.concatenate([dummies, log["c"]], 1), log["p"], log["z"], debiased=True)
    found = two_stage(log["y"], log["c"], log["p"], log["z"], log["codes"][:, 0], debiased=True)
    np.testing.assert_allclose(found.coefficient_k, full.coefficient_k[-4:], rtol=1e-8)
    np.testing.assert_allclose(found.error_k, full.error_k[-4:], rtol=1e-8)
    np.testing.assert_allclose(found.first_stage_f_m, full.first_stage_f_m, rtol=1e-8)


def test_what_cannot_be_estimated_is_named(log):
    y, c = log["y"], log["c"]
    with pytest.raises(ValueError, match="x column 3: expected columns that vary by themselves"):
        ols(y, with_intercept(c, c[:, 0]))
    with pytest.raises(ValueError, match="x column 0"):
        ols(y, with_intercept(c), log["codes"])
    with pytest.raises(ValueError, match="instruments: expected at least 2"):
        two_stage(y, with_intercept(c), log["p"], log["z"][:, 0])
    with pytest.raises(ValueError, match="instrument 1: expected columns"):
        two_stage(y, with_intercept(c), log["p"][:, 0], np.stack([log["z"][:, 0], c[:, 1]], 1))
    with pytest.raises(ValueError, match="endogenous column 1: the instruments do not move it"):
        two_stage(y, with_intercept(c), log["p"][:, [0, 0]], log["z"])
    with pytest.raises(ValueError, match="cluster: expected at least 2"):
        ols(y, with_intercept(c), cluster_n=np.zeros(N))
    with pytest.raises(ValueError, match="fewer than 3 coefficients for 3 rows"):
        ols(y[:3], with_intercept(c[:3]))
