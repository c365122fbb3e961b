"""Recipes on single texts with a reward: the log's best texts (SFT), KTO, DRO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from deconfound_jax.align.groups import epochs
from deconfound_jax.align.losses.dro import reward_precision
from deconfound_jax.align.scored import dro_objective, kto_objective, sft_objective
from deconfound_jax.align.scoring import desirability, in_the_top
from deconfound_jax.causal.reward import Reward
from deconfound_jax.config import Align, Dro, Kto, Top
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.recipes.reference import text_logprobs
from deconfound_jax.recipes.stage import Record, Stage, batch_of, train, trained_part
from deconfound_jax.recipes.texts import Texts, check_certainty, check_texts, require
from deconfound_jax.structs import Scored
from deconfound_jax.train.step import adamw, make_step

Single = Top | Kto | Dro


def single_stage(decoder: Decoder, config: Single, accumulate: int = 1) -> Stage:
    """The compiled step of the recipe that `config` is of. KTO's z0 is then a microbatch's."""
    optimizer = adamw(config.learning_rate, config.steps)
    step = make_step(objective_of(decoder, config), optimizer, accumulate=accumulate)
    return Stage(step, optimizer, config.steps, batch=batch_of(config), accumulate=accumulate).on(None)


def objective_of(decoder: Decoder, config: Single) -> Callable:
    """Maximum likelihood for `Top`, else the objective of `config`'s name; ValueError for a share that is none."""
    if isinstance(config, Top):
        if not 0 < config.share < 1:
            raise ValueError(f"top.share: expected a share between 0 and 1, got {config.share}")
        return sft_objective(decoder)
    return kto_objective(decoder) if isinstance(config, Kto) else dro_objective(decoder)


def align_singles(decoder: Decoder, stage: Stage, reference: Any, texts: Texts, reward: Reward, config: Single,
                  align: Align, seed: int, record: Record, evaluators=()) -> Any:  # fmt: skip
    """Trains `reference` on the log's texts one by one; returns the policy's parameters, or its adapters.

    Rewards are centred and divided by the sd of their mean over the log. What the posterior gives:

        Top   weight       P(among the best `share` of the log)
        Kto   label        P(above the median)
        Dro   reward       and, with `precision`, the weight 1 / (1 + sd^2)

    Raises:
      ValueError: see `preference.align_dpo`.
    """
    require(reward, align.accept_risk)
    check_texts(texts, decoder, reference, reward)
    scored = score_texts(decoder, reference, texts, reward, config)
    order = epochs(len(texts.tokens_nl), config.batch, seed)

    def batch(i: int) -> Scored:
        pick = order(i)
        return Scored(*(None if leaf is None else leaf[pick] for leaf in scored))

    params, frozen = trained_part(reference, align.lora, seed)
    params, knobs = start_of(params, config)
    if texts.prompt_nq is not None:
        knobs |= {"reference": reference}  # KTO's z0 reads it at run time
    state = train(stage, params, frozen | knobs, batch, seed, record, evaluators, keys=lambda i: texts.keys(order(i)))
    return policy_of(state.params)


def score_texts(decoder: Decoder, reference: Any, texts: Texts, reward: Reward, config: Single) -> Scored:
    """The whole log as `Scored`, on the host."""
    if isinstance(config, Top | Kto) or config.weight == "precision":
        check_certainty(reward)
    unit = float(reward.mean.std()) or 1.0
    mean_n, sd_n = (reward.mean - reward.mean.mean()) / unit, reward.sd / unit
    weight_n = np.ones_like(mean_n)
    if isinstance(config, Top):
        weight_n = np.asarray(in_the_top(reward.draws_sn, config.share))
    elif isinstance(config, Dro) and config.weight == "precision":
        weight_n = np.asarray(reward_precision(sd_n, 1.0))
    label_n = np.asarray(desirability(reward.draws_sn))
    reference_n = text_logprobs(decoder, reference, texts.tokens_nl, texts.prompt_nq)
    floats = (np.asarray(a, np.float32) for a in (reference_n, mean_n, sd_n, label_n, weight_n))
    return Scored(texts.tokens_nl, *floats, texts.prompt_nq)


def start_of(params: dict[str, Any], config: Single) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and scalar knobs of a recipe: DRO trains its constant V beside the policy.

    V starts at the mean reward, its least squares while the policy is the reference.
    """
    if isinstance(config, Dro):
        return {**params, "value": {"v": np.zeros((), np.float32)}}, {"tau": config.tau}
    return params, {"beta": config.beta} if isinstance(config, Kto) else {}


def policy_of(params: dict[str, Any]) -> dict[str, Any]:
    """The policy's own variables, without DRO's constant."""
    return {name: leaf for name, leaf in params.items() if name != "value"}
