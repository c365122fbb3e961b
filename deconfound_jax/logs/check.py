"""What a log must fulfil before anything is computed from it.

Every check returns a list of `Problem`s, so that all of them can be shown at
once; `BadLogs` is what the reader raises when there are any.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import pathlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from deconfound_jax.structs import Roles

SHOWN = 10  # problems spelled out in a message; the rest are in `.problems`
FORMATS = {".parquet": "parquet"} | {
    suffix + gz: "csv" if suffix == ".csv" else "json"
    for suffix in (".csv", ".json", ".jsonl", ".ndjson")
    for gz in ("", ".gz")
}
EXPECTED = {
    "text": "text",
    "number": "a number",
    "time": "a number or a time stamp",
    "name": "text or a number",
    "flag": "true or false",
}


class Problem(NamedTuple):
    """One thing wrong: `row` counts from 0 (-1: the whole column), `column` "" is the whole file."""

    row: int
    column: str
    expected: str
    found: str


class BadLogs(ValueError):
    """A log that cannot be used; `.problems` has everything that is wrong with it.

    `keys` maps a row to its value of `Roles.key`, for the message.
    """

    def __init__(self, path: object, problems: Sequence[Problem], keys: Mapping[int, str] | None = None):
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        lines = [f"{path}: {count}"] + [f"  {_sentence(p, keys or {})}" for p in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            lines.append(f"  ... and {len(self.problems) - SHOWN} more")
        super().__init__("\n".join(lines))


@dataclasses.dataclass(frozen=True)
class Column:
    """Cells as they came, before they are judged.

    `values_n` holds float64 (NaN where there is no number), str ("" where there is
    none) or bool by `kind`, one of `EXPECTED`; `unreadable` maps a row to the cell
    that is not of that kind.
    """

    kind: str
    values_n: np.ndarray
    null_n: np.ndarray
    unreadable: Mapping[int, str]

    @property
    def absent_n(self) -> np.ndarray:
        """Cells without a value: NULL, NaN, or nothing but white space."""
        absent_n = self.null_n.copy()
        if self.kind in ("number", "time"):
            absent_n |= np.isnan(self.values_n)
        elif self.kind != "flag":
            absent_n |= np.array([not v.strip() for v in self.values_n], bool)
        absent_n[list(self.unreadable)] = False
        return absent_n

    def take(self, keep: np.ndarray) -> Column:
        """The rows of a boolean mask; unreadable cells must not be among them."""
        return Column(self.kind, self.values_n[keep], self.null_n[keep], {})


def nearest(name: str, names: Iterable[str]) -> str:
    """The clause `; nearest is 'x'` that ends a message about an unknown name."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)
    return f"; nearest is {close[0]!r}" if close else ""


def file_problems(path: pathlib.Path) -> list[Problem]:
    """A file that is not there, is empty, or is of a format that is not read."""
    suffix = suffix_of(path)
    if suffix not in FORMATS:
        found = f"{suffix!r}{nearest(suffix, FORMATS)}"
        return [Problem(-1, "", f"a file name ending in one of {', '.join(FORMATS)}", found)]
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        return [Problem(-1, "", "an existing file", f"none{nearest(path.name, beside)}")]
    return [] if path.stat().st_size else [Problem(-1, "", "at least one row", "0 bytes")]


def suffix_of(path: pathlib.Path) -> str:
    """The key of `FORMATS` that a file's name ends in, or what stands in its place."""
    return "".join(path.suffixes[-2:] if path.suffix == ".gz" else path.suffixes[-1:]).lower()


