"""What a decoder is made of: norm, dense with its low-rank addition, rotary positions, attention, the block.

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

# Finite, so that 0 * log-probability stays 0; far below any logit, so the probability is exactly 0.
NEVER = -1e9
# Each saves attention's work, down to a half of it, and costs a compilation and a copy of the layer's gradient.
_SPANS = 2
_ACTIVATION = {
    "gelu_tanh": nn.gelu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "silu": nn.silu,
}


def cast(c: DecoderConfig):
    """The dtype of computation."""
    return jnp.dtype(c.dtype)


def param_dtype(c: DecoderConfig):
    """The dtype of parameters, logits and reductions: float32, or float64 where everything is."""
    return jnp.promote_types(cast(c), jnp.float32)


class Norm(nn.Module):
    """Layer norm or RMS norm over the last axis, reduced in float32 at least.

        layer: (x - mean) / sd * scale + bias,     rms: x / sqrt(mean x^2) * scale

    Sources: Ba et al. 1607.06450; Zhang and Sennrich 1910.07467.
    """

    config: DecoderConfig
    rms: bool = False  # whatever the config says: of queries and keys

    @nn.compact
    def __call__(self, x):
        c = self.config
        stored, rms = param_dtype(c), self.rms or c.norm == "rms"
        ones = nn.initializers.zeros if c.norm_plus_one and rms else nn.initializers.ones
        scale_d = self.param("scale", ones, (x.shape[-1],), stored).reshape((1,) * (x.ndim - 1) + (-1,))
        wide = x.astype(stored)
        if not rms:
            wide = wide - wide.mean(-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + c.norm_epsilon)
        wide = wide * (1 + scale_d if c.norm_plus_one and rms else scale_d)
        if not rms:
            wide = wide + self.param("bias", nn.initializers.zeros, (x.shape[-1],), stored).reshape(scale_d.shape)
        return wide.astype(cast(c))


class Dense(nn.Module):
    """x W + b, plus (x A) B of the collection "lora" where it holds this kernel's."""

    config: DecoderConfig
    features: int
    bias: bool
    init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        dtype, stored = cast(self.config), param_dtype(self.config)
        if self.has_variable("transposed", "kernel"):  # (out, in), where a model generates: `models.cache`
            y = jnp.moveaxis(jnp.tensordot(self.get_variable("transposed", "kernel"), x, (1, -1)), 0, -1)
        else:
            y = x @ self.param("kernel", self.init, (x.shape[-1], self.features), stored).astype(dtype)
        if self.has_variable("lora", "a"):
            low = x @ self.get_variable("lora", "a").astype(dtype)
            y = y + low @ self.get_variable("lora", "b").astype(dtype)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), stored)
            y = y + bias.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y


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
        c, length = self.config, x_bld.shape[1]
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
        normed_bqd, activation = self.mlp_norm(x_bqd), _ACTIVATION[c.activation]
        up = self.up_proj(normed_bqd)
        inner = activation(self.gate_proj(normed_bqd)) * up if c.gated else activation(up)
        out_bqd = self.down_proj(inner)
        return x_bqd + (self.mlp_out_norm(out_bqd) if c.norm_after else out_bqd)


def head_width(c: DecoderConfig) -> int:
    """Numbers of one head's query."""
    return c.head_width or c.width // c.heads


def rotary(c: DecoderConfig, positions_bl) -> list[jax.Array]:
    """Angles' cosines and sines (b, l, e / 2): of global layers, then of local ones; empty with learned positions.

        angle_j(t) = t base^(-2 j / e)

    Source: Su et al. 2104.09864; the scalings of Llama 3.1 and of linear interpolation (2306.15595).
    """
    if c.positions == "learned":
        return []
    base = [c.rotary_base, c.local_base or c.rotary_base]
    frequencies = [np.power(b, -np.arange(0, head_width(c), 2) / head_width(c)) for b in base]
    frequencies[0] = _scaled(c.rotary_scaling, frequencies[0])
    if not c.local_base:
        frequencies[1] = frequencies[0]
    found = []
    for frequency_e in frequencies:
        angle_ble = (
            positions_bl[..., None].astype(param_dtype(c)) * jnp.asarray(frequency_e, param_dtype(c))[None, None]
        )
        found += [jnp.cos(angle_ble), jnp.sin(angle_ble)]
    return found


