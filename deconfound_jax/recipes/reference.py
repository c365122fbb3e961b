"""SFT: the reference policy, trained on the log's texts and nothing of their outcomes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deconfound_jax.align.groups import epochs
from deconfound_jax.align.logprobs import check_targets, group_scores, sequence_logprob, token_scores
from deconfound_jax.align.losses.likelihood import token_nll
from deconfound_jax.config import Features, Sft
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.features import pool
from deconfound_jax.models.tokenizer import PAD
from deconfound_jax.recipes.stage import Record, Stage
from deconfound_jax.train.loop import run_stage
from deconfound_jax.train.step import adamw, init_state, make_step

_CHUNK = 256  # texts a compiled pass over a log sees; fixed, so one shape is compiled


def sft_stage(decoder: Decoder, config: Sft) -> Stage:
    """The compiled step of maximum likelihood: mean nats per target token."""

    def objective(params, frozen, batch, key):
        loss_b = token_nll(token_scores(decoder, params, batch).logprob, batch)
        return loss_b, jnp.ones_like(loss_b), 0.0, {}

    optimizer = adamw(config.learning_rate, config.steps)
    return Stage(make_step(objective, optimizer), optimizer, config.steps)


def train_reference(
    decoder: Decoder, stage: Stage, tokens_nl: np.ndarray, config: Sft, seed: int, record: Record
) -> Any:
    """Trains a decoder from scratch on texts (n, l); returns its parameters.

    Raises:
      ValueError: a text without a target token.
    """
    check_targets(tokens_nl)
    key = jax.random.key(seed)
    params = decoder.init(jax.random.fold_in(key, 0), jnp.asarray(tokens_nl[:1]))
    order = epochs(len(tokens_nl), config.batch, seed)
    state = run_stage(
        record.name, init_state(params, stage.optimizer), stage.step, (), lambda i: tokens_nl[order(i)], stage.steps,
        record.workdir, checkpoint_every=record.checkpoint_every, on_step=record.on_step,
        key=jax.random.fold_in(key, 1),
    )  # fmt: skip
    return state.params


def text_logprobs(
    decoder: Decoder, params: Any, tokens_nl: np.ndarray, prompt_nq: np.ndarray | None = None
) -> np.ndarray:
    """Log-probability of each text (n,), in nats; with prompts, of what stands behind them."""
    arrays = (tokens_nl,) if prompt_nq is None else (tokens_nl, prompt_nq)
    return _chunks(_logprob, decoder, params, arrays)


def decoder_features(decoder: Decoder, params: Any, tokens_nl: np.ndarray, config: Features) -> np.ndarray:
    """phi(x) = pooled states of the frozen reference, (n, d) float32; see `models.features.pool`.

    Args:
      config: `states` (input embeddings, last hidden states, or both side by side) and `pooling`.
    """
    return _chunks(_pooled, decoder, params, (tokens_nl,), config.states, config.pooling)


def pooled_states(decoder: Decoder, params: Any, tokens_bl, states: str, pooling: str):
    """phi(x) (b, d) inside a compiled function; see `decoder_features`."""
    parts = []
    if states != "hidden":
        parts.append(decoder.apply(params, tokens_bl, method="embed"))
    if states != "embeddings":
        parts.append(decoder.apply(params, tokens_bl, method="hidden"))
    return pool(jnp.concatenate(parts, -1), tokens_bl != PAD, pooling)


def _chunks(function, decoder, params, arrays, *static):
    found, n = [], len(arrays[0])
    for start in range(0, n, _CHUNK):
        pieces = [array[start : start + _CHUNK] for array in arrays]
        rows = len(pieces[0])
        padded = [np.concatenate([piece, np.repeat(piece[:1], _CHUNK - rows, axis=0)]) for piece in pieces]
        found.append(np.asarray(function(decoder, params, *static, *padded))[:rows])
    return np.concatenate(found)


@functools.partial(jax.jit, static_argnums=0)
def _logprob(decoder, params, tokens_bl, prompt_bq=None):
    if prompt_bq is None:
        return sequence_logprob(decoder, params, tokens_bl)
    return group_scores(decoder, params, tokens_bl[:, None], prompt_bq).logprob.sum((1, 2))


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _pooled(decoder, params, states, pooling, tokens_bl):
    return pooled_states(decoder, params, tokens_bl, states, pooling)
