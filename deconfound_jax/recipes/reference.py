"""SFT: the reference policy, trained on the log's texts and nothing of their outcomes.

train_reference(decoder, stage, tokens_nl, config, seed, record)                # a decoder of the log's own
tune_reference(decoder, stage, published, texts, config, lora, seed, record)    # a published model, behind prompts
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from deconfound_jax.align.groups import epochs
from deconfound_jax.align.logprobs import group_scores, sequence_logprob
from deconfound_jax.align.scored import sft_objective
from deconfound_jax.config import Features, Lora, Sft
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.features import pool
from deconfound_jax.models.rows import ROWS
from deconfound_jax.models.tokenizer import PAD
from deconfound_jax.recipes.stage import Record, Stage, batch_of, mesh_under, train, trained_part
from deconfound_jax.recipes.texts import Texts, check_texts
from deconfound_jax.structs import Scored
from deconfound_jax.train import hosts
from deconfound_jax.train.step import adamw, make_step

_CHUNK = 256  # texts a compiled pass over a log sees, at least; fixed, so one shape is compiled


def sft_stage(decoder: Decoder, config: Sft, accumulate: int = 1) -> Stage:
    """The compiled step of maximum likelihood: mean nats per target token."""
    optimizer = adamw(config.learning_rate, config.steps)
    step = make_step(sft_objective(decoder), optimizer, accumulate=accumulate)
    return Stage(step, optimizer, config.steps, batch=batch_of(config), accumulate=accumulate).on(None)


def train_reference(
    decoder: Decoder, stage: Stage, tokens_nl: np.ndarray, config: Sft, seed: int, record: Record
) -> Any:
    """Trains a decoder from scratch on texts (n, l); returns its parameters.

    Raises:
      ValueError: a text without a target token, or of another vocabulary.
    """
    params = decoder.init(jax.random.fold_in(jax.random.key(seed), 0), jnp.asarray(tokens_nl[:1]))
    return _likeliest(decoder, stage, params, {}, Texts(tokens_nl), config, seed, record)


def tune_reference(decoder: Decoder, stage: Stage, published: Any, texts: Texts, config: Sft, lora: Lora, seed: int,
                   record: Record) -> dict[str, Any]:  # fmt: skip
    """Trains a published model on the log's texts, so that preferences start from a policy that writes such texts.

    Args:
      published: its variables, {"params": ...}.
      texts: behind prompts, or whole.
      lora: with a rank, adapters are trained and the model stays as it is.

    Returns:
      What was trained: {"params": ...}, or {"lora": ...}, which `models.lora.merge_lora` makes a reference.

    Raises:
      ValueError: a text without a target token, or of another vocabulary.
    """
    params, frozen = trained_part(published, lora, seed)
    return _likeliest(decoder, stage, params, frozen, texts, config, seed, record)


def _likeliest(decoder, stage, params, frozen, texts, config, seed, record):
    check_texts(texts, decoder, params)
    order = epochs(len(texts.tokens_nl), config.batch, seed)

    def batch(i: int) -> Scored:
        pick = order(i)
        prompt_bq = None if texts.prompt_nq is None else texts.prompt_nq[pick]
        return Scored(texts.tokens_nl[pick], None, None, None, None, np.ones(len(pick), np.float32), prompt_bq)

    return train(stage, params, frozen, batch, seed, record, keys=lambda i: texts.keys(order(i)), stream=1).params


def text_logprobs(
    decoder: Decoder, params: Any, tokens_nl: np.ndarray, prompt_nq: np.ndarray | None = None
) -> np.ndarray:
    """Log-probability of each text (n,), in nats; with prompts, of what stands behind them."""
    arrays = (tokens_nl,) if prompt_nq is None else (tokens_nl, prompt_nq)
    return in_chunks(_logprob, decoder, params, arrays)


def decoder_features(decoder: Decoder, params: Any, tokens_nl: np.ndarray, config: Features) -> np.ndarray:
    """phi(x) = pooled states of the frozen reference, (n, d) float32; see `models.features.pool`.

    Args:
      config: `states` (input embeddings, last hidden states, or both side by side) and `pooling`.
    """
    return in_chunks(_pooled, decoder, params, (tokens_nl,), config.states, config.pooling)


def pooled_states(decoder: Decoder, params: Any, tokens_bl, states: str, pooling: str):
    """phi(x) (b, d) inside a compiled function; see `decoder_features`."""
    parts = []
    if states != "hidden":
        parts.append(decoder.apply(params, tokens_bl, method="embed"))
    if states != "embeddings":
        parts.append(decoder.apply(params, tokens_bl, method="hidden"))
    return pool(jnp.concatenate(parts, -1), tokens_bl != PAD, pooling)


def in_chunks(function, decoder, params, arrays, *static):
    """The function's rows on the host; where the parameters lie on a mesh, its devices share the texts of a chunk."""
    found, n, chunk, mesh = [], len(arrays[0]), _CHUNK, mesh_under(params)
    if mesh is not None:
        lies = NamedSharding(mesh, ROWS)
        chunk = -(-chunk // (shares := mesh.shape["data"] * mesh.shape["fsdp"])) * shares
    for start in range(0, n, chunk):
        pieces = [array[start : start + chunk] for array in arrays]
        rows = len(pieces[0])
        padded = [np.concatenate([piece, np.repeat(piece[:1], chunk - rows, axis=0)]) for piece in pieces]
        padded = padded if mesh is None else [hosts.place(piece, lies) for piece in padded]
        found.append(hosts.fetch(function(decoder, params, *static, *padded))[:rows])
    return np.concatenate(found)


@functools.partial(jax.jit, static_argnums=0)
def _logprob(decoder, params, tokens_bl, prompt_bq=None):
    if prompt_bq is None:
        return sequence_logprob(decoder, params, tokens_bl)
    return group_scores(decoder, params, tokens_bl[:, None], prompt_bq).logprob.sum((1, 2))


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _pooled(decoder, params, states, pooling, tokens_bl):
    return pooled_states(decoder, params, tokens_bl, states, pooling)
