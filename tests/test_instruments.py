"""Instrument diagnostics against closed forms, the reference estimators, and repeated samples."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from deconfound_jax.causal import instruments as iv
from deconfound_jax.causal.classical.linear import ols, two_stage, with_intercept
from deconfound_jax.causal.working import Raw


def raw_of(y_n, p_nm, z_nk, x_nd=None, codes_n=None, frequency_n=None, precision_n=None, cluster_n=None):
    """The arrays of a design without a log."""
    n = len(y_n)
    ones = np.ones(n)
    codes_nc = np.zeros((n, 0), int) if codes_n is None else codes_n[:, None]
    return Raw(
        y_n, ones if precision_n is None else precision_n, ones if frequency_n is None else frequency_n, np.arange(n),
        np.zeros((n, 0)) if x_nd is None else x_nd, np.reshape(p_nm, (n, -1)), np.reshape(z_nk, (n, -1)),
        np.zeros((n, 0)), codes_nc, (("week", "level", 0),) if codes_n is not None else (), cluster_n,
    )  # fmt: skip


def simulate(seed, n=400, pi=(0.5,), gamma=1.0, rho=0.7, direct=(0.0,)):
    """y, p, z, x: one endogenous variable, x moves with it; `direct` is each instrument's own effect on y."""
    rng = np.random.default_rng(seed)
    z, x = rng.normal(size=(n, len(pi))), rng.normal(size=(n, 2))
    u = rng.normal(size=n)
    p = z @ np.asarray(pi) + x @ [0.5, 0.0] + u
    y = gamma * p + x @ [0.3, -0.2] + z @ np.asarray(direct) + rho * u + np.sqrt(1 - rho**2) * rng.normal(size=n)
    return y, p, z, x


def test_the_point_estimate_is_two_stage_least_squares():
    y, p, z, x = simulate(0, pi=(0.5, 0.3), direct=(0, 0))
    codes_n = np.arange(len(y)) % 7
    found = iv.point_estimate(iv.reduced_form(raw_of(y, p, z, x, codes_n)))
    reference = two_stage(y, x, p, z, codes_nc=codes_n)
    assert found[0] == pytest.approx(reference.coefficient_k[-1], rel=1e-9)


def test_effective_f_of_one_instrument_is_the_robust_f():
    y, p, z, x = simulate(1, pi=(0.2,))
    right = np.concatenate([np.ones((len(y), 1)), x, z], 1)
    bread = np.linalg.inv(right.T @ right)
    b = bread @ right.T @ p
    score = right * (p - right @ b)[:, None]
    variance = bread @ score.T @ score @ bread * len(y) / (len(y) - 4)
    assert iv.effective_f(iv.reduced_form(raw_of(y, p, z, x)))[0] == pytest.approx(b[3] ** 2 / variance[3, 3], rel=1e-9)


def test_effective_f_of_many_instruments_is_below_the_plain_f_where_noise_follows_the_strong_one():
    rng = np.random.default_rng(2)
    z = rng.normal(size=(2000, 3))
    p = 0.1 * z[:, 0] + rng.normal(size=2000) * (0.2 + 1.5 * np.abs(z[:, 0]))
    form = iv.reduced_form(raw_of(rng.normal(size=2000), p, z))
    x = np.concatenate([np.ones((2000, 1)), z], 1)
    b, (left,) = np.linalg.lstsq(x, p, rcond=None)[:2]
    plain = ((x @ b - p.mean()) ** 2).sum() / 3 / (left / 1996)
    assert iv.effective_f(form)[0] < 0.7 * plain
    assert iv.cragg_donald(form) == pytest.approx(iv.effective_f(form)[0], rel=1e-9), "one variable: the same number"


def test_the_set_of_one_instrument_is_where_the_quadratic_says():
    y, p, z, x = simulate(3, pi=(0.4,))
    form = iv.reduced_form(raw_of(y, p, z, x))
    (low, high), v = iv.anderson_rubin(form).pieces[0], form.covariance_jj
    critical = scipy.stats.f.ppf(0.95, 1, form.df)
    delta, pi = form.delta_k[0], form.pi_km[0, 0]
    roots = np.roots([
        pi**2 - critical * v[1, 1], 2 * (critical * v[0, 1] - pi * delta), delta**2 - critical * v[0, 0],
    ])  # fmt: skip
    assert [low, high] == pytest.approx(sorted(roots), rel=1e-6)
    assert low < 1.0 < high


@pytest.mark.parametrize(("pi", "bounded"), [(0.5, (100, 100)), (0.02, (0, 25))])
def test_the_set_covers_gamma_whatever_the_strength(pi, bounded):
    sets = [iv.anderson_rubin(iv.reduced_form(raw_of(*simulate(s, n=200, pi=(pi,))))) for s in range(100)]
    covered = sum(any(low <= 1.0 <= high for low, high in one.pieces) for one in sets)
    assert 89 <= covered <= 100, f"95% sets cover in {covered} of 100"
    assert bounded[0] <= sum(one.bounded for one in sets) <= bounded[1]


