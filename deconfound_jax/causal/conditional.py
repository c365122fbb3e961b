"""The model given its scalars: a linear Gaussian system, solved in closed form.

Given psi = (scales, sigma, s1, c0) both equations are linear in the coefficients
theta = (intercept, text, terms, gamma; first stage), because the control function
c0 e = k (p - Z theta_z - v), k = c0 / s1, is linear in theta_z:

    y - k p = X theta_x + gamma p + u_level - k (Z theta_z + v_level) + noise / omega
    p       =                                   Z theta_z + v_level  + s1 e

so theta | psi is Gaussian and p(y, p | psi) is its normalising constant. Both need
the rows only through cross products, `Moments`, which add up over batches of
rows: that is what a compiled step can keep up to date exactly. The category with
the most levels never enters a matrix: it is absorbed by a Schur complement. So are
the text's columns where the rows came rotated to make them orthogonal
(`Spec.orthogonal`): each direction is then a system of its own, as each level is.

Arrays: q columns of the cross products are [1, Rows.columns, one-hot levels that
are not absorbed, p, y].
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve, solve_triangular

from deconfound_jax.causal.families import FAMILIES
from deconfound_jax.causal.terms import Block, Levels, Rows, Spec

_LOG_2PI = float(np.log(2 * np.pi))


class Moments(NamedTuple):
    """Cross products over rows; the sum of two batches' moments is that of both."""

    outcome_qq: jax.Array  # weighted by the outcome's precision
    first_qq: jax.Array  # weighted by the rows' weights alone
    outcome_cq: jax.Array  # the same, summed within each absorbed level
    first_cq: jax.Array
    rows: jax.Array  # (): sum of weights
    constant: jax.Array  # (): log-likelihood terms free of psi and theta


class Layout(NamedTuple):
    """Where the coefficients lie: static, derived from a `Spec`."""

    names: tuple[str, ...]  # of psi: log scales, log sigmas, then c0
    absorbed: Levels | Block | None
    kept: tuple[Levels, ...]  # levels that enter as one-hot columns
    outcome_columns: tuple[int, ...]  # columns of X, p last if endogenous
    first_columns: tuple[int, ...]
    outcome_sites: tuple[tuple[str, int, int], ...]  # (site, start, stop) in theta
    first_sites: tuple[tuple[str, int, int], ...]
    n_columns: int  # q


class Solution(NamedTuple):
    """theta | psi and the collapsed log-likelihood."""

    log_likelihood: jax.Array  # log p(y, p | psi)
    mean_d: jax.Array  # of the dense coefficients
    cholesky_dd: jax.Array  # lower factor of their precision
    level_precision_cmm: jax.Array  # absorbed units, m = 1 equation or 2
    level_linear_cm: jax.Array
    level_cross_cmd: jax.Array


def layout(spec: Spec) -> Layout:
    """Lays out psi, theta and the columns of the cross products."""
    absorbed = spec.blocks[0] if spec.orthogonal else max(spec.levels, key=lambda level: level.count, default=None)
    kept = tuple(level for level in spec.levels if level is not absorbed)
    width = max((b.stop for b in (*spec.blocks, *((spec.instruments,) if spec.instruments else ()))), default=0)
    start = 1 + width
    hot = {}
    for level in kept:
        hot[level.name] = range(start, start + level.count)
        start += level.count

    def equation(blocks, prefix):
        columns, sites = [0], [(prefix + "intercept", 0, 1)]
        groups = [(b.name, range(1 + b.start, 1 + b.stop)) for b in blocks if b is not absorbed] + list(hot.items())
        for name, span in groups:
            sites.append((prefix + name, len(columns), len(columns) + len(span)))
            columns += span
        return columns, sites

    x, x_sites = equation(spec.blocks, "")
    learned = [b.name for b in spec.blocks if b.sd is None] + [level.name for level in spec.levels]
    names = [f"{name}.scale" for name in learned]
    names += ["sigma"] if FAMILIES[spec.family].has_sigma else []
    z, z_sites = [], []
    if spec.endogenous:
        x_sites.append(("gamma", len(x), len(x) + 1))
        x.append(start)
        z, z_sites = equation(spec.first_blocks, "first.")
        z_sites = [(name, a + len(x), b + len(x)) for name, a, b in z_sites]
        names += [f"first.{name}.scale" for name in learned] + ["first.sigma", "control"]
    return Layout(tuple(names), absorbed, kept, tuple(x), tuple(z), tuple(x_sites), tuple(z_sites), start + 2)


def design_matrix(spec: Spec, rows: Rows, plan: Layout):
    """The columns (n, q) whose cross products the moments are."""
    n = rows.outcome_n.shape[0]
    hot = [jax.nn.one_hot(rows.levels_nc[:, level.column], level.count) for level in plan.kept]
    parts = [jnp.ones((n, 1)), rows.columns_nq, *hot, rows.endogenous_n[:, None], rows.outcome_n[:, None]]
    return jnp.concatenate([jnp.asarray(p, rows.outcome_n.dtype) for p in parts], 1)


