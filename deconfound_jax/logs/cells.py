"""Cells of a file as SQL and as arrays: what each kind of column may be stored as, and how it is read.

Whether a value is good is decided in `check`; here a cell becomes a value, or is
handed on as it stands where it is not of its column's kind.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import duckdb
import numpy as np

from deconfound_jax.logs import check
from deconfound_jax.logs.check import Column

_JSON_NUMBERS = "('BIGINT', 'UBIGINT', 'HUGEINT', 'DOUBLE')"
FITS = {  # the types of a file's columns that may hold a kind
    "text": ("VARCHAR", "CELL", "JSON"),
    "number": ("NUMBER", "BOOLEAN", "CELL", "JSON"),
    "time": ("NUMBER", "TIME", "VARCHAR", "CELL", "JSON"),
    "name": ("NUMBER", "BOOLEAN", "TIME", "VARCHAR", "CELL", "JSON"),
    "flag": ("BOOLEAN", "CELL", "JSON"),
    "switch": ("NUMBER", "BOOLEAN", "CELL", "JSON"),
    "vector": ("LIST", "CELL", "JSON"),
}
_LIST = re.compile(r"(\w+(?:\(.*\))?)\[\d*\]")  # FLOAT[] and DOUBLE[384], not FLOAT[][]


def type_of(sql: str) -> str:
    """A SQL type as one of those in `FITS`."""
    if (inside := _LIST.fullmatch(sql)) and type_of(inside[1]) == "NUMBER":
        return "LIST"
    if sql in ("DOUBLE", "FLOAT", "INTEGER", "UINTEGER") or sql.endswith("INT") or sql.startswith("DECIMAL"):
        return "NUMBER"
    if sql.startswith("TIMESTAMP") or sql == "DATE":
        return "TIME"
    return "VARCHAR" if sql == "UUID" or sql.startswith("ENUM") else sql


def usual_kind(connection, relation: str, cell: str, sql: str, confounder: bool) -> str:
    """What an undeclared column is: a confounder's flags are numbers, and its numbers may have bad cells."""
    if sql in ("CELL", "JSON"):
        numbers, flags = shares(connection, relation, cell, sql)
    else:
        numbers, flags = float(sql == "NUMBER"), float(sql == "BOOLEAN")
    if flags == 1 and not confounder:
        return "flag"
    return "number" if numbers + flags == 1 or (confounder and numbers > 0.5) else "name"


def shares(connection, relation: str, cell: str, sql: str) -> tuple[float, float]:
    """The shares of filled cells that are numbers, and that are true or false."""
    number, flag = f"TRY_CAST({cell} AS DOUBLE) IS NOT NULL", f"lower(trim({cell})) IN ('true', 'false')"
    if sql == "JSON":
        number, flag = f"json_type({cell}) IN {_JSON_NUMBERS}", f"json_type({cell}) = 'BOOLEAN'"
    query = f"SELECT count(*) FILTER ({number}), count(*) FILTER ({flag}), count(*) FROM {relation}"
    numbers, flags, cells = connection.execute(f"{query} WHERE {_filled(cell, sql)}").fetchone()
    return numbers / max(cells, 1), flags / max(cells, 1)


