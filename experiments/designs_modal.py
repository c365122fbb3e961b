"""A fit for designs too wide to integrate their scales: psi at its mode, theta at its mean given psi.

    psi^ = argmax log p(psi) + log p~(y | psi),    theta^ = E~[theta | y, psi^]

p~ is the Gaussian that touches the likelihood at eta. It is renewed in rounds, each of
which maximises over the scales with the rows' information held (penalised
quasi-likelihood, Breslow and Clayton 1993): the Laplace approximation's mode, but for
how the information moves with eta. A scale's gradient needs no differentiation:

    d log p~ / d log sd_k = E~[|theta_k|^2] / sd_k^2 - width_k                (Fisher's identity)

Levels nested in levels never enter a matrix (`designs_chain`). There are no draws:
what comes out ranks texts, and says nothing of how sure it is.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from deconfound_jax.causal.families import FAMILIES
from deconfound_jax.causal.scalars import log_prior, scalars, sd_of, start
from deconfound_jax.causal.spec import FLAT_SD, Rows, Spec
from experiments.designs_chain import Columns, Surrogate, fitted, lay_out, solve, spread

_ROUNDS, _PSI_STEP, _PSI_STILL = 15, 1.5, 0.02  # of log psi: at most in one round, and what counts as none
_NEWTON_STEPS, _HALVINGS, _ETA_STILL = 8, 8, 1e-3  # in one round; of a step; of eta, in the link's units
_GRADIENT = 0.1  # nats per unit of log psi
_LEAST_SD = 1e-9
_BLOCK = 512  # rows

_scalars = lru_cache(maxsize=64)(scalars)


class Modal(NamedTuple):
    """The fit: scalars and coefficients by site, the log evidence at psi, and whether the rounds came to rest."""

    psi: dict[str, float]
    mean: dict[str, np.ndarray]
    log_evidence: float
    converged: bool
    eta_n: np.ndarray  # where the likelihood is touched


def fit_modal(spec: Spec, rows: Rows, psi: dict[str, float] | None = None, learn: bool = True) -> Modal:
    """Fits a design without equations before the outcome's.

    Args:
      spec, rows: from `terms.prepare`; a family without closed form.
      psi: scalars by name to begin with; names it lacks begin where every fit does.
      learn: False takes `psi` as it is.

    Raises:
      ValueError: a conjugate family, an endogenous, selection or guardrail term, or a horseshoe.
    """
    if FAMILIES[spec.family].conjugate or spec.equations or spec.selection or spec.blocks[0].prior != "ridge":
        raise ValueError(f"fit_modal: expected one equation of a family without closed form and a ridge, got {spec}")
    names, raw = [s.name for s in _scalars(spec)], unconstrained(spec, psi or {})
    columns, still = lay_out(spec, rows), False
    levels = tuple(np.zeros(v.count) for v in columns.chain)
    state = _State(np.zeros(columns.dense_nd.shape[1]), levels, np.zeros(len(rows.outcome_n)))
    scale = [i for i, name in enumerate(names) if name.endswith((".scale", ".lengthscale"))]
    for _ in range(_ROUNDS if learn else 3):
        before = raw.copy()
        state, moved = _newton(spec, rows, columns, raw, state)
        if learn:
            surrogate = surrogate_at(spec, rows, columns, raw, state.eta_n)
            raw[scale] = _scales(spec, columns, surrogate, raw, scale)
            for i in sorted({*range(len(names))} - {*scale}):
                raw[i] = _family_scalar(spec, rows, columns, surrogate, raw, i, state.eta_n)
        still = np.abs(raw - before).max(initial=0.0) < _PSI_STILL and moved < _ETA_STILL
        if still:
            break
    surrogate = surrogate_at(spec, rows, columns, raw, state.eta_n)
    found = solve(columns, surrogate, *log_sds(spec, columns, raw))
    mean = {name: found.mean_d[a:b] for name, a, b in columns.sites}
    mean |= {level.name: effect for level, effect in zip(columns.chain, found.levels, strict=True)}
    log_evidence = found.log_evidence + _prior(spec, raw)[0]
    return Modal(_natural(spec, raw), mean, float(log_evidence), bool(still), state.eta_n)


def unconstrained(spec: Spec, psi: dict[str, float]) -> np.ndarray:
    """Raw scalars, logs of those that are positive; names that psi lacks are where every fit begins."""
    raw = np.asarray(start(spec), float)
    for i, s in enumerate(_scalars(spec)):
        if s.name in psi:
            raw[i] = np.log(psi[s.name]) if s.positive else psi[s.name]
    return raw


def surrogate_at(spec: Spec, rows: Rows, columns: Columns, raw, eta_n) -> Surrogate:
    """Cross products of the Gaussian that touches the likelihood at eta."""
    first_n, information_n, log_prob_n = _curvature(spec, rows, raw, eta_n)
    weight_n = np.asarray(rows.weight_n, float)
    both = np.concatenate([columns.dense_nd, (eta_n + first_n / information_n)[:, None]], 1)
    weighted = both * (weight_n * information_n)[:, None]
    constant = float(weight_n @ (log_prob_n + 0.5 * first_n**2 / information_n))
    return Surrogate(weighted.T @ both, columns.into[0] @ weighted if columns.chain else None, constant, information_n)


class _State(NamedTuple):
    """Coefficients and what they give."""

    mean_d: np.ndarray
    levels: tuple[np.ndarray, ...]
    eta_n: np.ndarray


def _newton(spec: Spec, rows: Rows, columns: Columns, raw, state: _State) -> tuple[_State, float]:
    """Newton steps on theta at psi, each halved until the posterior density does not fall; the last one's size in eta.

    The beta-binomial is not log-concave: full steps from afar can circle for ever.
    """
    sds, moved = log_sds(spec, columns, raw), np.inf
    density = _density(spec, rows, raw, sds, state)
    for _ in range(_NEWTON_STEPS):
        found = solve(columns, surrogate_at(spec, rows, columns, raw, state.eta_n), *sds)
        share = 1.0
        for _ in range(_HALVINGS):
            ahead = _between(state, _State(found.mean_d, found.levels, fitted(columns, found)), share)
            reached = _density(spec, rows, raw, sds, ahead)
            if reached >= density - 1e-9 * abs(density):
                break
            share /= 2
        moved, state, density = float(np.abs(ahead.eta_n - state.eta_n).max()), ahead, reached
        if moved < _ETA_STILL:
            break
    return state, moved


def _between(state: _State, goal: _State, share: float) -> _State:
    levels = tuple(a + share * (b - a) for a, b in zip(state.levels, goal.levels, strict=True))
    eta_n = state.eta_n + share * (goal.eta_n - state.eta_n)
    return _State(state.mean_d + share * (goal.mean_d - state.mean_d), levels, eta_n)


def _density(spec: Spec, rows: Rows, raw, log_sds, state: _State) -> float:
    """Log posterior density of the coefficients given psi, up to a constant."""
    penalty = ((state.mean_d * np.exp(-log_sds[0])) ** 2).sum()
    penalty += sum(((b * np.exp(-sd)) ** 2).sum() for b, sd in zip(state.levels, log_sds[1], strict=True))
    return float(np.asarray(rows.weight_n, float) @ _curvature(spec, rows, raw, state.eta_n)[2] - 0.5 * penalty)


def _scales(spec: Spec, columns: Columns, surrogate: Surrogate, raw, scale) -> np.ndarray:
    """Log scales that maximise the surrogate's evidence, within `_PSI_STEP` of where they are."""

    def negative(values):
        moved = raw.copy()
        moved[scale] = values
        sds = log_sds(spec, columns, moved)
        found = solve(columns, surrogate, *sds)
        moments = spread(columns, found, *sds)
        by_d, by_chain = _by_psi(spec, columns, moved)
        prior, by_prior = _prior(spec, moved)
        gradient = by_prior + by_d @ moments.by_log_sd_d + by_chain @ moments.by_log_sd_chain
        return -(found.log_evidence + prior), -gradient[scale]

    bounds = [(max(-9.0, x - _PSI_STEP), min(4.0, x + _PSI_STEP)) for x in raw[scale]]
    if not scale:
        return raw[scale]
    options = {"gtol": _GRADIENT, "maxiter": 8}
    return scipy.optimize.minimize(negative, raw[scale], jac=True, method="L-BFGS-B", bounds=bounds, options=options).x