def test_an_unbounded_set_is_two_rays_or_the_line():
    kinds = {}
    for seed in range(40):
        one = iv.anderson_rubin(iv.reduced_form(raw_of(*simulate(seed, n=200, pi=(0.05,)))))
        kinds.setdefault(one.kind, one)
    assert kinds["line"].pieces == ((-np.inf, np.inf),)
    rays = kinds["unbounded"].pieces
    assert len(rays) == 2 and rays[0][0] == -np.inf and rays[1][1] == np.inf and rays[0][1] < rays[1][0]


def test_disagreeing_instruments_are_seen_and_agreeing_ones_are_not():
    p_values = [
        iv.overidentification(iv.reduced_form(raw_of(*simulate(s, pi=(0.5, 0.5), direct=(0, 0))))) for s in range(100)
    ]
    assert 1 <= sum(p < 0.05 for p in p_values) <= 11
    bad = iv.reduced_form(raw_of(*simulate(0, pi=(0.5, 0.5), direct=(0, 0.6))))
    assert iv.overidentification(bad) < 1e-3
    assert iv.anderson_rubin(bad).kind == "empty"
    first, second = iv.single_instrument_sets(bad)
    assert first.pieces[0][0] < 1.0 < first.pieces[0][1], "the valid instrument's own set holds gamma"
    assert second.pieces[0][0] > 1.5
    assert iv.overidentification(iv.reduced_form(raw_of(*simulate(0)))) == 1.0


def test_two_variables_driven_by_one_direction_have_no_strength_together():
    rng = np.random.default_rng(4)
    z, u = rng.normal(size=(1000, 2)), rng.normal(size=(1000, 2))
    together = np.stack([z[:, 0] + u[:, 0], z[:, 0] + u[:, 1]], 1)
    apart = np.stack([z[:, 0] + u[:, 0], z[:, 1] + u[:, 1]], 1)
    for p, strong in ((together, False), (apart, True)):
        y = p @ [1.0, -0.5] + u.sum(1) + rng.normal(size=1000)
        form = iv.reduced_form(raw_of(y, p, z))
        one_by_one = [iv.effective_f(iv.reduced_form(raw_of(y, p[:, j], z)))[0] for j in range(2)]
        assert min(one_by_one) > 100
        assert (iv.effective_f(form).min() > 100) == strong
        found = iv.anderson_rubin(form)
        assert found.bounded == strong
    assert iv.overidentification(form) == 1.0


def test_the_joint_set_of_two_variables_covers():
    covered = np.zeros(2)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        z, u = rng.normal(size=(200, 2)), rng.normal(size=(200, 2))
        y = (z + u) @ [1.0, -0.5] + u.sum(1) + rng.normal(size=200)
        pieces = iv.anderson_rubin(iv.reduced_form(raw_of(y, z + u, z))).pieces
        covered += [low < gamma < high for (low, high), gamma in zip(pieces, (1.0, -0.5), strict=True)]
    assert (covered >= 56).all(), f"projections of a 95% set cover {covered} of 60"


def test_the_conditional_f_is_sanderson_and_windmeijers():
    rng = np.random.default_rng(10)
    z, u = rng.normal(size=(2000, 3)), rng.normal(size=(2000, 2))
    p = z @ np.array([[0.3, 0.2], [0.2, 0.3], [0.1, 0.1]]) + u
    found = iv.effective_f(iv.reduced_form(raw_of(u[:, 0], p, z)))
    one = np.ones((2000, 1))
    kappa = two_stage(p[:, 0], one, p[:, 1], z).coefficient_k[1]
    left = p[:, 0] - kappa * p[:, 1]
    left = left - left.mean()
    right = with_intercept(z)
    rest = left - right @ np.linalg.lstsq(right, left, rcond=None)[0]
    conditional = (left @ left - rest @ rest) / (3 - 2 + 1) / (rest @ rest / (2000 - 4))
    assert found[0] == pytest.approx(conditional, rel=0.05)


def test_projections_of_the_joint_set_hold_the_set():
    rng = np.random.default_rng(5)
    z, u = rng.normal(size=(500, 3)), rng.normal(size=(500, 2))
    p = z @ np.array([[0.6, 0.1], [0.2, 0.5], [0.3, -0.4]]) + u
    y = p @ [1.0, -0.5] + u.sum(1) + rng.normal(size=500)
    form = iv.reduced_form(raw_of(y, p, z))
    found = iv.anderson_rubin(form)
    grid = np.stack(np.meshgrid(*[np.linspace(a - 0.2, b + 0.2, 400) for a, b in found.pieces]), -1).reshape(-1, 2)
    line = np.concatenate([np.ones((len(grid), 1)), -grid], 1)
    statistic = np.einsum("gi,ij,gj->g", line, form.cross_kk, line) / np.einsum(
        "gi,ij,gj->g", line, form.sigma_kk, line
    )
    inside = grid[statistic <= 3 * scipy.stats.f.ppf(0.95, 3, form.df)]
    step = (grid.max(0) - grid.min(0)) / 399
    assert np.abs(inside.min(0) - [a for a, _ in found.pieces]).max() < 2 * step.max()
    assert np.abs(inside.max(0) - [b for _, b in found.pieces]).max() < 2 * step.max()


