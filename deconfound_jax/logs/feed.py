"""Rows for training by their number: each host reads its own part of every batch, and resume needs no iterator.

    source = read_records("data/headlines")                    # TFDS ArrayRecord: rows stay on disk
    source = read_columns("log/*.parquet", ("text", "reward"))     # Parquet: these columns, in memory
    rows_at = feed(source, batch=256, seed=0, part=rows_of(mesh))
    rows_at(17)                                                # {"text": (256 / n,), ...}, rows of update 17

A batch follows from the source, its size, the seed and the step alone. The parts of n hosts, one behind the other,
are the batch of one host, so a run goes on with the same data on another number of them. TensorFlow is not imported.
"""

from __future__ import annotations

import glob
import itertools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import duckdb
import grain
import numpy as np
import tensorflow_datasets as tfds
from etils import epath

_CHUNK = 1 << 12  # rows handed to the writer at once


class Source(Protocol):
    """Rows by their number, each a dict of numbers, arrays and strings."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


def feed(source: Source, batch: int, *, seed: int, part: tuple[int, int] = (0, 1), shuffle: bool = True) -> Callable:
    """step -> column -> rows of one part of that update's batch, a pure function.

    Each row comes once an epoch, in an order that the seed and the epoch give; a batch may reach into the next epoch.

    Args:
      batch: rows of all parts together.
      part: (i, n): rows i batch / n to (i + 1) batch / n of the batch; `train.mesh.rows_of` says which a host needs.
    Returns:
      a function; numbers come as (rows,), arrays as (rows, ...), strings as objects.
    Raises:
      ValueError: no rows, a batch that n does not divide, or (by step) rows of unequal shapes.
    """
    index, parts = part
    if not len(source):
        raise ValueError("source: expected rows, got none")
    if batch < 1 or batch % parts or not 0 <= index < parts:
        raise ValueError(f"feed: expected a batch that part's n divides and 0 <= i < n, got {batch} and part {part}")
    rows = grain.MapDataset.source(source)
    if shuffle:
        # Grain orders epoch e by seed + e: seeds side by side would share their epochs.
        rows = rows.shuffle(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]))
    pieces = rows.repeat().batch(batch // parts, batch_fn=_stack)
    return lambda step: pieces[step * parts + index]


def read_records(folder: epath.PathLike, split: str = "train") -> Source:
    """The rows of a TFDS data set in ArrayRecord, read from disk one by one; texts as `str`.

    Args:
      folder: holds `dataset_info.json`; one that `write_records` or TFDS itself wrote (`file_format="array_record"`).
    """
    builder = tfds.builder_from_directory(epath.Path(folder))
    texts = [name for name, kind in builder.info.features.items() if isinstance(kind, tfds.features.Text)]
    return _Records(builder.as_data_source(split=split), texts)


def write_records(folder: epath.PathLike, rows: Iterable[Mapping[str, Any]], *, name: str = "log", split: str = "train",
                  shard: int = 1 << 18) -> int:  # fmt: skip
    """Writes rows as a TFDS data set in ArrayRecord, `shard` of them a file; returns how many.

    Columns, types and shapes are the first row's; memory is that of a few thousand rows.

    Raises:
      FileExistsError: the folder holds one. ValueError: no rows, or a row unlike the first.
    """
    folder, rows = epath.Path(folder), iter(rows)
    if (folder / "dataset_info.json").exists():
        raise FileExistsError(f"{folder}: expected no data set, found one")
    first = next(rows, None)
    if first is None:
        raise ValueError("rows: expected at least one, got none")
    folder.mkdir(parents=True, exist_ok=True)
    identity = tfds.core.DatasetIdentity(name=name, version=tfds.core.Version("1.0.0"), data_dir=str(folder),
                                         module_name=name)  # fmt: skip
    kinds = {column: _kind(value) for column, value in first.items()}
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(kinds))
    writer = tfds.core.SequentialWriter(info, shard, file_format=tfds.core.FileFormat.ARRAY_RECORD)
    writer.initialize_splits([split])
    rows, count = itertools.chain([first], rows), 0
    while chunk := list(itertools.islice(rows, _CHUNK)):
        for number, row in enumerate(chunk, count):
            _same(row, first, number)
        writer.add_examples({split: chunk})
        count += len(chunk)
    writer.close_all()
    return count


def read_columns(path: str | pathlib.Path | Sequence[str | pathlib.Path], columns: Sequence[str]) -> Source:
    """Columns of Parquet files, in the files' order, held in memory; lists of numbers as arrays of one shape.

    For more rows than memory holds: `write_records`, once, from `logs.batches` or any other reader.

    Raises:
      FileNotFoundError: no file there. ValueError: a missing value, or lists of unequal length.
    """
    paths = [path] if isinstance(path, str | pathlib.Path) else list(path)
    files = [file for pattern in paths for file in sorted(glob.glob(str(pattern)))]
    if not files:
        raise FileNotFoundError(f"path: expected Parquet files, got {', '.join(map(str, paths))}")
    quoted = ", ".join('"' + name.replace('"', '""') + '"' for name in columns)
    with duckdb.connect(config={"autoinstall_known_extensions": "false"}) as connection:
        relation = "read_parquet($files, filename = true, file_row_number = true)"
        query = f"SELECT {quoted} FROM {relation} ORDER BY filename, file_row_number"
        found = connection.execute(query, {"files": list(map(glob.escape, files))}).fetchnumpy()
    return _Columns({name: _whole(name, found[name]) for name in columns})


class _Records:
    def __init__(self, source, texts: Sequence[str]):
        self.source, self.texts = source, texts

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.source[index]
        return row | {name: row[name].decode() for name in self.texts}


class _Columns:
    def __init__(self, columns: Mapping[str, np.ndarray]):
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: values[index] for name, values in self.columns.items()}


def _stack(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    return {name: _array(name, [row[name] for row in rows]) for name in rows[0]}


def _array(name: str, values: list[Any]) -> np.ndarray:
    if isinstance(values[0], str):
        return np.asarray(values, object)
    shapes = sorted({np.shape(value) for value in values})
    if len(shapes) > 1:
        raise ValueError(f"{name}: expected one shape in every row, got {shapes[0]} and {shapes[-1]}")
    return np.stack(values)


def _whole(name: str, values: np.ndarray) -> np.ndarray:
    missing_n = np.ma.getmaskarray(values)
    if missing_n.any():
        raise ValueError(f"{name}: expected a value in every row, got none in row {int(missing_n.argmax())}")
    values = np.ma.getdata(values)
    lists = values.dtype == object and len(values) and not isinstance(values[0], str)
    return _array(name, list(values)) if lists else values


def _kind(value: Any):
    """TFDS's word for a column that holds values like this one."""
    if isinstance(value, str):
        return tfds.features.Text()
    value = np.asarray(value)
    return (
        tfds.features.Tensor(shape=value.shape, dtype=value.dtype) if value.ndim else tfds.features.Scalar(value.dtype)
    )


def _same(row: Mapping[str, Any], first: Mapping[str, Any], number: int) -> None:
    if row.keys() != first.keys():
        raise ValueError(f"row {number}: expected columns {sorted(first)}, got {sorted(row)}")
    for name, value in first.items():
        like, got = np.asarray(value), np.asarray(row[name])
        if isinstance(value, str) != isinstance(row[name], str) or like.shape != got.shape:
            raise ValueError(f"row {number}: {name}: expected shape {like.shape} as in row 0, got {got.shape}")
