"""What a log must fulfil before anything is computed from it.

Every check returns a list of `Problem`s, so that all of them can be shown at
once; `BadLogs` is what the reader raises when there are any.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import pathlib
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
    "switch": "0 or 1, true or false",
    "vector": "a list of numbers",
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
    none) or bool by `kind`, one of `EXPECTED`; of vectors it is (n, k); `unreadable` maps a row to the cell
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
        if self.kind in ("number", "time", "switch"):
            absent_n |= np.isnan(self.values_n)
        elif self.kind not in ("flag", "vector"):
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


def row_problems(table: Mapping[str, Column], roles: Roles, trials: bool = True) -> list[Problem]:
    """Cells that are wrong in themselves or against their row; a cell is named once.

    A confounder without a value is not among them: see `missing_problems`. Neither is
    an outcome without one where `Roles.observed` is 0. `trials`: the outcome is a count
    of the exposure's trials.
    """
    finite = {roles.outcome, roles.exposure, roles.weight, roles.time, roles.treatment, roles.guardrail,
              roles.propensity, *roles.confounders, *roles.instruments}  # fmt: skip
    problems = []
    for name, column in table.items():
        expected = _expected(column)
        problems += [Problem(row, name, expected, cell) for row, cell in column.unreadable.items()]
        if name in _required(roles) or column.kind == "flag":
            seen_n = table[roles.observed].values_n != 0 if roles.observed and name == roles.outcome else None
            problems += _absent(name, column, seen_n)
        if column.kind == "vector":
            problems += _vectors(name, column)
        if name in finite and column.kind in ("number", "time"):
            problems += _flag(name, np.isinf(column.values_n), "a finite number", column.values_n)
        if column.kind == "switch":
            wrong_n = ~np.isnan(column.values_n) & ~np.isin(column.values_n, (0.0, 1.0))
            problems += _flag(name, wrong_n, expected, column.values_n)
    if roles.weight:
        weight_n = table[roles.weight].values_n
        problems += _flag(roles.weight, np.isfinite(weight_n) & (weight_n <= 0), "a number > 0", weight_n)
    if roles.propensity:
        chance_n = table[roles.propensity].values_n
        wrong_n = np.isfinite(chance_n) & ((chance_n <= 0) | (chance_n > 1))
        problems += _flag(roles.propensity, wrong_n, "a probability > 0", chance_n)
    if roles.exposure:
        problems += _counts(table, roles, trials)
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
    must_vary = (*roles.confounders, *roles.instruments, roles.treatment, roles.observed, roles.guardrail)
    for name in filter(None, (*must_vary, *roles.embedding)):
        column = table[name]
        usable_n = ~column.absent_n
        usable_n[list(column.unreadable)] = False
        number = column.kind in ("number", "time", "switch")
        levels = np.unique(column.values_n[usable_n], axis=0)
        extra_level = missing_level and not number and bool(column.absent_n.any())
        if len(levels) + extra_level < 2:
            wanted = "at least two different values" if number else "at least two levels"
            wanted = "lists that differ" if column.kind == "vector" else wanted
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
    optional = ("confounders", "context")
    values = [getattr(roles, field.name) for field in dataclasses.fields(roles) if field.name not in optional]
    return {name for value in values for name in ((value,) if isinstance(value, str) else value) if name}


def _flag(name: str, wrong_n: np.ndarray, expected: str, values_n: np.ndarray) -> list[Problem]:
    return [Problem(int(row), name, expected, show(values_n[row])) for row in np.flatnonzero(wrong_n)]


def _absent(name: str, column: Column, seen_n: np.ndarray | None = None) -> list[Problem]:
    expected = {"text": "non-empty text", "name": "a value"}.get(column.kind, _expected(column))
    rows = np.flatnonzero(column.absent_n if seen_n is None else column.absent_n & seen_n)
    found = ["NULL" if column.null_n[row] else show(column.values_n[row]) for row in rows]
    return [Problem(int(row), name, expected, came) for row, came in zip(rows, found, strict=True)]


def _expected(column: Column) -> str:
    if column.kind == "vector" and column.values_n.shape[1]:
        return f"a list of {column.values_n.shape[1]} numbers"
    return EXPECTED[column.kind]


def _vectors(name: str, column: Column) -> list[Problem]:
    """Lists with a number that is missing or infinite: the first of each."""
    bad_nk = ~np.isfinite(column.values_n)
    bad_nk[column.null_n] = False
    bad_nk[list(column.unreadable)] = False
    places = [(int(row), int(bad_nk[row].argmax())) for row in np.flatnonzero(bad_nk.any(1))]
    wanted, values_nk = "finite numbers", column.values_n
    return [Problem(row, name, wanted, f"{show(values_nk[row, at])} in place {at}") for row, at in places]


def _counts(table: Mapping[str, Column], roles: Roles, trials: bool) -> list[Problem]:
    count_n, shown_n = table[roles.outcome].values_n, table[roles.exposure].values_n
    with np.errstate(invalid="ignore"):
        bad_count = np.isfinite(count_n) & ((count_n != np.floor(count_n)) | (count_n < 0))
        whole = shown_n == np.floor(shown_n) if trials else np.ones(len(shown_n), bool)
        bad_shown = np.isfinite(shown_n) & (~whole | (shown_n <= 0))
        above = np.isfinite(count_n) & np.isfinite(shown_n) & ~bad_count & ~bad_shown & (count_n > shown_n) & trials
    problems = _flag(roles.outcome, bad_count, "a whole number >= 0", count_n)
    problems += _flag(roles.exposure, bad_shown, "a whole number > 0" if trials else "a number > 0", shown_n)
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
