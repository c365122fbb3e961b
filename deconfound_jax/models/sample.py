"""Texts drawn from a decoder inside one compiled graph."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from deconfound_jax.models.cache import lay_out, prefill, step
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.filters import draw, filter_logits
from deconfound_jax.models.tokenizer import BEGIN, END, PAD


class Generated(NamedTuple):
    """What `generate` returns: (b, n, new_tokens) each, n samples of b prompts.

    tokens: int32, the stop token included, PAD after it. mask: True at drawn tokens. logprob: nats, 0 outside the
    mask, of each drawn token under the model itself, that is without penalty, temperature and filters: the pi of a
    policy gradient. It is the probability of the draw only where those are off.
    """

    tokens: jax.Array
    logprob: jax.Array
    mask: jax.Array


def generate(
    decoder: Decoder,
    params: Any,
    key,
    prompt_bl,
    new_tokens: int,
    samples: int = 1,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    *,
    stop: Sequence[int],
) -> Generated:
    """Continues prompts, until a stop token, `new_tokens`, or `Decoder.length` positions.

    A prompt is read once for all its samples. A sample's random numbers depend on the key, its prompt's row and its
    own number alone: not on other rows, not on their padding or their end.

    Args:
      params: with a collection "lora" or without.
      prompt_bl: int, PAD left or right. A row without a token yields none.
      new_tokens, samples, stop: static.
      temperature, top_k, top_p, min_p, repetition_penalty: scalars, may be traced, see `filters.filter_logits`;
        temperature 0 is greedy. The penalty counts the prompt's tokens too.

        texts = generate(decoder, params, key, prompt_bl, 64, samples=4, top_p=0.9, stop=lm.tokenizer.stop).tokens
    """
    knobs = (temperature, top_k, top_p, min_p, repetition_penalty)
    done_b = jnp.zeros(len(prompt_bl), bool)
    return _generate(
        decoder, params, key, prompt_bl, done_b, knobs, new_tokens, samples, tuple(stop), decoder.config.length
    )


def sample(decoder: Decoder, params: Any, key, n: int, length: int, prompt_bl=None, temperature=1.0):
    """Draws n whole texts of an own vocabulary: BEGIN first, END last.

        token_t ~ softmax(logits_t / temperature)

    Args:
      n, length: rows and positions, BEGIN counted; both static.
      prompt_bl: (n, <= length) int tokens to force, BEGIN first, PAD where free; PAD to the right.
      temperature: may be traced; 0 is greedy.
    Returns:
      tokens (n, length) int32, PAD after END (no END where the length ran out), and log-probability (n,) in nats under
      the untempered model, of the drawn tokens only: END counts, forced tokens do not.

        tokens_nl, logprob_n = sample(decoder, params, key, n=8, length=24)
    """
    if prompt_bl is None:  # one prompt, read once
        prompt_bl, samples = jnp.full((1, 1), BEGIN, jnp.int32), n
    else:
        prompt_bl, samples = _begun(prompt_bl, n, length), 1
    over_b = jnp.any(prompt_bl == END, axis=1)
    knobs = (temperature, 0, 1.0, 0.0, 1.0)
    drawn = _generate(decoder, params, key, prompt_bl, over_b, knobs, length - 1, samples, (END,), length)
    drawn_nm = rearrange(drawn.tokens, "b s m -> (b s) m")
    prompt_nl = jnp.pad(prompt_bl, ((0, 0), (0, length - prompt_bl.shape[1])), constant_values=PAD)
    prompt_nl = repeat(prompt_nl, "b l -> (b s) l", s=samples)
    place_nl = jnp.arange(length)[None] - jnp.sum(prompt_nl != PAD, axis=1, keepdims=True)
    free_nl = jnp.take_along_axis(drawn_nm, jnp.clip(place_nl, 0, length - 2), axis=1)
    return jnp.where(place_nl < 0, prompt_nl, free_nl), rearrange(drawn.logprob, "b s m -> (b s) m").sum(1)


def bucket(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `length`: what is padded to buckets compiles once for each.

    Raises:
      ValueError: none does.
    """
    holds = [size for size in sorted(buckets) if size >= length]
    if not holds:
        raise ValueError(f"buckets: expected one of at least {length}, got {tuple(buckets)}")
    return holds[0]