def test_wu_hausman_sees_endogeneity_and_only_that():
    assert iv.endogeneity(iv.reduced_form(raw_of(*simulate(0, rho=0.7)))) < 1e-4
    p_values = [iv.endogeneity(iv.reduced_form(raw_of(*simulate(s, rho=0.0)))) for s in range(100)]
    assert 1 <= sum(p < 0.05 for p in p_values) <= 11


def test_a_row_of_weight_two_is_the_row_twice():
    y, p, z, x = simulate(6, n=120)
    twice = [np.concatenate([v, v[:40]]) for v in (y, p, z, x)]
    frequency_n = np.where(np.arange(120) < 40, 2.0, 1.0)
    weighted, repeated = iv.reduced_form(raw_of(y, p, z, x, frequency_n=frequency_n)), iv.reduced_form(raw_of(*twice))
    assert iv.effective_f(weighted) == pytest.approx(iv.effective_f(repeated), rel=1e-9)
    assert iv.anderson_rubin(weighted).pieces[0] == pytest.approx(iv.anderson_rubin(repeated).pieces[0], rel=1e-6)


def test_rows_of_a_cluster_are_not_independent():
    y, p, z, x = simulate(7, n=150)
    copies = [np.repeat(v, 5, axis=0) for v in (y, p, z, x)]
    once, naive = iv.reduced_form(raw_of(y, p, z, x)), iv.reduced_form(raw_of(*copies))
    clustered = iv.reduced_form(raw_of(*copies, cluster_n=np.repeat(np.arange(150), 5)))
    assert iv.effective_f(naive)[0] > 4 * iv.effective_f(once)[0]
    y, p, z, x = copies
    reference = ols(p, with_intercept(x, z), cluster_n=np.repeat(np.arange(150), 5))
    assert iv.effective_f(clustered)[0] == pytest.approx((reference.coefficient_k[3] / reference.error_k[3]) ** 2)


def test_unequal_precision_gives_the_reduced_form_of_weighted_least_squares():
    y, p, z, x = simulate(8, n=300)
    precision_n = np.random.default_rng(8).uniform(0.2, 5.0, size=300)
    form = iv.reduced_form(raw_of(y, p, z, x, precision_n=precision_n))
    right = np.concatenate([np.ones((300, 1)), z, p[:, None], x], 1)
    b = np.linalg.lstsq(right * np.sqrt(precision_n)[:, None], y * np.sqrt(precision_n), rcond=None)[0]
    first = np.linalg.lstsq(np.delete(right, 2, 1), p, rcond=None)[0]
    assert iv.point_estimate(form)[0] == pytest.approx((b[1] + b[2] * first[1]) / first[1], rel=1e-8)


def test_the_covariance_of_delta_is_that_of_regressing_y_on_the_instruments():
    y, p, z, x = simulate(11)
    form, reference = iv.reduced_form(raw_of(y, p, z, x)), ols(y, with_intercept(x, z))
    t = form.delta_k[0] / np.sqrt(form.covariance_jj[0, 0])
    assert t == pytest.approx(reference.coefficient_k[3] / reference.error_k[3], rel=1e-9)


def test_a_design_without_instruments_is_refused():
    y, p, z, x = simulate(0)
    with pytest.raises(ValueError, match="endogenous term"):
        iv.reduced_form(raw_of(y, p[:, None][:, :0], z[:, :0], x))


def test_few_levels_cost_degrees_of_freedom():
    y, p, z, x = simulate(9, n=100)
    many = iv.reduced_form(raw_of(y, p, z, x, codes_n=np.arange(100) // 2))
    few = iv.reduced_form(raw_of(y, p, z, x, codes_n=np.arange(100) % 2))
    assert many.df == 100 - 50 - 3 and few.df == 100 - 2 - 3


def test_the_joint_set_of_two_variables_covers_where_shocks_come_in_clusters():
    """Cluster-level instruments and shocks: a set that took rows for independent would miss the truth in most logs."""
    missed = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        cluster_n = np.repeat(np.arange(60), 15)
        z = rng.normal(size=(60, 3))[cluster_n]
        u = rng.normal(size=(60, 1))[cluster_n] + 0.5 * rng.normal(size=(900, 1))
        p = z[:, :2] + 0.5 * z[:, 2:] + u + rng.normal(size=(900, 2))
        y = p @ np.array([1.0, -1.0]) + 2 * u[:, 0]
        found = raw_of(y, p, z, cluster_n=cluster_n)
        pieces = iv.anderson_rubin(iv.reduced_form(found)).pieces
        missed += not all(low <= true <= high for (low, high), true in zip(pieces, (1.0, -1.0), strict=True))
    assert missed <= 4