def moments(spec: Spec, rows: Rows, response_n=None, information_n=None, constant=None) -> Moments:
    """Cross products of the rows.

    Without further arguments: of a conjugate family. A Newton step passes its
    working response, the information of each row, and the constant that makes the
    surrogate touch the log-likelihood.
    """
    plan = layout(spec)
    matrix_nq = design_matrix(spec, rows, plan)
    weight_n = jnp.asarray(rows.weight_n)
    if response_n is None:
        information_n = rows.precision_n
        constant = 0.5 * jnp.sum(weight_n * (jnp.log(rows.precision_n) - _LOG_2PI))
    else:
        matrix_nq = matrix_nq.at[:, -1].set(response_n)
    outcome_nq, first_nq = matrix_nq * (weight_n * information_n)[:, None], matrix_nq * weight_n[:, None]
    count = plan.absorbed.count if isinstance(plan.absorbed, Levels) else 0
    codes_n = rows.levels_nc[:, plan.absorbed.column] if count else jnp.zeros(len(matrix_nq), int)
    by_level = (
        [jax.ops.segment_sum(m, codes_n, num_segments=count) for m in (outcome_nq, first_nq)]
        if count
        else ([jnp.zeros((0, plan.n_columns))] * 2)
    )
    return Moments(outcome_nq.T @ matrix_nq, first_nq.T @ matrix_nq, *by_level, weight_n.sum(), constant)


def solve(spec: Spec, stats: Moments, psi: dict[str, jax.Array]) -> Solution:
    """Posterior of theta given the scalars, and the collapsed log-likelihood.

    Args:
      stats: cross products of the log.
      psi: scalars by name (`Layout.names`), in natural units.

    With A the precision of (theta, u, v), b its linear term and P0 the prior
    precision: log p = const + (log|P0| - log|A| + b' A^-1 b) / 2.
    """
    plan = layout(spec)
    x, z = np.asarray(plan.outcome_columns, int), np.asarray(plan.first_columns, int)
    p, y = plan.n_columns - 2, plan.n_columns - 1
    sigma, s1, k = _scalars(spec, psi)
    a_o, a_f = 1 / sigma**2, 1 / s1**2
    out, first = stats.outcome_qq, stats.first_qq
    target_q = out[:, y] - k * out[:, p]  # cross products with y - k p

    xz = -k * a_o * out[np.ix_(x, z)]
    zz = k**2 * a_o * out[np.ix_(z, z)] + a_f * first[np.ix_(z, z)]
    precision = jnp.block([[a_o * out[np.ix_(x, x)], xz], [xz.T, zz]])
    linear = jnp.concatenate([a_o * target_q[x], -k * a_o * target_q[z] + a_f * first[z, p]])
    prior_d = _prior_precision(spec, plan, psi)
    precision = precision + jnp.diag(prior_d)

    cross, level, level_b, prior_c = _absorbed(spec, plan, stats, psi, x, z)
    level_cross = _divide(level, cross)  # (c, m, d)
    schur = precision - jnp.einsum("cmd,cme->de", cross, level_cross)
    linear = linear - jnp.einsum("cmd,cm->d", level_cross, level_b)
    chol = jnp.linalg.cholesky(schur)
    mean = cho_solve((chol, True), linear)
    quadratic = linear @ mean + jnp.sum(level_b * _divide(level, level_b[..., None])[..., 0])
    log_det = 2 * jnp.log(jnp.diagonal(chol)).sum() + _log_det(level).sum()
    log_prior = jnp.log(prior_d).sum() + jnp.log(prior_c).sum() * level.shape[0]
    squares = a_o * (out[y, y] - 2 * k * out[y, p] + k**2 * out[p, p]) + a_f * first[p, p] * spec.endogenous
    log_likelihood = stats.constant + 0.5 * (log_prior - log_det + quadratic - squares)
    log_likelihood = log_likelihood - stats.rows * jnp.log(sigma)
    if spec.endogenous:
        log_likelihood = log_likelihood - stats.rows * (jnp.log(s1) + 0.5 * _LOG_2PI)
    return Solution(log_likelihood, mean, chol, level, level_b, cross)


def draw(spec: Spec, solution: Solution, key: jax.Array) -> dict[str, jax.Array]:
    """One draw of every coefficient given psi, by site."""
    key_d, key_c = jax.random.split(key)
    d, (c, m) = solution.mean_d.shape[0], solution.level_linear_cm.shape
    noise_d = jax.random.normal(key_d, (d,), solution.mean_d.dtype)
    noise_cm = jax.random.normal(key_c, (c, m), solution.mean_d.dtype)
    theta_d = solution.mean_d + solve_triangular(solution.cholesky_dd, noise_d, lower=True, trans=1)
    return sites(spec, solution, theta_d, noise_cm)