def name_problems(
    roles: Roles, categories: Sequence[str], numeric: Sequence[str], extra: Sequence[str], names: Sequence[str]
) -> list[Problem]:
    """Columns that the file (its column `names`) lacks or has twice, and roles that contradict each other."""
    problems, counts = [], Counter(names)
    for column in dict.fromkeys((*roles.columns(), *extra)):
        if not counts[column]:
            wanted = f"a column of the file ({_role(roles, column)})"
            problems.append(Problem(-1, column, wanted, f"no such column{nearest(column, names)}"))
        elif counts[column] > 1:
            problems.append(Problem(-1, column, "a column name used once", f"{counts[column]} columns of this name"))
    declarable = (*roles.confounders, *extra)
    for argument, columns in (("categories", categories), ("numeric", numeric)):
        for column in columns:
            if column not in declarable:
                wanted = f"{argument} to name a confounder or an extra column"
                problems.append(Problem(-1, column, wanted, f"neither{nearest(column, declarable)}"))
    for column in set(categories) & set(numeric):
        problems.append(Problem(-1, column, "either categories or numeric", "both"))
    return problems + _conflicts(roles)


def row_problems(table: Mapping[str, Column], roles: Roles) -> list[Problem]:
    """Cells that are wrong in themselves or against their row; a cell is named once.

    A confounder without a value is not among them: see `missing_problems`.
    """
    finite = {roles.outcome, roles.exposure, roles.weight, roles.time, *roles.confounders, *roles.instruments}
    problems = []
    for name, column in table.items():
        problems += [Problem(row, name, EXPECTED[column.kind], cell) for row, cell in column.unreadable.items()]
        if name in _required(roles) or column.kind == "flag":
            problems += _absent(name, column)
        if name in finite and column.kind in ("number", "time"):
            problems += _flag(name, np.isinf(column.values_n), "a finite number", column.values_n)
    if roles.weight:
        weight_n = table[roles.weight].values_n
        problems += _flag(roles.weight, np.isfinite(weight_n) & (weight_n <= 0), "a number > 0", weight_n)
    if roles.exposure:
        problems += _counts(table, roles)
    if roles.key:
        problems += _repeats(roles.key, table[roles.key])
    return problems


def missing_problems(table: Mapping[str, Column], roles: Roles) -> list[Problem]:
    """Confounder cells without a value."""
    columns = [c for c in roles.confounders if c not in _required(roles)]
    return [problem for name in columns for problem in _absent(name, table[name])]


def column_problems(table: Mapping[str, Column], roles: Roles, missing_level: bool = False) -> list[Problem]:
    """What is wrong with a whole column: no rows, a confounder or an instrument that never varies.

    `missing_level` counts "missing" as a level of its own.
    """
    if not len(table[roles.text].values_n):
        return [Problem(-1, "", "at least one row", "0 rows")]
    problems = []
    for name in (*roles.confounders, *roles.instruments):
        column = table[name]
        usable_n = ~column.absent_n
        usable_n[list(column.unreadable)] = False
        levels = np.unique(column.values_n[usable_n])
        number = column.kind in ("number", "time")
        extra_level = missing_level and not number and bool(column.absent_n.any())
        if len(levels) + extra_level < 2:
            wanted = "at least two different values" if number else "at least two levels"
            problems.append(Problem(-1, name, wanted, f"only {show(levels[0])}" if len(levels) else "no value"))
        if missing_level and number and f"{name}.missing" in table and column.absent_n.any():
            problems.append(Problem(-1, f"{name}.missing", "a name free for the indicator", "a column of the log"))
    return problems


def write_rejected(problems: Iterable[Problem], keys: np.ndarray | None, path: object) -> None:
    """Writes each row that is left out as one JSON line: row, key (or null) and its reasons."""
    rows: dict[int, list[dict[str, str]]] = {}
    for problem in sorted(problems, key=lambda p: p.row):
        rows.setdefault(problem.row, []).append({k: v for k, v in problem._asdict().items() if k != "row"})
    lines = [
        json.dumps({"row": row, "key": None if keys is None else str(keys[row]), "reasons": reasons}) + "\n"
        for row, reasons in rows.items()
    ]
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    epath.Path(path).write_text("".join(lines))


