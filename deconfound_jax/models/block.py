"""A decoder's block, whole rows at once or a chunk of positions at a time.

A block's queries may be read in chunks, each recomputed in the backward pass (`Decoder.chunk`): keys and values of
the whole row are made first, then attention, output projection and MLP of one chunk at a time, so that the memory of
activations is a chunk's. The gradient is exact: what a chunk adds to earlier keys and values is summed over the
chunks. Chunks are iterations of a loop (side by side, a compiler keeps all of them alive); those of a span read the
keys up to the span's end only.
Source: Luo et al. 2506.03077 (StreamBP).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from deconfound_jax.config import Decoder as DecoderConfig
from deconfound_jax.models.layers import Dense, Norm, attention, causal_mask, head_width, rotate, whole_rows
from deconfound_jax.models.rows import keep_rows

# Each saves attention's work, down to a half of it, and costs a compilation and a copy of the layer's gradient.
_SPANS = 2
_ACTIVATION = {
    "gelu_tanh": nn.gelu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "silu": nn.silu,
}


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); Gemma 2 and 3 norm each branch's output too."""

    config: DecoderConfig

    def setup(self):
        c = self.config
        # The branches' outputs are scaled so that the residual stream keeps its variance in depth.
        into_stream = nn.initializers.variance_scaling(1 / (2 * c.layers), "fan_in", "truncated_normal")
        width, kv, inner = head_width(c), c.kv_heads or c.heads, c.inner or 4 * c.width
        self.attention_norm, self.mlp_norm = Norm(c), Norm(c)
        self.q_proj = Dense(c, c.heads * width, c.qkv_bias)
        self.k_proj, self.v_proj = Dense(c, kv * width, c.qkv_bias), Dense(c, kv * width, c.qkv_bias)
        self.o_proj = Dense(c, c.width, c.bias, into_stream)
        self.up_proj = Dense(c, inner, c.bias)
        self.down_proj = Dense(c, c.width, c.bias, into_stream)
        if c.gated:
            self.gate_proj = Dense(c, inner, c.bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = Norm(c, rms=True), Norm(c, rms=True)
        if c.norm_after:
            self.attention_out_norm, self.mlp_out_norm = Norm(c), Norm(c)

    def __call__(self, x_bld, tables, segments, local):
        """Reads whole rows; returns them and nothing beside (what `nn.scan` asks for).

        Args:
          tables: `rotary`'s.
          segments: None, or (segments, positions) (b, l) each, see `Decoder.__call__`.
          local: () bool, whether this layer has a window.
        """
        c, length, x_bld = self.config, x_bld.shape[1], keep_rows(x_bld)
        keys = self.keys_values(x_bld, tables, local)
        if not c.chunk or c.chunk >= length or self.is_initializing():
            return self.attend(x_bld, *keys, tables, segments, local, 0, length), None
        return self.stream(x_bld, keys, tables, segments, local), None

    def stream(self, x_bld, keys, tables, segments, local):
        """Block's output a chunk of positions at a time: a chunk is recomputed in the backward pass."""
        c, length = self.config, x_bld.shape[1]
        block, variables = Block(c, parent=None), self.variables
        read_bqhe = None
        if whole_rows(c, segments):
            read_bqhe = attention(c, self.queries(x_bld, tables, local), *keys, None)

        def one(seen, piece):
            start, x_bqd, tables, read_bqhe = piece
            if read_bqhe is not None:
                return block.apply(variables, x_bqd, read_bqhe, method="finish")
            seen_keys = [key_blhe[:, :seen] for key_blhe in keys]
            return block.apply(variables, x_bqd, *seen_keys, tables, segments, local, start, seen, method="attend")

        pieces = []
        for first, last, size in _spans(length, c.chunk):
            rows = jax.tree.map(lambda a: _split(a[:, first:last], size), (x_bld, tables, read_bqhe))  # noqa: B023
            body = jax.checkpoint(functools.partial(one, last), prevent_cse=False)
            out_nbqd = jax.lax.map(body, (jnp.arange(first, last, size), *rows))
            pieces.append(rearrange(out_nbqd, "n b q d -> b (n q) d"))
        return jnp.concatenate(pieces, 1)

    def keys_values(self, x_bld, tables, local):
        """Keys, rotated, and values of every position, (b, l, h, e) each."""
        normed_bld, e = self.attention_norm(x_bld), head_width(self.config)
        key_blhe, value_blhe = (
            rearrange(project(normed_bld), "b l (h e) -> b l h e", e=e) for project in (self.k_proj, self.v_proj)
        )
        if self.config.qk_norm:
            key_blhe = self.k_norm(key_blhe)
        return rotate(key_blhe, tables, local), value_blhe

    def attend(self, x_bqd, key_bkhe, value_bkhe, tables, segments, local, start, seen):
        """Block's output at the positions from `start`, which read the first `seen` keys up to their own."""
        query_bqhe = self.queries(x_bqd, tables, local)
        mask = causal_mask(self.config, start, x_bqd.shape[1], seen, segments, local)
        return self.finish(x_bqd, attention(self.config, query_bqhe, key_bkhe, value_bkhe, mask))

    def queries(self, x_bqd, tables, local):
        """Queries, rotated, (b, q, h, e)."""
        query_bqhe = rearrange(self.q_proj(self.attention_norm(x_bqd)), "b q (h e) -> b q h e", h=self.config.heads)
        if self.config.qk_norm:
            query_bqhe = self.q_norm(query_bqhe)
        return rotate(query_bqhe, tables, local)

    def finish(self, x_bqd, read_bqhe):
        """What attention read into the stream, then the MLP."""
        c = self.config
        out_bqd = self.o_proj(rearrange(read_bqhe, "b q h e -> b q (h e)"))
        x_bqd = x_bqd + (self.attention_out_norm(out_bqd) if c.norm_after else out_bqd)
        normed_bqd = self.mlp_norm(x_bqd)
        gate = self.gate_proj(normed_bqd) if c.gated else None
        out_bqd = self.down_proj(_activated(c, self.up_proj(normed_bqd), gate))
        return x_bqd + (self.mlp_out_norm(out_bqd) if c.norm_after else out_bqd)


# As in `layers.Norm`: only its arguments are kept for the backward pass.
@functools.partial(jax.checkpoint, static_argnums=0, prevent_cse=False)
def _activated(c: DecoderConfig, up, gate):
    activation = _ACTIVATION[c.activation]
    return activation(up) if gate is None else activation(gate) * up


def _spans(length: int, size: int) -> list[tuple[int, int, int]]:
    """First and last position of each span, and its chunks' size; what is left over is a span of one chunk."""
    chunks = length // size
    bounds = np.linspace(0, chunks, min(_SPANS, chunks) + 1).round().astype(int) * size
    spans = [(int(first), int(last), size) for first, last in zip(bounds[:-1], bounds[1:], strict=True)]
    return spans + [(chunks * size, length, length - chunks * size)] * (chunks * size < length)


def _split(a, size: int):
    """(b, n size, ...) -> (n, b, size, ...); rows that all share (1, ...) stay shared."""
    return jnp.moveaxis(a.reshape(a.shape[0], -1, size, *a.shape[2:]), 1, 0)
