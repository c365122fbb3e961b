"""The joint step: causal update and preference update in one compiled graph.

    batch = {rows, groups}
    1. moments <- moments + cross products of rows           exact sufficient statistics
    2. psi     <- a few Adam steps on the collapsed log posterior of the scalars
    3. theta   ~ p(theta | psi, moments)                     joint draws, closed form
    4. label and weight of every pair from the draws' rewards
    5. policy  <- DPO step; held back until `warm_rows` rows have been seen

Gaussian designs only: there the update of step 1 is exact, so after one pass over
the log the causal state is what a separate fit would have, up to the scalars'
spread (a point here, integrated in `causal.nested`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deconfound_jax.align.groups import pair_index
from deconfound_jax.align.preference import dpo_objective
from deconfound_jax.align.update import update_policy
from deconfound_jax.causal import conditional
from deconfound_jax.causal.reward import precision_weight, prefer
from deconfound_jax.causal.scalars import constrain, log_prior, start
from deconfound_jax.causal.spec import Rows, Spec
from deconfound_jax.config import Joint
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.structs import Pairs


class CausalState(NamedTuple):
    """What the causal part carries: cross products, scalars, their optimizer, rows seen."""

    moments: conditional.Moments
    raw: jax.Array  # unconstrained psi
    opt_state: Any
    seen: jax.Array


class JointBatch(NamedTuple):
    """Rows for the causal update (weight 0: seen before), groups for the preference update."""

    rows: Rows
    tokens_bgl: Any
    reference_bg: Any
    features_bgd: Any  # phi(x), standardised as in the fit
    present_bg: Any  # 0 where a group is smaller


def init_causal(spec: Spec, rows: Rows, config: Joint) -> CausalState:
    """The state before any row: zero moments, scales at 0.3, c0 at 0."""
    like = jax.eval_shape(lambda: conditional.moments(spec, rows))
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), like)
    raw = jnp.asarray(start(spec), jnp.float32)
    return CausalState(empty, raw, _adam(config).init(raw), jnp.zeros((), jnp.float32))


def update_causal(spec: Spec, config: Joint, state: CausalState, rows: Rows) -> CausalState:
    """Adds the rows' cross products, then moves the scalars uphill `causal_updates` times."""
    stats = jax.tree.map(jnp.add, state.moments, conditional.moments(spec, rows))

    def loss(raw):
        solution = conditional.solve(spec, stats, constrain(spec, raw))
        return -(solution.log_likelihood + log_prior(spec, raw)) / jnp.maximum(stats.rows, 1.0)

    def step(carry, _):
        raw, opt_state = carry
        updates, opt_state = _adam(config).update(jax.grad(loss)(raw), opt_state)
        return (optax.apply_updates(raw, updates), opt_state), None

    (raw, opt_state), _ = jax.lax.scan(step, (state.raw, state.opt_state), length=config.causal_updates)
    return CausalState(stats, raw, opt_state, state.seen + rows.weight_n.sum())


def text_draws(spec: Spec, state: CausalState, draws: int, key: jax.Array) -> jax.Array:
    """Joint draws (s, d) of the text's coefficients at the current psi, standardised units."""
    return posterior_draws(spec, state, draws, key)["text"]


def posterior_draws(spec: Spec, state: CausalState, draws: int, key: jax.Array) -> dict[str, jax.Array]:
    """Joint draws (s, ...) of every site given psi; psi itself is a point, the same in every draw."""
    psi = constrain(spec, state.raw)
    solution = conditional.solve(spec, state.moments, psi)
    sites = jax.vmap(lambda k: conditional.draw(spec, solution, k))(jax.random.split(key, draws))
    return sites | {name: jnp.full(draws, value) for name, value in psi.items()}


def label_groups(batch: JointBatch, coefficients_sd, weighting: str) -> Pairs:
    """Soft label and weight of every pair from draws of the text's coefficients.

    tau is the sd of the mean reward over the batch's texts, in the draws' own units.
    """
    reward_sbg = jnp.einsum("sd,bgd->sbg", coefficients_sd, batch.features_bgd)
    mean_bg, n = reward_sbg.mean(0), jnp.maximum(batch.present_bg.sum(), 1.0)
    centre = (mean_bg * batch.present_bg).sum() / n
    tau = jnp.sqrt((batch.present_bg * (mean_bg - centre) ** 2).sum() / n)
    first, second = pair_index(batch.tokens_bgl.shape[1])
    a, b = reward_sbg[:, :, first], reward_sbg[:, :, second]
    weight = precision_weight(a, b, tau) if weighting == "precision" else jnp.ones(a.shape[1:])
    weight = weight * batch.present_bg[:, first] * batch.present_bg[:, second]
    return Pairs(batch.tokens_bgl, batch.reference_bg, prefer(a, b, tau), weight)


def joint_step(decoder: Decoder, spec: Spec, config: Joint, optimizer: optax.GradientTransformation, weighting: str):
    """Builds `(state, frozen, batch, key) -> (state, metrics)`; `train.step.jit_step` compiles it.

    `state.causal` is a `CausalState`; `frozen` is {"beta": scalar}. The metrics hold
    the current psi by name, rows seen, the DPO loss and its gradient's norm.
    """
    objective = dpo_objective(decoder)

    def step(state, frozen, batch: JointBatch, key):
        key = jax.random.fold_in(key, state.step)
        causal = update_causal(spec, config, state.causal, batch.rows)
        groups = jax.lax.stop_gradient(label_groups(batch, text_draws(spec, causal, config.draws, key), weighting))
        params, opt_state, metrics = update_policy(
            objective, optimizer, state.params, state.opt_state, frozen, groups, key
        )
        warm = causal.seen >= config.warm_rows
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(warm, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        psi = constrain(spec, causal.raw)
        metrics = {**metrics, **{f"psi.{name}": value for name, value in psi.items()}, "seen": causal.seen}
        return state._replace(params=params, opt_state=opt_state, causal=causal, step=state.step + 1), metrics

    return step


def _adam(config: Joint) -> optax.GradientTransformation:
    return optax.adam(config.causal_learning_rate)