def sites(spec: Spec, solution: Solution, theta_d, noise_cm) -> dict[str, jax.Array]:
    """Coefficients by site from dense theta, absorbed levels at their conditional (plus noise)."""
    plan = layout(spec)
    found = {name: theta_d[a:b] for name, a, b in (*plan.outcome_sites, *plan.first_sites)}
    for name in ("intercept", "first.intercept", "gamma"):
        if name in found:
            found[name] = found[name][0]
    if plan.absorbed:
        linear_cm = solution.level_linear_cm - jnp.einsum("cmd,d->cm", solution.level_cross_cmd, theta_d)
        mean_cm = _divide(solution.level_precision_cmm, linear_cm[..., None])[..., 0]
        chol = jnp.linalg.cholesky(solution.level_precision_cmm)
        spread = solve_triangular(chol, noise_cm[..., None], lower=True, trans=1)[..., 0]
        found[plan.absorbed.name] = (mean_cm + spread)[:, 0]
        if spec.endogenous:
            found[f"first.{plan.absorbed.name}"] = (mean_cm + spread)[:, 1]
    return found


def log_prior(spec: Spec, raw: jax.Array) -> jax.Array:
    """Log prior density of the unconstrained scalars: HalfNormal(1) on exp, N(0, control_sd) on c0."""
    names = layout(spec).names
    scales = raw[: len(names) - spec.endogenous]
    total = jnp.sum(-0.5 * jnp.exp(2 * scales) + scales)
    if spec.endogenous:
        total = total - 0.5 * (raw[-1] / spec.control_sd) ** 2
    return total


def constrain(spec: Spec, raw: jax.Array) -> dict[str, jax.Array]:
    """Unconstrained scalars to natural units, by name."""
    return {name: raw[i] if name == "control" else jnp.exp(raw[i]) for i, name in enumerate(layout(spec).names)}


def _scalars(spec: Spec, psi):
    sigma = psi.get("sigma", jnp.ones(()))
    if not spec.endogenous:
        return sigma, jnp.ones(()), jnp.zeros(())
    return sigma, psi["first.sigma"], psi["control"] / psi["first.sigma"]


def _prior_precision(spec: Spec, plan: Layout, psi):
    fixed = {b.name: b.sd for b in (*spec.blocks, *((spec.instruments,) if spec.instruments else ())) if b.sd}
    fixed |= {"intercept": 1.0, "gamma": spec.gamma_sd}
    pieces = []
    for site, start, stop in (*plan.outcome_sites, *plan.first_sites):
        sd = fixed.get(site.removeprefix("first."))
        pieces.append(jnp.full(stop - start, (psi[f"{site}.scale"] if sd is None else sd) ** -2.0))
    return jnp.concatenate(pieces)


def _absorbed(spec: Spec, plan: Layout, stats: Moments, psi, x, z):
    """The absorbed units' part of (A, b): per unit one unknown, or two with a first stage."""
    p, y = plan.n_columns - 2, plan.n_columns - 1
    sigma, s1, k = _scalars(spec, psi)
    a_o, a_f, m = 1 / sigma**2, 1 / s1**2, 1 + spec.endogenous
    out, first = stats.outcome_cq, stats.first_cq
    own_o, own_f = out[:, 0], first[:, 0]
    if spec.orthogonal:
        units = np.arange(1 + plan.absorbed.start, 1 + plan.absorbed.stop)
        out, first = stats.outcome_qq[units], stats.first_qq[units]
        own_o, own_f = stats.outcome_qq[units, units], stats.first_qq[units, units]
    target_c = out[:, y] - k * out[:, p]
    u_cross = jnp.concatenate([a_o * out[:, x], -k * a_o * out[:, z]], 1)
    v_cross = jnp.concatenate([-k * a_o * out[:, x], k**2 * a_o * out[:, z] + a_f * first[:, z]], 1)
    cross = jnp.stack([u_cross, v_cross][:m], 1)
    level_b = jnp.stack([a_o * target_c, -k * a_o * target_c + a_f * first[:, p]][:m], 1)
    names = [plan.absorbed.name, f"first.{plan.absorbed.name}"][:m] if plan.absorbed else []
    prior = jnp.stack([psi[f"{name}.scale"] ** -2.0 for name in names]) if names else jnp.ones(m)
    uu, uv = a_o * own_o, -k * a_o * own_o
    vv = k**2 * a_o * own_o + a_f * own_f
    level = jnp.stack([jnp.stack([uu, uv], -1), jnp.stack([uv, vv], -1)], -2)[:, :m, :m] + jnp.diag(prior)[None]
    return cross, level, level_b, prior


def _divide(level_cmm, right_cmk):
    """level^-1 right for positive definite systems of one or two unknowns, in closed form."""
    a, first = level_cmm[:, :1, :1], right_cmk[:, :1]
    if level_cmm.shape[-1] == 1:
        return first / a
    b, d = level_cmm[:, :1, 1:], level_cmm[:, 1:, 1:]
    lower = (right_cmk[:, 1:] - b / a * first) / (d - b**2 / a)
    return jnp.concatenate([(first - b * lower) / a, lower], 1)


def _log_det(level_cmm):
    a = level_cmm[:, 0, 0]
    if level_cmm.shape[-1] == 1:
        return jnp.log(a)
    return jnp.log(a) + jnp.log(level_cmm[:, 1, 1] - level_cmm[:, 0, 1] ** 2 / a)