def _scaled(scaling: tuple[float, ...], frequency_e: np.ndarray) -> np.ndarray:
    if not scaling:
        return frequency_e
    if len(scaling) == 1:
        return frequency_e / scaling[0]
    factor, low, high, original = scaling
    turns_e = original * frequency_e / (2 * np.pi)  # over the length it was trained on
    share_e = np.clip((turns_e - low) / (high - low), 0.0, 1.0)
    return frequency_e * (share_e + (1 - share_e) / factor)


def rotate(x_blhe, tables, local):
    """Turns each head's pairs (j, j + e / 2) by the position's angles; as it is where there are no tables."""
    if not tables:
        return x_blhe
    cos_ble, sin_ble = (jnp.where(local, tables[i + 2], tables[i]) for i in (0, 1))
    first, second = jnp.split(x_blhe.astype(cos_ble.dtype), 2, axis=-1)
    cos, sin = cos_ble[:, :, None], sin_ble[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x_blhe.dtype)


def causal_mask(c: DecoderConfig, start, size: int, seen: int, segments, local):
    """Which of `seen` keys the `size` queries from `start` see, (b or 1, 1, q, k); None: all up to their own."""
    if not c.window and segments is None and seen == size:
        return None
    place_1q, place_1k = start + jnp.arange(size)[None], jnp.arange(seen)[None]
    mask = place_1q[:, :, None] >= place_1k[:, None]
    if segments is None:
        own_1k, asked_1q = place_1k, place_1q
    else:
        segment_bl, own_1k = (a[:, :seen] for a in segments)
        segment_bq, asked_1q = (jax.lax.dynamic_slice_in_dim(a, start, size, 1) for a in segments)
        mask = mask & ((segment_bl == 0)[:, None] | (segment_bl[:, None] == segment_bq[:, :, None]))
    if c.window:
        mask = mask & ((asked_1q[:, :, None] - own_1k[:, None] < c.window) | ~jnp.asarray(local))
    return mask[:, None]


def flash(c: DecoderConfig) -> bool:
    """Whether attention runs in a kernel that holds no scores."""
    return c.attention == "cudnn" or (
        c.attention == "auto" and jax.default_backend() == "gpu" and c.dtype == "bfloat16"
    )


def whole_rows(c: DecoderConfig, segments) -> bool:
    """Whether a streamed block reads attention in one piece: where a kernel holds no scores and needs no mask."""
    return flash(c) and not c.window and not c.attention_cap and segments is None


def attention(c: DecoderConfig, query_bqhe, key_bkhe, value_bkhe, mask):
    """softmax(q k^T scale) v over the visible keys; fewer key heads than query heads are shared by groups.

    Args:
      mask: bool (b or 1, 1, q, k); None: causal, queries and keys at the same positions.
    """
    scale = c.query_scale or head_width(c) ** -0.5
    if not c.attention_cap and c.dtype != "float64":  # jax.nn's softmax is float32 whatever comes in
        return jax.nn.dot_product_attention(
            query_bqhe, key_bkhe, value_bkhe, mask=mask, scale=scale, is_causal=mask is None,
            implementation="cudnn" if flash(c) else "xla",
        )  # fmt: skip
    grouped_bqhge = rearrange(query_bqhe, "b q (h g) e -> b q h g e", h=key_bkhe.shape[2])
    score = scale * jnp.einsum("bqhge,bkhe->bhgqk", grouped_bqhge, key_bkhe, preferred_element_type=param_dtype(c))
    if c.attention_cap:
        score = c.attention_cap * jnp.tanh(score / c.attention_cap)
    if mask is None:
        mask = jnp.asarray(np.tril(np.ones(score.shape[-2:], bool)))[None, None]
    weight = jax.nn.softmax(jnp.where(mask[:, :, None], score, NEVER), axis=-1).astype(value_bkhe.dtype)
    return rearrange(jnp.einsum("bhgqk,bkhe->bqhge", weight, value_bkhe), "b q h g e -> b q (h g) e")


def _spans(length: int, size: int) -> list[tuple[int, int, int]]:
    """First and last position of each span, and its chunks' size; what is left over is a span of one chunk."""
    chunks = length // size
    bounds = np.linspace(0, chunks, min(_SPANS, chunks) + 1).round().astype(int) * size
    spans = [(int(first), int(last), size) for first, last in zip(bounds[:-1], bounds[1:], strict=True)]
    return spans + [(chunks * size, length, length - chunks * size)] * (chunks * size < length)


def _split(a, size: int):
    """(b, n size, ...) -> (n, b, size, ...); rows that all share (1, ...) stay shared."""
    return jnp.moveaxis(a.reshape(a.shape[0], -1, size, *a.shape[2:]), 1, 0)
