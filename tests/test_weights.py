"""The safetensors format: what the library writes is read, what is written the library reads, no half file loads."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from deconfound_jax.models import weights
from deconfound_jax.models.weights import load_safetensors, read_header, save_safetensors, write_safetensors

TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.array([3, -1], np.int16),
    "empty": np.zeros((0, 4), np.float16),
    "one": np.array(2.5),
}


def raw(header, data):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def of(shape, first, last, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def check_equal(read):
    assert set(read) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        np.testing.assert_array_equal(read[name], tensor)


def test_the_library_reads_what_is_written(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", TENSORS, TENSORS.__getitem__, {"format": "pt"})
    check_equal(safetensors.numpy.load_file(tmp_path / "x.safetensors"))
    with safetensors.safe_open(tmp_path / "x.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert min(tensor.first for tensor in read_header(tmp_path / "x.safetensors").values()) % 8 == 0  # for maps


def test_what_the_library_writes_is_read(tmp_path):
    safetensors.numpy.save_file(TENSORS, tmp_path / "x.safetensors", {"format": "pt"})
    check_equal(load_safetensors(tmp_path / "x.safetensors"))


def test_a_header_is_read_without_the_tensors(tmp_path):
    save_safetensors(tmp_path / "x.safetensors", TENSORS)
    assert {name: tensor.shape for name, tensor in read_header(tmp_path / "x.safetensors").items()} == {
        name: tensor.shape for name, tensor in TENSORS.items()
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"short", "expected a safetensors file, got one that cannot be read"),
        (raw({"x": of([2], 0, 8)}, b"12345678")[:20], "its header would end at byte"),
        (raw({"x": of([2], 0, 8)}, b"12345"), r"tensor 'x': expected shape \(2,\) F32 up to byte .* cut off"),
        (raw({"x": of([2], 0, 8)}, b"123456789"), "expected .* bytes, found"),
        (raw({"x": of([3], 0, 8)}, b"12345678"), r"tensor 'x': expected 12 bytes of shape \(3,\) F32, found 8 bytes"),
        (raw({"x": of([1], 0, 4), "y": of([1], 8, 12)}, b"1" * 12), "tensor 'y': expected its first byte at"),
        (raw({"x": of([1], 0, 4), "y": of([1], 0, 4)}, b"1" * 4), "tensor 'y': expected its first byte at"),
        (raw({"x": {"dtype": "F32", "shape": [1]}}, b"1234"), "tensor 'x': data_offsets: expected two .* found None"),
        (raw({"x": of([1], 0, 4) | {"data_offsets": [4]}}, b"1234"), "data_offsets: expected two integers.* found .4."),
        (raw({"x": of(["1"], 0, 4)}, b"1234"), r"tensor 'x': shape: expected a list of integers.* found \['1'\]"),
        (raw({"x": of([-1, -1], 0, 4)}, b"1234"), r"shape: expected .* none below zero, found \[-1, -1\]"),
        (raw({"x": of([1], 0, 4, [])}, b"1234"), r"tensor 'x': dtype: expected a name, found \[\]"),
        (raw({"x": 3}, b""), "tensor 'x': dtype: expected a name, found None"),
        (raw([], b""), "its header: expected an object, found list"),
        ((200_000).to_bytes(8, "little") + b"[" * 200_000, "its header: expected JSON, found RecursionError"),
        (raw({"x": of([4], 0, 4, "F8_E4M3")}, b"1234"), "tensor of one of .*, got F8_E4M3"),
    ],
)
def test_a_broken_file_is_named(tmp_path, content, message):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.safetensors: .*{message}"):
        load_safetensors(tmp_path / "x.safetensors")


def test_a_long_header_is_not_read(tmp_path, monkeypatch):
    assert weights._HEADER == 100_000_000  # the library's own limit
    save_safetensors(tmp_path / "x.safetensors", TENSORS)
    monkeypatch.setattr(weights, "_HEADER", 100)
    with pytest.raises(ValueError, match=r"x\.safetensors: .*its header: expected up to 100 bytes, found \d{3}"):
        read_header(tmp_path / "x.safetensors")


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_safetensors(path, TENSORS)
    shapes = {"y": jax.ShapeDtypeStruct((2,), "float32"), "z": jax.ShapeDtypeStruct((3,), "float32")}
    with pytest.raises(ValueError, match=r"x\.safetensors: tensor 'z': expected \(3,\) float32, got \(2,\) float32"):
        write_safetensors(path, shapes, lambda name: np.zeros(2, np.float32))
    check_equal(load_safetensors(path))
    with pytest.raises(ValueError, match="tensor 'texts': expected a dtype of .* got object"):
        save_safetensors(path, {"texts": np.array(["a", None])})
    check_equal(load_safetensors(path))
