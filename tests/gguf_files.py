"""Tiny GGUF files for the tests, as llama.cpp's converter writes them, by the format's own package."""

import jax
import numpy as np
import pytest

from deconfound_jax.config import Decoder as Config
from deconfound_jax.models.decoder import Decoder

gguf = pytest.importorskip("gguf", reason="GGUF files are written by the gguf package, which is not installed")
Kind = gguf.GGMLQuantizationType

ROTARY = dict(
    width=32, layers=2, heads=4, kv_heads=2, vocabulary=24, length=64, inner=64, norm="rms", norm_epsilon=1e-5,
    positions="rotary", rotary_base=5e4, activation="silu", gated=True, bias=False, qkv_bias=False, forbidden=(),
)  # fmt: skip
GEMMA = ROTARY | dict(
    activation="gelu_tanh", norm_plus_one=True, norm_after=True, embedding_scale=32**0.5, head_width=16,
    query_scale=0.25, window=8,
)  # fmt: skip
GPT2 = dict(width=32, layers=2, heads=4, kv_heads=4, vocabulary=24, length=16, inner=128, norm_epsilon=1e-5)
CONFIGS = {
    "gpt2": Config(**GPT2, forbidden=()),
    "llama": Config(**ROTARY, tied=False),
    "qwen2": Config(**ROTARY | {"qkv_bias": True}),
    "qwen3": Config(**ROTARY, qk_norm=True, head_width=16),
    "gemma2": Config(**GEMMA, global_every=2, attention_cap=50.0, logit_cap=30.0),
    "gemma3": Config(**GEMMA, global_every=6, qk_norm=True, local_base=10_000.0, rotary_scaling=(8.0,)),
}
STEMS = {
    **{"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "q_norm": "attn_q_norm"},
    **{"k_norm": "attn_k_norm", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"},
    **{"attention_norm": "attn_norm", "mlp_norm": "ffn_norm"},
    **{"attention_out_norm": "post_attention_norm", "mlp_out_norm": "post_ffw_norm"},
}


def random_params(c):
    shapes = jax.eval_shape(Decoder(c, c.vocabulary).init, jax.random.key(0), np.zeros((1, 1), np.int32))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


def interleaved(rows, heads):
    """llama.cpp's permute: of each head, row j and row j + e / 2 side by side."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def stored(architecture, c, params):
    """Name -> array, as the converter writes them: kernels (out, in)."""
    p, plus = params["params"], 1 if architecture.startswith("gemma") else 0
    found = {"token_embd.weight": p["embed_tokens"]["embedding"], "output_norm.weight": p["norm"]["scale"] + plus}
    if "lm_head" in p:
        found["output.weight"] = p["lm_head"].T
    if "positions" in p:
        found |= {"position_embd.weight": p["positions"], "output_norm.bias": p["norm"]["bias"]}
    for i in range(c.layers):
        for module, leaves in p["layers"].items():
            for part, leaf in leaves.items():
                rows = leaf[i].T + plus * (part == "scale")
                if architecture == "llama" and module in ("q_proj", "k_proj"):
                    rows = interleaved(rows, c.heads if module == "q_proj" else c.kv_heads)
                found[f"blk.{i}.{STEMS[module]}.{'bias' if part == 'bias' else 'weight'}"] = rows
        for kind in ("weight", "bias") if architecture == "gpt2" else ():
            parts = [found.pop(f"blk.{i}.attn_{x}.{kind}") for x in "qkv"]
            found[f"blk.{i}.attn_qkv.{kind}"] = np.concatenate(parts)
    return found


def metadata(architecture, c):
    found = {
        "vocab_size": c.vocabulary, "context_length": c.length, "embedding_length": c.width,
        "block_count": c.layers,
        "feed_forward_length": c.inner, "attention.head_count": c.heads, "attention.head_count_kv": c.kv_heads,
    }  # fmt: skip
    if architecture == "gpt2":
        return found | {"attention.layer_norm_epsilon": c.norm_epsilon}
    found |= {"attention.layer_norm_rms_epsilon": c.norm_epsilon, "rope.freq_base": c.rotary_base}
    if c.head_width:
        found["attention.key_length"] = c.head_width
    if c.window:
        found["attention.sliding_window"] = c.window
    if len(c.rotary_scaling) == 1:
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": c.rotary_scaling[0]}
    return found


def write(path, architecture, data, tensors, kinds=None):
    """A file of these; `kinds` name -> quantization of a tensor that is bytes already."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in data.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](key if key.startswith("split") else f"{architecture}.{key}", value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor), raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model_file(path, architecture="llama", data=None, tensors=None, drop=(), kinds=None):
    """A whole file, with some of its metadata or tensors others."""
    c = CONFIGS[architecture]
    params = random_params(c)
    held = {k: v for k, v in stored(architecture, c, params).items() if k not in drop} | (tensors or {})
    return write(path, architecture, metadata(architecture, c) | (data or {}), held, kinds), params
