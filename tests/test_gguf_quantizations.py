"""Every quantization of GGUF files, against its definition written out number by number."""

import dataclasses
import struct

import numpy as np
from gguf_files import CONFIGS, STEMS, Kind, gguf, metadata, random_params, stored, write

from deconfound_jax.models.gguf import QUANTIZATIONS, load_gguf


def number(data, form):
    return struct.unpack(f"<{form}", bytes(data))[0]


def halves(data):
    """Sixteen bytes: the low nibbles, then the high ones."""
    return np.concatenate([data & 15, data >> 4]).astype(int)


def six_bits(s, j):
    """Scale and minimum of sub-block j of Q4_K."""
    if j < 4:
        return s[j] & 63, s[j + 4] & 63
    return (s[j + 4] & 15) | (s[j - 4] >> 6 << 4), (s[j + 4] >> 4) | (s[j] >> 6 << 4)


def read_q4_k(b):
    d, low, scales, nibbles = number(b[:2], "e"), number(b[2:4], "e"), b[4:16].astype(int), b[16:].astype(int)
    out = []
    for j in range(8):
        scale, least = six_bits(scales, j)
        values = nibbles[32 * (j // 2) : 32 * (j // 2) + 32] >> 4 * (j % 2) & 15
        out.append(d * scale * values - low * least)
    return np.concatenate(out)


def read_q6_k(b):
    low, high, scales, d = b[:128].astype(int), b[128:192].astype(int), b[192:208].view(np.int8), number(b[208:], "e")
    out = np.empty(256)
    for i in range(256):
        half, quarter, place = i // 128, i % 128 // 32, i % 32
        four = low[64 * half + 32 * (quarter % 2) + place] >> 4 * (quarter // 2) & 15
        two = high[32 * half + place] >> 2 * quarter & 3
        out[i] = d * scales[i // 16] * ((four | two << 4) - 32)
    return out


def read_q5_0(b):
    fifth = number(b[2:6], "I") >> np.arange(32) & 1
    return number(b[:2], "e") * ((halves(b[6:]) | fifth << 4) - 16)


# kind -> (bytes of a block, the block's numbers), after ggml-common.h and ggml-quants.c
READ = {
    "F32": (4, lambda b: [number(b, "f")]),
    "F16": (2, lambda b: [number(b, "e")]),
    "BF16": (2, lambda b: [number(b"\0\0" + bytes(b), "f")]),
    "Q8_0": (34, lambda b: number(b[:2], "e") * b[2:].view(np.int8).astype(float)),
    "Q4_0": (18, lambda b: number(b[:2], "e") * (halves(b[2:]) - 8)),
    "Q4_1": (20, lambda b: number(b[:2], "e") * halves(b[4:]) + number(b[2:4], "e")),
    "Q5_0": (22, read_q5_0),
    "Q4_K": (144, read_q4_k),
    "Q6_K": (210, read_q6_k),
}


def random_rows(kind, shape, rng):
    """Bytes (rows, bytes of a row) of a random tensor; of the kinds that the package cannot make, random blocks."""
    if kind not in ("Q4_K", "Q6_K"):
        rows = gguf.quantize(rng.normal(size=shape).astype(np.float32), Kind[kind])
        return np.ascontiguousarray(rows).view(np.uint8)
    size, _ = READ[kind]
    blocks = rng.integers(256, size=(shape[0], shape[1] // 256, size)).astype(np.uint8)
    for place in [0, 2] if kind == "Q4_K" else [208]:
        blocks[..., place : place + 2] = rng.normal(size=blocks.shape[:2] + (1,)).astype(np.float16).view(np.uint8)
    return blocks.reshape(shape[0], -1)


def test_every_quantization(tmp_path):
    c = dataclasses.replace(CONFIGS["qwen2"], inner=256)
    rng, held = np.random.default_rng(0), stored("qwen2", c, random_params(c))
    quantized = {
        "token_embd.weight": "Q8_0", "blk.0.attn_q.weight": "Q4_0", "blk.1.attn_q.weight": "Q4_1",
        "blk.0.attn_v.weight": "Q5_0", "blk.1.attn_v.weight": "BF16", "blk.0.ffn_up.weight": "F16",
        "blk.0.ffn_down.weight": "Q4_K", "blk.1.ffn_down.weight": "Q6_K", "blk.1.ffn_up.weight": "F32",
    }  # fmt: skip
    rows = {name: random_rows(kind, held[name].shape, rng) for name, kind in quantized.items()}
    kinds = {name: Kind[kind] for name, kind in quantized.items()}
    assert set(quantized.values()) == set(READ) == set(QUANTIZATIONS)
    _, params = load_gguf(write(tmp_path / "m.gguf", "qwen2", metadata("qwen2", c), held | rows, kinds))
    params = params["params"]
    for name, kind in quantized.items():
        size, read = READ[kind]
        expected = [np.concatenate([read(b) for b in row.reshape(-1, size)]) for row in rows[name]]
        if name == "token_embd.weight":
            found = params["embed_tokens"]["embedding"]
        else:
            _, layer, stem, _ = name.split(".")
            module = {ours: theirs for theirs, ours in STEMS.items()}[stem]
            found = params["layers"][module]["kernel"][int(layer)].T
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=kind)
