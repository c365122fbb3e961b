"""DPO on the posterior of a reward: two-stage (labels from a finished fit) and joint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deconfound_jax.align.groups import epochs, form_groups, pair_index, pair_labels
from deconfound_jax.align.joint import JointBatch, init_causal, joint_step
from deconfound_jax.align.preference import dpo_objective
from deconfound_jax.causal.families import FAMILIES
from deconfound_jax.causal.fit import needs_sampling
from deconfound_jax.causal.reward import Reward
from deconfound_jax.causal.spec import Prepared, Rows, Spec
from deconfound_jax.config import Dpo, Joint
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.recipes.reference import text_logprobs
from deconfound_jax.recipes.stage import Record, Stage
from deconfound_jax.structs import Pairs
from deconfound_jax.train.loop import run_stage
from deconfound_jax.train.step import adamw, init_state, jit_step, make_step


def dpo_stage(decoder: Decoder, config: Dpo) -> Stage:
    """The compiled two-stage step; labels and beta are arguments, so every method and seed shares it."""
    optimizer = adamw(config.learning_rate, config.steps)
    return Stage(make_step(dpo_objective(decoder), optimizer), optimizer, config.steps)


def joint_stage(decoder: Decoder, spec: Spec, config: Dpo, joint: Joint) -> Stage:
    """The compiled joint step. Its first `warm_rows / rows` steps move the causal part alone."""
    optimizer = adamw(config.learning_rate, config.steps)
    step = jit_step(joint_step(decoder, spec, joint, optimizer, config.weight))
    return Stage(step, optimizer, config.steps + -(-joint.warm_rows // joint.rows) - 1)


def align(decoder: Decoder, stage: Stage, reference: Any, tokens_nl: np.ndarray, reward: Reward,
          codes_n: np.ndarray | None, config: Dpo, seed: int, record: Record, evaluators=(),
          sign: Callable | None = None) -> Any:  # fmt: skip
    """Two-stage DPO of `reference` on the joint draws of a reward; returns the policy's parameters.

    Args:
      tokens_nl: the log's texts.
      reward: their reward, draws (s, n); tau is the sd of its mean over the log.
      codes_n: pairs are formed inside equal values; None: across rows.
      evaluators: see `train.loop.run_stage`.
      sign: for a `bounded` verdict, (rows a, rows b) -> +1, -1 or 0: pairs of 0 do not train
        (`causal.interval.RewardInterval.sign` on the rows' features).

    Raises:
      ValueError: a reward without a verdict, or with one that does not allow to train, unless
        `config.accept_risk`; it names the failed checks and what would mend them.
    """
    require(reward, config.accept_risk, sign is not None)
    groups_mg = form_groups(codes_n, len(tokens_nl), config.group_size, seed)
    label_mp, weight_mp = pair_labels(reward.draws_sn, groups_mg, float(reward.mean.std()), config.weight)
    if sign is not None:
        # A draw's gamma may lie outside the set: a label that contradicts the whole interval does not train either.
        weight_mp = weight_mp * (signed_pairs(groups_mg, sign) * np.sign(label_mp - 0.5) > 0)
    reference_n = text_logprobs(decoder, reference, tokens_nl)
    order = epochs(len(groups_mg), config.groups, seed)

    def batch(i: int) -> Pairs:
        pick = order(i)
        rows = groups_mg[pick]
        return Pairs(tokens_nl[rows], reference_n[rows], label_mp[pick], weight_mp[pick].astype(np.float32))

    state = init_state(reference, stage.optimizer)
    return _run(stage, state, config, batch, seed, record, evaluators).params


def require(reward: Reward, accept_risk: bool, bounded: bool = False) -> None:
    """Refuses a reward that may not train: ValueError unless its verdict is `consistent`.

    Args:
      bounded: pairs are held back where the interval has no sign, so a `bounded` verdict will do.
    """
    if accept_risk:
        return
    if reward.verdict is None:
        raise ValueError(
            "reward.verdict: expected a verdict, got none; fit() attaches one, verdict(posterior, prepared) "
            "makes one, and accept_risk=True trains without"
        )
    if not (bounded and reward.verdict.status == "bounded"):
        reward.verdict.require()


def signed_pairs(groups_mg: np.ndarray, sign: Callable) -> np.ndarray:
    """+1 or -1 where a pair's order is the same over the whole interval, else 0, (m, p); ValueError where none's is."""
    first, second = pair_index(groups_mg.shape[1])
    a, b = groups_mg[:, first], groups_mg[:, second]
    sign_mp = np.asarray(sign(a.reshape(-1), b.reshape(-1))).reshape(a.shape) * ((a >= 0) & (b >= 0))
    if not sign_mp.any():
        raise ValueError("align: no pair has one sign over the whole interval of the reward; nothing to train on")
    return sign_mp.astype(np.float32)


def align_jointly(decoder: Decoder, stage: Stage, reference: Any, tokens_nl: np.ndarray, prepared: Prepared,
                  codes_n: np.ndarray | None, config: Dpo, joint: Joint, seed: int, record: Record,
                  evaluators=()) -> Any:  # fmt: skip
    """Joint training: the log's rows stream through the causal part while the policy learns from it.

    Returns:
      the final state: `params` is the policy, `causal` the `CausalState` it learned from.

    Raises:
      ValueError: a design that is not Gaussian, or rows of the log that were summed: neither is streamed yet.
    """
    if not FAMILIES[prepared.spec.family].conjugate or (why := needs_sampling(prepared.spec)):
        why = why if FAMILIES[prepared.spec.family].conjugate else f"got {prepared.spec.family!r}"
        raise ValueError(f"joint: expected the normal family and an f and terms with a closed form; {why}")
    if len(prepared.rows.outcome_n) != len(tokens_nl):
        raise ValueError(
            f"joint: expected one model row a log row, got {len(prepared.rows.outcome_n)} for {len(tokens_nl)}"
        )
    total = float(np.sum(prepared.rows.weight_n))
    if joint.warm_rows > total:
        raise ValueError(f"joint.warm_rows: expected at most the log's {total:g} rows, got {joint.warm_rows}")
    groups_mg = form_groups(codes_n, len(tokens_nl), config.group_size, seed)
    reference_n = text_logprobs(decoder, reference, tokens_nl)
    text = prepared.spec.blocks[0]
    features_nd = np.asarray(prepared.rows.columns_nq[:, text.start : text.stop], np.float32)
    group_order, rows_at = epochs(len(groups_mg), config.groups, seed), _row_batches(prepared.rows, joint.rows, seed)

    def batch(i: int) -> JointBatch:
        groups = groups_mg[group_order(i)]
        present = (groups >= 0).astype(np.float32)
        return JointBatch(rows_at(i), tokens_nl[groups], reference_n[groups], features_nd[groups], present)

    state = init_state(reference, stage.optimizer, init_causal(prepared.spec, rows_at(0), joint))
    return _run(stage, state, config, batch, seed, record, evaluators)


def _run(stage, state, config, batch, seed, record, evaluators):
    return run_stage(
        record.name, state, stage.step, {"beta": jnp.float32(config.beta)}, batch, stage.steps, record.workdir,
        checkpoint_every=record.checkpoint_every, evaluators=evaluators, on_step=record.on_step,
        key=jax.random.fold_in(jax.random.key(seed), 2),
    )  # fmt: skip


def _row_batches(rows: Rows, size: int, seed: int):
    """step -> Rows of fixed size; each row comes once, afterwards rows carry weight 0."""
    n = len(rows.outcome_n)
    order = np.random.default_rng(seed).permutation(n)
    single = Rows(
        *[np.asarray(f, np.int32 if k == "levels_nc" else np.float32) for k, f in zip(Rows._fields, rows, strict=True)]
    )

    def at(i: int) -> Rows:
        position = np.arange(i * size, (i + 1) * size)
        piece = single.take(order[np.minimum(position, n - 1)])
        return piece._replace(weight_n=piece.weight_n * (position < n))

    return at
