"""Many data sets of one shape at once, drawn and fitted: simulation studies and calibration.

The fit is the nested one: every function of psi is `nested`'s own, vmapped over the data sets; what `nested` does
in numpy for one (a search for the mode, importance sampling around it) is done here
on the batch. One compilation serves a spec, and the data sets' sums fill the machine.

Arrays: b data sets, k scalars psi, m proposals of a round, s draws.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.handlers import seed as seeded
from numpyro.handlers import trace

from deconfound_jax.causal import conditional, nested, proposal
from deconfound_jax.causal.diagnostics import PARETO_LIMIT, pareto_k
from deconfound_jax.causal.families import FAMILIES
from deconfound_jax.causal.model import causal_model
from deconfound_jax.causal.scalars import scalars, start
from deconfound_jax.causal.spec import Rows, Spec, doubled

_MODE_STEPS = 100  # of the search for the mode, at most
_DIFFERENCE = 1e-3  # of psi, for the gradient's differences


def fit_batched(spec: Spec, rows: Rows, draws: int, seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Draws from the posterior of every site of b data sets: `nested.fit_nested`, vmapped.

    Args:
      spec: of every data set.
      rows: their rows, every field with the data sets first: (b, n, ...), offset (b,).
      draws: posterior draws to return.
      seed: of the proposals and the draws.

    Returns:
      Sites (b, draws, ...), and the diagnostics of `fit_nested`, (b,) each.

    Example:
      >>> found, diagnostics = fit_batched(spec, stack(rows_of_each), draws=256, seed=0)
      >>> mean_b = found["gamma"].mean(1)
    """
    with jax.enable_x64(True):
        rows = doubled(rows)
        if FAMILIES[spec.family].conjugate:
            data = _moments(spec, rows)
        else:
            data = nested.Working(rows, jnp.zeros_like(rows.outcome_n), jnp.zeros(len(rows.outcome_n)))
        mode_bk, covariance_bkk, gradient_b, data = _modes(spec, data)
        psi_bmk, weight_bm, pareto_b = _importance(spec, data, mode_bk, covariance_bkk, draws, seed)
        pick_bs = np.stack([nested._resample(weight_m, draws, seed + i) for i, weight_m in enumerate(weight_bm)])
        keys_bs = jax.random.split(jax.random.key(seed), pick_bs.shape)
        psi_bsk = np.take_along_axis(psi_bmk, pick_bs[:, :, None], 1)
        found = jax.tree.map(np.asarray, _draw_all(spec, data, jnp.asarray(psi_bsk), keys_bs))
        moved_b = np.zeros(len(mode_bk)) if isinstance(data, conditional.Moments) else np.asarray(data.moved)
    still_b = (moved_b < 1e-3) & (gradient_b < 1e-2 * max(1.0, float(rows.weight_n.shape[1]) ** 0.5))
    diagnostics = {"pareto_k": pareto_b, "effective_draws": 1 / (weight_bm**2).sum(1), "mode_gradient": gradient_b}
    return found, {**diagnostics, "newton_step": moved_b, "converged": still_b & (pareto_b <= PARETO_LIMIT)}


def simulate_batched(spec: Spec, rows: Rows, seed: int) -> dict[str, np.ndarray]:
    """Every site of `causal_model` (b, ...), outcome and endogenous variables too, drawn from the prior.

    Args:
      spec: of every data set.
      rows: their columns, the data sets first; outcomes and endogenous variables are not read.
      seed: of the truths and the data.
    """
    with jax.enable_x64(True):
        keys_b = jax.random.split(jax.random.key(seed), len(rows.outcome_n))
        return jax.tree.map(np.asarray, _simulate(spec, Rows(*map(jnp.asarray, rows)), keys_b))


def stack(rows: list[Rows]) -> Rows:
    """Rows of several data sets of one shape, the data sets first."""
    return Rows(*[np.stack([np.asarray(field) for field in fields]) for fields in zip(*rows, strict=True)])


_moments = jax.jit(lambda spec, rows: jax.vmap(partial(conditional.moments, spec))(rows), static_argnums=0)


