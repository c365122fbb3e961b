"""Exact and Laplace fits: coefficients in closed form, a few scalars integrated.

For the normal family theta | psi is Gaussian, so the only thing left to integrate
is the collapsed posterior of psi (two to eight scalars). Elsewhere theta | psi is
replaced by its Laplace approximation, found by Newton steps (as in Rue, Martino
and Chopin 2009). Either way psi is integrated by importance sampling: a two-sided
Student-t at the mode (`proposal`), with the Pareto k of the weights as the
convergence check. fp64 inside the call only.

Fixed effects are projected out and wide features rotated to be orthogonal first,
once (`compress`): then each psi costs a factorisation as large as the other terms.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from deconfound_jax.causal import compress, conditional, proposal
from deconfound_jax.causal.diagnostics import PARETO_LIMIT, pareto_k
from deconfound_jax.causal.families import FAMILIES
from deconfound_jax.causal.scalars import constrain, gammas, log_prior, scalars, start
from deconfound_jax.causal.spec import Equation, Rows, Spec, doubled

NEWTON_STEPS = 40  # at most; from a near start four are enough
_NEWTON_TOLERANCE = 1e-8  # of eta, in the link's units
_FAR = 0.3  # of eta: after a larger step the next one is taken with a curvature that does not overshoot
_CHUNK = 64  # proposals of one compiled call, whatever their number: one compilation
_ROUNDS = 4  # of the proposal, at most: it is refitted to its own draws until the weights behave
_GRADIENT = 0.05  # at the mode, per unit of psi: the mode only centres the proposal


def fit_nested(spec: Spec, rows: Rows, draws: int, seed: int) -> tuple[dict[str, np.ndarray], dict]:
    """Draws from the posterior of every site.

    Args:
      spec, rows: from `terms.prepare`.
      draws: posterior draws to return.
      seed: of the proposal and the draws.

    Returns:
      Sites with draws first, and diagnostics: pareto_k, effective_draws, mode_gradient, newton_step, converged.
    """
    with jax.enable_x64(True):
        rows = doubled(rows)
        if FAMILIES[spec.family].conjugate:
            return fit_moments(spec, _moments(spec, rows), draws, seed)
        found, diagnostics, data = _integrate(
            spec, Working(rows, jnp.zeros_like(rows.outcome_n), jnp.zeros(())), rows.weight_n.shape[0], draws, seed
        )
    still = float(data.moved) < 1e-3
    diagnostics["converged"] &= still
    return found, {**diagnostics, "newton_step": float(data.moved)}


def fit_moments(spec: Spec, stats: conditional.Moments, draws: int, seed: int) -> tuple[dict[str, np.ndarray], dict]:
    """The same for a conjugate family from its cross products alone: what a stream of batches leaves behind."""
    with jax.enable_x64(True):
        small, stats, dropped = compress.project(spec, stats)
        small, stats, rotation_dd = compress.rotate(small, stats, dropped is not None)
        stats = conditional.Moments(*[jnp.asarray(value, float) for value in stats])
        found, diagnostics, _ = _integrate(small, stats, float(stats.rows), draws, seed, rotation_dd)
    if rotation_dd is not None:
        found |= {n: found[n] @ rotation_dd.T for n in ["text", *(f"{e.prefix}text" for e in spec.equations)]}
    if dropped is not None:
        found |= compress.restore(dropped, found, seed)
    return found, {**diagnostics, "newton_step": 0.0}


def _integrate(spec: Spec, data, rows: float, draws: int, seed: int, rotation_dd=None):
    """Draws of every site with psi integrated out, diagnostics, and the data at the mode."""
    mode, covariance, gradient, data = _mode(spec, data)
    psi, weights, k = _importance(spec, data, mode, covariance, draws, seed)
    pick = _resample(weights, draws, seed)
    keys = jax.random.split(jax.random.key(seed), draws)
    found = jax.tree.map(np.asarray, _draw_all(spec, data, jnp.asarray(psi[pick]), keys, rotation_dd))
    diagnostics = {"pareto_k": k, "effective_draws": float(1 / np.sum(weights**2)), "mode_gradient": gradient}
    still = gradient < 1e-2 * max(1.0, rows**0.5)
    return found, {**diagnostics, "converged": bool(k <= PARETO_LIMIT and still)}, data


class Working(NamedTuple):
    """Rows of a family without closed form, and where Newton's steps on theta start."""

    rows: Rows
    eta_n: jax.Array
    moved: jax.Array  # (): the last step's size, 0 where the steps have converged


