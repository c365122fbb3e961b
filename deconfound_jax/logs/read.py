"""Files to `Logs`: Parquet, CSV and JSON lines through DuckDB.

DuckDB reads and casts; whether a cell is good is decided in `check`. A CSV is
read as text and JSON cell by cell, so a bad cell is a named row and never an
inferred type.
"""

from __future__ import annotations

import csv
import dataclasses
import glob
import gzip
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import duckdb
import numpy as np

from deconfound_jax.logs import check
from deconfound_jax.logs.check import BadLogs, Column, Problem
from deconfound_jax.structs import Logs, Roles

MISSING = "(missing)"
_LOG = logging.getLogger(__name__)
_JSON_NUMBERS = "('BIGINT', 'UBIGINT', 'HUGEINT', 'DOUBLE')"
# All keys of all rows, and every value left as JSON.
_JSON_OPTIONS = "records='true', maximum_depth=1, sample_size=-1, map_inference_threshold=-1"

_FITS = {  # the types of a file's columns that may hold a kind
    "text": ("VARCHAR", "CELL", "JSON"),
    "number": ("NUMBER", "BOOLEAN", "CELL", "JSON"),
    "time": ("NUMBER", "TIME", "VARCHAR", "CELL", "JSON"),
    "name": ("NUMBER", "BOOLEAN", "TIME", "VARCHAR", "CELL", "JSON"),
    "flag": ("BOOLEAN", "CELL", "JSON"),
}


def read(
    path: str | pathlib.Path,
    roles: Roles,
    *,
    categories: Sequence[str] = (),
    numeric: Sequence[str] = (),
    extra: Sequence[str] = (),
    on_bad_rows: Literal["error", "drop"] = "error",
    missing: Literal["error", "level", "drop"] = "error",
    rejected_path: str | pathlib.Path | None = None,
) -> Logs:
    """Reads a file of logs, keeps the columns named under roles and checks every row.

    Args:
      path: ends in one of `check.FORMATS`.
      roles: which column is what.
      categories: confounders or extra columns whose values are levels, integers too.
      numeric: confounders or extra columns that must be numbers. What is in neither is
        what most of its cells are: numbers, or else levels.
      extra: further columns to carry along; their cells may be empty (except flags).
      on_bad_rows: "drop" leaves bad rows out and writes each with its reasons to
        `rejected_path`, one JSON object a line.
      missing: a confounder's missing value: "error" is a bad row, "drop" leaves the row
        out as above; "level" gives a category the level "(missing)", and a number the
        column's mean beside a new 0/1 confounder `<column>.missing`.

    Returns:
      Logs of n rows in the file's order. Text and names are object arrays of str (empty:
      none), numbers float64, `roles.time` seconds since 1970 (UTC), flags bool.

    Raises:
      BadLogs: with every problem, row and column named. Problems of a whole column are
        errors in every mode. ValueError: an argument that makes no sense.

    Example:
      logs = read("arms.parquet", Roles(text="headline", outcome="clicks", exposure="impressions"))
    """
    _check_arguments(on_bad_rows, missing, rejected_path)
    path = pathlib.Path(path)
    table = _table(path, roles, _Declared(tuple(categories), tuple(numeric), tuple(extra)))
    bad = check.row_problems(table, roles)
    absent = [] if missing == "level" else check.missing_problems(table, roles)
    dropped = (bad if on_bad_rows == "drop" else []) + (absent if "drop" in (on_bad_rows, missing) else [])
    raised = [] if on_bad_rows == "drop" else bad if missing == "drop" else bad + absent
    keys = table[roles.key].values_n if roles.key else None
    if rejected_path is not None and not raised:
        table = _drop(table, dropped, keys, path, rejected_path)
    raised = check.column_problems(table, roles, missing == "level") + sorted(raised, key=lambda p: p.row)
    if raised:
        raise BadLogs(path, raised, {p.row: str(keys[p.row]) for p in raised if p.row >= 0} if roles.key else None)
    return _logs(table, roles)


class _Declared(NamedTuple):
    """What the caller says about columns beside their roles."""

    categories: tuple[str, ...]
    numeric: tuple[str, ...]
    extra: tuple[str, ...]


class _Source(NamedTuple):
    """A file as a SQL relation; `cells` maps a column's name to its identifier and SQL type (CELL: of a CSV)."""

    relation: str
    names: list[str]
    cells: dict[str, tuple[str, str]]


