"""Recipes that weight the log's texts to the policy that is wanted: outcome-weighted SFT, DR-CPO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from deconfound_jax.align.groups import epochs
from deconfound_jax.align.losses.off_policy import outcome_weights
from deconfound_jax.align.rounds import round_step
from deconfound_jax.align.scored import OffPolicy, dr_cpo_objective, sft_objective
from deconfound_jax.align.scoring import TextReward
from deconfound_jax.causal.reward import Reward
from deconfound_jax.config import Align, DrCpo, Features, Rwr
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.sample import generate
from deconfound_jax.models.tokenizer import END
from deconfound_jax.recipes.reference import text_logprobs
from deconfound_jax.recipes.rounds import featuriser, frozen_reward
from deconfound_jax.recipes.stage import Record, Stage, batch_of, train, trained_part
from deconfound_jax.recipes.texts import Texts, check_texts, require
from deconfound_jax.structs import Scored
from deconfound_jax.train.step import adamw, jit_step, make_step


def rwr_stage(decoder: Decoder, config: Rwr, accumulate: int = 1) -> Stage:
    """The compiled step of weighted maximum likelihood."""
    optimizer = adamw(config.learning_rate, config.steps)
    step = make_step(sft_objective(decoder), optimizer, accumulate=accumulate)
    return Stage(step, optimizer, config.steps, batch=batch_of(config), accumulate=accumulate).on(None)


def align_rwr(decoder: Decoder, stage: Stage, reference: Any, texts: Texts, reward: Reward, config: Rwr, align: Align,
              seed: int, record: Record, evaluators=()) -> Any:  # fmt: skip
    """Outcome-weighted SFT on the log's texts; returns the policy's parameters, or its adapters.

        w_i = mean_s exp(r_si / tau) / mean_j exp(r_sj / tau),   tau in sd of the log's mean reward

    The log's texts are those of a policy that the reference imitates, so what is imitated here is, up to the texts
    there are, reference x exp(reward / tau).

    Raises:
      ValueError: see `preference.align_dpo`.
    """
    require(reward, align.accept_risk)
    check_texts(texts, decoder, reference, reward)
    tau = config.tau * (float(reward.mean.std()) or 1.0)
    ones_n = np.ones(len(texts.tokens_nl), np.float32)
    weight_n = np.asarray(outcome_weights(np.asarray(reward.draws_sn, np.float32), ones_n, tau))
    order = epochs(len(texts.tokens_nl), config.batch, seed)

    def batch(i: int) -> Scored:
        pick = order(i)
        prompt_bq = None if texts.prompt_nq is None else texts.prompt_nq[pick]
        return Scored(texts.tokens_nl[pick], None, None, None, None, weight_n[pick], prompt_bq)

    params, frozen = trained_part(reference, align.lora, seed)
    return train(stage, params, frozen, batch, seed, record, evaluators, keys=lambda i: texts.keys(order(i))).params


class LoggedTexts(NamedTuple):
    """A step's texts of the log for DR-CPO, as they stand behind BEGIN."""

    tokens_bl: Any
    behaviour_b: Any  # log-probability under the reference, nats
    gain_b: Any  # outcome less the confounders' part less f(x), units of the reward
    prompt_bq: Any  # BEGIN


def dr_cpo_stage(decoder: Decoder, config: DrCpo, features: Features, accumulate: int = 1) -> Stage:
    """The compiled step: as many fresh texts of the reference as logged ones, each with its gain, one update.

    Args:
      features: of the reference, as the causal layer saw them; see `rounds.featuriser`.
    """
    optimizer = adamw(config.learning_rate, config.steps)
    fill = with_fresh(decoder, featuriser(decoder, features), accumulate)
    step = round_step(dr_cpo_objective(decoder), optimizer, fill, accumulate=accumulate)
    return Stage(jit_step(step), optimizer, config.steps, batch=batch_of(config), accumulate=accumulate).on(None)


