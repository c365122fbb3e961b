"""llama.cpp's GGUF files: metadata and tensors -> the decoder's config and parameters.

    config, params = load_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")
    logits_blv, _ = Decoder(config, config.vocabulary).apply(params, tokens_bl)

`models.gguf_header` reads what stands before the weights, the `gguf` package dequantizes them. What llama.cpp's
converter changes is undone: "llama" has the rows of queries and keys interleaved for its rotary positions; Gemma's
norms have 1 added; GPT-2's queries, keys and values are one tensor. Every tensor's name, quantization, shape and place
is checked before the weights are read.
"""

from __future__ import annotations

import math
import os
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from deconfound_jax.config import Decoder as DecoderConfig
from deconfound_jax.models.decoder import check, param_shapes
from deconfound_jax.models.gguf_header import Header, read_header
from deconfound_jax.models.layers import head_width
from deconfound_jax.models.weights import Precision, check_precision

ARCHITECTURES = ("gemma2", "gemma3", "gpt2", "llama", "qwen2", "qwen3")
# Q5_0 beside what is asked for most: llama.cpp takes it where a row is no multiple of Q4_K's 256.
QUANTIZATIONS = ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
_ROWS = 4096  # dequantized at once: the copy beside the parameters stays small

_OF_LAYER = {
    **{"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"},
    **{"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"},
    **{"attention_norm": "attn_norm", "mlp_norm": "ffn_norm", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm"},
    **{"attention_out_norm": "post_attention_norm", "mlp_out_norm": "post_ffw_norm"},
}
_OF_MODEL = {
    ("embed_tokens", "embedding"): "token_embd.weight",
    ("positions",): "position_embd.weight",
    ("lm_head",): "output.weight",
    ("norm", "scale"): "output_norm.weight",
    ("norm", "bias"): "output_norm.bias",
}
_QKV = ("q_proj", "k_proj", "v_proj")
_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3 = (1.0, 4.0, 8192.0)  # low, high, original length of Llama 3.1 to 3.3, the only ones the format's writers know


def decoder_config(header: Header) -> DecoderConfig:
    """The decoder that a file's metadata describes. Raises ValueError naming the key that is missing or unknown."""
    integer, decimal, tensors = header.integer, header.decimal, header.tensors
    architecture = header.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{header.path}: architecture: expected one of {ARCHITECTURES}, found {architecture!r}")
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{header.path}: token_embd.weight: expected a tensor, found none")
    width, heads = integer("*.embedding_length"), integer("*.attention.head_count")
    sizes = dict(
        width=width, layers=integer("*.block_count"), heads=heads, kv_heads=integer("*.attention.head_count_kv", heads),
        vocabulary=tensors["token_embd.weight"].shape[0], length=integer("*.context_length"),
        inner=integer("*.feed_forward_length"), tied="output.weight" not in tensors, forbidden=(),
    )  # fmt: skip
    window = integer("*.attention.sliding_window", 0, least=0)
    if not architecture.startswith("gemma") and 0 < window < sizes["length"]:
        raise header.wrong("*.attention.sliding_window", "0 or the context's length: no window but Gemma's", window)
    if architecture == "gpt2":
        return DecoderConfig(**sizes, norm_epsilon=decimal("*.attention.layer_norm_epsilon"))
    head = integer("*.attention.key_length", width // heads)
    if head % 2:
        raise header.wrong("*.attention.key_length", "an even number: rotary positions turn pairs", head)
    common = dict(
        **sizes, head_width=head if head * heads != width else 0, norm="rms", positions="rotary", gated=True,
        norm_epsilon=decimal("*.attention.layer_norm_rms_epsilon"),
        rotary_base=decimal("*.rope.freq_base", 10_000.0), rotary_scaling=_scaling(header, head),
        qk_norm="blk.0.attn_q_norm.weight" in tensors, qkv_bias="blk.0.attn_q.bias" in tensors,
        bias="blk.0.attn_output.bias" in tensors,
    )  # fmt: skip
    gemma = _gemma(header, width, heads, head) if architecture.startswith("gemma") else {"activation": "silu"}
    return DecoderConfig(**common, **gemma)


def load_gguf(path: str | os.PathLike, dtype: Precision = "float32") -> tuple[DecoderConfig, dict[str, Any]]:
    """Reads a GGUF file of any of `ARCHITECTURES` in any mix of `QUANTIZATIONS`.

    Args:
      dtype: of the parameters that are returned, whatever the file's; `Decoder.dtype` of the config, the precision of
        computation, stays the caller's to choose.

    Returns:
      The decoder's config (`vocabulary` is the embedding's rows) and what its `init` returns. The arrays go to JAX's
      default device, a leaf at a time.

    Raises:
      FileNotFoundError; ValueError naming file, tensor or key, what was expected and what was found.
    """
    check_precision(dtype)
    header = read_header(path)
    config = decoder_config(header)
    try:
        check(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    shapes = {keys: leaf.shape for keys, leaf in param_shapes(config).items()}
    expected = {name for keys in shapes for name in _names(header, config, keys)} | {_ROPE_FACTORS}
    if unknown := sorted(set(header.tensors) - expected):
        raise ValueError(f"{path}: expected no tensor but the architecture's, found {unknown[:5]}")
    for keys, shape in shapes.items():
        _parts(header, config, keys, shape)
    leaves = {
        keys: jnp.asarray(_leaf(header, config, keys, np.empty(shape, jnp.dtype(dtype))))
        for keys, shape in shapes.items()
    }
    return config, {"params": unflatten_dict(leaves)}


def _names(header: Header, config: DecoderConfig, keys: tuple[str, ...]) -> list[str]:
    """The file's tensors that make a leaf: one, or one a layer."""
    if keys[0] != "layers":
        return [_OF_MODEL[keys]]
    _, module, part = keys
    fused = header.get("general.architecture") == "gpt2" and module in _QKV
    stem = "attn_qkv" if fused else _OF_LAYER[module]
    return [f"blk.{i}.{stem}.{'bias' if part == 'bias' else 'weight'}" for i in range(config.layers)]


def _parts(header: Header, config: DecoderConfig, keys: tuple[str, ...], shape: tuple[int, ...]) -> list[tuple]:
    """`_stored` of each of a leaf's tensors: all are checked, none is read."""
    shape = shape[1:] if keys[0] == "layers" else shape
    shape = shape[::-1] if keys[-1] in ("kernel", "lm_head") else shape  # the file's rows are outputs
    names = _names(header, config, keys)
    return [_stored(header, name, ((3 if "attn_qkv" in name else 1) * shape[0], *shape[1:])) for name in names]


def _leaf(header: Header, config: DecoderConfig, keys: tuple[str, ...], out: np.ndarray) -> np.ndarray:
    """Fills a parameter in our layout, its layers stacked."""
    module = keys[1] if keys[0] == "layers" else ""
    llama = header.get("general.architecture") == "llama"
    added = float(config.norm_plus_one and keys[-1] == "scale")
    for i, (stored, kind) in enumerate(_parts(header, config, keys, out.shape)):
        part = out[i] if module else out
        part = part.T if keys[-1] in ("kernel", "lm_head") else part  # a view
        which = _QKV.index(module) if len(stored) > len(part) else 0
        order = np.arange(len(part))
        if llama and module in ("q_proj", "k_proj"):
            order = order.reshape(-1, 2, head_width(config) // 2).swapaxes(1, 2).reshape(-1)
        for start in range(0, len(part), _ROWS):
            rows = order[start : start + _ROWS]
            first = which * len(part) + start
            part[rows] = _numbers(stored[first : first + len(rows)], kind).reshape(len(rows), *part.shape[1:]) - added
    return out


def _stored(header: Header, name: str, expected: tuple[int, ...]) -> tuple[np.ndarray, Any]:
    """A tensor's bytes, a row of the first axis each, and its quantization; ValueError where it is not as expected."""
    import gguf  # here: the core runs without it

    if name not in header.tensors:
        raise ValueError(f"{header.path}: {name}: expected a tensor of shape {expected}, found none")
    shape, number, start = header.tensors[name]
    kind = {k.value: k for k in gguf.GGMLQuantizationType}.get(number)
    if kind is None or kind.name not in QUANTIZATIONS:
        found = kind.name if kind else number
        raise ValueError(f"{header.path}: {name}: quantization: expected one of {QUANTIZATIONS}, found {found}")
    if shape != expected:
        raise ValueError(f"{header.path}: {name}: expected shape {expected}, found {shape}")
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block or (len(shape) == 1 and block > 1):
        raise ValueError(f"{header.path}: {name}: expected rows of a multiple of {block} in {kind.name}, found {shape}")
    total = math.prod(shape) * size // block
    file = np.memmap(header.path, np.uint8, "r")
    if start + total > len(file):
        left = max(0, len(file) - start)
        raise ValueError(f"{header.path}: {name}: expected {shape} in {kind.name}, {total} bytes, found {left}")
    return file[start : start + total].reshape(shape[0], -1), kind


def _numbers(rows: np.ndarray, kind) -> np.ndarray:
    import gguf

    return gguf.dequantize(np.asarray(rows), kind)


def _scaling(header: Header, head: int) -> tuple[float, ...]:
    """`Decoder.rotary_scaling` of linear scaling, or of Llama 3's factors, which are stored as a tensor."""
    kind = header.get("*.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ValueError(f"{header.path}: rope.scaling.type: expected 'none' or 'linear', found {kind!r}")
    if (turned := header.integer("*.rope.dimension_count", head)) != head:
        raise ValueError(f"{header.path}: rope.dimension_count: expected all {head} of a head, found {turned}")
    if _ROPE_FACTORS in header.tensors:
        factor_e = _numbers(*_stored(header, _ROPE_FACTORS, (head // 2,))).ravel()
        factor, (low, high, original) = float(factor_e.max()), _LLAMA3
        base = header.decimal("*.rope.freq_base", 10_000.0)
        turns_e = original * np.power(base, -np.arange(0, head, 2) / head) / (2 * np.pi)
        share_e = np.clip((turns_e - low) / (high - low), 0, 1)
        expected_e = 1 / (share_e + (1 - share_e) / factor)
        if not np.allclose(factor_e, expected_e, rtol=1e-3):
            raise ValueError(
                f"{header.path}: {_ROPE_FACTORS}: expected Llama 3's factors (low, high, length {_LLAMA3}),"
                f" {expected_e.round(3)}, found {factor_e.round(3)}"
            )
        return factor, low, high, original
    factor = header.decimal("*.rope.scaling.factor", 1.0) if kind == "linear" else 1.0
    return (factor,) if factor != 1 else ()


def _gemma(header: Header, width: int, heads: int, head: int) -> dict[str, Any]:
    """What only Gemma has. Numbers that the format leaves out are those that llama.cpp's gemma2 and gemma3 assume."""
    integer, decimal, second = header.integer, header.decimal, header.get("general.architecture") == "gemma2"
    # The 27B models, known by their depth, divide by the width of a head as if heads filled the stream.
    wide = integer("*.block_count") == (46 if second else 62)
    return dict(
        activation="gelu_tanh", norm_plus_one=True, norm_after=True, embedding_scale=math.sqrt(width),
        window=integer("*.attention.sliding_window", 4096 if second else 0, least=0),
        global_every=integer("*.attention.sliding_window_pattern", 2 if second else 6),
        local_base=0.0 if second else decimal("*.rope.freq_base_swa", 10_000.0),
        attention_cap=decimal("*.attn_logit_softcapping", 50.0 if second else 0.0, zero=True),
        logit_cap=decimal("*.final_logit_softcapping", 30.0 if second else 0.0, zero=True),
        query_scale=(width // heads if wide else head) ** -0.5,
    )  # fmt: skip
