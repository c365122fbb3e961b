"""Splits never cut a component, and say what a naive split would have leaked."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from deconfound_jax.config import Split
from deconfound_jax.logs.split import components, folds, one_arm, shared, split
from deconfound_jax.structs import Logs, Roles

ROOT = pathlib.Path(__file__).parents[1]
UPWORTHY = ROOT / "../shared/data/upworthy/packages.parquet"
ROLES = Roles(text="headline", outcome="clicks", group="test", time="when")


def log(headline, test, roles=ROLES, **columns):
    n = len(headline)
    columns = {"headline": headline, "test": test, "clicks": np.arange(n, dtype=np.float64), **columns}
    return Logs.of({k: np.asarray(v, object if isinstance(v[0], str) else None) for k, v in columns.items()}, roles)


def random_log(n=400, seed=3):
    rng = np.random.default_rng(seed)
    draw = {
        name: [f"{name}{v}" for v in rng.integers(0, size, n)] for name, size in (("h", 900), ("t", 150), ("l", 500))
    }
    return log(draw["h"], draw["t"], lede=draw["l"], when=rng.integers(0, 40, n).astype(np.float64))


def test_components_link_rows_through_group_text_and_columns():
    # Rows 0-1 share a test, 1-2 a headline, 3-4 a lede; 5 and 6 have no lede, which links nothing.
    logs = log(list("abbcdef"), list("ttuvwxy"), lede=["1", "2", "3", "4", "4", "", ""])
    assert components(logs).tolist() == [0, 0, 0, 1, 2, 3, 4]
    assert components(logs, ("lede",)).tolist() == [0, 0, 0, 1, 1, 2, 3]


def test_components_of_numbers_skip_nan():
    logs = log(list("abcd"), list("tuvw"), image=[1.0, np.nan, np.nan, 1.0])
    assert components(logs, ("image",)).tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("seed", range(5))
def test_the_sides_share_nothing(seed):
    logs = random_log()
    parts = split(logs, Split(columns=("lede",), held_out=0.3, seed=seed))
    np.testing.assert_array_equal(np.sort(np.concatenate([parts.train, parts.held_out])), np.arange(len(logs)))
    assert (np.diff(parts.train) > 0).all() and (np.diff(parts.held_out) > 0).all()
    for column in ("headline", "test", "lede"):
        assert not set(logs.columns[column][parts.train]) & set(logs.columns[column][parts.held_out])
    largest = np.bincount(parts.component_n).max()
    assert 0.3 * len(logs) <= len(parts.held_out) < 0.3 * len(logs) + largest


def test_a_split_is_its_seed():
    logs = random_log()
    first, again, other = (split(logs, Split(seed=s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(first.held_out, again.held_out)
    assert first.held_out.tolist() != other.held_out.tolist()


def test_shared_by_hand():
    held_n = np.array([True, True, True, True, False, False])
    values_n = np.array(["a", "b", "", "c", "a", ""], object)
    assert shared(values_n, held_n) == 0.25  # only "a"; an empty cell is shared by nobody
    assert shared(np.array([1.0, 2.0, np.nan, 4.0, 4.0, np.nan]), held_n) == 0.25


def test_leaked_is_of_the_naive_split_by_group():
    # Every headline stands in two tests of one row, ledes in one: whichever half of the tests is held out
    # naively, a headline leaks unless both of its tests are. The two splits draw by the same seed.
    n = 40
    logs = log([f"h{i // 2}" for i in range(n)], [f"t{i}" for i in range(n)], lede=[f"l{i}" for i in range(n)])
    parts = split(logs, Split(columns=("lede",), held_out=0.5, seed=0))
    naive = np.random.default_rng(0).permutation(n)[: n // 2]
    partners = [i ^ 1 for i in naive]
    assert parts.leaked == {"headline": np.mean([i not in naive for i in partners]), "lede": 0.0}
    assert 0.2 < parts.leaked["headline"] < 0.8


def test_only_whole_eligible_components_are_held_out():
    logs = random_log()
    eligible = np.random.default_rng(0).random(len(logs)) < 0.9
    parts = split(logs, Split(held_out=0.2), eligible)
    assert eligible[parts.held_out].all()
    tainted = set(parts.component_n[~eligible])
    assert not tainted & set(parts.component_n[parts.held_out])
    assert len(parts.held_out) >= 0.2 * eligible.sum()


def test_time_holds_out_the_last_and_keeps_ties_together():
    logs = log(list("abcdefghij"), list("0123456789"), when=np.array([5, 1, 2, 9, 7, 7, 7, 3, 4, 0.0]))
    assert split(logs, Split(by="time", held_out=0.2)).held_out.tolist() == [3, 4, 5, 6]
    assert split(logs, Split(by="time", held_out=0.1)).held_out.tolist() == [3]
    logs = random_log()
    parts, when = split(logs, Split(by="time", held_out=0.25)), logs.columns["when"]
    assert when[parts.train].max() < when[parts.held_out].min()
    assert parts.leaked["headline"] == shared(logs.columns["headline"], np.isin(np.arange(400), parts.held_out))


@pytest.mark.parametrize("flags", [[True, False, True, False], [1.0, 0.0, 1.0, 0.0]])
def test_a_column_holds_out_its_true_rows(flags):
    logs = log(list("abcd"), list("tuvw"), judged=np.array(flags))
    parts = split(logs, Split(by="column", column="judged"))
    assert parts.held_out.tolist() == [0, 2] and parts.train.tolist() == [1, 3]


def test_one_arm_is_one_row_a_group_and_any_of_them():
    logs = log(list("abcdefgh"), list("ttttuuvw"))
    index = np.array([0, 1, 2, 4, 5, 6])
    picks = [one_arm(logs, index, seed) for seed in range(60)]
    assert all(logs.columns["test"][pick].tolist() == ["t", "u", "v"] for pick in picks)
    assert {int(pick[0]) for pick in picks} == {0, 1, 2} and {int(pick[1]) for pick in picks} == {4, 5}
    np.testing.assert_array_equal(picks[7], one_arm(logs, index, 7))


BARE = Roles(text="headline", outcome="clicks")
ERRORS = {  # config, roles, eligible, message
    "way": (Split(by="component"), ROLES, None, "Split.by: expected one of .*'component'; nearest is 'components'"),
    "columns": (Split(columns=("ldee",)), ROLES, None, "Split.columns: .*'ldee'; nearest is 'lede'"),
    "share": (Split(held_out=1.0), ROLES, None, "Split.held_out: expected a share between 0 and 1, got 1.0"),
    "no time": (Split(by="time"), BARE, None, "expected Roles.time to name a column"),
    "no column": (Split(by="column"), ROLES, None, "expected Split.column to name a column"),
    "unknown column": (Split(by="column", column="judge"), ROLES, None, "Split.column: .*nearest is 'judged'"),
    "numbers": (Split(by="column", column="clicks"), ROLES, None, "'clicks': expected true or false .*got .*2.0"),
    "words": (Split(by="column", column="lede"), ROLES, None, "'lede': expected true or false .*got 'l0'"),
    "empty side": (Split(by="column", column="judged"), ROLES, None, "got none in held_out"),
    "eligible": (Split(by="time"), ROLES, np.ones(4, bool), "expected Split.by='components', got 'time'"),
    "few eligible": (Split(), ROLES, np.array([True, False, True, False]), "expected 1 rows .* got 0"),
    "one component": (Split(), ROLES, None, None),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_named(case):
    config, roles, eligible, message = ERRORS[case]
    tests = list("tttt") if message is None else list("ttuu")
    ledes = [f"l{i}" for i in range(4)]
    logs = log(list("abcd"), tests, roles, lede=ledes, judged=np.zeros(4, bool), when=np.arange(4.0))
    with pytest.raises(ValueError, match=message or "got none in train"):
        split(logs, config, eligible)


def test_one_arm_needs_a_group():
    with pytest.raises(ValueError, match="one_arm: expected Roles.group to name a column"):
        one_arm(log(list("ab"), list("tu"), BARE), np.arange(2), 0)


def test_without_a_group_the_naive_split_is_by_row():
    parts = split(log(list("aabbccdd"), list("tttttttt"), BARE), Split(held_out=0.5))
    assert len(parts.held_out) == 4 and parts.component_n.max() == 3


def test_split_needs_no_file_format():
    # Simulated logs are split where nothing but the core is installed.
    code = "import sys, deconfound_jax.logs.split; sys.exit('duckdb' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.skipif(not UPWORTHY.exists(), reason="the Upworthy log is not beside the repository")
def test_upworthy_leaks_what_its_readme_says():
    from deconfound_jax.logs.read import read

    roles = Roles(
        text="headline",
        outcome="clicks",
        exposure="impressions",
        group="clickability_test_id",
        confounders=("test_week",),
    )
    logs = read(UPWORTHY, roles, categories=("test_week",), extra=("lede", "eyecatcher_id"))
    assert len(logs) == 17131
    parts = [split(logs, Split(columns=("lede", "eyecatcher_id"), seed=seed)) for seed in range(5)]
    assert abs(np.mean([p.leaked["headline"] for p in parts]) - 0.12) < 0.03
    assert abs(np.mean([p.leaked["lede"] for p in parts]) - 0.26) < 0.03
    for column in ("headline", "lede", "eyecatcher_id", "clickability_test_id"):
        assert shared(logs.columns[column], np.isin(np.arange(len(logs)), parts[0].held_out)) == 0


def test_folds_keep_components_whole_and_hold_each_eligible_row_once():
    component_n = np.repeat(np.arange(40), 3)
    eligible = component_n >= 10
    fold_n = folds(component_n, 5, seed=0, eligible=eligible)
    assert (fold_n[~eligible] == -1).all() and set(fold_n[eligible]) == set(range(5))
    for component in range(40):
        assert len(set(fold_n[component_n == component])) == 1
    assert np.bincount(fold_n[eligible]).tolist() == [18] * 5
    assert not np.array_equal(fold_n, folds(component_n, 5, seed=1, eligible=eligible))
    partly = eligible & (np.arange(120) != 119)  # one row of the last component may not be judged: none of it is
    assert (folds(component_n, 5, seed=0, eligible=partly)[-3:] == -1).all()
    with pytest.raises(ValueError, match="at least 50 eligible components, got 30"):
        folds(component_n, 50, seed=0, eligible=eligible)
