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

from deconfound_jax.logs import cells, check
from deconfound_jax.logs.check import BadLogs, Column, Problem
from deconfound_jax.logs.names import name_problems
from deconfound_jax.structs import Logs, Roles

MISSING = "(missing)"
_LOG = logging.getLogger(__name__)
# All keys of all rows, and every value left as JSON.
_JSON_OPTIONS = "records='true', maximum_depth=1, sample_size=-1, map_inference_threshold=-1"


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
    exposure: Literal["trials", "amount"] = "trials",
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
      exposure: "trials" of which the outcome is a count, or an "amount", such as the
        hours in which a Poisson outcome was counted: any positive number.

    Returns:
      Logs of n rows in the file's order. Text and names are object arrays of str (empty:
      none), numbers float64, `roles.time` seconds since 1970 (UTC), flags and the arm
      bool, an embedding float64 (n, k). The outcome is NaN where it may be missing: where
      `roles.observed` is 0.

    Raises:
      BadLogs: with every problem, row and column named. Problems of a whole column are
        errors in every mode. ValueError: an argument that makes no sense.

    Example:
      logs = read("arms.parquet", Roles(text="headline", outcome="clicks", exposure="impressions"))
    """
    _check_arguments(on_bad_rows, missing, exposure, rejected_path)
    path = pathlib.Path(path)
    table = _table(path, roles, _Declared(tuple(categories), tuple(numeric), tuple(extra)))
    bad = check.row_problems(table, roles, trials=exposure == "trials")
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


def _check_arguments(on_bad_rows: str, missing: str, exposure: str, rejected_path: object) -> None:
    rules = {"on_bad_rows": (on_bad_rows, ("error", "drop")), "missing": (missing, ("error", "level", "drop"))}
    rules["exposure"] = (exposure, ("trials", "amount"))
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
            if problems := name_problems(roles, *declared, source.names):
                raise BadLogs(path, problems)
            kinds, problems = _kinds(connection, source, roles, declared)
            if problems:
                raise BadLogs(path, problems)
            return cells.fetch(connection, source.relation, source.cells, kinds)
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


def _kinds(connection, source: _Source, roles: Roles, declared: _Declared) -> tuple[dict[str, str], list[Problem]]:
    """The kind every column must have (`check.EXPECTED`), and the columns whose type cannot have it."""
    kinds, problems = {}, []
    declared_kinds = _kinds_of_roles(roles, declared)
    for name in dict.fromkeys((*roles.columns(), *declared.extra)):
        cell, raw = source.cells[name]
        sql = cells.type_of(raw)
        kind = declared_kinds.get(name)
        if kind is None:
            kind = cells.usual_kind(connection, source.relation, cell, sql, name in roles.confounders)
        if kind == "text" and sql == "CELL" and cells.shares(connection, source.relation, cell, sql)[0] == 1:
            problems.append(Problem(-1, name, check.EXPECTED[kind], "numbers only"))
        if sql not in cells.FITS[kind]:
            problems.append(Problem(-1, name, check.EXPECTED[kind], f"a column of type {raw}"))
        kinds[name] = kind
    return kinds, problems


def _kinds_of_roles(roles: Roles, declared: _Declared) -> dict[str, str]:
    """The kinds that roles and the caller's words settle; of a column with two roles the later of these counts."""
    numbers = (roles.outcome, roles.exposure, roles.weight, roles.treatment, roles.guardrail, roles.propensity)
    kinds = dict.fromkeys((*declared.categories, roles.key, roles.group, roles.pair_within, *roles.context), "name")
    kinds |= dict.fromkeys((*numbers, *roles.instruments, *declared.numeric), "number")
    kinds |= dict.fromkeys(roles.embedding, "vector") | dict.fromkeys((roles.arm, roles.observed), "switch")
    kinds |= {roles.time: "time", roles.prompt: "text", roles.text: "text"}
    return kinds


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
        columns[name] = values_n.astype(bool) if name == roles.arm else values_n
    return Logs.of(columns, dataclasses.replace(roles, confounders=roles.confounders + tuple(indicators)))


def _quoted(text: str, mark: str) -> str:
    return mark + text.replace(mark, mark * 2) + mark
