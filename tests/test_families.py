"""Published families: our logits are transformers', every feature of a family matters, config.json both ways.

The checkpoints in tests/fixtures/families and their logits are transformers' (tests/fixtures/make_families.py).
"""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from checkpoints import FIXTURES, NAMES, TOLERANCE, load

from deconfound_jax import config
from deconfound_jax.models.config_json import read_config, write_config
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.families import FAMILIES
from deconfound_jax.models.weights import load_safetensors

# What the hub's files say, as far as it is the model's, in the style of the time.
SMOLLM2 = {
    **{"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
    **{"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192},
    **{"rms_norm_eps": 1e-05, "rope_theta": 100000, "rope_scaling": None, "tie_word_embeddings": True},
    **{"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0},
}
LLAMA32 = {
    **SMOLLM2,
    **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072},
    "rope_theta": 500000.0,
    "rope_scaling": {
        **{"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"},
        "original_max_position_embeddings": 8192,
    },
}
QWEN25 = {
    **{"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
    **{"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768},
    **{"rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": True, "hidden_act": "silu"},
    **{"sliding_window": 32768, "max_window_layers": 21, "use_sliding_window": False},
}
GEMMA2 = {
    **{"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256},
    **{"vocab_size": 256000, "max_position_embeddings": 8192, "rms_norm_eps": 1e-06, "rope_theta": 10000.0},
    **{"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096},
    **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention_bias": False},
}
GEMMA3 = {
    **{"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26},
    **{"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256},
    **{"vocab_size": 262144, "max_position_embeddings": 32768, "rms_norm_eps": 1e-06, "attention_bias": False},
    **{"rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None, "sliding_window": 512},
    **{"sliding_window_pattern": 6, "final_logit_softcapping": None, "attn_logit_softcapping": None},
    "hidden_activation": "gelu_pytorch_tanh",
}
GEMMA3_IMAGES = {  # 4B: the file leaves out what is the class's default
    "model_type": "gemma3",
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
    "text_config": {
        **{"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
        **{"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
    },
}
MISTRAL = {
    **{"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768},
    **{"rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False},
}
GPT2 = {
    **{"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "n_ctx": 1024},
    **{"vocab_size": 50257, "layer_norm_epsilon": 1e-05, "activation_function": "gelu_new"},
}
QWEN3 = {
    **QWEN25,
    **{"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
    **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960},
    **{"sliding_window": None, "max_window_layers": 28, "attention_bias": False, "rope_scaling": None},
}
PUBLISHED = {
    **{"smollm2": SMOLLM2, "llama32": LLAMA32, "qwen25": QWEN25, "qwen3": QWEN3, "gemma2": GEMMA2},
    **{"gemma3": GEMMA3, "gemma3_images": GEMMA3_IMAGES, "mistral": MISTRAL, "gpt2": GPT2},
}


def load_expected(name):
    expected = load_safetensors(FIXTURES / name / "expected.safetensors")
    return *load(name), expected["tokens"], expected["logits"]


@functools.partial(jax.jit, static_argnames="small")
def logits(small, params, tokens_bl):
    return Decoder(small, small.vocabulary).apply(params, tokens_bl)[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_are_transformers(name):
    small, params, tokens_bl, expected_blv = load_expected(name)
    assert expected_blv.std() > 1
    np.testing.assert_allclose(logits(small, params, tokens_bl), expected_blv, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", [{"activation": "gelu"}, {"norm_epsilon": 1e-5}]),
        ("llama_scaled", [{"rotary_scaling": ()}, {"rotary_scaling": (8.0,)}]),
        ("llama_untied", [{"rotary_scaling": ()}, {"bias": False}, {"rotary_base": 10_000.0}]),
        ("mistral", [{"window": 0}]),
        ("qwen2", [{"window": 0}, {"global_every": 0}, {"qkv_bias": False}]),
        ("qwen3", [{"qk_norm": False}]),
        ("gemma2", [{"window": 0}, {"global_every": 0}, {"attention_cap": 0.0}, {"logit_cap": 0.0}]),
        ("gemma2", [{"query_scale": 0.0}, {"embedding_scale": 1.0}, {"norm_plus_one": False}, {"norm_after": False}]),
        ("gemma3_text", [{"window": 0}, {"global_every": 0}, {"local_base": 0.0}, {"rotary_scaling": ()}]),
    ],
)
def test_each_feature_makes_another_model(name, changes):
    small, params, tokens_bl, expected_blv = load_expected(name)
    for change in changes:
        assert getattr(small, *change) != next(iter(change.values()))
        other_blv = logits(dataclasses.replace(small, **change), params, tokens_bl)
        assert np.abs(other_blv - expected_blv).max() > 10 * TOLERANCE, f"{name}: {change} changes nothing"


def test_published_files_are_read():
    read = {name: read_config(record)[1] for name, record in PUBLISHED.items()}
    rotary = {"norm": "rms", "positions": "rotary", "activation": "silu", "gated": True, "bias": False}
    assert read["smollm2"] == config.Decoder(
        width=576, layers=30, heads=9, kv_heads=3, head_width=64, inner=1536, vocabulary=49152, length=8192,
        norm_epsilon=1e-5, rotary_base=100_000.0, qkv_bias=False, forbidden=(), **rotary,
    )  # fmt: skip
    assert read["llama32"].rotary_scaling == (32.0, 1.0, 4.0, 8192.0)
    assert (read["qwen25"].qkv_bias, read["qwen25"].bias, read["qwen25"].window) == (True, False, 0)
    assert (read["qwen3"].qk_norm, read["qwen3"].head_width, read["qwen3"].window) == (True, 128, 0)
    assert (read["mistral"].window, read["mistral"].global_every, read["mistral"].tied) == (4096, 0, False)
    assert read["gpt2"] == config.Decoder(
        width=768, layers=12, heads=12, kv_heads=12, head_width=64, inner=3072, vocabulary=50257, length=1024,
        norm_epsilon=1e-5, forbidden=(),
    )  # fmt: skip
    two, three, four = read["gemma2"], read["gemma3"], read["gemma3_images"]
    assert (two.window, two.global_every, two.attention_cap, two.logit_cap) == (4096, 2, 50.0, 30.0)
    assert (two.tied, two.embedding_scale, two.query_scale) == (True, 48.0, 1 / 16)
    assert (three.window, three.global_every, three.rotary_base, three.local_base) == (512, 6, 1e6, 1e4)
    assert (three.rotary_scaling, three.attention_cap, three.logit_cap) == ((), 0.0, 0.0)
    assert (four.rotary_scaling, four.local_base, four.window) == ((8.0,), 1e4, 1024)
    assert (four.heads, four.kv_heads, four.head_width, four.vocabulary) == (8, 4, 256, 262_208)


@pytest.mark.parametrize("name", [*NAMES, *PUBLISHED])
def test_what_is_written_is_read_back(name):
    record = PUBLISHED[name] if name in PUBLISHED else json.loads((FIXTURES / name / "config.json").read_text())
    family, small = read_config(record)
    assert read_config(json.loads(json.dumps(write_config(family, small)))) == (family, small)


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_reads_the_same(name):
    transformers = pytest.importorskip("transformers")
    family, small = read_config(PUBLISHED[name])
    theirs = transformers.AutoConfig.for_model(**PUBLISHED[name]).to_dict()
    assert read_config(theirs) == (family, small)  # their defaults, in the style of version 5
    ours = transformers.AutoConfig.for_model(**write_config(family, small)).to_dict()
    assert read_config(ours) == (family, small)


def without(record, *fields):
    return {field: value for field, value in record.items() if field not in fields}


SCALED = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"model_type": "bloom"}, r"model_type: expected one of gemma2, .*gemma3, found 'bloom'"),
        ({}, "model_type: expected one of .* found None"),
        ({**SMOLLM2, "model_type": ["llama"]}, r"model_type: expected one of .* found \['llama'\]"),
        ({"model_type": "gemma3", "text_config": None}, "config.json: text_config: expected an object, found None"),
        ({**SMOLLM2, "hidden_act": ["silu"]}, r"hidden_act: expected one of .*, found \['silu'\]"),
        ({**SMOLLM2, "rope_theta": "abc"}, "rope_theta: expected a number above zero, found 'abc'"),
        ({**SMOLLM2, "rope_theta": -5}, "rope_theta: expected a number above zero, found -5"),
        ({**SMOLLM2, "rope_theta": 0}, "rope_theta: expected a number above zero, found 0"),
        ({**SMOLLM2, "rope_theta": float("inf")}, "rope_theta: expected a number above zero, found inf"),
        ({**SMOLLM2, "rope_scaling": ["x"]}, r"rope_scaling: expected an object, found \['x'\]"),
        ({**SMOLLM2, "rope_scaling": {"type": "linear", "factor": 0}}, "factor: expected a number above .* found 0"),
        ({**SMOLLM2, "rope_scaling": {"rope_type": ["linear"]}}, r"rope_type: expected .* found \['linear'\]"),
        ({**SMOLLM2, "head_dim": 63}, "head_dim: expected an even number.*, found 63"),
        ({**MISTRAL, "sliding_window": True}, "sliding_window: expected a number of tokens.*, found True"),
        ({**QWEN25, "use_sliding_window": "no"}, "use_sliding_window: expected true or false, found 'no'"),
        ({**QWEN25, "max_window_layers": "21"}, "max_window_layers: expected an integer, found '21'"),
        ({**QWEN25, "layer_types": 24}, "layer_types: expected .* each of 24 layers, found 24"),
        ({**QWEN25, "layer_types": [[]] * 24}, "layer_types: expected .* each of 24 layers, found"),
        ({**GEMMA3, "sliding_window_pattern": "6"}, "sliding_window_pattern: expected an integer above .* found '6'"),
        (without(SMOLLM2, "vocab_size"), "vocab_size: expected an integer above zero, as it has no default, found"),
        ({**SMOLLM2, "hidden_size": "576"}, "hidden_size: expected an integer above zero, found '576'"),
        ({**SMOLLM2, "rms_norm_eps": None}, "rms_norm_eps: expected a number above zero, found None"),
        ({**SMOLLM2, "hidden_act": "relu2"}, "hidden_act: expected one of silu, .*, found 'relu2'"),
        ({**SMOLLM2, "attention_bias": True}, "mlp_bias: expected True, attention_bias's, found False"),
        ({**SMOLLM2, "num_key_value_heads": 4}, "Decoder.kv_heads: expected a divisor of heads 9, got 4"),
        ({**SMOLLM2, "rope_scaling": SCALED}, "rope_type: expected one of default, linear, llama3, found 'yarn'"),
        ({**SMOLLM2, "rope_parameters": SCALED}, "rope_type: expected one of default, linear, llama3, found 'yarn'"),
        ({**SMOLLM2, "rope_scaling": {"type": "dynamic"}}, "rope_type: expected .* found 'dynamic'"),
        ({**SMOLLM2, "rope_scaling": {"type": "linear"}}, "rope_scaling.factor: expected a number above zero, found"),
        ({**SMOLLM2, "partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1.0, found 0.5"),
        ({**SMOLLM2, "quantization_config": {"bits": 4}}, "quantization_config: expected none"),
        ({**QWEN3, "attention_bias": True}, "attention_bias: expected False, found True"),
        ({**QWEN25, "use_sliding_window": True}, "layer_types: expected every n-th layer .* found 'l*g{21}l{3} "),
        ({**QWEN25, "layer_types": ["sliding_attention"] * 24}, "sliding_window: expected .*, found None"),
        ({**GEMMA2, "layer_types": ["full_attention"]}, "layer_types: expected .* each of 26 layers"),
        ({**GEMMA2, "use_bidirectional_attention": True}, "use_bidirectional_attention: expected None, found True"),
        ({**GEMMA3, "attn_logit_softcapping": 50.0}, "attn_logit_softcapping: expected None, found 50.0"),
        ({**GEMMA3, "rope_parameters": {"rope_theta": 1e4}}, "rope_parameters: expected fields under full_attention"),
        (
            {**GEMMA3, "rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "sliding_attention.rope_type: expected default, found 'linear'",
        ),
        ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: expected False, found"),
        ({**GPT2, "scale_attn_weights": False}, "scale_attn_weights: expected True, found False"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(record, message):
    with pytest.raises(ValueError, match=message):
        read_config(record)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gpt2", {"forbidden": (0, 1)}, r"Decoder.forbidden: expected \(\), all that 'gpt2' can hold, got \(0, 1\)"),
        ("gpt2", {"kv_heads": 2}, "Decoder.kv_heads: expected 4, all that 'gpt2' can hold, got 2"),
        ("gpt2", {"window": 8}, "Decoder.window: expected 0, .* got 8"),
        ("llama", {}, "Decoder.norm: expected 'rms', .* got 'layer'"),
        ("gemma4", {}, "model_type: expected one of .* found 'gemma4'"),
    ],
)
def test_what_a_family_cannot_hold_is_refused_by_name(family, change, message):
    with pytest.raises(ValueError, match=message):
        write_config(family, dataclasses.replace(config.Decoder(forbidden=()), **change))


def test_runtime_fields_are_no_part_of_a_file():
    small = config.Decoder(forbidden=())
    other = dataclasses.replace(small, dtype="bfloat16", remat="layer", chunk=8, inner=256, kv_heads=4, rotary_base=1.0)
    assert write_config("gpt2", small) == write_config("gpt2", other)


def test_the_fixtures_fields_are_read():
    small = load("gemma3_text")[0]
    assert (small.window, small.global_every, small.local_base, small.rotary_scaling) == (4, 3, 10.0, (2.0,))
    assert load("llama_scaled")[0].rotary_scaling == (8.0, 1.0, 4.0, 16.0)
    assert load("qwen3")[0].head_width == 6


def test_every_family_has_a_fixture():
    kinds = {json.loads((FIXTURES / name / "config.json").read_text())["model_type"] for name in NAMES}
    assert kinds == set(FAMILIES)
