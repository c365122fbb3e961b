"""A log and a design become arrays: standardised, summed where rows are equal, named by term."""

import numpy as np
import pytest

from deconfound_jax.causal import conditional
from deconfound_jax.causal.spec import summed
from deconfound_jax.causal.terms import empirical_logit, prepare
from deconfound_jax.structs import Design


def test_prepare_standardises_with_weights_and_remembers_the_way_back(log_of):
    columns = {"outcome": [1.0, 3.0, 5.0], "hour": [0.0, 1.0, 1.0], "w": [2.0, 1.0, 1.0]}
    logs = log_of({name: np.asarray(value) for name, value in columns.items()}, weight="w")
    prepared = prepare(logs, np.asarray([[1.0], [1.0], [5.0]]), Design.parse("hour"))
    assert prepared.scaling["outcome.mean"] == 2.5 and prepared.scaling["features.mean"] == [2.0]
    np.testing.assert_allclose(prepared.scaling["hour.sd"], 0.5)
    back = prepared.rows.outcome_n * prepared.scaling["outcome.sd"] + prepared.scaling["outcome.mean"]
    np.testing.assert_allclose(back, [1.0, 3.0, 5.0])
    assert [block.name for block in prepared.spec.blocks] == ["text", "hour"]


def test_category_means_span_the_levels_means_of_the_features(log_of):
    rng = np.random.default_rng(0)
    features_nd, week_n = rng.normal(size=(12, 2)), np.arange(12) % 4
    logs = log_of({"outcome": rng.normal(size=12), "week": np.asarray([f"w{w}" for w in week_n], object)})
    prepared = prepare(logs, features_nd, Design.parse("category(week)"))
    block = next(b for b in prepared.spec.blocks if b.name == "week.means")
    text_nd, found_nk = prepared.rows.columns_nq[:, :2], prepared.rows.columns_nq[:, block.start : block.stop]
    means_nd = np.stack([text_nd[week_n == w].mean(0) for w in range(4)])[week_n]
    np.testing.assert_allclose(found_nk @ found_nk.T, means_nd @ means_nd.T, atol=1e-12)  # a rotation of the means


def test_equal_rows_of_counts_are_summed_and_others_are_not(log_of):
    columns = {
        "text": np.asarray(["a", "a", "a", "b"], object), "week": np.asarray(["u", "u", "v", "u"], object),
        "outcome": np.asarray([1.0, 2.0, 3.0, 4.0]), "shown": np.asarray([10.0, 20.0, 30.0, 40.0]),
    }  # fmt: skip
    logs, features_nd = log_of(columns, exposure="shown"), np.asarray([[0.0], [0.0], [0.0], [1.0]])
    prepared = prepare(logs, features_nd, Design.parse("intercept(week)", "normal", "empirical_logit"))
    assert len(prepared.rows.outcome_n) == 3
    np.testing.assert_array_equal(prepared.rows.exposure_n[prepared.row_of_log_n], [30.0, 30.0, 30.0, 40.0])
    counts = prepare(logs, features_nd, Design.parse("intercept(week)", "binomial"))
    assert len(counts.rows.outcome_n) == 4  # every check counts the log's rows; only the fit sums them
    fitted = summed(counts.spec, counts.rows)
    np.testing.assert_array_equal(
        sorted(zip(fitted.outcome_n, fitted.exposure_n, strict=True)), [(3, 30), (3, 30), (4, 40)]
    )
    assert summed(counts.spec._replace(family="beta_binomial"), counts.rows) is counts.rows  # a sum has another law
    kept = prepare(logs, features_nd, Design.parse("intercept(week)"))  # not counts: all stay
    assert len(kept.rows.outcome_n) == len(kept.rows.columns_nq) == 4
    np.testing.assert_array_equal(kept.row_of_log_n, np.arange(4))


def test_a_column_named_like_a_site_keeps_its_own(log_of):
    rng = np.random.default_rng(0)
    names = {"text": np.repeat(np.asarray(["t0", "t1", "t2"], object), 2)}
    logs = log_of(names | {"outcome": rng.normal(size=6), "gamma": rng.normal(size=6), "features": rng.normal(size=6)})
    prepared = prepare(logs, rng.normal(size=(6, 2)), Design.parse("intercept(text) + gamma + features"))
    plan = conditional.layout(prepared.spec)
    sites = [name for name, _, _ in plan.sites] + [plan.absorbed.name]
    assert sorted(sites) == ["column.features", "column.gamma", "column.text", "intercept", "text"]
    assert prepared.scaling["features.mean"].shape == (2,)


@pytest.mark.parametrize(
    "change, features, design, message",
    [
        ({}, np.zeros((3, 2)), "", r"features: expected \(4, d\).*got \(3, 2\)"),
        ({}, np.full((4, 1), np.nan), "", "features: expected finite"),
        ({}, np.zeros((4, 1)), "wek", "needs column 'wek'; the log holds"),
        ({"outcome": np.full(4, 2.0)}, np.zeros((4, 1)), "", "outcome: expected values that differ, got 2"),
        ({}, np.zeros((4, 1)), Design("binomial"), "roles.exposure: expected a column of counts for binomial/identity"),
    ],
)
def test_prepare_names_what_is_wrong(log_of, change, features, design, message):
    logs = log_of({"outcome": np.arange(4.0)} | change)
    with pytest.raises(ValueError, match=message):
        prepare(logs, features, Design.parse(design) if isinstance(design, str) else design)


def test_missing_indicators_join_the_design(log_of):
    columns = {"outcome": np.arange(3.0), "age": np.arange(3.0), "age.missing": np.asarray([0.0, 1.0, 0.0])}
    logs = log_of(columns, confounders=("age", "age.missing"))
    blocks = prepare(logs, np.eye(3), Design.parse("age")).spec.blocks
    assert [b.name for b in blocks] == ["text", "age", "age.missing"]


def test_empirical_logit_by_hand():
    logit, variance = empirical_logit(np.asarray([0.0, 3.0]), np.asarray([7.0, 3.0]))
    np.testing.assert_allclose(logit, [np.log(0.5 / 7.5), np.log(3.5 / 0.5)])
    np.testing.assert_allclose(variance, [2 + 1 / 7.5, 1 / 3.5 + 2])
