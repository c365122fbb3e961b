"""The DPO family on the posterior of a reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from deconfound_jax.align.groups import epochs, form_groups, pair_index, pair_labels
from deconfound_jax.align.preference import preference_objective
from deconfound_jax.causal.reward import Reward
from deconfound_jax.config import Align, Dpo
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.recipes.reference import text_logprobs
from deconfound_jax.recipes.stage import Record, Stage, batch_of, train, trained_part
from deconfound_jax.recipes.texts import Texts, check_certainty, check_texts, different_texts, require
from deconfound_jax.structs import Pairs
from deconfound_jax.train.step import adamw, make_step


def dpo_stage(decoder: Decoder, config: Dpo, accumulate: int = 1) -> Stage:
    """The compiled two-stage step; labels and beta are arguments, so every method and seed shares it."""
    optimizer = adamw(config.learning_rate, config.steps)
    step = make_step(pair_objective(decoder, config), optimizer, accumulate=accumulate)
    return Stage(step, optimizer, config.steps, batch=batch_of(config), accumulate=accumulate).on(None)


def pair_objective(decoder: Decoder, config: Dpo) -> Callable:
    """The loss that `config` names, as an objective; ValueError for knobs that make nothing of a pair."""
    if config.group_size < 2:
        raise ValueError(f"dpo.group_size: expected at least 2 texts to compare, got {config.group_size}")
    if config.loss == "robust" and not 0 <= config.noise < 0.5:
        raise ValueError(f"dpo.noise: expected 0 to below 1/2 for the robust loss, got {config.noise}")
    return preference_objective(decoder, config.loss, config.normalise)


def pair_knobs(config: Dpo) -> dict[str, float]:
    """The scalars that the losses read; each takes its own."""
    return {name: getattr(config, name) for name in ("beta", "noise", "margin", "strength")}


def align_dpo(decoder: Decoder, stage: Stage, reference: Any, texts: Texts, reward: Reward, config: Dpo, align: Align,
              seed: int, record: Record, evaluators=(), sign: Callable | None = None) -> Any:  # fmt: skip
    """Two-stage DPO of `reference` on the joint draws of a reward; returns the policy's parameters, or its adapters.

    Args:
      reward: of the log's texts, draws (s, n); tau is the sd of its mean over the log.
      evaluators: see `train.loop.run_stage`.
      sign: for a `bounded` verdict, (rows a, rows b) -> +1, -1 or 0: pairs of 0 do not train
        (`causal.interval.RewardInterval.sign` on the rows' features).

    Raises:
      ValueError: a reward without a verdict, or with one that does not allow to train, unless
        `align.accept_risk`; it names the failed checks and what would mend them. Texts or pairs that teach nothing,
        see `texts.check_texts` and `texts.different_texts`.
    """
    require(reward, align.accept_risk, sign is not None)
    check_texts(texts, decoder, reference, reward)
    groups_mg = form_groups(texts.within_n, len(texts.tokens_nl), config.group_size, seed)
    label_mp, weight_mp = labels(reward, groups_mg, config)
    weight_mp = weight_mp * different_texts(texts, groups_mg, align.equal_texts == "drop")
    if sign is not None:
        # A draw's gamma may lie outside the set: a label that contradicts the whole interval does not train either.
        weight_mp = weight_mp * (signed_pairs(groups_mg, sign) * np.sign(label_mp - 0.5) > 0)
    batch_of = pairs_of(decoder, reference, texts, groups_mg)
    order = epochs(len(groups_mg), config.groups, seed)

    def batch(i: int) -> Pairs:
        pick = order(i)
        return batch_of(pick)._replace(label_bp=label_mp[pick], weight_bp=weight_mp[pick].astype(np.float32))

    params, frozen = trained_part(reference, align.lora, seed)
    return train(stage, params, frozen | pair_knobs(config), batch, seed, record, evaluators,
                 keys=lambda i: texts.keys(groups_mg[order(i)])).params  # fmt: skip


def labels(reward: Reward, groups_mg: np.ndarray, config: Dpo) -> tuple[np.ndarray, np.ndarray]:
    """Label and weight of every pair of every group, (m, p) each; `hard` forgets how sure the posterior is."""
    if (config.label, config.weight) != ("hard", "one"):
        check_certainty(reward)
    label_mp, weight_mp = pair_labels(reward.draws_sn, groups_mg, float(reward.mean.std()), config.weight)
    if config.label == "hard":
        first, second = pair_index(groups_mg.shape[1])
        gap_mp = reward.mean[groups_mg[:, first]] - reward.mean[groups_mg[:, second]]
        label_mp = (0.5 * (np.sign(gap_mp) + 1)).astype(np.float32)
    return label_mp, weight_mp


def pairs_of(decoder: Decoder, reference: Any, texts: Texts, groups_mg: np.ndarray) -> Callable[[np.ndarray], Pairs]:
    """Numbers of groups -> their `Pairs`, labels still to come; weight 0 where a member is missing.

    The reference is read once, here.
    """
    reference_n = text_logprobs(decoder, reference, texts.tokens_nl, texts.prompt_nq)
    first, second = pair_index(groups_mg.shape[1])
    there_mp = ((groups_mg[:, first] >= 0) & (groups_mg[:, second] >= 0)).astype(np.float32)

    def batch(pick: np.ndarray) -> Pairs:
        rows = groups_mg[pick]
        prompt_bq = None if texts.prompt_nq is None else texts.prompt_nq[rows[:, 0]]
        blank = np.full(there_mp[pick].shape, 0.5, np.float32)
        return Pairs(texts.tokens_nl[rows], reference_n[rows], blank, there_mp[pick], prompt_bq)

    return batch


def signed_pairs(groups_mg: np.ndarray, sign: Callable) -> np.ndarray:
    """+1 or -1 where a pair's order is the same over the whole interval, else 0, (m, p); ValueError where none's is."""
    first, second = pair_index(groups_mg.shape[1])
    a, b = groups_mg[:, first], groups_mg[:, second]
    sign_mp = np.asarray(sign(a.reshape(-1), b.reshape(-1))).reshape(a.shape) * ((a >= 0) & (b >= 0))
    if not sign_mp.any():
        raise ValueError("align: no pair has one sign over the whole interval of the reward; nothing to train on")
    return sign_mp.astype(np.float32)