def pad_prompts(tokens_bl, buckets: Sequence[int]) -> np.ndarray:
    """Prompts (b, l) as int32, PAD anywhere, moved to the left edge of rows as wide as the longest one's bucket.

    pad_prompts([[-1, 5, 6]], buckets=(4, 8))  # [[5, 6, -1, -1]]
    """
    tokens_bl = np.asarray(tokens_bl, np.int32)
    longest = int((tokens_bl != PAD).sum(1).max())
    order_bl = np.argsort(tokens_bl == PAD, axis=1, kind="stable")
    found = np.full((len(tokens_bl), bucket(longest, buckets)), PAD, np.int32)
    found[:, :longest] = np.take_along_axis(tokens_bl, order_bl, 1)[:, :longest]
    return found


@functools.partial(jax.jit, static_argnames=("decoder", "new_tokens", "samples", "stop", "length"))
def _generate(decoder, params, key, prompt_bl, done_b, knobs, new_tokens, samples, stop, length) -> Generated:
    """`generate`, `done_b` rows drawing nothing and none going beyond `length` positions."""
    chex.assert_rank(prompt_bl, 2)
    if new_tokens < 1 or samples < 1:
        raise ValueError(f"new_tokens, samples: expected at least 1 of each, got {new_tokens} and {samples}")
    prompt_bl, prompts = jnp.asarray(prompt_bl, jnp.int32), len(prompt_bl)
    history_rl = repeat(prompt_bl, "b l -> (b n) l", n=samples)
    keys_r = jax.vmap(lambda b, n: jax.random.fold_in(jax.random.fold_in(key, b), n))(
        repeat(jnp.arange(prompts), "b -> (b n)", n=samples), repeat(jnp.arange(samples), "n -> (b n)", b=prompts)
    )
    length_r, weights = jnp.sum(history_rl != PAD, axis=1), lay_out(decoder, params)
    done_r = repeat(done_b, "b -> (b n)", n=samples) | (length_r == 0) | (length_r >= length)

    def choose(logits_bnv, t, tokens_rm, logprob_rm, done_r):
        logits_rv = rearrange(logits_bnv, "b n v -> (b n) v")
        token_r = _choose(logits_rv, jnp.concatenate([history_rl, tokens_rm], 1), keys_r, t, knobs)
        logprob_r = jnp.take_along_axis(logits_rv, token_r[:, None], 1)[:, 0] - jax.nn.logsumexp(logits_rv, axis=1)
        tokens_rm = tokens_rm.at[:, t].set(jnp.where(done_r, PAD, token_r))
        logprob_rm = logprob_rm.at[:, t].set(jnp.where(done_r, 0.0, logprob_r))
        stops_r = jnp.isin(token_r, jnp.asarray(stop, jnp.int32))
        return tokens_rm, logprob_rm, done_r | stops_r | (length_r + t + 1 >= length)

    def more(carry):
        t, (_, _, done_r), _ = carry
        return (t < new_tokens) & ~done_r.all()

    def one(carry):
        t, (tokens_rm, logprob_rm, done_r), cache = carry
        token_bn = rearrange(tokens_rm[:, t - 1], "(b n) -> b n", b=prompts)
        logits_bnv, cache = step(decoder, weights, token_bn, cache)
        return t + 1, choose(logits_bnv, t, tokens_rm, logprob_rm, done_r), cache

    logits_bv, cache = prefill(decoder, params, prompt_bl, new_tokens, samples)
    free_rm = jnp.full((prompts * samples, new_tokens), PAD, jnp.int32)
    chosen = choose(repeat(logits_bv, "b v -> b n v", n=samples), 0, free_rm, jnp.zeros(free_rm.shape), done_r)
    _, (tokens_rm, logprob_rm, _), _ = jax.lax.while_loop(more, one, (jnp.int32(1), chosen, cache))
    tokens, logprob = (rearrange(leaf, "(b n) m -> b n m", b=prompts) for leaf in (tokens_rm, logprob_rm))
    return Generated(tokens, logprob, tokens != PAD)


def _choose(logits_rv, history_rl, keys_r, t, knobs):
    """The next token of every row, (r,) int32."""
    score_rv = filter_logits(logits_rv, history_rl, *knobs)
    return jax.lax.cond(
        knobs[0] > 0,
        lambda: draw(jax.vmap(jax.random.fold_in, (0, None))(keys_r, t), score_rv),
        lambda: jnp.argmax(score_rv, axis=1).astype(jnp.int32),
    )


def _begun(prompt_bl, n: int, length: int):
    chex.assert_rank(prompt_bl, 2)
    if prompt_bl.shape[0] != n or prompt_bl.shape[1] > length:
        raise ValueError(f"prompt: expected shape ({n}, at most {length}), got {prompt_bl.shape}")
    return jnp.asarray(prompt_bl, jnp.int32).at[:, 0].set(BEGIN)
