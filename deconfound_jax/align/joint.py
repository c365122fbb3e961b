"""The joint step: causal update and preference update in one compiled graph.

    batch = {rows, groups}
    1. moments <- moments + cross products of rows           exact sufficient statistics
    2. psi     <- a few Adam steps on the collapsed log posterior of the scalars
    3. theta   ~ p(theta | psi, moments)                     joint draws, closed form
    4. labels, weights or rewards of the texts from the draws
    5. policy  <- preference step (DPO, KTO, DRO, GRPO); held back until `warm_rows` rows have been seen

Gaussian designs only: there the update of step 1 is exact, so after one pass over
the log the causal state is what a separate fit would have, up to the scalars'
spread (a point here, integrated in `causal.nested`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deconfound_jax.align.groups import pair_index
from deconfound_jax.align.losses.dro import reward_precision
from deconfound_jax.align.rounds import update_several
from deconfound_jax.align.scoring import desirability
from deconfound_jax.causal import conditional
from deconfound_jax.causal.reward import precision_weight, prefer
from deconfound_jax.causal.scalars import constrain, log_prior, start
from deconfound_jax.causal.spec import Rows, Spec
from deconfound_jax.config import Joint
from deconfound_jax.structs import Pairs, Scored


class CausalState(NamedTuple):
    """What the causal part carries: cross products, scalars, their optimizer, rows seen."""

    moments: conditional.Moments
    raw: jax.Array  # unconstrained psi
    opt_state: Any
    seen: jax.Array


class JointBatch(NamedTuple):
    """Rows for the causal update (weight 0: seen before), texts for the preference update.

    Of `texts` the causal part fills in what comes from the reward; see `fill_pairs`, `fill_scored` and
    `rounds.sample_groups`.
    """

    rows: Rows
    texts: Any
    features: Any = None  # phi(x) (..., d) of the texts, standardised as in the fit
    present: Any = None  # (...), 0 where there is no text


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


def fill_pairs(weighting: str, label: str = "soft") -> Callable:
    """Labels and weights of `Pairs` from draws of the text's coefficients: `Fill` of the DPO family.

    A `hard` label is the order of the mean rewards. tau is the sd of the mean reward over the batch's texts, in the
    draws' own units. Pairs of weight 0 keep it.
    """

    def fill(params, frozen, batch: JointBatch, coefficients_sd, key) -> Pairs:
        reward_sbg = jnp.einsum("sd,bgd->sbg", coefficients_sd, batch.features)
        tau = _spread(reward_sbg.mean(0), batch.present)
        first, second = pair_index(batch.texts.tokens_bgl.shape[1])
        a, b = reward_sbg[:, :, first], reward_sbg[:, :, second]
        weight = precision_weight(a, b, tau) if weighting == "precision" else jnp.ones(a.shape[1:])
        label_bp = prefer(a.mean(0)[None], b.mean(0)[None], 0.0) if label == "hard" else prefer(a, b, tau)
        return batch.texts._replace(label_bp=label_bp, weight_bp=weight * batch.texts.weight_bp)

    return fill


def fill_scored(weighting: str) -> Callable:
    """Reward, sd, desirability and weight of `Scored` from draws of the text's coefficients: `Fill` of KTO and DRO.

    Rewards are centred on the batch and divided by its sd; desirable is what beats the batch's median, draw by draw.
    """

    def fill(params, frozen, batch: JointBatch, coefficients_sd, key) -> Scored:
        reward_sb = jnp.einsum("sd,bd->sb", coefficients_sd, batch.features)
        reward_sb = (reward_sb - reward_sb.mean()) / _spread(reward_sb.mean(0), batch.present)
        sd_b = reward_sb.std(0)
        weight_b = reward_precision(sd_b, 1.0) if weighting == "precision" else jnp.ones_like(sd_b)
        return batch.texts._replace(
            reward_b=reward_sb.mean(0), sd_b=sd_b, label_b=desirability(reward_sb), weight_b=weight_b * batch.present
        )

    return fill


def fill_rollouts(sample: Callable) -> Callable:
    """Texts and rewards by `rounds.sample_groups`, rewards in sd of the mean reward over the log: `Fill` of GRPO.

    unit = sqrt(mean(beta)' C mean(beta)),   C = frozen["covariance"] (d, d), of the log's standardised features
    """

    def fill(params, frozen, batch: JointBatch, coefficients_sd, key):
        mean_d = coefficients_sd.mean(0)
        unit = jnp.sqrt(mean_d @ frozen["covariance"] @ mean_d)
        return sample(params, frozen, batch, coefficients_sd / jnp.where(unit > 0, unit, 1.0), key)

    return fill


def joint_step(spec: Spec, config: Joint, objective: Callable, optimizer: optax.GradientTransformation, fill: Callable,
               updates: int = 1, accumulate: int = 1) -> Callable:  # fmt: skip
    """Builds `(state, frozen, batch, key) -> (state, metrics)`; `train.step.jit_step` compiles it.

    Args:
      objective: of the preference update, over what `fill` returns.
      fill: (params, frozen, batch, coefficients (s, d), key) -> the objective's batch.
      updates: of the policy on one batch.
      accumulate: microbatches of the texts in an update, see `update.update_policy`; rows are read, and texts judged,
        all at once.

    `state.causal` is a `CausalState`. The metrics hold the current psi by name, rows seen, and the objective's, which
    are 0 as long as the policy is held back: nothing is computed of it then.
    """

    def step(state, frozen, batch: JointBatch, key):
        key = jax.random.fold_in(key, state.step)
        causal = update_causal(spec, config, state.causal, batch.rows)
        # Not the draws' key: `split` gives those of few the same first keys as those of many.
        coefficients_sd, fill_key = text_draws(spec, causal, config.draws, key), jax.random.fold_in(key, 1)
        warm = causal.seen >= config.warm_rows

        def learn(params, opt_state):
            texts = jax.lax.stop_gradient(fill(params, frozen, batch, coefficients_sd, fill_key))
            return update_several(objective, optimizer, params, opt_state, frozen, texts, key, updates, accumulate)

        def wait(params, opt_state):
            metrics = jax.eval_shape(learn, params, opt_state)[2]
            return params, opt_state, jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), metrics)

        # A branch, and no `where` over old and new parameters: that would hold both, and read them once more.
        params, opt_state, metrics = jax.lax.cond(warm, learn, wait, state.params, state.opt_state)
        psi = constrain(spec, causal.raw)
        metrics = {**metrics, **{f"psi.{name}": value for name, value in psi.items()}, "seen": causal.seen}
        return state._replace(params=params, opt_state=opt_state, causal=causal, step=state.step + 1), metrics

    return step


def _spread(value, present):
    """The sd over the texts that are there; 1 where they do not differ."""
    n = jnp.maximum(present.sum(), 1.0)
    centre = (value * present).sum() / n
    spread = jnp.sqrt((present * (value - centre) ** 2).sum() / n)
    return jnp.where(spread > 0, spread, 1.0)


def _adam(config: Joint) -> optax.GradientTransformation:
    return optax.adam(config.causal_learning_rate)