def _family_scalar(spec: Spec, rows: Rows, columns: Columns, surrogate: Surrogate, raw, i, eta_n) -> float:
    """A scalar of the family at fixed eta: likelihood, and what the information does to the determinant.

    d log|A| = sum of h dW over rows, h the variance of eta: written with log W, which bends as the determinant does.
    """
    sds = log_sds(spec, columns, raw)
    moments = spread(columns, solve(columns, surrogate, *sds), *sds)
    reach_nd = columns.dense_nd @ moments.half_dd.T
    variance_n = np.zeros(len(eta_n))
    if columns.chain:
        reach_nd += moments.reach_ud[columns.codes[0]]
        variance_n = moments.own_u[columns.codes[0]]
    weight_n = np.asarray(rows.weight_n, float)
    leverage_n = (variance_n + (reach_nd**2).sum(1)) * surrogate.information_n * weight_n

    def negative(value):
        moved = raw.copy()
        moved[i] = value
        _, information_n, log_prob_n = _curvature(spec, rows, moved, eta_n)
        gain = weight_n @ log_prob_n - 0.5 * leverage_n @ np.log(information_n)
        return -(gain + _prior(spec, moved)[0])

    bounds = (raw[i] - _PSI_STEP, raw[i] + _PSI_STEP)
    options = {"xatol": 0.2 * _PSI_STILL}
    return float(scipy.optimize.minimize_scalar(negative, bounds=bounds, method="bounded", options=options).x)


