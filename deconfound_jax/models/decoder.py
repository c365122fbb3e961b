"""A small pre-norm causal transformer, and the same blocks one token at a time.

    d = Decoder(config.Decoder(), vocabulary=tokenizer.size)
    params = d.init(key, tokens_bl)
    logits_blv, hidden_bld = d.apply(params, tokens_bl)

`params` is everywhere what `init` returns, so `d.apply` is the policy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from deconfound_jax.config import Decoder as DecoderConfig
from deconfound_jax.models.tokenizer import BEGIN, PAD

# Finite, so that 0 * log-probability stays 0; far below any logit, so the probability is exactly 0.
_NEVER = -1e9


class Cache(NamedTuple):
    """Keys and values of the tokens read so far, one pair a layer; False in `visible_bl` hides a position."""

    keys_blhe: tuple[jax.Array, ...]
    values_blhe: tuple[jax.Array, ...]
    visible_bl: jax.Array


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_bqd, mask_bqk, past=None, position=0):
        """Reads q tokens that sit at `position`; returns them and the (keys, values) they may attend to.

        Without `past` these are the keys of the q tokens themselves; with it, `past` with the new ones written in.
        """
        c = self.config
        dtype = jnp.dtype(c.dtype)
        # The branches' outputs are scaled so that the residual stream keeps its variance in depth.
        into_stream = nn.initializers.variance_scaling(1 / (2 * c.layers), "fan_in", "truncated_normal")

        qkv = nn.Dense(3 * c.width, dtype=dtype, name="qkv")(nn.LayerNorm(dtype=dtype, name="norm_attention")(x_bqd))
        query_bqhe, key_bkhe, value_bkhe = rearrange(qkv, "b q (three h e) -> three b q h e", three=3, h=c.heads)
        if past is not None:
            key_bkhe, value_bkhe = (
                jax.lax.dynamic_update_slice_in_dim(old, new, position, axis=1)
                for old, new in zip(past, (key_bkhe, value_bkhe), strict=True)
            )
        read_bqhe = _attend(query_bqhe, key_bkhe, value_bkhe, mask_bqk)
        read_bqd = rearrange(read_bqhe, "b q h e -> b q (h e)")
        x_bqd = x_bqd + nn.Dense(c.width, dtype=dtype, kernel_init=into_stream, name="out")(read_bqd)

        inner = nn.Dense(4 * c.width, dtype=dtype, name="up")(nn.LayerNorm(dtype=dtype, name="norm_mlp")(x_bqd))
        x_bqd = x_bqd + nn.Dense(c.width, dtype=dtype, kernel_init=into_stream, name="down")(nn.gelu(inner))
        return x_bqd, (key_bkhe, value_bkhe)


class Decoder(nn.Module):
    """Learned positions, pre-norm blocks, output embedding tied to the input's.

        p(token_t | tokens before t) = softmax(E norm(h_{t-1})),   0 for PAD and BEGIN

    PAD and BEGIN have probability zero, so what is sampled is a text and log-probabilities of texts sum to one.
    """

    config: DecoderConfig
    vocabulary: int

    def setup(self):
        c = self.config
        if c.width % c.heads:
            raise ValueError(f"Decoder.heads: expected a divisor of width {c.width}, got {c.heads}")
        small = nn.initializers.normal(0.02)
        self.embedding = nn.Embed(self.vocabulary, c.width, embedding_init=small)
        self.positions = self.param("positions", small, (c.length, c.width))
        self.blocks = [Block(c) for _ in range(c.layers)]
        self.norm = nn.LayerNorm()

    def __call__(self, tokens_bl):
        """Tokens (b, l) int, PAD to the right -> next token's logits (b, l, v), hidden (b, l, d); both float32."""
        chex.assert_rank(tokens_bl, 2)
        return self.read(self.embed(tokens_bl), tokens_bl != PAD)

    def embed(self, tokens_bl, start=0):
        """Token plus position, float32; the tokens sit at `start`, start + 1, ..."""
        length = tokens_bl.shape[1]
        if length > self.config.length:
            raise ValueError(f"tokens: expected at most Decoder.length = {self.config.length} positions, got {length}")
        position_ld = jax.lax.dynamic_slice_in_dim(self.positions, start, length)
        return self.embedding(tokens_bl) + position_ld[None]

    def read(self, x_bld, visible_bl):
        """Embedded tokens -> (logits, hidden), every position seeing itself and the visible ones before it."""
        mask_bll = nn.make_causal_mask(visible_bl, dtype=bool)[:, 0] & visible_bl[:, None, :]
        x_bld = x_bld.astype(self.config.dtype)
        for block in self.blocks:
            x_bld, _ = block(x_bld, mask_bll)
        return self.predict(x_bld)

    def step(self, token_b, position, cache: Cache):
        """One token at `position` (traced) -> (logits (b, v), cache with it)."""
        visible_bl = cache.visible_bl.at[:, position].set(token_b != PAD)
        x_bld = self.embed(token_b[:, None], position).astype(self.config.dtype)
        pasts = []
        for block, *past in zip(self.blocks, cache.keys_blhe, cache.values_blhe, strict=True):
            x_bld, past = block(x_bld, visible_bl[:, None, :], past, position)
            pasts.append(past)
        logits_blv, _ = self.predict(x_bld)
        keys, values = zip(*pasts, strict=True)
        return logits_blv[:, 0], Cache(keys, values, visible_bl)

    def predict(self, x_bld):
        hidden_bld = self.norm(x_bld.astype(jnp.float32))
        table_vd, query_bld = (a.astype(self.config.dtype) for a in (self.embedding.embedding, hidden_bld))
        logits_blv = jnp.einsum("bld,vd->blv", query_bld, table_vd, preferred_element_type=jnp.float32)
        return logits_blv.at[..., jnp.array([PAD, BEGIN])].set(_NEVER), hidden_bld


def decode_step(decoder: Decoder, params: Any, token_b, position, cache: Cache):
    """The next token's logits, from one new token and the cache of those before it.

    Args:
      token_b: (b,) int tokens at `position`; `position` may be traced.
      cache: of `empty_cache`, or of the step before.
    Returns:
      logits (b, v) float32, equal to `apply` on the whole prefix, and the cache with this token in it.
    """
    return decoder.apply(params, token_b, position, cache, method="step")


def empty_cache(decoder: Decoder, batch: int, length: int) -> Cache:
    """A cache of `length` positions in which nothing has been read."""
    c = decoder.config
    if length > c.length:
        raise ValueError(f"length: expected at most Decoder.length = {c.length}, got {length}")
    # One buffer each: aliases of one array could not be updated in place.
    shape = (batch, length, c.heads, c.width // c.heads)
    keys, values = (tuple(jnp.zeros(shape, c.dtype) for _ in range(c.layers)) for _ in range(2))
    return Cache(keys, values, jnp.zeros((batch, length), bool))


def count_parameters(params: Any) -> int:
    """Numbers in a tree of arrays (or of shapes, from `jax.eval_shape`)."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _attend(query_bqhe, key_bkhe, value_bkhe, mask_bqk):
    scale = query_bqhe.shape[-1] ** -0.5
    score_bhqk = jnp.einsum("bqhe,bkhe->bhqk", query_bqhe, key_bkhe, preferred_element_type=jnp.float32) * scale
    # A row of padding sees nothing: with a finite mask its weights are uniform, not NaN.
    weight_bhqk = jax.nn.softmax(jnp.where(mask_bqk[:, None], score_bhqk, _NEVER), axis=-1)
    return jnp.einsum("bhqk,bkhe->bqhe", weight_bhqk.astype(value_bkhe.dtype), value_bkhe)
