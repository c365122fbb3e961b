"""Rows for training: a batch follows from its step, hosts share it without overlap, formats give the same rows."""

from __future__ import annotations

import subprocess
import sys

import duckdb
import numpy as np
import pytest

from deconfound_jax.logs.feed import feed, read_columns, read_records, write_records

ROWS = [
    {"text": f"häd\x00line {i}\x00", "clicks": i, "reward": 0.5 * i, "tokens": np.arange(3, dtype=np.int32) + i}
    for i in range(10)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The rows as ArrayRecord (three files) and as Parquet (two)."""
    folder = tmp_path_factory.mktemp("feed")
    assert write_records(folder / "records", iter(ROWS), shard=4) == 10
    with duckdb.connect() as connection:
        for name, rows in (("b", ROWS[6:]), ("a", ROWS[:6])):
            values = ", ".join(f"('t{r['clicks']}', {r['clicks']}, {r['tokens'].tolist()})" for r in rows)
            connection.execute(
                f"COPY (SELECT * FROM (VALUES {values}) t(text, clicks, tokens)) TO '{folder}/{name}.parquet'"
            )
    return folder


def clicks(rows_at, steps):
    return [rows_at(i)["clicks"].tolist() for i in steps]


def test_records_come_back_as_they_went(folder):
    found = feed(read_records(folder / "records"), batch=10, seed=0, shuffle=False)(0)
    assert found["text"].tolist() == [row["text"] for row in ROWS]
    for name in ("clicks", "reward", "tokens"):
        expected = np.stack([np.asarray(row[name]) for row in ROWS])
        np.testing.assert_array_equal(found[name], expected)
        assert found[name].dtype == expected.dtype


def test_parquet_comes_in_the_files_order(folder):
    found = feed(read_columns(f"{folder}/*.parquet", ("text", "clicks", "tokens")), batch=10, seed=0, shuffle=False)(0)
    assert found["text"].tolist() == [f"t{i}" for i in range(10)] and found["clicks"].tolist() == list(range(10))
    np.testing.assert_array_equal(found["tokens"], np.stack([row["tokens"] for row in ROWS]))


def test_each_row_comes_once_an_epoch_and_epochs_differ():
    rows_at = feed(ROWS, batch=4, seed=3)
    seen = np.concatenate(clicks(rows_at, range(5)))  # two epochs; the third batch belongs to both
    first, second = seen[:10], seen[10:]
    assert sorted(first) == sorted(second) == list(range(10)) and (first != second).any()
    assert clicks(feed(ROWS, batch=10, seed=3), [1]) != clicks(feed(ROWS, batch=10, seed=4), [0])


def test_a_batch_follows_from_its_step_alone():
    expected = clicks(feed(ROWS, batch=4, seed=3), range(6))
    assert clicks(feed(ROWS, batch=4, seed=3), [5, 0, 3]) == [expected[i] for i in (5, 0, 3)]
    assert clicks(feed(ROWS, batch=4, seed=2), range(6)) != expected


def test_hosts_parts_make_up_the_batch_of_one_host():
    whole, parts = feed(ROWS, batch=4, seed=3), [feed(ROWS, batch=4, seed=3, part=(i, 2)) for i in range(2)]
    for step in range(4):
        joined = np.concatenate([part(step)["tokens"] for part in parts])
        np.testing.assert_array_equal(joined, whole(step)["tokens"])


def test_tensorflow_stays_away(folder):
    code = (
        "import sys; from deconfound_jax.logs.feed import feed, read_records\n"
        f"feed(read_records(r'{folder / 'records'}'), batch=2, seed=0)(0)\n"
        "assert not {'tensorflow', 'torch'} & {name.partition('.')[0] for name in sys.modules}"
    )
    # Where TensorFlow is not installed this shows that it is not asked for either.
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_fed_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="source: expected rows"):
        feed([], batch=2, seed=0)
    with pytest.raises(ValueError, match=r"got 3 and part \(0, 2\)"):
        feed(ROWS, batch=3, seed=0, part=(0, 2))
    with pytest.raises(ValueError, match=r"tokens: expected one shape in every row, got \(2,\) and \(3,\)"):
        feed([{"tokens": np.zeros(2)}, {"tokens": np.zeros(3)}], batch=2, seed=0)(0)
    with pytest.raises(FileExistsError, match="expected no data set"):
        write_records(folder / "records", ROWS)
    with pytest.raises(ValueError, match=r"row 1: tokens: expected shape \(3,\) as in row 0, got \(2,\)"):
        write_records(tmp_path / "r", [ROWS[0], ROWS[1] | {"tokens": np.zeros(2, np.int32)}])
    with pytest.raises(FileNotFoundError, match="expected Parquet files"):
        read_columns(tmp_path / "no.parquet", ("text",))
    with duckdb.connect() as connection:
        connection.execute(f"COPY (SELECT * FROM (VALUES (1), (NULL)) t(clicks)) TO '{tmp_path}/gap.parquet'")
    with pytest.raises(ValueError, match="clicks: expected a value in every row, got none in row 1"):
        read_columns(tmp_path / "gap.parquet", ("clicks",))
