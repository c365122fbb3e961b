"""Joint training: the log streams through the causal part while the policy learns from it, in one compiled step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from deconfound_jax.align.groups import epochs, form_groups
from deconfound_jax.align.joint import JointBatch, fill_pairs, fill_rollouts, fill_scored, init_causal, joint_step
from deconfound_jax.align.rounds import sample_groups
from deconfound_jax.causal.families import FAMILIES
from deconfound_jax.causal.fit import needs_sampling
from deconfound_jax.causal.spec import Prepared, Rows, Spec
from deconfound_jax.config import Align, Dpo, Dro, Features, Grpo, Joint, Kto
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.tokenizer import END
from deconfound_jax.recipes.preference import pair_knobs, pair_objective, pairs_of
from deconfound_jax.recipes.reference import text_logprobs
from deconfound_jax.recipes.rounds import OWN, featuriser, grpo_knobs, grpo_objective, prompt_batches, round_tokens
from deconfound_jax.recipes.singles import objective_of, start_of
from deconfound_jax.recipes.stage import Record, Stage, batch_of, train, trained_part
from deconfound_jax.recipes.texts import Texts, check_texts, different_texts
from deconfound_jax.structs import Scored
from deconfound_jax.train.step import adamw, jit_step

Config = Dpo | Kto | Dro | Grpo


def joint_stage(decoder: Decoder, spec: Spec, config: Config, joint: Joint, features: Features | None = None,
                dispatch: int = 1, accumulate: int = 1) -> Stage:  # fmt: skip
    """The compiled joint step. Its first `warm_rows / rows` steps move the causal part alone.

    Args:
      features: for `Grpo`, whose texts no log holds: how the frozen reference's states are pooled.
      dispatch: steps of one call; the steps in all are the next multiple of it.
      accumulate: microbatches of the texts.
    Raises:
      ValueError: a recipe that has no joint step.
    """
    if not isinstance(config, Config):
        name = batch_of(config)[0].partition(".")[0]
        raise ValueError(f"align.recipe: expected dpo, kto, dro or grpo for the joint step, got {name!r}")
    steps, updates = (config.rounds, config.updates) if isinstance(config, Grpo) else (config.steps, 1)
    optimizer, tokens = adamw(config.learning_rate, steps * updates), None
    if isinstance(config, Grpo):
        objective, new_tokens = grpo_objective(decoder, config), decoder.config.length - 1
        featurise, tokens = featuriser(decoder, features or Features()), round_tokens(config, new_tokens)
        fill = fill_rollouts(sample_groups(decoder, featurise, config, new_tokens, (END,)))
    elif isinstance(config, Dpo):
        objective, fill = pair_objective(decoder, config), fill_pairs(config.weight, config.label)
    else:
        precise = isinstance(config, Dro) and config.weight == "precision"
        objective, fill = objective_of(decoder, config), fill_scored("precision" if precise else "one")
    step = jit_step(joint_step(spec, joint, objective, optimizer, fill, updates, accumulate))
    steps += -(-joint.warm_rows // joint.rows) - 1
    steps += -steps % max(dispatch, 1)
    stage = Stage(step, optimizer, steps, batch=batch_of(config), accumulate=accumulate, tokens=tokens)
    return stage.on(None).dispatched(dispatch)


def align_jointly(decoder: Decoder, stage: Stage, reference: Any, texts: Texts, prepared: Prepared, config: Config,
                  align: Align, joint: Joint, seed: int, record: Record, evaluators=()) -> Any:  # fmt: skip
    """Trains policy and causal part together; whatever `config` is of decides what is learned from.

    Returns:
      the final state: `params` is the policy, `causal` the `CausalState` it learned from.

    Raises:
      ValueError: a design that is not Gaussian, or rows of the log that were summed: neither is streamed; texts or
        pairs that teach nothing, see `texts`.
    """
    check_streamed(prepared, len(texts.tokens_nl), joint)
    check_texts(texts, decoder, reference)
    features_nd = text_features(prepared)
    texts_at, picked_at = _batches(decoder, reference, texts, features_nd, config, align, seed)
    rows_at = row_batches(prepared.rows, joint.rows, seed)
    streamed_at, log_row_n = _streamed(len(texts.tokens_nl), joint.rows, seed), np.argsort(prepared.row_of_log_n)
    params, frozen = trained_part(reference, align.lora, seed)
    if isinstance(config, Grpo):
        scaling = ((k, prepared.scaling[f"features.{v}"]) for k, v in (("mean_d", "mean"), ("scale_d", "sd")))
        covariance_dd = np.atleast_2d(np.cov(features_nd, rowvar=False, ddof=0)).astype(np.float32)
        knobs = grpo_knobs(config) | {"reference": reference, "covariance": covariance_dd}
        knobs |= {name: jnp.asarray(value, jnp.float32) for name, value in scaling}
    elif isinstance(config, Dpo):
        knobs = pair_knobs(config)
    else:
        params, knobs = start_of(params, config)
        knobs |= {"reference": reference} if texts.prompt_nq is not None else {}

    def batch(i: int) -> JointBatch:
        return texts_at(i)._replace(rows=rows_at(i))

    def keys(i: int) -> list[str]:
        rows, new = streamed_at(i)
        return texts.keys(log_row_n[rows[new]]) + texts.keys(picked_at(i))

    causal = init_causal(prepared.spec, rows_at(0), joint)
    return train(stage, params, frozen | knobs, batch, seed, record, evaluators, causal, keys)


def text_features(prepared: Prepared) -> np.ndarray:
    """phi(x) (n, d) as the fit saw it, in the order of the log, which is not always that of the model's rows."""
    text = prepared.spec.blocks[0]
    return np.asarray(prepared.rows.columns_nq[prepared.row_of_log_n, text.start : text.stop], np.float32)


