"""The model given its scalars: a linear Gaussian system, solved in closed form.

Variables v_1..v_m are explained before the outcome y. Given psi, the errors of all
of them are L e, e ~ N(0, I), L lower triangular, and every equation is linear in
its coefficients:

    v_k = Z_k theta_k                      + (L e)_k
    y   = X theta_x + sum_k gamma_k v_k    + (L e)_y,  e_y over sqrt(precision of the row)

With M = L^-1, the rows' quadratic form has weights

    first_ij = sum_{k < y} M_ki M_kj,   outcome_ij = M_yi M_yj

between equations i and j, so theta | psi is Gaussian and p(y, v | psi) is its
normalising constant. Both need the rows only through cross products, `Moments`,
which add up over batches of rows: that is what a compiled step can keep up to date
exactly. The category with the most levels never enters a matrix: it is absorbed by
a Schur complement. So are the text's columns where the rows came rotated to make
them orthogonal (`Spec.orthogonal`): each direction is then a system of its own, as
each level is.

Arrays: q columns of the cross products are [1, Rows.columns, one-hot levels that
are not absorbed, v_1..v_m, y]. u units are absorbed, m + 1 unknowns each, the
outcome's first.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve, solve_triangular

from deconfound_jax.causal.scalars import error_factor, gammas, sd_of
from deconfound_jax.causal.scalars import scalars as scalars_of
from deconfound_jax.causal.solves import dense_terms, divide, log_det
from deconfound_jax.causal.spec import FLAT_SD, Block, Equation, Levels, Rows, Spec

_LOG_2PI = float(np.log(2 * np.pi))


class Moments(NamedTuple):
    """Cross products over rows; the sum of two batches' moments is that of both."""

    outcome_qq: jax.Array  # weighted by the outcome's precision
    first_qq: jax.Array  # weighted by the rows' weights alone
    outcome_cq: jax.Array  # the same, summed within each absorbed level
    first_cq: jax.Array
    rows: jax.Array  # (): sum of weights
    constant: jax.Array  # (): log-likelihood terms free of psi and theta


class Part(NamedTuple):
    """One equation's place: its columns of the cross products, its sites in theta, its variable's column."""

    equation: Equation | None  # None: the outcome's
    columns: np.ndarray
    sites: tuple[tuple[str, int, int], ...]  # (site, start, stop) in theta
    target: int


class Layout(NamedTuple):
    """Where the coefficients lie: static, derived from a `Spec`."""

    names: tuple[str, ...]  # of psi
    absorbed: Levels | Block | None
    kept: tuple[Levels, ...]  # levels that enter as one-hot columns
    parts: tuple[Part, ...]  # the outcome's first
    n_columns: int  # q

    @property
    def sites(self) -> tuple[tuple[str, int, int], ...]:
        return tuple(site for part in self.parts for site in part.sites)


class Solution(NamedTuple):
    """theta | psi and the collapsed log-likelihood."""

    log_likelihood: jax.Array  # log p(y, v | psi)
    mean_d: jax.Array  # of the dense coefficients
    cholesky_dd: jax.Array  # lower factor of their precision
    level_precision_umm: jax.Array  # absorbed units, one unknown an equation
    level_linear_um: jax.Array
    level_cross_umd: jax.Array


def layout(spec: Spec) -> Layout:
    """Lays out psi, theta and the columns of the cross products."""
    absorbed = spec.blocks[0] if spec.orthogonal else max(spec.levels, key=lambda level: level.count, default=None)
    kept = tuple(level for level in spec.levels if level is not absorbed)
    start = 1 + max(b.stop for b in spec.first_blocks)
    hot = {}
    for level in kept:
        hot[level.name] = range(start, start + level.count)
        start += level.count
    parts, at = [], 0
    for equation in (None, *spec.equations):
        prefix = equation.prefix if equation else ""
        groups = [(prefix + "intercept", range(1))]
        groups += [
            (prefix + b.name, range(1 + b.start, 1 + b.stop)) for b in spec.blocks_of(equation) if b is not absorbed
        ]
        groups += [(prefix + name, span) for name, span in hot.items()]
        groups += [(name, range(start + i, start + i + 1)) for i, name in gammas(spec, equation)]
        columns, sites = [], []
        for name, span in groups:
            sites.append((name, at, at + len(span)))
            columns, at = columns + [*span], at + len(span)
        target = start + (spec.equations.index(equation) if equation else len(spec.equations))
        parts.append(Part(equation, np.asarray(columns, int), tuple(sites), target))
    names = tuple(s.name for s in scalars_of(spec))
    return Layout(names, absorbed, kept, tuple(parts), start + len(spec.equations) + 1)


