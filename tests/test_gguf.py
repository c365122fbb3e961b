"""GGUF files: every architecture's weights; files that are broken, cut short or of another kind.

What a file holds is made here from what llama.cpp's converter does: the loader must undo it.
"""

import dataclasses
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import CONFIGS, Kind, metadata, model_file, write

from deconfound_jax.models import gguf
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.gguf import ARCHITECTURES, decoder_config, load_gguf
from deconfound_jax.models.gguf_header import read_header


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_the_converter_changed_is_undone(architecture, tmp_path):
    path, params = model_file(tmp_path / "m.gguf", architecture)
    found_config, found = load_gguf(path)
    assert found_config == CONFIGS[architecture]
    assert jax.tree.structure(found) == jax.tree.structure(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, params)


# Beside it what transformers' own reader leaves at its defaults.
UNREAD = {
    **{"gpt2": {"vocab_size": 24, "n_positions": 16}, "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 16}},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_reads_the_same_model(architecture, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is in the peers environment only")
    torch = pytest.importorskip("torch")
    path, _ = model_file(tmp_path / "m.gguf", architecture)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, **UNREAD[architecture]
    )
    tokens_bl = np.random.default_rng(1).integers(24, size=(2, 12))
    with torch.no_grad():
        expected_blv = peer.eval()(torch.tensor(tokens_bl)).logits.numpy()
    c, params = load_gguf(path)
    np.testing.assert_allclose(Decoder(c, 24).apply(params, tokens_bl)[0], expected_blv, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["int8", "float16", "float64"])
def test_parameters_of_another_dtype_are_refused(dtype, tmp_path):
    path, _ = model_file(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=f"dtype: expected one of float32, bfloat16, got '{dtype}'"):
        load_gguf(path, dtype)


@pytest.mark.parametrize(("window", "fits"), [(0, True), (63, False), (64, True), (4096, True)])
def test_a_window_is_gemmas_only(window, fits, tmp_path):
    path, _ = model_file(tmp_path / "m.gguf", data={"attention.sliding_window": window})
    if fits:
        assert load_gguf(path)[0] == CONFIGS["llama"]
    else:
        with pytest.raises(ValueError, match="m.gguf: llama.attention.sliding_window: expected 0 or .*, found 63"):
            load_gguf(path)


def test_nothing_is_read_before_everything_is_checked(tmp_path, monkeypatch):
    path, _ = model_file(tmp_path / "m.gguf", drop=["output_norm.weight"])
    monkeypatch.setattr(gguf, "_numbers", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match="output_norm.weight: expected a tensor of shape .* found none"):
        load_gguf(path)