def show(value: object) -> str:
    """A cell for a message: whole numbers without a point, text quoted and cut at 80 letters."""
    if isinstance(value, (float, np.floating)):
        if np.isnan(value):
            return "NaN"
        return str(int(value)) if abs(value) < 1e15 and value == int(value) else str(float(value))
    text = str(value)
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _required(roles: Roles) -> set[str]:
    single = (roles.text, roles.outcome, roles.exposure, roles.weight, roles.time, roles.key, roles.group)
    return {name for name in (*single, roles.pair_within, *roles.instruments) if name}


def _role(roles: Roles, column: str) -> str:
    """The field that names a column, for a message: `Roles.outcome`, or `extra`."""
    for field in dataclasses.fields(roles):
        value = getattr(roles, field.name)
        if column == value or (isinstance(value, tuple) and column in value):
            return f"Roles.{field.name}"
    return "extra"


def _conflicts(roles: Roles) -> list[Problem]:
    # group, key, context and time may repeat a confounder (a week, an article); these may not.
    measured = [(field, getattr(roles, field)) for field in ("text", "outcome", "exposure", "weight")]
    measured += [("instruments", name) for name in roles.instruments]
    measured += [("confounders", name) for name in roles.confounders]
    places: dict[str, list[str]] = {}
    for field, column in measured:
        if column:
            places.setdefault(column, []).append(field)
    wanted = "one role among text, outcome, exposure, weight, instruments, confounders"
    return [Problem(-1, c, wanted, " and ".join(fields)) for c, fields in places.items() if len(fields) > 1] + [
        Problem(-1, "", f"Roles.{field} to name a column", "no name") for field, column in measured[:2] if not column
    ]


def _flag(name: str, wrong_n: np.ndarray, expected: str, values_n: np.ndarray) -> list[Problem]:
    return [Problem(int(row), name, expected, show(values_n[row])) for row in np.flatnonzero(wrong_n)]


def _absent(name: str, column: Column) -> list[Problem]:
    expected = {"text": "non-empty text", "name": "a value"}.get(column.kind, EXPECTED[column.kind])
    rows = np.flatnonzero(column.absent_n)
    found = ["NULL" if column.null_n[row] else show(column.values_n[row]) for row in rows]
    return [Problem(int(row), name, expected, came) for row, came in zip(rows, found, strict=True)]


def _counts(table: Mapping[str, Column], roles: Roles) -> list[Problem]:
    count_n, shown_n = table[roles.outcome].values_n, table[roles.exposure].values_n
    with np.errstate(invalid="ignore"):
        count_ok, shown_ok = count_n == np.floor(count_n), shown_n == np.floor(shown_n)
        bad_count = np.isfinite(count_n) & (~count_ok | (count_n < 0))
        bad_shown = np.isfinite(shown_n) & (~shown_ok | (shown_n <= 0))
        above = np.isfinite(count_n) & np.isfinite(shown_n) & ~bad_count & ~bad_shown & (count_n > shown_n)
    problems = _flag(roles.outcome, bad_count, "a whole number >= 0", count_n)
    problems += _flag(roles.exposure, bad_shown, "a whole number > 0", shown_n)
    for row in np.flatnonzero(above):
        wanted = f"at most {roles.exposure} = {show(shown_n[row])}"
        problems.append(Problem(int(row), roles.outcome, wanted, show(count_n[row])))
    return problems


def _repeats(name: str, column: Column) -> list[Problem]:
    first, problems = {}, []
    for row in np.flatnonzero(~column.absent_n):
        value = column.values_n[row]
        if value and value in first:
            problems.append(Problem(int(row), name, "a key used once", f"{show(value)}, also in row {first[value]}"))
        first.setdefault(value, int(row))
    return problems


def _sentence(problem: Problem, keys: Mapping[int, str]) -> str:
    place = []
    if problem.row >= 0:
        key = f" (key {keys[problem.row]!r})" if keys.get(problem.row) else ""
        place.append(f"row {problem.row}{key}")
    place.append(f"column {problem.column}" if problem.column else "the file")
    return f"{', '.join(place)}: expected {problem.expected}, found {problem.found}"
