"""Memory of one gradient, from the compiler: nothing runs, so the numbers are the same on every machine of a kind.

Three steps of the same loss: every layer recomputed with all logits at once (what trainers call gradient
checkpointing), the same with streamed logits, and all streamed (`Decoder.chunk`). Counted are the temporary buffers;
parameters and their gradients, the same for all, are not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deconfound_jax import config
from deconfound_jax.align.logprobs import token_scores
from deconfound_jax.align.losses.likelihood import token_nll
from deconfound_jax.models.decoder import Decoder

SMOLLM2 = config.Decoder(
    width=576, layers=30, heads=9, kv_heads=3, inner=1536, vocabulary=49_152, length=16_384, norm="rms",
    norm_epsilon=1e-5, positions="rotary", rotary_base=100_000.0, activation="silu", gated=True, bias=False,
    qkv_bias=False, forbidden=(),
)  # fmt: skip
TINY = dataclasses.replace(SMOLLM2, width=48, layers=4, heads=3, kv_heads=1, inner=96, vocabulary=1024)
KINDS = ("checkpointed", "logits", "streamed")
CHUNK = 64  # positions; smaller ones save nothing more, larger ones are slower on a CPU, too


def full_loss(decoder: Decoder, params: Any, tokens_bl):
    """Mean negative log-likelihood from the logits of all positions."""
    logits_blv, _ = decoder.apply(params, tokens_bl)
    log_blv = jax.nn.log_softmax(logits_blv[:, :-1])
    return -jnp.take_along_axis(log_blv, tokens_bl[:, 1:, None], -1).mean()


def streamed_loss(decoder: Decoder, params: Any, tokens_bl):
    """The same, as the recipes have it."""
    return token_nll(token_scores(decoder, params, tokens_bl).logprob, tokens_bl).mean()


def step_of(kind: str, c: config.Decoder, chunk: int = CHUNK) -> tuple[Decoder, Callable]:
    """Decoder and loss of `checkpointed`, `logits` (only these are streamed) or `streamed`."""
    loss = full_loss if kind == "checkpointed" else streamed_loss
    c = dataclasses.replace(c, remat="layer", chunk=chunk if kind == "streamed" else 0)
    return Decoder(c, c.vocabulary), loss


def gradient(decoder: Decoder, loss: Callable) -> Callable:
    """(params, tokens) -> gradient, to be compiled."""
    return jax.grad(lambda params, tokens_bl: loss(decoder, params, tokens_bl))


def temporary_bytes(kind: str, c: config.Decoder, length: int, chunk: int = CHUNK, batch: int = 1) -> int:
    """Temporary bytes of one gradient of `batch` texts of `length` tokens."""
    decoder, loss = step_of(kind, c, chunk)
    tokens_bl = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    params = jax.eval_shape(decoder.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    compiled = jax.jit(gradient(decoder, loss)).lower(params, tokens_bl).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def memory(shapes: str, lengths: tuple[int, ...], vocabularies: tuple[int, ...]) -> dict[str, float]:
    """Megabytes of each kind by length and vocabulary, and how many times those streamed go into the others."""
    found = {}
    base = {"smollm2": SMOLLM2, "tiny": TINY}[shapes]
    for vocabulary in vocabularies:
        for length in lengths:
            c, at = dataclasses.replace(base, vocabulary=vocabulary), f"T{length}.V{vocabulary}"
            mb = {kind: temporary_bytes(kind, c, length) / 1e6 for kind in KINDS}
            found |= {f"memory.{kind}_mb.{at}": value for kind, value in mb.items()}
            found[f"memory.checkpoint_over_streamed.{at}"] = mb["checkpointed"] / mb["streamed"]
            found[f"memory.logits_over_streamed.{at}"] = mb["logits"] / mb["streamed"]
    return found
