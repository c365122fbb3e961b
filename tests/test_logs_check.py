"""Every broken file is refused with row, column, what was expected and what came."""

import gzip
import json
import logging

import duckdb
import numpy as np
import pytest

from deconfound_jax.logs.check import BadLogs, Problem
from deconfound_jax.logs.names import MEASURED
from deconfound_jax.logs.read import MISSING, read
from deconfound_jax.structs import Roles

FORMATS = ("csv", "jsonl", "parquet")
NAMES = dict(text="headline", outcome="clicks", exposure="shown", weight="weight", key="id", group="test")
ROLES = Roles(**NAMES, confounders=("week", "hour"), instruments=("rain",))
NUMBERS = ("clicks", "shown", "hour", "rain", "weight")
TYPES = {"id": "VARCHAR", "test": "VARCHAR", "headline": "VARCHAR", "week": "BIGINT"} | dict.fromkeys(NUMBERS, "DOUBLE")


def good_rows():
    names = [{"id": f"a{i}", "test": f"t{i // 2}", "headline": f"Ferry, no {i}", "week": 1 + i % 3} for i in range(6)]
    numbers = [{"clicks": i, "shown": 10 + i, "hour": 0.5 * i, "rain": 1.5 - i, "weight": 1} for i in range(6)]
    return [name | number for name, number in zip(names, numbers, strict=True)]


def write(folder, form, rows, types=TYPES):
    """One log in any format; Parquet through DuckDB with the given types."""
    path = folder / f"log.{form}"
    if form == "csv":
        cells = [",".join(_cell(row.get(c)) for c in types) for row in rows]
        path.write_text("\n".join([",".join(types), *cells]) + "\n")
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with duckdb.connect() as connection:
            connection.execute(f"CREATE TABLE t ({', '.join(f'{c} {t}' for c, t in types.items())})")
            for row in rows:
                connection.execute(f"INSERT INTO t VALUES ({', '.join('?' * len(types))})", [row.get(c) for c in types])
            connection.execute(f"COPY t TO '{path}' (FORMAT parquet)")
    return path


def problems_of(path, roles=ROLES, **options):
    with pytest.raises(BadLogs) as caught:
        read(path, roles, **{"categories": ("week",), **options})
    return list(caught.value.problems)


def _absent(field):
    return f"a column of the file ({field})"