def newton(spec: Spec, rows: Rows, raw: jax.Array, eta_n: jax.Array, steps: int = NEWTON_STEPS) -> jax.Array:
    """Fitted eta (n,) at the mode of theta | psi: Newton steps until none moves, `steps` at most."""

    def unfinished(carry):
        i, _, moved = carry
        return (i < steps) & (moved > _NEWTON_TOLERANCE)

    def step(carry):
        i, eta_n, moved = carry
        new_n = newton_step(spec, rows, raw, eta_n, moved > _FAR)
        return i + 1, new_n, jnp.abs(new_n - eta_n).max()

    return jax.lax.while_loop(unfinished, step, (0, eta_n, jnp.full((), jnp.inf, eta_n.dtype)))[1]


def newton_step(spec: Spec, rows: Rows, raw: jax.Array, eta_n: jax.Array, far=False) -> jax.Array:
    """One step, bounded so that it cannot overshoot to rate 0 or 1; `far` from the mode by the family's `ascent`."""
    psi = constrain(spec, raw)
    solution = conditional.solve(spec, surrogate(spec, rows, eta_n, psi, far), psi)
    found = conditional.sites(spec, solution, solution.mean_d, jnp.zeros_like(solution.level_linear_um))
    return eta_n + jnp.clip(linear_predictor(spec, rows, found | psi) - eta_n, -4.0, 4.0)


def surrogate(spec: Spec, rows: Rows, eta_n: jax.Array, psi, far=False) -> conditional.Moments:
    """Cross products of the quadratic that touches the log-likelihood at eta."""
    family = FAMILIES[spec.family]
    first_n, information_n = family.curvature(eta_n, rows, psi)
    information_n = jnp.where(far, family.ascent(eta_n, rows, psi, information_n), information_n)
    log_prob_n = family.distribution(eta_n, rows, psi).log_prob(rows.outcome_n)
    constant = jnp.sum(rows.weight_n * (log_prob_n + 0.5 * first_n**2 / information_n))
    return conditional.moments(spec, rows, eta_n + first_n / information_n, information_n, constant)


def linear_predictor(spec: Spec, rows: Rows, found) -> jax.Array:
    """eta (n,) of the outcome at one value of every site, psi among them."""
    errors = []
    for equation, value_n in zip((*spec.equations, None), (*rows.endogenous_nm.T, None), strict=True):
        mean_n = exogenous(spec, rows, found, equation)
        prefix = equation.prefix if equation else ""
        for i, name in gammas(spec, equation):
            mean_n = mean_n + found[name] * rows.endogenous_nm[:, i]
        for before, error_n in zip(spec.equations, errors, strict=False):
            mean_n = mean_n + found[f"{prefix}control{before.suffix}"] * error_n
        if equation:
            errors.append((value_n - mean_n) / found[f"{prefix}sigma"])
    return mean_n


def exogenous(spec: Spec, rows: Rows, found, equation: Equation | None) -> jax.Array:
    """Sum of one equation's exogenous effects (n,)."""
    prefix = equation.prefix if equation else ""
    total_n = found[f"{prefix}intercept"] * jnp.ones(rows.columns_nq.shape[0])
    for block in spec.blocks_of(equation):
        total_n = total_n + rows.columns_nq[:, block.start : block.stop] @ found[prefix + block.name]
    for level in spec.levels:
        total_n = total_n + found[prefix + level.name][rows.levels_nc[:, level.column]]
    return total_n


_moments = jax.jit(conditional.moments, static_argnums=0)


def _stats(spec: Spec, data, raw):
    """Moments at psi (the log's own, or the surrogate's after Newton steps), and `data` to start from next.

    Only a last Newton step is differentiated: at the mode the derivative with
    respect to the step's start vanishes, so the gradient is right.
    """
    if isinstance(data, conditional.Moments):
        return data, data
    raw_fixed, start_n = jax.lax.stop_gradient((raw, data.eta_n))
    eta_n = jax.lax.stop_gradient(newton(spec, data.rows, raw_fixed, start_n))
    last_n = newton_step(spec, data.rows, raw, eta_n)
    near = jax.lax.stop_gradient(Working(data.rows, last_n, jnp.abs(last_n - eta_n).max()))
    return surrogate(spec, data.rows, last_n, constrain(spec, raw)), near


