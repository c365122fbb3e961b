"""What a decoder's block is made of: norm, dense with its low-rank addition, rotary positions, masks, attention."""

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
        c, width = self.config, x.shape[-1]
        rms = self.rms or c.norm == "rms"
        around_one = nn.initializers.zeros if c.norm_plus_one and rms else nn.initializers.ones
        scale_d = self.param("scale", around_one, (width,), param_dtype(c))
        bias_d = None if rms else self.param("bias", nn.initializers.zeros, (width,), param_dtype(c))
        return _normed(c, x, 1 + scale_d if c.norm_plus_one and rms else scale_d, bias_d)


# Only x is kept for the backward pass: what lies between is cheaper made again than written and read.
@functools.partial(jax.checkpoint, static_argnums=0, prevent_cse=False)
def _normed(c: DecoderConfig, x, scale_d, bias_d):
    row = (1,) * (x.ndim - 1) + (-1,)
    wide = x.astype(param_dtype(c))
    if bias_d is not None:
        wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + c.norm_epsilon) * scale_d.reshape(row)
    return (wide if bias_d is None else wide + bias_d.reshape(row)).astype(cast(c))


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
            kernel = self.param("kernel", self.init, (x.shape[-1], self.features), stored).astype(dtype)
            y = (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], self.features)
        if self.has_variable("lora", "a"):
            low = x @ self.get_variable("lora", "a").astype(dtype)
            y = y + low @ self.get_variable("lora", "b").astype(dtype)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), stored)
            y = y + bias.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y


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


def flash(c: DecoderConfig, masked: bool = False) -> bool:
    """Whether attention runs in a kernel that holds no scores; "auto" keeps to what every cuDNN since Ampere takes."""
    if c.attention != "auto":
        return c.attention == "cudnn"
    fits = head_width(c) % 8 == 0 and head_width(c) <= 128 and c.dtype == "bfloat16" and not c.attention_cap
    return fits and not masked and jax.default_backend() == "gpu"


def whole_rows(c: DecoderConfig, segments) -> bool:
    """Whether a streamed block reads attention in one piece: where a kernel holds no scores and needs no mask."""
    return flash(c) and not c.window and segments is None


def attention(c: DecoderConfig, query_bqhe, key_bkhe, value_bkhe, mask):
    """softmax(q k^T scale) v over the visible keys; fewer key heads than query heads are shared by groups.

    Args:
      mask: bool (b or 1, 1, q, k); None: causal, queries and keys at the same positions.
    """
    scale = c.query_scale or head_width(c) ** -0.5
    if not c.attention_cap and c.dtype != "float64":  # jax.nn's softmax is float32 whatever comes in
        return jax.nn.dot_product_attention(
            query_bqhe, key_bkhe, value_bkhe, mask=mask, scale=scale, is_causal=mask is None,
            implementation="cudnn" if flash(c, mask is not None) else "xla",
        )  # fmt: skip
    grouped_bqhge = rearrange(query_bqhe, "b q (h g) e -> b q h g e", h=key_bkhe.shape[2])
    score = scale * jnp.einsum("bqhge,bkhe->bhgqk", grouped_bqhge, key_bkhe, preferred_element_type=param_dtype(c))
    if c.attention_cap:
        score = c.attention_cap * jnp.tanh(score / c.attention_cap)
    if mask is None:
        mask = jnp.asarray(np.tril(np.ones(score.shape[-2:], bool)))[None, None]
    weight = jax.nn.softmax(jnp.where(mask[:, :, None], score, NEVER), axis=-1).astype(value_bkhe.dtype)
    return rearrange(jnp.einsum("bhgqk,bkhe->bqhge", weight, value_bkhe), "b q h g e -> b q (h g) e")
