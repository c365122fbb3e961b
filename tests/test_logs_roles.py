"""Roles beyond text and outcome: arrays, treatment, observed, guardrail, arm, propensity, prompt."""

import json

import duckdb
import numpy as np
import pytest

from deconfound_jax.logs.check import BadLogs, Problem
from deconfound_jax.logs.read import read
from deconfound_jax.structs import Roles

FORMATS = ("csv", "jsonl", "parquet")
ROLES = Roles(
    text="reply", outcome="stars", embedding=("article",), treatment="dose", observed="rated", guardrail="complaints",
    prompt="question", arm="random", propensity="chance",
)  # fmt: skip
TYPES = {
    "reply": "VARCHAR", "question": "VARCHAR", "stars": "DOUBLE", "article": "FLOAT[]", "dose": "DOUBLE",
    "rated": "BIGINT", "complaints": "DOUBLE", "random": "BOOLEAN", "chance": "DOUBLE",
}  # fmt: skip


def good_rows():
    return [
        {
            "reply": f"reply {i}", "question": f"why {i}?", "stars": float(i) if i % 2 else None,
            "article": [0.5 * i, 1.0, -2.0], "dose": float(i % 3), "rated": i % 2, "complaints": 0.25 * i,
            "random": i > 2, "chance": 0.1 + 0.1 * i,
        }
        for i in range(6)
    ]  # fmt: skip


def write(folder, form, rows, types=TYPES):
    path = folder / f"log.{form}"
    if form == "csv":
        cells = [",".join("" if r[c] is None else f'"{r[c]}"' for c in types) for r in rows]
        path.write_text("\n".join([",".join(types), *cells]) + "\n")
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with duckdb.connect() as connection:
            connection.execute(f"CREATE TABLE t ({', '.join(f'{c} {t}' for c, t in types.items())})")
            for row in rows:
                connection.execute(f"INSERT INTO t VALUES ({', '.join('?' * len(types))})", [row[c] for c in types])
            connection.execute(f"COPY t TO '{path}' (FORMAT parquet)")
    return path


def problems_of(path, roles=ROLES, **options):
    with pytest.raises(BadLogs) as caught:
        read(path, roles, **options)
    return list(caught.value.problems)


@pytest.mark.parametrize("form", FORMATS)
def test_every_role_reads_the_same_in_every_format(tmp_path, form):
    columns = read(write(tmp_path, form, good_rows()), ROLES).columns
    np.testing.assert_array_equal(columns["article"], [[0.5 * i, 1.0, -2.0] for i in range(6)])
    assert columns["article"].dtype == np.float64
    np.testing.assert_array_equal(columns["stars"], [np.nan, 1, np.nan, 3, np.nan, 5])
    np.testing.assert_array_equal(columns["rated"], [0.0, 1.0] * 3)
    assert columns["random"].tolist() == [False] * 3 + [True] * 3 and columns["random"].dtype == bool
    assert columns["question"].tolist() == [f"why {i}?" for i in range(6)]
    np.testing.assert_allclose(columns["chance"], 0.1 + 0.1 * np.arange(6))
    np.testing.assert_array_equal(columns["dose"], [0, 1, 2, 0, 1, 2])


def test_arms_may_be_numbers_arrays_fixed_and_a_subset_keeps_them(tmp_path):
    rows = [{**row, "random": i % 2, "rated": bool(row["rated"])} for i, row in enumerate(good_rows())]
    types = {**TYPES, "random": "INTEGER", "rated": "BOOLEAN", "article": "DOUBLE[3]"}
    logs = read(write(tmp_path, "parquet", rows, types), ROLES)
    assert logs.columns["random"].tolist() == [False, True] * 3
    assert logs.columns["rated"].tolist() == [0.0, 1.0] * 3
    part = logs.take(np.arange(6) > 3)
    np.testing.assert_array_equal(part.columns["article"], [[2.0, 1.0, -2.0], [2.5, 1.0, -2.0]])
    assert part.fingerprint != logs.fingerprint