def test_parameters_in_bfloat16(tmp_path):
    path, params = model_file(tmp_path / "m.gguf", "gemma2")
    c, found = load_gguf(path, "bfloat16")
    assert c.dtype == "float32" and {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.bfloat16.dtype}
    # Gemma's 1 is taken off before the rounding: small scales stay exact to bfloat16's own precision.
    expected = params["params"]["norm"]["scale"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(found["params"]["norm"]["scale"], expected)


def llama3_factors(factor, head, base, low=1.0, high=4.0, original=8192):
    """As llama.cpp's converter writes them: by wavelength."""
    out = []
    for wave in 2 * np.pi * base ** (np.arange(0, head, 2) / head):
        share = (original / wave - low) / (high - low)
        out.append(
            1 if wave < original / high else factor if wave > original / low else 1 / ((1 - share) / factor + share)
        )
    return np.asarray(out, np.float32)


def test_llama_3_rotary_factors(tmp_path):
    factors, base = llama3_factors(8.0, head=8, base=4e5), {"rope.freq_base": 4e5}
    assert 1 == factors[0] < factors[2] < factors[3] == 8
    path, _ = model_file(tmp_path / "m.gguf", data=base, tensors={"rope_freqs.weight": factors})
    assert load_gguf(path)[0].rotary_scaling == (8.0, 1.0, 4.0, 8192.0)
    path, _ = model_file(tmp_path / "n.gguf", tensors={"rope_freqs.weight": factors})  # another base's
    with pytest.raises(ValueError, match="rope_freqs.weight: expected Llama 3's factors"):
        load_gguf(path)


def test_wide_gemma_scales_its_queries_by_the_stream(tmp_path):
    data = metadata("gemma2", dataclasses.replace(CONFIGS["gemma2"], layers=46))
    path = write(tmp_path / "m.gguf", "gemma2", data, {"token_embd.weight": np.zeros((24, 32), np.float32)})
    assert decoder_config(read_header(path)).query_scale == (32 // 4) ** -0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": ["blk.1.ffn_up.weight"]}, r"blk\.1\.ffn_up\.weight: expected a .* \(64, 32\), found none"),
        ({"drop": ["token_embd.weight"]}, "token_embd.weight: expected a tensor, found none"),
        ({"tensors": {"blk.0.attn_k.weight": np.zeros((8, 32), np.float32)}},
         r"blk\.0\.attn_k\.weight: expected shape \(16, 32\), found \(8, 32\)"),
        ({"tensors": {"blk.0.ffn_gate_inp.weight": np.zeros((4, 32), np.float32)}}, r"found \['blk\.0\.ffn_gate_inp"),
        ({"tensors": {"blk.0.ffn_down.weight": np.zeros((32, 84), np.uint8)},
          "kinds": {"blk.0.ffn_down.weight": Kind.Q2_K}}, "quantization: expected one of .*, found Q2_K"),
        ({"data": {"rope.scaling.type": "yarn"}}, "rope.scaling.type: expected 'none' or 'linear', found 'yarn'"),
        ({"data": {"rope.dimension_count": 4}}, "rope.dimension_count: expected all 8 of a head, found 4"),
        ({"data": {"attention.head_count_kv": [2, 1]}}, r"head_count_kv: expected one integer.*, found \[2, 1\]"),
        ({"data": {"attention.head_count": 0}}, "llama.attention.head_count: expected one integer, 1 .* found 0"),
        ({"data": {"attention.head_count": 5}}, "Decoder.kv_heads: expected a divisor of heads 5, got 2"),
        ({"data": {"block_count": 0}}, "llama.block_count: expected one integer, 1 or more, found 0"),
        ({"data": {"embedding_length": "32"}}, "llama.embedding_length: expected one integer, .* found '32'"),
        ({"data": {"attention.key_length": 7}}, "llama.attention.key_length: expected an even number.* found 7"),
        ({"data": {"rope.freq_base": -5.0}}, "llama.rope.freq_base: expected a number above zero, found -5.0"),
        ({"data": {"rope.freq_base": "x"}}, "llama.rope.freq_base: expected a number above zero, found 'x'"),
        ({"data": {"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}}, "factor: expected .*, found 0.0"),
        ({"data": {"split.count": "3"}}, "split.count: expected one integer, 0 or more, found '3'"),
        ({"data": {"split.count": 3}}, "split.count: expected one file, found part of 3"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_named(change, message, tmp_path):
    path, _ = model_file(tmp_path / "m.gguf", **change)
    with pytest.raises(ValueError, match=f"m.gguf: .*{message}"):
        load_gguf(path)


def test_other_architectures_and_missing_metadata_are_named(tmp_path):
    path = write(tmp_path / "m.gguf", "mamba", {"block_count": 1}, {"token_embd.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(ValueError, match="m.gguf: architecture: expected one of .*'llama'.*, found 'mamba'"):
        load_gguf(path)
    path = write(tmp_path / "n.gguf", "llama", {"block_count": 1}, {"token_embd.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(ValueError, match="n.gguf: llama.embedding_length: expected it in the metadata, found none"):
        load_gguf(path)


def test_a_file_cut_short_is_refused_wherever_it_ends(tmp_path):
    path, _ = model_file(tmp_path / "m.gguf")
    whole, header = path.read_bytes(), read_header(path)
    first = min(tensor.start for tensor in header.tensors.values())
    last = max(header.tensors, key=lambda name: header.tensors[name].start)
    cut = tmp_path / "cut.gguf"
    for size in (0, 3, 7, 20, first // 2, first - 40):
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf: header: expected \d+ bytes at byte \d+, found \d+"):
            load_gguf(cut)
    for size in (first, len(whole) - 33):
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.gguf: .*weight: expected \(.*\) in F32, \d+ bytes, found \d+"):
            load_gguf(cut)
    assert last in str(pytest.raises(ValueError, load_gguf, cut).value)


def text(x):
    return struct.pack("<Q", len(x)) + x


@pytest.mark.parametrize(
    ("tensors", "rest", "message"),
    [
        (0, text(b"general.alignment") + struct.pack("<II", 4, 0), "general.alignment: expected .* found 0"),
        (0, text(b"general.alignment") + struct.pack("<I", 8) + text(b"x"), "general.alignment: expected .* found 'x'"),
        (0, text(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9999, "numbers or texts in an array, found"),
        (1, text(b"k") + struct.pack("<II", 4, 1) + text(b"t") + bytes(16), "t: expected 1 to 4 dimensions, found 0"),
    ],
)
def test_a_header_that_cannot_be_is_named(tensors, rest, message, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, 1) + rest)
    with pytest.raises(ValueError, match=f"m.gguf: .*{message}"):
        read_header(path)


def test_what_is_no_gguf_file_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    with pytest.raises(FileNotFoundError, match="m.gguf: expected a GGUF file, found none"):
        load_gguf(path)
    path.write_bytes(b"PK\3\4 a zip archive, say")
    with pytest.raises(ValueError, match="found one that does not begin with 'GGUF'"):
        load_gguf(path)
    path.write_bytes(b"GGUF" + struct.pack(">I", 3) + bytes(16))
    with pytest.raises(ValueError, match=r"expected GGUF version \(2, 3\), little-endian, found 50331648"):
        load_gguf(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", 99))
    with pytest.raises(ValueError, match="expected a type of value up to 12 at byte 37, found 99"):
        load_gguf(path)
