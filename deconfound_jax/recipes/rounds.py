"""GRPO and its relatives: each round samples groups from the policy, scores them by the posterior and updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from deconfound_jax.align.rollouts import policy_gradient_objective
from deconfound_jax.align.rounds import round_step, sample_groups
from deconfound_jax.align.scoring import TextReward
from deconfound_jax.causal.reward import Reward
from deconfound_jax.config import Align, Features, Grpo
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.tokenizer import BEGIN, END
from deconfound_jax.recipes.reference import pooled_states
from deconfound_jax.recipes.stage import Record, Stage, batch_of, train, trained_part
from deconfound_jax.recipes.texts import check_prompts, require
from deconfound_jax.train.step import adamw, jit_step

OWN = np.asarray([[BEGIN]], np.int32)  # the prompt of a decoder with its own vocabulary


def grpo_stage(decoder: Decoder, config: Grpo, features: Features, new_tokens: int = 0,
               stop: Sequence[int] = (END,), featurise: Callable | None = None,
               accumulate: int = 1) -> Stage:  # fmt: skip
    """The compiled round: sample, score, update.

    Args:
      features: of the reference, as the causal layer saw them; see `featuriser`.
      new_tokens: of a text, at most; 0: what fits behind BEGIN.
      stop: tokens that end a text.
      featurise: in place of `featuriser(decoder, features)`.
      accumulate: microbatches of groups in which an update reads the round's texts.
    """
    optimizer = adamw(config.learning_rate, config.rounds * config.updates)
    new_tokens = new_tokens or decoder.config.length - 1
    fill = sample_groups(decoder, featurise or featuriser(decoder, features), config, new_tokens, stop)
    step = round_step(grpo_objective(decoder, config), optimizer, fill, config.updates, accumulate)
    return Stage(jit_step(step), optimizer, config.rounds, batch=batch_of(config),
                 accumulate=accumulate, tokens=round_tokens(config, new_tokens)).on(None)  # fmt: skip


def round_tokens(config: Grpo, new_tokens: int) -> int:
    """Tokens that a round samples, at most: texts that end early have fewer."""
    return config.groups * config.group_size * new_tokens


def grpo_objective(decoder: Decoder, config: Grpo) -> Callable:
    """The policy gradient that `config` describes; ValueError for groups of one text."""
    if config.group_size < 2:
        raise ValueError(f"grpo.group_size: expected at least 2 texts to compare, got {config.group_size}")
    return policy_gradient_objective(decoder, config.advantage, config.estimator)


def grpo_knobs(config: Grpo) -> dict[str, float]:
    """The scalars that the objective reads."""
    return {"kl": config.kl, "kl_target": config.kl_target or float("inf"), "clip": config.clip}


def featuriser(decoder: Decoder, config: Features) -> Callable:
    """(frozen, prompt_bq, tokens_bgm) -> standardised features (b, g, d) of whole texts, by the frozen reference.

    `frozen` holds "reference", and "mean_d", "scale_d" of the log's features.
    """

    def featurise(frozen, prompt_bq, tokens_bgm):
        b, g, _ = tokens_bgm.shape
        prompt_bgq = jnp.broadcast_to(prompt_bq[:, None], (b, g, prompt_bq.shape[1]))
        whole_nl = rearrange(jnp.concatenate([prompt_bgq, tokens_bgm], -1), "b g l -> (b g) l")
        found_nd = pooled_states(decoder, frozen["reference"], whole_nl, config.states, config.pooling)
        standard_nd = (found_nd - frozen["mean_d"][None]) / frozen["scale_d"][None]
        return rearrange(standard_nd, "(b g) d -> b g d", b=b)

    return featurise


def align_grpo(decoder: Decoder, stage: Stage, reference: Any, reward: TextReward, judged: Reward, config: Grpo,
               align: Align, seed: int, record: Record, evaluators=(),
               prompts_nq: np.ndarray = OWN) -> Any:  # fmt: skip
    """Trains `reference` on texts of its own; returns the policy's parameters, or its adapters.

    Rewards count in sd of the log's mean reward, so that `config.kl` means the same for every reward.

    Args:
      reward: f(x) of any text, see `align.scoring.text_reward`.
      judged: the same posterior's reward of the log's texts, whose verdict is asked.
      prompts_nq: what is answered; prompts are taken in the order of an epoch. By default BEGIN alone.

    Raises:
      ValueError: see `preference.align_dpo`.
    """
    require(judged, align.accept_risk)
    check_prompts(prompts_nq, decoder, reference)
    batch = prompt_batches(prompts_nq, config.groups, seed)
    params, frozen = trained_part(reference, align.lora, seed)
    reward = reward._replace(coefficients_sd=reward.coefficients_sd / (float(judged.mean.std()) or 1.0))
    knobs = frozen_reward(reward) | grpo_knobs(config) | {"reference": reference}
    return train(stage, params, frozen | knobs, batch, seed, record, evaluators).params


def frozen_reward(reward: TextReward) -> dict[str, Any]:
    """The arrays that `featuriser` and `round_step` read."""
    return {"coefficients": reward.coefficients_sd, "mean_d": reward.mean_d, "scale_d": reward.scale_d}


def prompt_batches(prompts_nq: np.ndarray, groups: int, seed: int) -> Callable[[int], np.ndarray]:
    """step -> (groups, q) prompts, a fresh order each epoch."""
    prompts_nq = np.asarray(prompts_nq, np.int32)

    def batch(i: int) -> np.ndarray:
        n = len(prompts_nq)
        places = np.arange(i * groups, (i + 1) * groups)
        orders = {e: np.random.default_rng((seed, e)).permutation(n) for e in set((places // n).tolist())}
        return prompts_nq[[orders[p // n][p % n] for p in places.tolist()]]

    return batch