@partial(jax.jit, static_argnums=0)
def _values_and_gradients(spec: Spec, data, raw_bk):
    return jax.vmap(partial(nested._value_and_gradient, spec))(data, raw_bk)


@partial(jax.jit, static_argnums=0)
def _log_posteriors(spec: Spec, data, raw_bmk):
    return jax.vmap(partial(nested._log_posteriors, spec))(data, raw_bmk)


@partial(jax.jit, static_argnums=0)
def _draw_all(spec: Spec, data, raw_bsk, keys_bs):
    return jax.vmap(lambda *each: nested._draw_all(spec, *each, None))(data, raw_bsk, keys_bs)


@partial(jax.jit, static_argnums=0)
def _simulate(spec: Spec, rows: Rows, keys_b):
    def one(rows, key):
        sites = trace(seeded(causal_model, key)).get_trace(spec, rows)
        return {name: site["value"] for name, site in sites.items() if site["type"] in ("sample", "deterministic")}

    return jax.vmap(one)(rows, keys_b)


def _modes(spec: Spec, data):
    """Modes (b, k) by damped BFGS, covariances by differences of the gradient, gradients there, and near starts."""
    positive_k = np.array([s.positive for s in scalars(spec)])
    low_k, high_k = np.where(positive_k, -9.0, -np.inf), np.where(positive_k, 4.0, np.inf)

    def evaluate(raw_bk):
        nonlocal data
        (value_b, near), gradient_bk = _values_and_gradients(spec, data, jnp.asarray(raw_bk))
        value_b, gradient_bk = np.asarray(value_b), np.asarray(gradient_bk)
        fine_b = np.isfinite(gradient_bk).all(1)
        if isinstance(data, nested.Working):
            data = data._replace(
                eta_n=jnp.where(fine_b[:, None], near.eta_n, data.eta_n),
                moved=jnp.where(fine_b, near.moved, data.moved),
            )
        return np.where(fine_b, value_b, np.inf), np.where(fine_b[:, None], gradient_bk, 0.0)

    count = next(iter(jax.tree.leaves(data))).shape[0]
    mode_bk = np.tile(np.asarray(start(spec), float), (count, 1))
    state = mode_bk, *evaluate(mode_bk), np.tile(np.eye(len(positive_k)), (count, 1, 1)), np.zeros(count)
    for _ in range(_MODE_STEPS):
        if (np.abs(state[2]).max(1) <= nested._GRADIENT).all():
            break
        state = _bfgs_step(state, evaluate, low_k, high_k)
    mode_bk, _, gradient_bk = state[:3]
    shifts = np.eye(len(positive_k)) * _DIFFERENCE
    columns = [(evaluate(mode_bk + s[None])[1] - evaluate(mode_bk - s[None])[1]) / (2 * _DIFFERENCE) for s in shifts]
    evaluate(mode_bk)  # leaves the near starts at the mode
    hessian_bkk = np.stack(columns, 1)
    values_bk, vectors_bkk = np.linalg.eigh((hessian_bkk + hessian_bkk.swapaxes(1, 2)) / 2)
    covariance_bkk = (vectors_bkk / np.clip(values_bk, 0.05, None)[:, None, :]) @ vectors_bkk.swapaxes(1, 2)
    return mode_bk, covariance_bkk, np.abs(gradient_bk).max(1), data


