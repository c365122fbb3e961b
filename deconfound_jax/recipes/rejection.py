"""Rejection-sampling SFT: the reference's best of n samples, by mean - kappa sd of the posterior, are imitated.

Each step draws anew, in one compiled graph: there is no pool to over-fit, and a resumed run draws what an unbroken
one does. The policy tends to the distribution of the best of n, whose KL is at most log n - (n - 1) / n.

Sources: Touvron et al. 2307.09288, section 3.2.3; Dong et al. 2304.06767 (RAFT), with one round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from deconfound_jax.align.logprobs import group_mask
from deconfound_jax.align.rounds import round_step
from deconfound_jax.align.scored import sft_objective
from deconfound_jax.align.scoring import TextReward, scored
from deconfound_jax.causal.reward import Reward
from deconfound_jax.config import Align, Features, Rejection
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.sample import generate
from deconfound_jax.models.tokenizer import END
from deconfound_jax.recipes.best_of_n import choose
from deconfound_jax.recipes.rounds import OWN, featuriser, frozen_reward, prompt_batches
from deconfound_jax.recipes.stage import Record, Stage, batch_of, train, trained_part
from deconfound_jax.recipes.texts import check_prompts, require
from deconfound_jax.structs import Scored
from deconfound_jax.train.step import adamw, jit_step


def rejection_stage(decoder: Decoder, config: Rejection, features: Features, new_tokens: int = 0,
                    stop: Sequence[int] = (END,), featurise: Callable | None = None,
                    accumulate: int = 1) -> Stage:  # fmt: skip
    """The compiled step: sample from the reference, score, choose, imitate.

    Args:
      features: of the reference, as the causal layer saw them; see `rounds.featuriser`.
      new_tokens: of a text, at most; 0: what fits behind BEGIN.
      stop: tokens that end a text.
      featurise: in place of `featuriser(decoder, features)`.
      accumulate: microbatches in which the chosen texts are read.

    Raises:
      ValueError: an n that leaves nothing to choose.
    """
    if config.n < 2:
        raise ValueError(f"rejection.n: expected at least 2 samples to choose from, got {config.n}")
    optimizer, new_tokens = adamw(config.learning_rate, config.steps), new_tokens or decoder.config.length - 1
    fill = best_samples(decoder, featurise or featuriser(decoder, features), config, new_tokens, stop)
    step = round_step(_imitate(decoder), optimizer, fill, accumulate=accumulate)
    drawn = config.batch * config.n * new_tokens
    return Stage(jit_step(step), optimizer, config.steps, batch=batch_of(config), accumulate=accumulate,
                 tokens=drawn).on(None)  # fmt: skip


def best_samples(
    decoder: Decoder, featurise: Callable, config: Rejection, new_tokens: int, stop: Sequence[int]
) -> Callable:
    """(params, frozen, prompts, coefficients (s, d), key) -> `Scored`: for each prompt the best of n texts.

        x_1 ... x_n ~ pi_ref(. | prompt),   x = argmax_i mean_s r_s(x_i) - kappa sd_s r_s(x_i)

    `frozen` holds "reference", variables of the policy that is sampled from, whatever is trained.
    """

    def fill(params, frozen, prompt_bq, coefficients_sd, key) -> Scored:
        drawn = generate(decoder, frozen["reference"], key, prompt_bq, new_tokens, config.n, config.temperature,
                         stop=stop)  # fmt: skip
        features_bgd = featurise(frozen, prompt_bq, drawn.tokens)
        reward_sbg = jnp.einsum("sd,bgd->sbg", coefficients_sd, features_bgd)
        score_bg = scored(reward_sbg, config.kappa)
        best_b1 = choose(score_bg)[:, None]
        tokens_bl = jnp.take_along_axis(drawn.tokens, best_b1[..., None], 1)[:, 0]
        best_b = jnp.take_along_axis(score_bg, best_b1, 1)[:, 0]
        # A text's loss is a mean over its tokens. Weighted by their number it is the likelihood of the text: by text
        # alone, long ones would pull less a token, and the limit would be the best of n over its length.
        targets_b = group_mask(tokens_bl[:, None], prompt_bq)[:, 0].sum(-1).astype(best_b.dtype)
        return Scored(tokens_bl, None, best_b, None, None, targets_b, prompt_bq)

    return fill


def align_rejection(
    decoder: Decoder, stage: Stage, reference: Any, reward: TextReward, judged: Reward, config: Rejection,
    align: Align, seed: int, record: Record, evaluators=(), prompts_nq: np.ndarray = OWN,
) -> Any:  # fmt: skip
    """Trains `reference` on its own best samples; returns the policy's parameters, or its adapters.

    Args:
      reward: f(x) of any text, see `align.scoring.text_reward`.
      judged: the same posterior's reward of the log's texts, whose verdict is asked.
      prompts_nq: what is answered; by default BEGIN alone.

    Metrics: `score`, the mean score of the chosen texts; it moves by chance alone, as the reference does not move.

    Raises:
      ValueError: see `preference.align_dpo`.
    """
    require(judged, align.accept_risk)
    check_prompts(prompts_nq, decoder, reference)
    params, frozen = trained_part(reference, align.lora, seed)
    frozen = frozen | frozen_reward(reward) | {"reference": reference}
    batch = prompt_batches(prompts_nq, config.batch, seed)
    return train(stage, params, frozen, batch, seed, record, evaluators).params


def _imitate(decoder: Decoder) -> Callable:
    imitate = sft_objective(decoder)

    def objective(params, frozen, batch: Scored, key):
        loss_b, weight_b, penalty, metrics = imitate(params, frozen, batch, key)
        return loss_b, weight_b, penalty, metrics | {"score": batch.reward_b.mean()}

    return objective