def design_matrix(spec: Spec, rows: Rows, plan: Layout):
    """The columns (n, q) whose cross products the moments are."""
    n = rows.outcome_n.shape[0]
    hot = [jax.nn.one_hot(rows.levels_nc[:, level.column], level.count) for level in plan.kept]
    parts = [jnp.ones((n, 1)), rows.columns_nq, *hot, rows.endogenous_nm, rows.outcome_n[:, None]]
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

    With A the precision of (theta, absorbed units), b its linear term and P0 the prior
    precision: log p = const + (log|P0| - log|A| + b' A^-1 b) / 2.
    """
    plan = layout(spec)
    out, first = stats.outcome_qq, stats.first_qq
    factor = error_factor(spec, psi)
    a_first, a_out = _equation_weights(factor)
    parts = plan.parts

    def weighted(i, j, rows, columns):
        return a_first[i, j] * first[rows, columns] + a_out[i, j] * out[rows, columns]

    k = range(len(parts))
    precision = jnp.block([[weighted(i, j, *np.ix_(parts[i].columns, parts[j].columns)) for j in k] for i in k])
    linear = jnp.concatenate([sum(weighted(i, j, parts[i].columns, parts[j].target) for j in k) for i in k])
    squares = sum(weighted(i, j, parts[i].target, parts[j].target) for j in k for i in k)
    prior_d = _prior_precision(spec, plan, psi)
    precision = precision + jnp.diag(prior_d)

    cross, level, level_b, prior_m = _absorbed(spec, plan, stats, psi, a_first, a_out)
    level_cross = divide(level, cross)  # (u, m, d)
    schur = precision - jnp.einsum("umd,ume->de", cross, level_cross)
    linear = linear - jnp.einsum("umd,um->d", level_cross, level_b)
    chol = jnp.linalg.cholesky(schur)
    mean = cho_solve((chol, True), linear)
    quadratic, dense_log_det = dense_terms(schur, linear, chol, mean)
    quadratic = quadratic + jnp.sum(level_b * divide(level, level_b[..., None])[..., 0])
    both_log_det = dense_log_det + log_det(level).sum()
    log_prior = jnp.log(prior_d).sum() + jnp.log(prior_m).sum() * level.shape[0]
    log_likelihood = stats.constant + 0.5 * (log_prior - both_log_det + quadratic - squares)
    log_likelihood = log_likelihood - stats.rows * jnp.log(jnp.diagonal(factor)).sum()
    log_likelihood = log_likelihood - stats.rows * len(spec.equations) * 0.5 * _LOG_2PI
    return Solution(log_likelihood, mean, chol, level, level_b, cross)


def draw(spec: Spec, solution: Solution, key: jax.Array, rotation_dd=None) -> dict[str, jax.Array]:
    """One draw of every coefficient given psi, by site; with the text's rotation, whichever eigenbasis it is."""
    key_d, key_u = jax.random.split(key)
    noise_d = jax.random.normal(key_d, solution.mean_d.shape, solution.mean_d.dtype)
    noise_um = jax.random.normal(key_u, solution.level_linear_um.shape, solution.mean_d.dtype)
    if rotation_dd is not None:
        noise_um = rotation_dd.T @ noise_um
    theta_d = solution.mean_d + solve_triangular(solution.cholesky_dd, noise_d, lower=True, trans=1)
    return sites(spec, solution, theta_d, noise_um)


def sites(spec: Spec, solution: Solution, theta_d, noise_um) -> dict[str, jax.Array]:
    """Coefficients by site from dense theta, absorbed units at their conditional (plus noise)."""
    plan = layout(spec)
    single = {name for e in (None, *spec.equations) for _, name in gammas(spec, e)}
    single |= {f"{part.equation.prefix if part.equation else ''}intercept" for part in plan.parts}
    found = {name: theta_d[a] if name in single else theta_d[a:b] for name, a, b in plan.sites}
    if plan.absorbed:
        linear_um = solution.level_linear_um - jnp.einsum("umd,d->um", solution.level_cross_umd, theta_d)
        mean_um = divide(solution.level_precision_umm, linear_um[..., None])[..., 0]
        chol = jnp.linalg.cholesky(solution.level_precision_umm)
        spread = solve_triangular(chol, noise_um[..., None], lower=True, trans=1)[..., 0]
        for i, equation in enumerate((None, *spec.equations)):
            prefix = equation.prefix if equation else ""
            found[prefix + plan.absorbed.name] = (mean_um + spread)[:, i]
    return found


def _equation_weights(factor):
    """first_ij and outcome_ij of the module's docstring, the outcome's row and column first."""
    inverse = solve_triangular(factor, jnp.eye(factor.shape[0], dtype=factor.dtype), lower=True)
    inverse = jnp.roll(inverse, 1, axis=1)  # columns: outcome, then the variables before it
    return inverse[:-1].T @ inverse[:-1], jnp.outer(inverse[-1], inverse[-1])


def _prior_precision(spec: Spec, plan: Layout, psi):
    fixed = {name: spec.gamma_sd for e in (None, *spec.equations) for _, name in gammas(spec, e)}
    levels = {level.name: level for level in spec.levels}
    pieces = []
    for part in plan.parts:
        prefix = part.equation.prefix if part.equation else ""
        blocks = {b.name: b for b in spec.blocks_of(part.equation)}
        for site, start, stop in part.sites:
            name = site.removeprefix(prefix)
            if name in blocks:
                sd = sd_of(psi, prefix, blocks[name])
            elif name in levels:
                sd = FLAT_SD if levels[name].absorbed else psi[f"{site}.scale"]
            else:
                sd = fixed.get(site, 1.0)  # an intercept
            pieces.append(jnp.broadcast_to(jnp.asarray(sd) ** -2.0, (stop - start,)))
    return jnp.concatenate(pieces)


def _absorbed(spec: Spec, plan: Layout, stats: Moments, psi, a_first, a_out):
    """The absorbed units' part of (A, b): one unknown an equation."""
    out, first = stats.outcome_cq, stats.first_cq
    own_out, own_first = out[:, 0], first[:, 0]
    if spec.orthogonal:
        units = np.arange(1 + plan.absorbed.start, 1 + plan.absorbed.stop)
        out, first = stats.outcome_qq[units], stats.first_qq[units]
        own_out, own_first = stats.outcome_qq[units, units], stats.first_qq[units, units]
    k = range(len(plan.parts))

    def weighted(i, j, columns):
        return a_first[i, j] * first[:, columns] + a_out[i, j] * out[:, columns]

    cross = jnp.stack([jnp.concatenate([weighted(i, j, plan.parts[j].columns) for j in k], 1) for i in k], 1)
    level_b = jnp.stack([sum(weighted(i, j, plan.parts[j].target) for j in k) for i in k], 1)
    level = own_first[:, None, None] * a_first[None] + own_out[:, None, None] * a_out[None]
    return cross, level + jnp.diag(_unit_prior(spec, plan, psi))[None], level_b, _unit_prior(spec, plan, psi)


def _unit_prior(spec: Spec, plan: Layout, psi):
    """Prior precision (m + 1,) of an absorbed unit's unknowns."""
    unit = plan.absorbed
    if unit is None:
        return jnp.ones(len(plan.parts))
    prefixes = [part.equation.prefix if part.equation else "" for part in plan.parts]
    if isinstance(unit, Levels):
        sds = [FLAT_SD if unit.absorbed else psi[f"{prefix}{unit.name}.scale"] for prefix in prefixes]
    else:
        sds = [sd_of(psi, prefix, unit) for prefix in prefixes]
    return jnp.stack([jnp.asarray(sd, float) ** -2.0 for sd in sds])