def _bfgs_step(state, evaluate, low_k, high_k):
    """One step of every data set; one that would not descend is shortened next time, and a finished search stays."""
    at_bk, value_b, gradient_bk, inverse_bkk, halvings_b = state
    step_bk = -np.einsum("bij,bj->bi", inverse_bkk, gradient_bk)
    length_b = 0.5**halvings_b * np.minimum(1.0, 1.0 / np.maximum(np.abs(step_bk).max(1), 1e-300))
    trial_bk = np.clip(at_bk + length_b[:, None] * step_bk, low_k[None], high_k[None])
    trial_bk = np.where((np.abs(gradient_bk).max(1) > nested._GRADIENT)[:, None], trial_bk, at_bk)
    new_b, new_bk = evaluate(trial_bk)
    s_bk, y_bk = trial_bk - at_bk, new_bk - gradient_bk
    down_b = new_b <= value_b + 1e-4 * (s_bk * gradient_bk).sum(1) + 1e-9
    curved_b = down_b & ((s_bk * y_bk).sum(1) > 1e-10)
    rho_b = 1 / np.where(curved_b, (s_bk * y_bk).sum(1), 1.0)
    left_bkk = np.eye(at_bk.shape[1])[None] - rho_b[:, None, None] * s_bk[:, :, None] * y_bk[:, None, :]
    updated_bkk = left_bkk @ inverse_bkk @ left_bkk.swapaxes(1, 2)
    updated_bkk = updated_bkk + rho_b[:, None, None] * s_bk[:, :, None] * s_bk[:, None, :]
    inverse_bkk = np.where(curved_b[:, None, None], updated_bkk, inverse_bkk)
    stuck_b = halvings_b > 8  # the metric is wrong: begin again from the gradient
    inverse_bkk = np.where(stuck_b[:, None, None], np.eye(at_bk.shape[1])[None], inverse_bkk)
    keep = down_b[:, None]
    halvings_b = np.where(down_b | stuck_b, 0, halvings_b + 1)
    gradient_bk = np.where(keep, new_bk, gradient_bk)
    return np.where(keep, trial_bk, at_bk), np.where(down_b, new_b, value_b), gradient_bk, inverse_bkk, halvings_b


def _importance(spec: Spec, data, mode_bk, covariance_bkk, draws: int, seed: int):
    """`nested._importance` on the batch: psi (b, m, k), weights (b, m) and Pareto k (b,) of each one's best round."""

    def log_density(raw_bmk):
        pad = -raw_bmk.shape[1] % nested._CHUNK
        padded = np.concatenate([raw_bmk, np.repeat(raw_bmk[:, :1], pad, axis=1)], 1)
        chunks = np.split(padded, padded.shape[1] // nested._CHUNK, axis=1)
        values = [np.asarray(_log_posteriors(spec, data, jnp.asarray(chunk))) for chunk in chunks]
        return np.concatenate(values, 1)[:, : raw_bmk.shape[1]]

    size = max((2 if isinstance(data, conditional.Moments) else 1) * draws, 4 * nested._CHUNK)
    count, k = mode_bk.shape
    rngs = [np.random.default_rng([seed, i]) for i in range(count)]
    psi_bmk, weight_bm, pareto_b = np.zeros((count, size, k)), np.zeros((count, size)), np.full(count, np.inf)
    covariance_bkk, open_b = covariance_bkk.copy(), np.ones(count, bool)
    for attempt in range(nested._ROUNDS):
        around = [proposal.at_mode(*pair) for pair in zip(mode_bk, covariance_bkk, strict=True)]
        around = _widened(around, log_density)
        pairs = [proposal.draw(one, size, rng) for one, rng in zip(around, rngs, strict=True)]
        raw_bmk, log_proposal_bm = (np.stack(parts) for parts in zip(*pairs, strict=True))
        log_weight_bm = log_density(raw_bmk) - log_proposal_bm
        for i in np.flatnonzero(open_b):
            weight_m = np.exp(log_weight_bm[i] - log_weight_bm[i].max())
            psi_bmk[i], weight_bm[i], pareto_b[i] = raw_bmk[i], weight_m / weight_m.sum(), pareto_k(log_weight_bm[i])
            open_b[i] = not (attempt and pareto_b[i] < PARETO_LIMIT - 0.1)
            if 1 / np.sum(weight_bm[i] ** 2) > 8 * k:
                centred = raw_bmk[i] - mode_bk[i][None]
                covariance_bkk[i] = (centred * weight_bm[i][:, None]).T @ centred + 1e-8 * np.eye(k)
        if not open_b.any():
            break
    return psi_bmk, weight_bm, pareto_b


def _widened(around: list[proposal.SplitT], log_density) -> list[proposal.SplitT]:
    """`proposal.widened` of every data set; their points are weighed in one call."""
    points = []
    for one in around:
        proposal.widened(one, lambda asked: points.append(asked) or np.zeros(len(asked)))
    values = log_density(np.stack(points))
    return [proposal.widened(one, lambda _, v=value: v) for one, value in zip(around, values, strict=True)]
