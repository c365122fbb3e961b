"""Parquet of any size as batches of rows: columns chosen, memory bounded by a batch.

DuckDB reads a range of rows at a time and skips the row groups outside it. Features
are one list column (or fixed-size array) of numbers; they arrive as float32.
"""

from __future__ import annotations

import glob
import pathlib
from collections.abc import Iterator, Sequence

import duckdb
import numpy as np

from deconfound_jax.logs import check
from deconfound_jax.structs import Logs, Roles

_INTEGERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT")
_NUMBERS = (*_INTEGERS, "HUGEINT", "FLOAT", "DOUBLE", "DECIMAL", "BOOLEAN")


def read_batches(
    path: str | pathlib.Path | Sequence[str | pathlib.Path],
    roles: Roles,
    features: str,
    *,
    categories: Sequence[str] = (),
    rows: int = 1 << 16,
) -> Iterator[tuple[Logs, np.ndarray]]:
    """Yields (logs, features_nd) in the files' order, `rows` rows at most each.

    Outcome, guardrail, exposure, weight, confounders, instruments, treatment and group are read;
    texts are not. Confounders of numbers are numbers unless named in `categories`.

    Args:
      path: a Parquet file, a pattern with * in it, or several of either.
      roles: which column is what.
      features: the column that holds one list of numbers a row, all of one length.
      categories: columns whose values are levels, integers too.

    Raises:
      FileNotFoundError: no file there. ValueError: a column the file lacks or of
        another type, a missing value, or lists of unequal length, with the row.

    Example:
      >>> roles = Roles(outcome="clicks", confounders=("author", "popularity"), instruments=("position",))
      >>> posterior = fit_stream(read_batches("log/*.parquet", roles, "embedding", categories=["author"]), config)
    """
    paths = [path] if isinstance(path, str | pathlib.Path) else list(path)
    files = [file for pattern in paths for file in sorted(glob.glob(str(pattern)))]
    if not files:
        raise FileNotFoundError(f"path: expected Parquet files, got {', '.join(map(str, paths))}")
    with duckdb.connect(config={"autoinstall_known_extensions": "false"}) as connection:
        first_row = 0
        for file in files:
            relation = "read_parquet('" + glob.escape(file).replace("'", "''") + "', file_row_number=true)"
            selected = _selected(connection, relation, roles, features, categories)
            (count,) = connection.execute(f"SELECT count(*) FROM {relation}").fetchone()
            for start in range(0, count, rows):
                part = f"FROM {relation} WHERE file_row_number BETWEEN {start} AND {start + rows - 1}"
                yield _batch(connection, part, selected, features, roles, first_row + start)
            first_row += count


def _selected(connection, relation: str, roles: Roles, features: str, categories) -> dict[str, str]:
    """Name -> SQL of every column to read; ValueError for one that cannot be what its role says."""
    types = {row[0]: row[1] for row in connection.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()}
    measured = [roles.outcome, roles.exposure, roles.weight, roles.treatment, roles.guardrail, *roles.instruments]
    named = [roles.group, *categories]
    wanted = dict.fromkeys(name for name in (*measured, *roles.confounders, *named) if name)
    for name in (*wanted, features):
        if name not in types:
            raise ValueError(f"{name}: expected a column of the file{check.nearest(name, types)}, got {sorted(types)}")
    if not types[features].endswith("]"):
        raise ValueError(f"{features}: expected lists of numbers, got a column of type {types[features]}")
    selected = {}
    for name in wanted:
        number = types[name].split("(")[0] in _NUMBERS
        if name in measured and not number:
            raise ValueError(f"{name}: expected numbers, got a column of type {types[name]}")
        level = name in named or not number
        kind = ("BIGINT" if types[name] in _INTEGERS else "VARCHAR") if level else "DOUBLE"
        selected[name] = f"CAST({_quoted(name)} AS {kind})"
    return selected


def _batch(connection, part: str, selected, features: str, roles: Roles, first_row: int) -> tuple[Logs, np.ndarray]:
    cells = ", ".join(f"{sql} AS c{i}" for i, sql in enumerate(selected.values()))
    found = connection.execute(f"SELECT {cells}, len({_quoted(features)}) AS width {part}").fetchnumpy()
    columns = {name: _filled(found[f"c{i}"], name, first_row) for i, name in enumerate(selected)}
    width_n = _filled(found["width"], features, first_row)
    if (width_n != width_n[0]).any():
        row = int(np.argmax(width_n != width_n[0]))
        expected = f"{features}: expected {width_n[0]} numbers as in row {first_row}"
        raise ValueError(f"{expected}, got {width_n[row]} in row {first_row + row}")
    flat = connection.execute(f"SELECT CAST(unnest({_quoted(features)}) AS FLOAT) AS x {part}").fetchnumpy()["x"]
    features_nd = np.ma.filled(flat, np.nan).reshape(len(width_n), int(width_n[0]))
    return Logs.of(columns, roles), features_nd


def _filled(values, name: str, first_row: int) -> np.ndarray:
    """The values; ValueError where one is missing."""
    missing_n = np.ma.getmaskarray(values)
    if missing_n.any():
        raise ValueError(
            f"{name}: expected a value in every row, got none in row {first_row + int(missing_n.argmax())}"
        )
    return np.ma.getdata(values)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