NAN, INF = float("nan"), float("inf")
# One wrong cell (row None: the whole column) at a time, in every format: row, column, cell, expected, found.
CELLS = {
    "nan outcome": (2, "clicks", NAN, "a number", "NaN"),
    "null outcome": (2, "clicks", None, "a number", "NULL"),
    "infinite outcome": (4, "clicks", INF, "a finite number", "inf"),
    "negative count": (1, "clicks", -2, "a whole number >= 0", "-2"),
    "count with a fraction": (1, "clicks", 0.5, "a whole number >= 0", "0.5"),
    "more clicks than impressions": (3, "clicks", 14, "at most shown = 13", "14"),
    "null exposure": (5, "shown", None, "a number", "NULL"),
    "exposure zero": (0, "shown", 0, "a whole number > 0", "0"),
    "exposure with a fraction": (0, "shown", 10.5, "a whole number > 0", "10.5"),
    "null text": (0, "headline", None, "non-empty text", "NULL"),
    "blank text": (5, "headline", "   ", "non-empty text", "'   '"),
    "nan confounder": (3, "hour", NAN, "a number", "NaN"),
    "null confounder": (3, "hour", None, "a number", "NULL"),
    "infinite confounder": (3, "hour", -INF, "a finite number", "-inf"),
    "null category": (3, "week", None, "a value", "NULL"),
    "nan instrument": (1, "rain", NAN, "a number", "NaN"),
    "infinite instrument": (1, "rain", INF, "a finite number", "inf"),
    "zero weight": (2, "weight", 0, "a number > 0", "0"),
    "negative weight": (2, "weight", -1.5, "a number > 0", "-1.5"),
    "key used twice": (4, "id", "a1", "a key used once", "'a1', also in row 1"),
    "no group": (4, "test", None, "a value", "NULL"),
    "one level": (None, "week", 7, "at least two levels", "only '7'"),
    "constant confounder": (None, "hour", 2.5, "at least two different values", "only 2.5"),
    "constant instrument": (None, "rain", 3, "at least two different values", "only 3"),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", CELLS)
def test_a_wrong_cell_is_named(tmp_path, case, form):
    row, column, cell, expected, found = CELLS[case]
    rows = good_rows()
    for wrong in rows if row is None else [rows[row]]:
        wrong[column] = cell
    assert problems_of(write(tmp_path, form, rows)) == [Problem(-1 if row is None else row, column, expected, found)]


# What only some formats can hold: format, row, column, cell, problem.
CELLS_OF_A_FORMAT = {
    "csv: outcome": ("csv", 2, "clicks", "many", "a number", "'many'"),
    "csv: confounder": ("csv", 2, "hour", "noon", "a number", "'noon'"),
    "csv: exposure": ("csv", 5, "shown", "1.000.000", "a number", "'1.000.000'"),
    "json: text in a number": ("jsonl", 2, "clicks", "2", "a number", '"2"'),
    "json: number in the text": ("jsonl", 4, "headline", 12, "text", "12"),
    "json: object in a category": ("jsonl", 0, "week", {"of": 2}, "text or a number", '{"of":2}'),
    "json: list in a confounder": ("jsonl", 1, "hour", [1], "a number", "[1]"),
}


@pytest.mark.parametrize("case", CELLS_OF_A_FORMAT)
def test_a_cell_of_the_wrong_type_is_named(tmp_path, case):
    form, row, column, cell, expected, found = CELLS_OF_A_FORMAT[case]
    rows = good_rows()
    rows[row][column] = cell
    assert problems_of(write(tmp_path, form, rows)) == [Problem(row, column, expected, found)]


WHOLE = {  # a column of wrong cells: format, column, its Parquet type, cell, expected, found
    "text in a number": ("parquet", "clicks", "VARCHAR", "many", "a number", "a column of type VARCHAR"),
    "number in the text": ("parquet", "headline", "BIGINT", 3, "text", "a column of type BIGINT"),
    "numbers in a csv's text": ("csv", "headline", "BIGINT", 3, "text", "numbers only"),
    "date in a number": ("parquet", "rain", "DATE", "2014-01-01", "a number", "a column of type DATE"),
    "list in a category": ("parquet", "week", "INTEGER[]", [1], "text or a number", "a column of type INTEGER[]"),
    "text declared a number": ("parquet", "hour", "VARCHAR", "noon", "a number", "a column of type VARCHAR"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_column_of_the_wrong_type_is_named(tmp_path, case):
    form, column, sql, cell, expected, found = WHOLE[case]
    path = write(tmp_path, form, [{**row, column: cell} for row in good_rows()], {**TYPES, column: sql})
    assert problems_of(path, numeric=("hour",)) == [Problem(-1, column, expected, found)]


def test_every_text_cell_of_a_column_declared_numeric_is_named(tmp_path):
    rows = [{**row, "hour": "noon"} for row in good_rows()]
    for form, found in (("csv", "'noon'"), ("jsonl", '"noon"')):
        problems = problems_of(write(tmp_path, form, rows), numeric=("hour",))
        assert problems[0] == Problem(-1, "hour", "at least two different values", "no value")
        assert problems[1:] == [Problem(i, "hour", "a number", found) for i in range(6)]


ENDINGS = ".parquet, .csv, .csv.gz, .json, .json.gz, .jsonl, .jsonl.gz, .ndjson, .ndjson.gz"
HEADER = ",".join(TYPES) + "\n"
FILES = {  # name, content (None: no file), expected, start of what was found
    "absent": ("lgo.csv", None, "an existing file", "none; nearest is 'log.csv'"),
    "suffix": ("log.xlsx", "a", f"a file name ending in one of {ENDINGS}", "'.xlsx'; nearest is '"),
    "no bytes": ("log.jsonl", "", "at least one row", "0 bytes"),
    "header only": ("log2.csv", HEADER, "at least one row", "0 rows"),
    "ragged csv": ("log2.csv", HEADER + "1,2\n", "a readable csv file", "Invalid Input Error: CSV Error on Line: 2"),
    "broken gzip": ("log.csv.gz", "a,b", "a readable csv file", "Not a gzipped file"),
    "not parquet": ("log.parquet", "hello", "a readable parquet file", "Invalid Input Error: File 'log.parquet'"),
    "not json": ("log.json", '{"a":1}\n{', "a readable json file", "Invalid Input Error: Malformed JSON in file"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_cannot_be_read_is_named(tmp_path, case):
    name, content, expected, found = FILES[case]
    write(tmp_path, "csv", good_rows())
    if content is not None:
        (tmp_path / name).write_text(content)
    (problem,) = problems_of(tmp_path / name)
    assert problem[:3] == (-1, "", expected) and problem.found.startswith(found)


UNKNOWN = "categories to name a confounder or an extra column"
ONE_ROLE = f"one role among {', '.join(MEASURED)}"
COLUMNS = {  # change of the roles, of the arguments, problem
    "missing": ({"outcome": "clikcs"}, {}, "clikcs", _absent("Roles.outcome"), "no such column; nearest is 'clicks'"),
    "missing tuple": ({"context": ["rian"]}, {}, "rian", _absent("Roles.context"), "no such column; nearest is 'rain'"),
    "missing extra": ({}, {"extra": ("ids",)}, "ids", _absent("extra"), "no such column; nearest is 'id'"),
    "undeclarable": ({}, {"categories": ("weeks",)}, "weeks", UNKNOWN, "neither; nearest is 'week'"),
    "declared twice": ({}, {"numeric": ("week",)}, "week", "either categories or numeric", "both"),
    "two roles": ({"weight": "clicks"}, {}, "clicks", ONE_ROLE, "outcome and weight"),
    "no outcome": ({"outcome": ""}, {}, "", "Roles.outcome to name a column", "no name"),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", COLUMNS)
def test_roles_that_do_not_fit_the_file_are_named(tmp_path, case, form):
    changes, options, *expected = COLUMNS[case]
    roles = Roles.from_json({**ROLES.to_json(), **changes})
    assert problems_of(write(tmp_path, form, good_rows()), roles, **options) == [Problem(-1, *expected)]


def test_a_repeated_column_name_is_named(tmp_path):
    (tmp_path / "log.csv").write_text("text,outcome,text\na,1,b\n")
    (problem,) = problems_of(tmp_path / "log.csv", Roles(), categories=())
    assert problem == (-1, "text", "a column name used once", "2 columns of this name")


def test_problems_are_raised_together_and_the_message_shows_ten(tmp_path):
    rows = [{**row, "clicks": -1, "weight": 0} for row in good_rows()]
    with pytest.raises(BadLogs, match="log.csv: 12 problems\n") as caught:
        read(write(tmp_path, "csv", rows), ROLES, categories=("week",))
    lines = str(caught.value).split("\n")
    assert len(caught.value.problems) == 12
    assert lines[1] == "  row 0 (key 'a0'), column weight: expected a number > 0, found 0"
    assert lines[-1] == "  ... and 2 more" and len(lines) == 12


@pytest.mark.parametrize("form", FORMATS)
def test_a_good_file_reads_the_same_in_every_format(tmp_path, form):
    roles = Roles.from_json({**ROLES.to_json(), "time": "day", "context": ["image"]})
    stamps = ["2014-01-01 00:00:00", "2014-01-01 00:00:01.5"]
    more = [{"day": stamps[i % 2], "image": None, "good": i > 2, "note": None if i else "x"} for i in range(6)]
    rows = [{**row, **add} for row, add in zip(good_rows(), more, strict=True)]
    types = {**TYPES, "day": "TIMESTAMP", "image": "VARCHAR", "good": "BOOLEAN", "note": "VARCHAR"}
    path = write(tmp_path, form, rows, types)
    logs = read(path, roles, categories=("week",), extra=("good", "note"))
    assert logs.fingerprint == "6272e24f2d2de849"  # of `good_rows` and `more`; update when those change
    assert logs.roles == roles
    assert logs.columns["week"].tolist() == ["1", "2", "3", "1", "2", "3"]
    assert logs.columns["hour"].dtype == np.float64 and logs.columns["good"].dtype == bool
    assert logs.columns["day"][:2].tolist() == [1388534400.0, 1388534401.5]
    assert logs.columns["note"].tolist() == ["x"] + [""] * 5
    assert logs.columns["headline"].dtype == object and logs.text[1] == "Ferry, no 1"
    rows[5]["clicks"] -= 1
    path = write(tmp_path, form, rows, types)
    assert logs.fingerprint != read(path, roles, categories=("week",), extra=("good", "note")).fingerprint


def test_undeclared_columns_are_what_most_cells_are(tmp_path):
    rows = [{**row, "week": f"w{row['week']}", "flag": i % 2 == 0, "code": i} for i, row in enumerate(good_rows())]
    roles = Roles(text="headline", outcome="clicks", confounders=("week", "hour", "flag"))
    types = {**TYPES, "week": "VARCHAR", "flag": "BOOLEAN", "code": "INTEGER"}
    for form in FORMATS:
        logs = read(write(tmp_path, form, rows, types), roles, extra=("code",))
        kinds = {name: values.dtype.kind for name, values in logs.columns.items()}
        assert kinds == {"headline": "O", "clicks": "f", "week": "O", "hour": "f", "flag": "f", "code": "f"}, form
    path = write(tmp_path, "parquet", good_rows(), {**TYPES, "week": "DOUBLE"})
    assert read(path, ROLES, categories=("week",)).columns["week"][0] == "1"  # the level that an integer 1 names


def test_zones_gzip_and_odd_names(tmp_path):
    path = tmp_path / "it's *.csv.gz"  # not a pattern: the log beside it is another one
    (tmp_path / "it's not.csv.gz").write_text("")
    with gzip.open(path, "wt") as file:
        file.write('text,outcome,Time,time,"a ""b"""\nx,1,2014-01-01T02:00:00+02:00,7,k\ny,2,1388534400,8,l\n')
    logs = read(path, Roles(time="Time"), extra=('a "b"',))
    assert logs.columns["Time"].tolist() == [1388534400.0, 1388534400.0]
    assert logs.columns['a "b"'].tolist() == ["k", "l"]


def test_drop_writes_each_bad_row_with_its_reasons(tmp_path, caplog):
    rows = good_rows()
    rows[1]["clicks"], rows[1]["headline"], rows[4]["hour"] = -1, " ", None
    path = write(tmp_path, "parquet", rows)
    with caplog.at_level(logging.WARNING):
        logs = read(path, ROLES, categories=("week",), on_bad_rows="drop", rejected_path=tmp_path / "out" / "bad.jsonl")
    assert [int(c) for c in logs.columns["clicks"]] == [0, 2, 3, 5]
    assert "left out 2 of 6 rows" in caplog.text
    rejected = [json.loads(line) for line in (tmp_path / "out" / "bad.jsonl").read_text().splitlines()]
    assert [(r["row"], r["key"], len(r["reasons"])) for r in rejected] == [(1, "a1", 2), (4, "a4", 1)]
    assert rejected[1]["reasons"] == [{"column": "hour", "expected": "a number", "found": "NULL"}]


def test_drop_repeats_the_whole_column_checks(tmp_path):
    rows = good_rows()
    for row in rows:
        row["week"], row["weight"] = (1, 1) if row["id"] != "a3" else (2, 0)
    options = {"on_bad_rows": "drop", "rejected_path": tmp_path / "bad.jsonl"}
    path = write(tmp_path, "csv", rows)
    assert problems_of(path, **options) == [Problem(-1, "week", "at least two levels", "only '1'")]
    path = write(tmp_path, "csv", [{**row, "clicks": -1} for row in rows])
    assert problems_of(path, **options) == [Problem(-1, "", "at least one row", "0 rows")]


@pytest.mark.parametrize("form", FORMATS)
def test_missing_level(tmp_path, form):
    rows = good_rows()
    rows[2]["week"], rows[5]["hour"], rows[0]["hour"] = None, NAN, None
    logs = read(write(tmp_path, form, rows), ROLES, categories=("week",), missing="level")
    assert logs.columns["week"].tolist() == ["1", "2", MISSING, "1", "2", "3"]
    np.testing.assert_allclose(logs.columns["hour"], [1.25, 0.5, 1.0, 1.5, 2.0, 1.25])
    assert logs.columns["hour.missing"].tolist() == [1, 0, 0, 0, 0, 1]
    assert logs.roles.confounders == ("week", "hour", "hour.missing")


def test_missing_drop_leaves_other_bad_rows_errors(tmp_path):
    rows, rejected = good_rows(), tmp_path / "bad.jsonl"
    rows[2]["week"] = None
    options = {"missing": "drop", "rejected_path": rejected}
    logs = read(write(tmp_path, "jsonl", rows), ROLES, categories=("week",), **options)
    assert len(logs) == 5 and json.loads(rejected.read_text())["row"] == 2
    rows[3]["clicks"] = -1
    path = write(tmp_path, "jsonl", rows)
    assert problems_of(path, **options) == [Problem(3, "clicks", "a whole number >= 0", "-1")]


def test_arguments_are_checked(tmp_path):
    path = write(tmp_path, "csv", good_rows())
    with pytest.raises(ValueError, match="rejected_path: expected a file"):
        read(path, ROLES, on_bad_rows="drop")
    with pytest.raises(ValueError, match="missing: expected one of .* got 'levle'; nearest is 'level'"):
        read(path, ROLES, missing="levle")


def _cell(value):
    return "" if value is None else f'"{value}"' if isinstance(value, str) else str(value)