def check_streamed(prepared: Prepared, rows: int, joint: Joint) -> None:
    """ValueError for a design whose update is not exact, summed rows, or a warm-up longer than the log."""
    if not FAMILIES[prepared.spec.family].conjugate or (why := needs_sampling(prepared.spec)):
        why = why if FAMILIES[prepared.spec.family].conjugate else f"got {prepared.spec.family!r}"
        raise ValueError(f"joint: expected the normal family and an f and terms with a closed form; {why}")
    if len(prepared.rows.outcome_n) != rows:
        raise ValueError(f"joint: expected one model row a log row, got {len(prepared.rows.outcome_n)} for {rows}")
    total = float(np.sum(prepared.rows.weight_n))
    if joint.warm_rows > total:
        raise ValueError(f"joint.warm_rows: expected at most the log's {total:g} rows, got {joint.warm_rows}")


def row_batches(rows: Rows, size: int, seed: int) -> Callable[[int], Rows]:
    """step -> Rows of fixed size; each row comes once, afterwards rows carry weight 0."""
    streamed_at = _streamed(len(rows.outcome_n), size, seed)
    single = Rows(
        *[np.asarray(f, np.int32 if k == "levels_nc" else np.float32) for k, f in zip(Rows._fields, rows, strict=True)]
    )

    def at(i: int) -> Rows:
        places, new = streamed_at(i)
        piece = single.take(places)
        return piece._replace(weight_n=piece.weight_n * new)

    return at


def _streamed(n: int, size: int, seed: int) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """step -> `size` of the model's n rows, and which of them come for the first time."""
    order = np.random.default_rng(seed).permutation(n)

    def at(i: int) -> tuple[np.ndarray, np.ndarray]:
        position = np.arange(i * size, (i + 1) * size)
        return order[np.minimum(position, n - 1)], position < n

    return at


def _batches(decoder, reference, texts, features_nd, config, align, seed) -> tuple[Callable, Callable]:
    """step -> the texts' part of a `JointBatch`; step -> the rows of the log that they are of."""
    if isinstance(config, Grpo):
        prompts_at = prompt_batches(OWN if texts.prompt_nq is None else texts.prompt_nq, config.groups, seed)
        return lambda i: JointBatch(None, prompts_at(i)), lambda i: np.empty(0, int)  # texts that no log holds
    if isinstance(config, Dpo):
        groups_mg = form_groups(texts.within_n, len(texts.tokens_nl), config.group_size, seed)
        differ_mp = different_texts(texts, groups_mg, align.equal_texts == "drop").astype(np.float32)
        batch_of, order = pairs_of(decoder, reference, texts, groups_mg), epochs(len(groups_mg), config.groups, seed)

        def pairs(i: int) -> JointBatch:
            pick = order(i)
            found = batch_of(pick)._replace(weight_bp=differ_mp[pick])
            return JointBatch(None, found, features_nd[groups_mg[pick]], (groups_mg[pick] >= 0).astype(np.float32))

        return pairs, lambda i: groups_mg[order(i)]
    reference_n = text_logprobs(decoder, reference, texts.tokens_nl, texts.prompt_nq)
    order = epochs(len(texts.tokens_nl), config.batch, seed)

    def singles(i: int) -> JointBatch:
        pick = order(i)
        blank, prompt_bq = np.zeros(len(pick), np.float32), texts.prompt_nq
        prompt_bq = None if prompt_bq is None else prompt_bq[pick]
        scored = Scored(texts.tokens_nl[pick], reference_n[pick], blank, blank, blank, blank, prompt_bq)
        return JointBatch(None, scored, features_nd[pick], np.ones(len(pick), np.float32))

    return singles, order
