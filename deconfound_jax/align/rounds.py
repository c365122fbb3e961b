"""Online training as one graph a round: the policy samples, the posterior scores, the policy is updated.

fill = sample_groups(decoder, featurise, config, new_tokens=24, stop=(END,))
step = jit_step(round_step(policy_gradient_objective(decoder), optimizer, fill))
state, metrics = step(state, {"reference": params, "coefficients": draws_sd, ...}, prompt_bq, key)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from deconfound_jax.align.logprobs import group_scores
from deconfound_jax.align.policy import variables_of
from deconfound_jax.align.scoring import one_draw_a_group
from deconfound_jax.align.update import update_policy
from deconfound_jax.config import Grpo
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.sample import generate
from deconfound_jax.structs import Rollouts


def sample_groups(
    decoder: Decoder, featurise: Callable, config: Grpo, new_tokens: int, stop: Sequence[int]
) -> Callable:
    """`fill` of policy gradients: (params, frozen, prompts, coefficients (s, d), key) -> `Rollouts`.

        x_bg ~ pi(. | prompt_b),   r_bg = one joint draw a group of beta' phi(x_bg), its mean, or its 5% quantile

    Args:
      featurise: (frozen, prompt_bq, tokens_bgm) -> phi (b, g, d), standardised as in the fit: states of the *frozen*
        reference, never of the moving policy.
      new_tokens, stop: of a text, static.

    `frozen` holds "reference": variables of the frozen policy. A batch is prompt_bq, or has it as `texts`.
    """

    def fill(params, frozen, batch, coefficients_sd, key) -> Rollouts:
        prompt_bq = getattr(batch, "texts", batch)
        draw_key, group_key = jax.random.split(key)
        policy = variables_of(params, frozen)
        drawn = generate(decoder, policy, draw_key, prompt_bq, new_tokens, config.group_size,
                         config.temperature, stop=stop)  # fmt: skip
        reference = group_scores(decoder, frozen["reference"], drawn.tokens, prompt_bq)
        features_bgd = featurise(frozen, prompt_bq, drawn.tokens)
        reward_sbg = jnp.einsum("sd,bgd->sbg", coefficients_sd, features_bgd)
        reward_bg = {
            "draw": lambda: one_draw_a_group(reward_sbg, group_key),
            "mean": lambda: reward_sbg.mean(0),
            "lower": lambda: jnp.quantile(reward_sbg, 0.05, axis=0),
        }[config.reward]()
        weight_bg = jnp.ones_like(reward_bg)
        return Rollouts(drawn.tokens, drawn.logprob, reference.logprob, reward_bg, weight_bg, prompt_bq)

    return fill


def round_step(objective: Callable, optimizer: optax.GradientTransformation, fill: Callable, updates: int = 1,
               accumulate: int = 1) -> Callable:  # fmt: skip
    """Builds `(state, frozen, batch, key) -> (state, metrics)`: fill, then `updates` of the policy on it.

    `frozen["coefficients"]` (s, d) are the reward's draws, standardised units. `accumulate`: see
    `update.update_policy`; the texts are sampled all at once.
    """

    def step(state, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)
        texts = jax.lax.stop_gradient(fill(state.params, frozen, batch, frozen["coefficients"], key))
        params, opt_state, metrics = update_several(
            objective, optimizer, state.params, state.opt_state, frozen, texts, key, updates, accumulate
        )
        return state._replace(params=params, opt_state=opt_state, step=state.step + 1), metrics

    return step


def update_several(objective, optimizer, params: Any, opt_state: Any, frozen, batch, key, updates: int,
                   accumulate: int = 1):  # fmt: skip
    """`update_policy` on the same batch several times; the metrics are those of the last."""
    if updates == 1:
        return update_policy(objective, optimizer, params, opt_state, frozen, batch, key, accumulate)

    def one(carry, i):
        params, opt_state, metrics = update_policy(
            objective, optimizer, *carry, frozen, batch, jax.random.fold_in(key, i), accumulate
        )
        return (params, opt_state), metrics

    (params, opt_state), metrics = jax.lax.scan(one, (params, opt_state), jnp.arange(updates))
    return params, opt_state, jax.tree.map(lambda m: m[-1], metrics)