def _check_arguments(on_bad_rows: str, missing: str, rejected_path: object) -> None:
    rules = {"on_bad_rows": (on_bad_rows, ("error", "drop")), "missing": (missing, ("error", "level", "drop"))}
    for name, (value, allowed) in rules.items():
        if value not in allowed:
            raise ValueError(f"{name}: expected one of {allowed}, got {value!r}{check.nearest(value, allowed)}")
    if "drop" in (on_bad_rows, missing) and rejected_path is None:
        raise ValueError("rejected_path: expected a file for the rows that are dropped, got None")


def _table(path: pathlib.Path, roles: Roles, declared: _Declared) -> dict[str, Column]:
    if problems := check.file_problems(path):
        raise BadLogs(path, problems)
    form = check.FORMATS[check.suffix_of(path)]
    with duckdb.connect(config={"autoinstall_known_extensions": "false"}) as connection:
        connection.execute("SET TimeZone = 'UTC'")  # time stamps without a zone are UTC on every machine
        try:
            source = _open(connection, path, form)
            if problems := check.name_problems(roles, *declared, source.names):
                raise BadLogs(path, problems)
            kinds, problems = _kinds(connection, source, roles, declared)
            if problems:
                raise BadLogs(path, problems)
            return _fetch(connection, source, kinds)
        except (duckdb.Error, OSError, EOFError, UnicodeError, csv.Error) as error:
            reason = str(error).split("\n")[0].strip().replace(str(path), path.name)
            raise BadLogs(path, [Problem(-1, "", f"a readable {form} file", reason)]) from error


def _open(connection: duckdb.DuckDBPyConnection, path: pathlib.Path, form: str) -> _Source:
    file = _quoted(glob.escape(str(path)), "'")
    if form == "csv":
        # Read by position: DuckDB renames columns that differ in case only.
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as lines:
            names = next(csv.reader(lines), [])
        idents = [f"c{i}" for i in range(len(names))]
        columns = ", ".join(f"{ident}: 'VARCHAR'" for ident in idents)
        options = "header=true, auto_detect=false, delim=',', quote='\"', escape='\"'"
        relation = f"read_csv({file}, {options}, columns={{{columns}}})"
        return _Source(relation, names, {n: (i, "CELL") for n, i in zip(names, idents, strict=True)})
    relation = f"read_parquet({file})" if form == "parquet" else f"read_json({file}, {_JSON_OPTIONS})"
    described = connection.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()
    idents = [_quoted(row[0], '"') for row in described]
    names = _parquet_names(connection, file) if form == "parquet" else [row[0] for row in described]
    return _Source(relation, names, {n: (i, row[1]) for n, i, row in zip(names, idents, described, strict=True)})


def _parquet_names(connection: duckdb.DuckDBPyConnection, file: str) -> list[str]:
    # The names in the file, of the top level: DESCRIBE shows them renamed where they repeat.
    names, inside = [], 0
    for name, children in connection.execute(f"SELECT name, num_children FROM parquet_schema({file})").fetchall()[1:]:
        if not inside:
            names.append(name)
        inside += (children or 0) - bool(inside)
    return names


def _type(sql: str) -> str:
    if sql in ("DOUBLE", "FLOAT", "INTEGER", "UINTEGER") or sql.endswith("INT") or sql.startswith("DECIMAL"):
        return "NUMBER"
    if sql.startswith("TIMESTAMP") or sql == "DATE":
        return "TIME"
    return "VARCHAR" if sql == "UUID" or sql.startswith("ENUM") else sql


def _kinds(connection, source: _Source, roles: Roles, declared: _Declared) -> tuple[dict[str, str], list[Problem]]:
    """The kind every column must have (`check.EXPECTED`), and the columns whose type cannot have it."""
    kinds, problems = {}, []
    measured = {roles.outcome, roles.exposure, roles.weight, *roles.instruments, *declared.numeric}
    named = {*declared.categories, roles.key, roles.group, roles.pair_within, *roles.context}
    for name in dict.fromkeys((*roles.columns(), *declared.extra)):
        cell, raw = source.cells[name]
        sql = _type(raw)
        if name == roles.text:
            kind = "text"
            if sql == "CELL" and _shares(connection, source.relation, cell, sql)[0] == 1:
                problems.append(Problem(-1, name, check.EXPECTED[kind], "numbers only"))
        elif name == roles.time or name in measured:
            kind = "time" if name == roles.time else "number"
        elif name in named:
            kind = "name"
        else:
            kind = _usual_kind(connection, source.relation, cell, sql, name in roles.confounders)
        if sql not in _FITS[kind]:
            problems.append(Problem(-1, name, check.EXPECTED[kind], f"a column of type {raw}"))
        kinds[name] = kind
    return kinds, problems