NAN, INF = float("nan"), float("inf")
# One wrong cell at a time, in every format: row, column, cell, expected, found.
CELLS = {
    "short list": (3, "article", [1.0, 2.0], "a list of 3 numbers", "a list of 2"),
    "no list": (4, "article", None, "a list of 3 numbers", "NULL"),
    "infinite number in a list": (2, "article", [1.0, INF, 2.0], "finite numbers", "inf in place 1"),
    "nan in a list": (2, "article", [1.0, 2.0, NAN], "finite numbers", "NaN in place 2"),
    "no dose": (1, "dose", None, "a number", "NULL"),
    "infinite dose": (1, "dose", INF, "a finite number", "inf"),
    "unseen outcome not declared": (1, "stars", None, "a number", "NULL"),
    "infinite guardrail": (0, "complaints", -INF, "a finite number", "-inf"),
    "two of one": (5, "rated", 2, "0 or 1, true or false", "2"),
    "seen or not": (5, "rated", None, "0 or 1, true or false", "NULL"),
    "probability zero": (0, "chance", 0.0, "a probability > 0", "0"),
    "probability above one": (2, "chance", 1.5, "a probability > 0", "1.5"),
    "no arm": (2, "random", None, "0 or 1, true or false", "NULL"),
    "blank question": (2, "question", " ", "non-empty text", "' '"),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", CELLS)
def test_a_wrong_cell_of_a_role_is_named(tmp_path, case, form):
    row, column, cell, expected, found = CELLS[case]
    rows = good_rows()
    rows[row][column] = cell
    assert problems_of(write(tmp_path, form, rows)) == [Problem(row, column, expected, found)]


@pytest.mark.parametrize(
    ("form", "cell", "expected", "found"),
    [
        ("jsonl", "far", "a list of 3 numbers", '"far"'),
        ("jsonl", ["a", 1, 2], "finite numbers", "NaN in place 0"),
        ("csv", "far", "a list of 3 numbers", "'far'"),
        ("csv", "[1, b, 2]", "finite numbers", "NaN in place 1"),
    ],
)
def test_what_is_no_list_of_numbers_is_named(tmp_path, form, cell, expected, found):
    rows = good_rows()
    rows[1]["article"] = cell
    assert problems_of(write(tmp_path, form, rows)) == [Problem(1, "article", expected, found)]


WHOLE = {  # a column of wrong cells: column, its Parquet type, cell, expected, found
    "texts for an array": ("article", "VARCHAR", "far", "a list of numbers", "a column of type VARCHAR"),
    "lists of texts": ("article", "VARCHAR[]", ["a"], "a list of numbers", "a column of type VARCHAR[]"),
    "lists of lists": ("article", "FLOAT[][]", [[1.0]], "a list of numbers", "a column of type FLOAT[][]"),
    "equal lists": ("article", "FLOAT[]", [1.0, 2.0], "lists that differ", "only '[1. 2.]'"),
    "one dose": ("dose", "DOUBLE", 2.0, "at least two different values", "only 2"),
    "all seen": ("rated", "BIGINT", 1, "at least two different values", "only 1"),
    "texts for an arm": ("random", "VARCHAR", "yes", "0 or 1, true or false", "a column of type VARCHAR"),
    "numbers for a prompt": ("question", "BIGINT", 3, "text", "a column of type BIGINT"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_wrong_column_of_a_role_is_named(tmp_path, case):
    column, sql, cell, expected, found = WHOLE[case]
    rows = [{**row, "stars": 1.0 + i, column: cell} for i, row in enumerate(good_rows())]
    path = write(tmp_path, "parquet", rows, {**TYPES, column: sql})
    assert problems_of(path) == [Problem(-1, column, expected, found)]


def test_a_dropped_row_takes_its_array_along(tmp_path):
    rows = good_rows()
    rows[1]["article"] = [1.0]
    logs = read(write(tmp_path, "jsonl", rows), ROLES, on_bad_rows="drop", rejected_path=tmp_path / "bad.jsonl")
    assert logs.columns["article"].shape == (5, 3) and len(logs) == 5


def test_an_amount_of_exposure_need_not_be_whole_nor_large(tmp_path):
    roles = Roles(text="reply", outcome="stars", exposure="dose")
    rows = [{**row, "stars": 3.0 * i, "dose": 0.5 + i} for i, row in enumerate(good_rows())]
    path = write(tmp_path, "parquet", rows)
    np.testing.assert_array_equal(read(path, roles, exposure="amount").exposure_n, 0.5 + np.arange(6))
    assert {p.expected for p in problems_of(path, roles)} == {"a whole number > 0"}
    rows[2]["dose"] = -1.0
    path = write(tmp_path, "parquet", rows)
    assert problems_of(path, roles, exposure="amount") == [Problem(2, "dose", "a number > 0", "-1")]
    with pytest.raises(ValueError, match="exposure: expected one of .* got 'hours'"):
        read(path, roles, exposure="hours")
