"""Stochastic variational inference: whole log or minibatches, a guide with full covariance.

A batch's rows count N / B times each, by their weights, so its ELBO and gradient are
right in the mean over an epoch of disjoint batches; level effects and all other sites
are global, whatever the batch holds. Rows that pad the last batch have weight 0.
Source: Hoffman, Blei, Wang and Paisley (2013).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.util import log_density

from deconfound_jax.causal.diagnostics import PARETO_LIMIT, pareto_k
from deconfound_jax.causal.guide import gaussian_guide
from deconfound_jax.causal.model import causal_model
from deconfound_jax.causal.sites import Draws, from_raw, observed, starting_draws
from deconfound_jax.causal.spec import Prepared, Rows, Spec, single

START_ROWS = 20_000  # of the nested fit that a larger log starts from
_WEIGHED = 512  # draws at least, of the Pareto k


def start_on_sample(prepared: Prepared, draws: int, seed: int) -> tuple[Draws, float]:
    """Starting draws from at most START_ROWS random rows, and the share of rows they saw."""
    n = len(prepared.rows.outcome_n)
    if n <= START_ROWS:
        return starting_draws(prepared, draws, seed), 1.0
    index = np.random.default_rng([seed, 3]).choice(n, START_ROWS, replace=False)
    return starting_draws(prepared._replace(rows=prepared.rows.take(index)), draws, seed), START_ROWS / n


def fit_svi(
    prepared: Prepared, start: Draws, draws: int, seed: int, steps: int = 1500, particles: int = 8, batch: int = 0,
    share: float = 1.0,
) -> tuple[Draws, dict]:  # fmt: skip
    """Draws from the guide; converged if the Pareto k of its importance weights is at most 0.7.

    Args:
      start: draws of every site to start and whiten by, which saw a `share` of the rows.
      steps: updates; each sees `batch` rows, or all where batch is 0.
      particles: draws of the guide an update.
    """
    spec, rows = prepared.spec, single(prepared.rows)
    guide = gaussian_guide(spec, start, share**0.5)
    n = rows.outcome_n.shape[0]
    size = batch if 0 < batch < n else n
    far = bool(spec.selection or spec.head or any(block.prior == "horseshoe" for block in spec.blocks))
    svi = SVI(causal_model, guide.sample, _optimizer(steps, n / size, far), Trace_ELBO(num_particles=particles))
    keys = jax.random.split(jax.random.key(seed), 2)
    state = svi.init(keys[0], spec, rows.take(jnp.arange(size)), **observed(spec, rows.take(jnp.arange(size))))
    per_epoch = -(-n // size)

    def update(carry, step):
        state, order_n = carry
        if size < n:
            fresh = jax.random.fold_in(keys[1], step // per_epoch)
            order_n = jax.lax.cond(step % per_epoch == 0, lambda: jax.random.permutation(fresh, n), lambda: order_n)
        some = rows if size == n else batch_of(rows, order_n, step % per_epoch, size)
        state, loss = svi.update(state, spec, some, **observed(spec, some))
        return (state, order_n), loss

    def run(state):
        return jax.lax.scan(update, (state, jnp.arange(n)), jnp.arange(steps))

    (state, _), losses = jax.jit(run)(state)
    params, losses = svi.get_params(state), np.asarray(losses, np.float64)
    log_weight, sites = _weigh(spec, rows, guide, params, max(draws, _WEIGHED), keys[1])
    k = pareto_k(log_weight)
    diagnostics = {"pareto_k": k, "elbo": -float(losses[-50:].mean()), "batch": size, "steps": steps}
    converged = bool(np.isfinite(losses).all() and k <= PARETO_LIMIT)
    return {name: value[:draws] for name, value in sites.items()}, {**diagnostics, "converged": converged}


def batch_of(rows: Rows, order_n, i, size: int) -> Rows:
    """Batch i of an epoch over the rows in `order_n`, weights times the number of batches.

    The last batch is filled up with rows of weight 0, so that every batch has one shape
    and the mean over the epoch is the whole log.
    """
    n = order_n.shape[0]
    place = i * size + jnp.arange(size)
    some = rows.take(order_n[place % n])
    return some._replace(weight_n=jnp.where(place < n, some.weight_n * -(-n // size), 0.0))


def _weigh(spec: Spec, rows: Rows, guide, params, draws: int, key):
    """Log importance weights (s,) of draws from the guide under the whole log, and their sites."""

    def one(key):
        white = guide.draw(params, key)
        sites, log_jacobian = guide.unpack(white)
        log_q = guide.log_prob(params, white) - log_jacobian
        log_p, _ = log_density(causal_model, (spec, rows), observed(spec, rows), sites)
        return from_raw(spec, sites), log_p - log_q

    sites, log_weight = jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(key, draws))
    return np.asarray(log_weight, np.float64), {name: np.asarray(value) for name, value in sites.items()}


def _optimizer(steps: int, noise: float, far: bool) -> optax.GradientTransformation:
    """Adam, decaying, in units of the start's sds; a start that is not the mode (`far`) is walked away from.

    Adam divides by the gradient's size, which a batch's noise swells by sqrt(N / B).
    """
    peak = min((5e-2 if far else 1e-2) * noise**0.5, 0.1)
    return optax.adam(optax.exponential_decay(peak, steps, 0.01))