def _usual_kind(connection, relation: str, cell: str, sql: str, confounder: bool) -> str:
    """What an undeclared column is: a confounder's flags are numbers, and its numbers may have bad cells."""
    if sql in ("CELL", "JSON"):
        numbers, flags = _shares(connection, relation, cell, sql)
    else:
        numbers, flags = float(sql == "NUMBER"), float(sql == "BOOLEAN")
    if flags == 1 and not confounder:
        return "flag"
    return "number" if numbers + flags == 1 or (confounder and numbers > 0.5) else "name"


def _shares(connection, relation: str, cell: str, sql: str) -> tuple[float, float]:
    """The shares of filled cells that are numbers, and that are true or false."""
    number, flag = f"TRY_CAST({cell} AS DOUBLE) IS NOT NULL", f"lower(trim({cell})) IN ('true', 'false')"
    if sql == "JSON":
        number, flag = f"json_type({cell}) IN {_JSON_NUMBERS}", f"json_type({cell}) = 'BOOLEAN'"
    query = f"SELECT count(*) FILTER ({number}), count(*) FILTER ({flag}), count(*) FROM {relation}"
    numbers, flags, cells = connection.execute(f"{query} WHERE {_filled(cell, sql)}").fetchone()
    return numbers / max(cells, 1), flags / max(cells, 1)


def _fetch(connection, source: _Source, kinds: Mapping[str, str]) -> dict[str, Column]:
    selected = []
    for i, (name, kind) in enumerate(kinds.items()):
        cell, sql = source.cells[name][0], _type(source.cells[name][1])
        value = _value(cell, sql, kind)
        raw = f"CASE WHEN {_filled(cell, sql)} AND {value} IS NULL THEN CAST({cell} AS VARCHAR) END"
        selected += [f"{value} AS v{i}", f"{raw} AS u{i}"]
    rows = connection.execute(f"SELECT {', '.join(selected)} FROM {source.relation}").fetchnumpy()
    table = {}
    for i, (name, kind) in enumerate(kinds.items()):
        null_n = np.array(np.ma.getmaskarray(rows[f"v{i}"]))
        values_n = np.array(np.ma.getdata(rows[f"v{i}"]))
        if kind != "flag":
            values_n[null_n] = np.nan if kind in ("number", "time") else ""
        unreadable = {}
        for row in np.flatnonzero(~np.ma.getmaskarray(rows[f"u{i}"])):
            cell = rows[f"u{i}"][row]
            unreadable[int(row)] = check.show(cell) if source.cells[name][1] != "JSON" else cell[:80]
        table[name] = Column(kind, values_n, null_n, unreadable)
    return table


def _value(cell: str, sql: str, kind: str) -> str:
    """SQL of a cell's value; NULL where the cell is not of this kind."""
    text = f"({cell} ->> '$')" if sql == "JSON" else f"CAST({cell} AS VARCHAR)"
    flag = f"CASE lower(trim({text})) WHEN 'true' THEN true WHEN 'false' THEN false END"
    json_type = f"json_type({cell})"
    if kind == "flag":
        return f"({flag})"
    if kind == "time":
        stamp = f"CAST({cell} AS TIMESTAMP)" if sql == "TIME" else f"TRY_CAST({text} AS TIMESTAMPTZ)"
        return f"COALESCE(TRY_CAST({text} AS DOUBLE), epoch({stamp}))"
    if kind == "number" and sql == "NUMBER":
        return f"CAST({cell} AS DOUBLE)"
    if kind == "number":
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


def _drop(table: Mapping[str, Column], problems: Sequence[Problem], keys, path, rejected_path) -> dict[str, Column]:
    keep = np.ones(len(next(iter(table.values())).values_n), bool)
    keep[[p.row for p in problems]] = False
    check.write_rejected(problems, keys, rejected_path)
    if not keep.all():
        _LOG.warning("%s: left out %d of %d rows, see %s", path, (~keep).sum(), len(keep), rejected_path)
    return {name: column.take(keep) for name, column in table.items()}


def _logs(table: Mapping[str, Column], roles: Roles) -> Logs:
    """Fills what may be missing: a category's level, a number's mean and indicator, an empty name."""
    columns, indicators = {}, []
    for name, column in table.items():
        values_n, absent_n = column.values_n.copy(), column.absent_n
        if name in roles.confounders and absent_n.any() and column.kind != "name":
            values_n[absent_n] = values_n[~absent_n].mean()
            indicators.append(f"{name}.missing")
            columns[indicators[-1]] = absent_n.astype(np.float64)
        elif column.kind == "name":
            values_n[absent_n] = MISSING if name in roles.confounders else ""
        columns[name] = values_n
    return Logs.of(columns, dataclasses.replace(roles, confounders=roles.confounders + tuple(indicators)))


def _quoted(text: str, mark: str) -> str:
    return mark + text.replace(mark, mark * 2) + mark