def with_fresh(decoder: Decoder, featurise: Callable, accumulate: int = 1) -> Callable:
    """(params, frozen, `LoggedTexts`, coefficients (s, d), key) -> `OffPolicy`: the logged texts, then fresh ones.

        x ~ pi_ref,   g(x) = mean_s r_s(x) / unit

    They take turns, `accumulate` at a time: so each device has some of both, and so has each microbatch, whose rows
    stand that far apart.
    """

    def fill(params, frozen, batch: LoggedTexts, coefficients_sd, key) -> OffPolicy:
        drawn = generate(decoder, frozen["reference"], key, batch.prompt_bq, batch.tokens_bl.shape[1], stop=(END,))
        features_bgd = featurise(frozen, batch.prompt_bq, drawn.tokens)
        fresh_b = (features_bgd @ coefficients_sd.mean(0))[:, 0] / frozen["unit"]
        sides = (
            OffPolicy(batch.tokens_bl, batch.behaviour_b, batch.gain_b, jnp.ones_like(fresh_b), jnp.ones_like(fresh_b),
                      batch.prompt_bq),
            OffPolicy(drawn.tokens[:, 0], drawn.logprob[:, 0].sum(-1), fresh_b, jnp.zeros_like(fresh_b),
                      jnp.ones_like(fresh_b), batch.prompt_bq),
        )  # fmt: skip

        def take_turns(two):
            return rearrange(jnp.stack(two), "t (b a) ... -> (b t a) ...", a=accumulate)

        return OffPolicy(*(take_turns(two) for two in zip(*sides, strict=True)))

    return fill


def align_dr_cpo(
    decoder: Decoder, stage: Stage, reference: Any, texts: Texts, reward: Reward, residual: Reward,
    anywhere: TextReward, config: DrCpo, align: Align, seed: int, record: Record, evaluators=(),
) -> Any:  # fmt: skip
    """Doubly robust CPO of `reference`; returns the policy's parameters, or its adapters.

        logged    y less the confounders' part, less f(x), at pi / pi_ref       fresh    f(x), at pi / pi_ref

    The outcome model is the posterior's mean f; what it gets wrong the logged residuals mend, as far as the reference
    is the policy that wrote the log. A log does not say which that was: where its writers knew what the design does
    not, and wrote by it, the importance side is as biased as the log. Gains are in sd of the log's mean f, centred.

    Args:
      reward: f of the log's texts.
      residual: of the same texts and posterior, `causal.reward.residual_form`: what was observed, not what the words
        predict.
      anywhere: f of any text, `align.scoring.text_reward`.

    Raises:
      ValueError: another form of `residual`; texts behind prompts; see also `preference.align_dpo`.
    """
    if residual.form != "residual":
        raise ValueError(f"residual: expected the outcome less the confounders' part (`causal.reward.residual_form`) "
                         f"for dr_cpo, got a reward of form {residual.form!r}")  # fmt: skip
    require(reward, align.accept_risk)
    check_texts(texts, decoder, reference, reward)
    if texts.prompt_nq is not None:
        raise ValueError("prompt: expected whole texts of an own decoder for dr_cpo, got texts behind prompts")
    unit = float(reward.mean.std()) or 1.0
    gap_n = residual.mean - reward.mean
    gain_n = ((gap_n - gap_n.mean()) / unit).astype(np.float32)
    behaviour_n = text_logprobs(decoder, reference, texts.tokens_nl).astype(np.float32)
    order = epochs(len(gain_n), config.batch, seed)

    def batch(i: int) -> LoggedTexts:
        pick = order(i)
        begin_b1 = texts.tokens_nl[pick, :1]
        return LoggedTexts(texts.tokens_nl[pick, 1:], behaviour_n[pick], gain_n[pick], begin_b1)

    params, frozen = trained_part(reference, align.lora, seed)
    frozen = frozen | frozen_reward(anywhere) | {"reference": reference, "ceiling": config.ceiling, "unit": unit}
    return train(stage, params, frozen, batch, seed, record, evaluators, keys=lambda i: texts.keys(order(i))).params