def _negative_log_posterior(spec: Spec, data, raw):
    stats, data = _stats(spec, data, raw)
    solution = conditional.solve(spec, stats, constrain(spec, raw))
    value = solution.log_likelihood + log_prior(spec, raw)
    return jnp.where(jnp.isfinite(value), -value, 1e12), data


_value_and_gradient = jax.jit(jax.value_and_grad(_negative_log_posterior, argnums=2, has_aux=True), static_argnums=0)


@partial(jax.jit, static_argnums=0)
def _log_posteriors(spec: Spec, data, raw_mk):
    return jax.lax.map(lambda raw: -_negative_log_posterior(spec, data, raw)[0], raw_mk)


@partial(jax.jit, static_argnums=0)
def _draw_all(spec: Spec, data, raw_sk, keys, rotation_dd):
    def one(pair):
        raw, key = pair
        psi = constrain(spec, raw)
        solution = conditional.solve(spec, _stats(spec, data, raw)[0], psi)
        return psi | conditional.draw(spec, solution, key, rotation_dd)

    return jax.lax.map(one, (raw_sk, keys))


def _mode(spec: Spec, data):
    """Mode of psi, its covariance by differences of the gradient, the gradient's size there, and a near start."""
    begin, n = np.asarray(start(spec)), len(scalars(spec))
    if not n:  # every scale is fixed: nothing to search
        return begin, np.zeros((0, 0)), 0.0, _stats(spec, data, jnp.asarray(begin))[1]
    bounds = [(-9.0, 4.0) if s.positive else (None, None) for s in scalars(spec)]

    def value_and_gradient(raw):
        nonlocal data
        (value, near), gradient = _value_and_gradient(spec, data, jnp.asarray(raw))
        if np.isfinite(gradient).all():
            data = near
        return float(value), np.asarray(gradient)

    # The value grows with the rows: a relative tolerance on it would stop far from the mode of a million.
    found = scipy.optimize.minimize(
        value_and_gradient, begin, jac=True, method="L-BFGS-B", bounds=bounds, options={"gtol": _GRADIENT, "ftol": 0.0}
    )
    step = 1e-3
    columns = []
    for i in range(n):
        shift = np.eye(n)[i] * step
        columns.append((value_and_gradient(found.x + shift)[1] - value_and_gradient(found.x - shift)[1]) / (2 * step))
    hessian = np.stack(columns)
    values, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
    covariance = (vectors / np.clip(values, 0.05, None)[None, :]) @ vectors.T
    return found.x, covariance, float(np.abs(found.jac).max()), data


def _importance(spec: Spec, data, mode, covariance, draws, seed):
    """Weighted draws of psi from a two-sided t around its mode, and the Pareto k of their weights."""

    if not len(mode):
        return np.zeros((draws, 0)), np.full(draws, 1 / draws), float("-inf")

    def log_density(raw_md):
        padded = np.concatenate([raw_md, np.repeat(raw_md[:1], -len(raw_md) % _CHUNK, axis=0)])
        values = [_log_posteriors(spec, data, jnp.asarray(chunk)) for chunk in padded.reshape(-1, _CHUNK, len(mode))]
        return np.concatenate(values)[: len(raw_md)]

    # A proposal of a closed form is cheap: weigh twice as many as are kept.
    size = max((2 if isinstance(data, conditional.Moments) else 1) * draws, 4 * _CHUNK)
    rng = np.random.default_rng(seed)
    for attempt in range(_ROUNDS):
        around = proposal.widened(proposal.at_mode(mode, covariance), log_density)
        raw, log_proposal = proposal.draw(around, size, rng)
        log_weight = log_density(raw) - log_proposal
        weights = np.exp(log_weight - log_weight.max())
        weights, k = weights / weights.sum(), pareto_k(log_weight)
        if attempt and k < PARETO_LIMIT - 0.1:
            break
        if 1 / np.sum(weights**2) > 8 * len(mode):  # enough to learn from how psi's parts move together
            centred = raw - mode[None, :]
            covariance = (centred * weights[:, None]).T @ centred + 1e-8 * np.eye(len(mode))
    return raw, weights, k


def _resample(weights, draws: int, seed: int) -> np.ndarray:
    """Indices (draws,) in proportion to the weights, with the least noise that allows (systematic), in random order."""
    rng = np.random.default_rng([seed, 1])
    points = (rng.uniform() + np.arange(draws)) / draws
    pick = np.searchsorted(np.cumsum(weights), points).clip(max=len(weights) - 1)
    return rng.permutation(pick)
