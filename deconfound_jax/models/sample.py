"""Texts drawn from a decoder inside one compiled graph."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from deconfound_jax.models.decoder import Decoder, decode_step, empty_cache
from deconfound_jax.models.tokenizer import BEGIN, END, PAD


def sample(decoder: Decoder, params: Any, key, n: int, length: int, prompt_bl=None, temperature=1.0):
    """Draws n texts token by token, with cached keys and values.

        token_t = argmax(logits_t + temperature * Gumbel),   that is, a draw from softmax(logits_t / temperature)

    Args:
      n, length: rows and positions, BEGIN counted; both static.
      prompt_bl: (n, <= length) int tokens to force, BEGIN first, PAD where free; PAD to the right.
      temperature: may be traced; 0 is greedy.
    Returns:
      tokens (n, length) int32, PAD after END (no END where the length ran out), and log-probability (n,) in nats under
      the untempered model, of the drawn tokens only: END counts, forced tokens do not.

        tokens_nl, logprob_n = sample(decoder, params, key, n=8, length=24)
    """
    prompt_nl = _prompt(prompt_bl, n, length)

    def next_token(carry, at):
        cache, token_n, done_n = carry
        position, forced_n = at
        logits_nv, cache = decode_step(decoder, params, token_n, position, cache)
        noise_nv = jax.random.gumbel(jax.random.fold_in(key, position), logits_nv.shape)
        drawn_n = jnp.argmax(logits_nv + temperature * noise_nv, axis=-1).astype(jnp.int32)
        drawn_n = jnp.where(done_n, PAD, drawn_n)
        token_n = jnp.where(forced_n != PAD, forced_n, drawn_n)
        logprob_n = jnp.take_along_axis(jax.nn.log_softmax(logits_nv), token_n[:, None], axis=1)[:, 0]
        counts_n = ~done_n & (forced_n == PAD)
        return (cache, token_n, done_n | (token_n == END)), (token_n, jnp.where(counts_n, logprob_n, 0.0))

    start = (empty_cache(decoder, n, length), prompt_nl[:, 0], jnp.zeros(n, bool))
    _, (tokens_ln, logprob_ln) = jax.lax.scan(next_token, start, (jnp.arange(length - 1), prompt_nl[:, 1:].T))
    return jnp.concatenate([prompt_nl[:, :1], tokens_ln.T], axis=1), logprob_ln.sum(0)


def _prompt(prompt_bl, n: int, length: int):
    free_nl = jnp.full((n, length), PAD, jnp.int32).at[:, 0].set(BEGIN)
    if prompt_bl is None:
        return free_nl
    chex.assert_rank(prompt_bl, 2)
    if prompt_bl.shape[0] != n or prompt_bl.shape[1] > length:
        raise ValueError(f"prompt: expected shape ({n}, at most {length}), got {prompt_bl.shape}")
    return free_nl.at[:, : prompt_bl.shape[1]].set(prompt_bl)
