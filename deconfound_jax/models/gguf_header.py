"""The header of llama.cpp's GGUF files: metadata and the list of tensors, without the weights.

The `gguf` package's own reader makes an array of every vocabulary entry (3 s for 49k tokens in place of 0.1 s), and
its error for a file cut short names no tensor.
Format: ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

VERSIONS = (2, 3)
_NUMBERS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}
_STRING, _ARRAY = 8, 9


class Tensor(NamedTuple):
    """One stored tensor; shape with rows first, kind the format's number of a quantization, start in bytes."""

    shape: tuple[int, ...]
    kind: int
    start: int


class Header(NamedTuple):
    """What a file says before its weights."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    def get(self, key: str, default: Any = None) -> Any:
        """A value; "*" stands for the architecture. ValueError where it is neither there nor has a default."""
        key = key.replace("*", str(self.metadata.get("general.architecture")))
        found = self.metadata.get(key, default)
        if found is None:
            raise ValueError(f"{self.path}: {key}: expected it in the metadata, found none")
        return found

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """`get` of a whole number; ValueError for anything else, lists of one per layer too, and below `least`."""
        found = self.get(key, default)
        if type(found) is not int or found < least:
            raise self.wrong(key, f"one integer, {least} or more", found)
        return found

    def decimal(self, key: str, default: float | None = None, zero: bool = False) -> float:
        """`get` of a number above zero, or from zero on; the shortest decimal of a float32: 1e-05, not 9.99999974e-06.

        ValueError for anything else.
        """
        found = self.get(key, default)
        fits = isinstance(found, (int, float)) and not isinstance(found, bool) and math.isfinite(found)
        if not (fits and (found >= 0 if zero else found > 0)):
            raise self.wrong(key, "a number, zero or more" if zero else "a number above zero", found)
        return float(str(np.float32(found)))

    def wrong(self, key: str, expected: str, found: Any) -> ValueError:
        """The error that names file and key."""
        key = key.replace("*", str(self.metadata.get("general.architecture")))
        return ValueError(f"{self.path}: {key}: expected {expected}, found {found!r}")


def read_header(path: str | os.PathLike) -> Header:
    """Metadata and the list of tensors. Raises FileNotFoundError, or ValueError that says where the file is wrong."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a GGUF file, found none")
    cursor = _Cursor(path)
    if bytes(cursor.take(4)) != b"GGUF":
        raise ValueError(f"{path}: expected a GGUF file, found one that does not begin with 'GGUF'")
    if (version := cursor.number("u4")) not in VERSIONS:
        raise ValueError(f"{path}: expected GGUF version {VERSIONS}, little-endian, found {version}")
    n_tensors, n_metadata = cursor.number("u8"), cursor.number("u8")
    metadata = {cursor.string(): cursor.value(cursor.number("u4")) for _ in range(n_metadata)}
    listed = {}
    for _ in range(n_tensors):
        name, dimensions = cursor.string(), cursor.number("u4")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"{path}: {name}: expected 1 to 4 dimensions, found {dimensions}")
        shape = tuple(reversed(cursor.numbers("u8", dimensions)))
        listed[name] = Tensor(shape, cursor.number("u4"), cursor.number("u8"))
    header = Header(path, metadata, listed)
    if (parts := header.integer("split.count", 1, least=0)) > 1:
        raise ValueError(f"{path}: split.count: expected one file, found part of {parts}; llama-gguf-split joins them")
    alignment = header.integer("general.alignment", 32)
    data = -(-cursor.at // alignment) * alignment
    return header._replace(tensors={name: t._replace(start=data + t.start) for name, t in listed.items()})


class _Cursor:
    """Reads a header from its first byte on."""

    def __init__(self, path: Path):
        self.path, self.at = path, 0
        # np.memmap refuses empty files in its own words.
        self.data = memoryview(np.memmap(path, np.uint8, "r") if path.stat().st_size else b"")

    def take(self, size: int) -> memoryview:
        left = len(self.data) - self.at
        if size > left:
            raise ValueError(f"{self.path}: header: expected {size} bytes at byte {self.at}, found {left}: cut short?")
        self.at += size
        return self.data[self.at - size : self.at]

    def numbers(self, code: str, count: int) -> list:
        dtype = np.dtype(f"<{code}")
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()

    def number(self, code: str):
        return self.numbers(code, 1)[0]

    def string(self) -> str:
        text = bytes(self.take(int.from_bytes(self.take(8), "little")))
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: header: expected text before byte {self.at}, found {error}") from error

    def value(self, kind: int):
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, count = self.number("u4"), self.number("u8")
            if kind == _ARRAY:
                raise ValueError(f"{self.path}: header: expected numbers or texts in an array, found arrays")
            if kind in _NUMBERS:
                return self.numbers(_NUMBERS[kind], count)
            return [self.value(kind) for _ in range(count)]
        if kind not in _NUMBERS:
            raise ValueError(f"{self.path}: header: expected a type of value up to 12 at byte {self.at}, found {kind}")
        return self.number(_NUMBERS[kind])