def _natural(spec: Spec, raw) -> dict[str, float]:
    return {s.name: float(np.exp(x)) if s.positive else float(x) for s, x in zip(_scalars(spec), raw, strict=True)}


def log_sds(spec: Spec, columns: Columns, raw) -> tuple[np.ndarray, np.ndarray]:
    """Log prior sd of every dense coefficient (d,), and of every set of levels in the chain."""
    psi, blocks, levels = _natural(spec, raw), {b.name: b for b in spec.blocks}, {v.name: v for v in spec.levels}

    def sd(name):
        if name in levels:
            return FLAT_SD if levels[name].absorbed else psi[f"{name}.scale"]
        if name not in blocks:
            return 1.0  # the intercept
        if blocks[name].spectrum:
            with jax.enable_x64(True):
                return np.asarray(sd_of(psi, "", blocks[name]))
        return psi[f"{name}.scale"] if blocks[name].sd is None else blocks[name].sd

    # A smooth process leaves its fastest bases an sd that underflows.
    pieces = [np.broadcast_to(np.log(np.maximum(sd(name), _LEAST_SD)), (b - a,)) for name, a, b in columns.sites]
    return np.concatenate(pieces), np.asarray([np.log(sd(v.name)) for v in columns.chain])


def _by_psi(spec: Spec, columns: Columns, raw, step: float = 1e-4) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives of both answers of `log_sds` by each unconstrained scalar."""
    by_d, by_chain = np.zeros((len(raw), columns.dense_nd.shape[1])), np.zeros((len(raw), len(columns.chain)))
    spans = {name: slice(a, b) for name, a, b in columns.sites}
    place = {level.name: i for i, level in enumerate(columns.chain)}
    for i, s in enumerate(_scalars(spec)):
        name, _, what = s.name.rpartition(".")
        if what == "lengthscale":
            shift = step * np.eye(len(raw))[i]
            by_d[i] = (log_sds(spec, columns, raw + shift)[0] - log_sds(spec, columns, raw - shift)[0]) / (2 * step)
        elif what == "scale" and name in place:
            by_chain[i, place[name]] = 1.0
        elif what == "scale":
            by_d[i, spans[name]] = 1.0
    return by_d, by_chain


def _prior(spec: Spec, raw) -> tuple[float, np.ndarray]:
    """Log prior density of the unconstrained scalars and its gradient."""
    blocks = tuple(b._replace(start=0, stop=1, spectrum=(1.0,) if b.spectrum else ()) for b in spec.blocks)
    levels = tuple(v._replace(count=2) for v in spec.levels)  # widths do not matter: one compilation for all of them
    with jax.enable_x64(True):
        value, gradient = _value_and_gradient(spec._replace(blocks=blocks, levels=levels), jnp.asarray(raw))
    return float(value), np.asarray(gradient)


_value_and_gradient = jax.jit(jax.value_and_grad(log_prior, argnums=1), static_argnums=0)


def _curvature(spec: Spec, rows: Rows, raw, eta_n) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First and negated second derivative of the rows' log-likelihood in eta, and the log-likelihood, (n,) each."""
    n = len(eta_n)
    arrays = [eta_n, rows.outcome_n, rows.exposure_n, rows.precision_n]
    # Copies of the last row fill a block up: logs of about one length share a compilation.
    arrays = [np.pad(np.asarray(a, float), (0, -n % _BLOCK), mode="edge") for a in arrays]
    natural = _natural(spec, raw)
    psi = {s.name: natural[s.name] for s in FAMILIES[spec.family].scalars(spec)}
    with jax.enable_x64(True):
        return tuple(np.asarray(a)[:n] for a in _derivatives(spec.family, psi, float(rows.offset), *arrays))


@partial(jax.jit, static_argnums=0)
def _derivatives(name, psi, offset, eta_n, outcome_n, exposure_n, precision_n):
    rows = Rows(None, None, outcome_n, None, exposure_n, precision_n, None, None, offset)
    first_n, information_n = FAMILIES[name].curvature(eta_n, rows, psi)
    return first_n, information_n, FAMILIES[name].distribution(eta_n, rows, psi).log_prob(outcome_n)