def fetch(
    connection: duckdb.DuckDBPyConnection, relation: str, cells: Mapping[str, tuple[str, str]], kinds: Mapping[str, str]
) -> dict[str, Column]:
    """Reads the columns named in `kinds`; `cells` maps a name to its identifier and SQL type."""
    selected = []
    for i, (name, kind) in enumerate(kinds.items()):
        cell, sql = cells[name][0], type_of(cells[name][1])
        value = _value(cell, sql, kind)
        raw = f"CASE WHEN {_filled(cell, sql)} AND {value} IS NULL THEN CAST({cell} AS VARCHAR) END"
        selected += [f"{value} AS v{i}", f"{raw} AS u{i}"]
    rows = connection.execute(f"SELECT {', '.join(selected)} FROM {relation}").fetchnumpy()
    table = {}
    for i, (name, kind) in enumerate(kinds.items()):
        null_n = np.array(np.ma.getmaskarray(rows[f"v{i}"]))
        values_n = np.array(np.ma.getdata(rows[f"v{i}"]))
        if kind not in ("flag", "vector"):
            values_n[null_n] = np.nan if kind in ("number", "time", "switch") else ""
        unreadable: dict[int, str] = {}
        if kind == "vector":
            values_n, unreadable = _matrix(values_n, null_n)
        for row in np.flatnonzero(~np.ma.getmaskarray(rows[f"u{i}"])):
            cell = rows[f"u{i}"][row]
            unreadable[int(row)] = check.show(cell) if cells[name][1] != "JSON" else cell[:80]
        table[name] = Column(kind, values_n, null_n, unreadable)
    return table


def _matrix(lists_n: np.ndarray, null_n: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
    """Lists of the commonest length as rows of an array (n, k), NaN elsewhere; and the lists of another length."""
    rows = {int(row): np.ma.filled(np.ma.asarray(lists_n[row], np.float64), np.nan) for row in np.flatnonzero(~null_n)}
    width = Counter(map(len, rows.values())).most_common(1)[0][0] if rows else 0
    values_nk = np.full((len(lists_n), width), np.nan)
    for row, value in rows.items():
        if len(value) == width:
            values_nk[row] = value
    return values_nk, {row: f"a list of {len(value)}" for row, value in rows.items() if len(value) != width}


def _value(cell: str, sql: str, kind: str) -> str:
    """SQL of a cell's value; NULL where the cell is not of this kind."""
    text = f"({cell} ->> '$')" if sql == "JSON" else f"CAST({cell} AS VARCHAR)"
    flag = f"CASE lower(trim({text})) WHEN 'true' THEN true WHEN 'false' THEN false END"
    json_type = f"json_type({cell})"
    if kind == "flag":
        return f"({flag})"
    if kind == "vector":
        return f"TRY_CAST({cell} AS DOUBLE[])"
    if kind == "time":
        stamp = f"CAST({cell} AS TIMESTAMP)" if sql == "TIME" else f"TRY_CAST({text} AS TIMESTAMPTZ)"
        return f"COALESCE(TRY_CAST({text} AS DOUBLE), epoch({stamp}))"
    if kind in ("number", "switch") and sql == "NUMBER":
        return f"CAST({cell} AS DOUBLE)"
    if kind in ("number", "switch"):
        number = f"COALESCE(TRY_CAST({text} AS DOUBLE), CAST(CAST({flag} AS INTEGER) AS DOUBLE))"
        # A quoted number in JSON is text, and whoever wrote it should know.
        return f"(CASE WHEN {json_type} <> 'VARCHAR' THEN {number} END)" if sql == "JSON" else number
    if sql == "NUMBER":
        # 3.0 and 3 name the same level, whatever the file's type.
        whole, integer = f"{cell} = trunc({cell}) AND abs({cell}) < 1e15", f"CAST(CAST({cell} AS BIGINT) AS VARCHAR)"
        return f"(CASE WHEN {whole} THEN {integer} WHEN {_filled(cell, sql)} THEN {text} END)"
    if sql == "JSON":
        fits = "= 'VARCHAR'" if kind == "text" else "NOT IN ('OBJECT', 'ARRAY')"
        return f"(CASE WHEN {json_type} {fits} AND {_filled(cell, sql)} THEN {text} END)"
    return text


def _filled(cell: str, sql: str) -> str:
    """SQL of whether anything stands in a cell (a NaN is nothing)."""
    if sql == "JSON":
        return f"CAST({cell} AS VARCHAR) NOT IN ('null', 'NaN')"
    return f"NOT isnan(CAST({cell} AS DOUBLE))" if sql == "NUMBER" else f"trim(CAST({cell} AS VARCHAR)) <> ''"
