"""Scores on randomized arms, by hand-made numbers."""

import math
import pathlib

import numpy as np
import pytest

from deconfound_jax.evaluate import ab
from deconfound_jax.evaluate.ab import Arms, calibration, confounder_correlation, pair_correct, pairs, scores

UPWORTHY = pathlib.Path(__file__).parents[2] / "shared/data/upworthy/packages.parquet"

# Two tests. Test A: rows 0, 1, 2 share an image; rows 1 and 3 another text or image. Test B: rows 4, 5.
ARMS = Arms(
    group_n=np.asarray(["A", "A", "A", "A", "B", "B", "B"]),
    context_n=np.asarray(["i", "i", "i", "j", "i", "i", "i"]),
    clicks_n=np.asarray([30, 10, 20, 90, 5, 5, 7]),
    impressions_n=np.asarray([1000, 1000, 1000, 1000, 1000, 1000, 1000]),
    text_n=np.asarray(["a", "b", "c", "d", "e", "f", "e"], object),
    component_n=np.asarray([0, 0, 0, 0, 1, 1, 1]),
)


def test_pairs_share_cell_and_differ_in_text_and_outcome():
    table = pairs(ARMS)
    # 4-5 tie in outcome, 4-6 are one text, 3 has another image.
    assert list(zip(table.first, table.second, strict=True)) == [(0, 1), (0, 2), (1, 2), (5, 6)]
    assert table.component_p.tolist() == [0, 0, 0, 1]
    difference = math.log(30.5 / 970.5) - math.log(10.5 / 990.5)
    se = math.sqrt(1 / 30.5 + 1 / 970.5 + 1 / 10.5 + 1 / 990.5)
    np.testing.assert_allclose([table.difference_p[0], table.z_p[0]], [difference, difference / se])
    assert table.z_p[0] > 1.96 > abs(table.z_p[1])


def test_scores_by_hand():
    reward = np.asarray([1.0, 0.0, 2.0, 9.0, 0.0, 0.0, 0.0])
    found = scores(reward, ARMS)
    # pairs: 0-1 right, 0-2 wrong, 1-2 right, 5-6 tie; clear: 0-1 and none else (1-2: z = -1.80)
    assert found["pair_accuracy"] == 2.5 / 4 and found["n_pairs"] == 4
    assert found["pair_accuracy_z196"] == 1.0 and found["n_pairs_z196"] == 1
    # cell A-i chooses arm 2 (20, best 30, mean 20); A-j has one text; B chooses any of three (mean 17/3, best 7)
    assert found["n_cells"] == 2
    np.testing.assert_allclose(found["winner_hit_rate"], (0 + 1 / 3) / 2)
    np.testing.assert_allclose(found["lift_per_1000"], 0.0, atol=1e-12)
    np.testing.assert_allclose(found["regret_per_1000"], (10 + 7 - 17 / 3) / 2)


def test_oracle_and_constant_rewards():
    rate = ARMS.clicks_n / ARMS.impressions_n
    oracle, constant, wrong = scores(rate, ARMS), scores(np.zeros(7), ARMS), scores(-rate, ARMS)
    assert oracle["pair_accuracy"] == oracle["winner_hit_rate"] == 1 and oracle["regret_per_1000"] == 0
    assert constant["pair_accuracy"] == 0.5 and constant["winner_hit_rate"] == 1 / 3
    assert abs(constant["lift_per_1000"]) < 1e-12
    assert wrong["pair_accuracy"] == wrong["winner_hit_rate"] == 0 and wrong["lift_per_1000"] < 0


def test_scores_move_with_order_alone():
    """Row order, a monotone map of the reward and a constant a cell change nothing."""
    rng = np.random.default_rng(0)
    reward, order = rng.normal(size=7), rng.permutation(7)
    base = scores(reward, ARMS)
    shift = np.asarray([5.0, 5, 5, -3, 8, 8, 8])
    for other, arms in (
        (reward[order], Arms(*(column[order] for column in ARMS))),
        (np.exp(2 * reward), ARMS),
        (reward + shift, ARMS),
    ):
        assert scores(other, arms) == pytest.approx(base)


def test_draws_add_calibration():
    draws = np.zeros((4, 7))
    draws[:3, 0] = 1.0  # P(0 better than 1) = 3/4 + 1/8, as over 2; 1-2 and 5-6 tie: 1/2
    found = scores(draws.mean(axis=0), ARMS, reward_draws=draws)
    np.testing.assert_allclose(found["brier"], (2 * 0.125**2 + 2 * 0.5**2) / 4)
    # bins: two at .875, both observed; two at .5, neither observed (1-2 and 5-6 are won by the second)
    np.testing.assert_allclose(found["calibration_error"], (2 * 0.125 + 2 * 0.5) / 4)


def test_no_pairs_give_nan_not_an_error():
    lonely = Arms(*(column[:1] for column in ARMS))
    found = scores([1.0], lonely, reward_draws=np.ones((3, 1)))
    assert found["n_pairs"] == found["n_cells"] == 0
    assert all(math.isnan(found[k]) for k in ("pair_accuracy", "winner_hit_rate", "lift_per_1000", "brier"))


def test_pairs_tied_as_rates_or_on_the_empirical_logit_are_left_out():
    equal_rates = Arms([0, 0], [0, 0], [5, 10], [100, 200], ["a", "b"], [0, 0])
    assert len(pairs(equal_rates).first) == 0
    # 0 of 1 and 1 of 5 differ as rates but (k + .5) / (n + 1) is 1/4 for both.
    arms = Arms([0, 0], [0, 0], [0, 1], [1, 5], ["a", "b"], [0, 0])
    assert len(pairs(arms).first) == 0


def test_errors_name_row_and_field():
    with pytest.raises(ValueError, match="row 1 has 1001 of 1000"):
        pairs(ARMS._replace(clicks_n=np.asarray([1, 1001, 1, 1, 1, 1, 1])))
    with pytest.raises(ValueError, match="impressions > 0, row 0"):
        pairs(ARMS._replace(clicks_n=np.zeros(7), impressions_n=np.zeros(7)))
    with pytest.raises(ValueError, match="component_n: .* rows 0 and 1"):
        pairs(ARMS._replace(component_n=np.arange(7)))
    with pytest.raises(ValueError, match="reward_n: .* row 2"):
        scores([0.0, 0.0, np.nan, 0.0, 0.0, 0.0, 0.0], ARMS)
    with pytest.raises(AssertionError):
        scores([0.0, 0.0], ARMS)


def test_pair_correct_by_hand():
    correct = pair_correct([0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0], pairs(ARMS))
    assert correct.tolist() == [0.0, 0.0, 0.5, 1.0]


def test_confounder_correlation_of_numbers():
    x = np.asarray([1.0, 2.0, 3.0, 4.0])
    assert confounder_correlation(-x, x) == pytest.approx(1.0)
    assert confounder_correlation(np.asarray([1.0, -1.0, -1.0, 1.0]), x) == pytest.approx(0.0, abs=1e-12)
    assert confounder_correlation(np.ones(4), x) == 0.0 == confounder_correlation(x, np.ones(4))


def test_confounder_correlation_of_levels():
    reward = np.asarray([1.0, 2.0, 3.0, 5.0, 6.0, 7.0])
    level = np.asarray(["a", "a", "a", "b", "b", "b"], object)
    # total 28, within 4: R2 = 6/7; adjusted 1 - (4/28)(5/4)
    expected = math.sqrt(1 - 4 / 28 * 5 / 4)
    assert confounder_correlation(reward, level) == pytest.approx(expected)
    assert confounder_correlation(reward, np.asarray([7, 7, 7, 3, 3, 3])) == pytest.approx(expected)
    rng = np.random.default_rng(0)
    noise, many = rng.normal(size=2000), rng.integers(500, size=2000)
    assert confounder_correlation(noise, many) < 0.2  # unadjusted it would be about 0.5
    with pytest.raises(ValueError, match="fewer levels than the 6 rows"):
        confounder_correlation(reward, np.arange(6))


def simulated_arms(n_tests, tau, seed):
    """Two arms a test; their true logits differ by N(0, tau^2). Returns the arms and the truth."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(scale=tau, size=n_tests)
    logit = -4 + np.stack([truth / 2, -truth / 2], axis=1).ravel()
    clicks = rng.binomial(4000, 1 / (1 + np.exp(-logit)))
    test = np.repeat(np.arange(n_tests), 2)
    text = np.asarray([f"t{i}" for i in range(2 * n_tests)], object)
    return Arms(test, np.zeros_like(test), clicks, np.full(2 * n_tests, 4000), text, test), logit


def test_ceiling_is_what_an_oracle_reaches():
    train, _ = simulated_arms(4000, 0.3, seed=0)
    arms, logit = simulated_arms(4000, 0.3, seed=1)
    found, reached = ab.ceiling(train, arms), scores(logit, arms)
    assert found["tau"] == pytest.approx(0.3, abs=0.02)
    assert found["pair_ceiling"] == pytest.approx(reached["pair_accuracy"], abs=0.015)
    assert found["pair_ceiling_z196"] == pytest.approx(reached["pair_accuracy_z196"], abs=0.01)
    plug_in = np.mean([0.5 * (1 + math.erf(abs(z) / math.sqrt(2))) for z in pairs(arms).z_p])
    assert plug_in > found["pair_ceiling"] + 0.01, "the plug-in suffers the winner's curse"


def test_ceiling_by_hand():
    train = Arms([0, 0], [0, 0], [40, 10], [1000, 1000], ["a", "b"], [0, 0])
    judged = Arms([0, 0], [0, 0], [30, 20], [1000, 1000], ["a", "b"], [0, 0])
    d, v = math.log(40.5 / 960.5) - math.log(10.5 / 990.5), 1 / 40.5 + 1 / 960.5 + 1 / 10.5 + 1 / 990.5
    tau2 = d**2 - v
    d, v = math.log(30.5 / 970.5) - math.log(20.5 / 980.5), 1 / 30.5 + 1 / 970.5 + 1 / 20.5 + 1 / 980.5
    # The truth given d is N(w d, w v) with w = tau^2 / (tau^2 + v).
    w = tau2 / (tau2 + v)
    expected = 0.5 * (1 + math.erf(w * d / math.sqrt(2 * w * v)))
    found = ab.ceiling(train, judged)
    assert (found["tau"], found["pair_ceiling"]) == (pytest.approx(tau2**0.5), pytest.approx(expected))
    assert math.isnan(found["pair_ceiling_z196"]), "no pair is clear"


def test_ceiling_without_true_differences_is_a_coin():
    # Equal rates everywhere: d^2 - v < 0, so tau is 0 and no outcome can be foreseen.
    same = ARMS._replace(clicks_n=np.full(7, 10))
    found = ab.ceiling(same, ARMS)
    assert (found["tau"], found["pair_ceiling"], found["pair_ceiling_z196"]) == (0.0, 0.5, 0.5)
    with pytest.raises(ValueError, match="arms_train"):
        ab.ceiling(Arms(*(column[:1] for column in ARMS)), ARMS)


@pytest.mark.skipif(not UPWORTHY.exists(), reason="the Upworthy archive is not beside the repository")
def test_ceiling_on_real_arms():
    duckdb = pytest.importorskip("duckdb")
    columns = "clickability_test_id, eyecatcher_id, clicks, impressions, headline, clickability_test_id as component"
    query = f"select {columns} from '{UPWORTHY}' where not randomization_imbalance_risk"
    rows = duckdb.sql(query).fetchall()
    held_out = np.asarray([int(row[0], 16) % 10 < 3 for row in rows])
    columns_n = [np.asarray(c) for c in zip(*rows, strict=True)]
    train, judged = (Arms(*(c[mask] for c in columns_n)) for mask in (~held_out, held_out))
    found = ab.ceiling(train, judged)
    assert found["pair_ceiling"] == pytest.approx(0.80, abs=0.015)
    assert found["pair_ceiling_z196"] == pytest.approx(0.975, abs=0.01)


def test_bootstrap_by_hand():
    component = np.asarray([0, 0, 1])
    difference, low, high = ab.paired_bootstrap([1.0, 1.0, 0.0], [0.0, 0.0, 0.0], component)
    # drawn twice 0: 1; twice 1: 0; once each: 2/3
    assert (difference, low, high) == (pytest.approx(2 / 3), 0.0, 1.0)
    assert ab.paired_bootstrap([1.0, 0.5], [1.0, 0.5], np.asarray([0, 1])) == (0.0, 0.0, 0.0)


def test_bootstrap_averages_logs_within_a_pair():
    rng = np.random.default_rng(0)
    a_lp, b_lp = rng.integers(2, size=(2, 3, 50)).astype(float)
    component = np.repeat(np.arange(10), 5)
    pooled = ab.paired_bootstrap(a_lp, b_lp, component)
    assert pooled == ab.paired_bootstrap(a_lp.mean(axis=0), b_lp.mean(axis=0), component)
    assert pooled[0] == pytest.approx(np.mean(a_lp - b_lp))
    assert ab.paired_bootstrap(b_lp, a_lp, component)[0] == -pooled[0]
    assert ab.paired_bootstrap(a_lp, b_lp, component, seed=1) != pooled


def test_bootstrap_covers_at_nominal_rate():
    """Pairs of a component move together; resampling pairs instead would cover far too rarely."""
    rng, covered, by_pair = np.random.default_rng(0), 0, 0
    component = np.repeat(np.arange(80), 6)
    for trial in range(300):
        gap = 0.1 + np.repeat(rng.normal(size=80), 6) + 0.3 * rng.normal(size=480)
        for code, count in ((component, "component"), (np.arange(480), "pair")):
            _, low, high = ab.paired_bootstrap(gap, np.zeros(480), code, n=200, seed=trial)
            covered += count == "component" and low <= 0.1 <= high
            by_pair += count == "pair" and low <= 0.1 <= high
    assert 0.90 <= covered / 300 <= 0.98
    assert by_pair / 300 < 0.75


def test_calibration_table():
    prefer = np.asarray([0.02, 0.08, 0.55, 0.95, 1.0, 1.0])
    sign = np.asarray([-1, 1, 0, 1, 1, -1])
    table = calibration(prefer, sign)
    np.testing.assert_allclose(table.edge_b, [0.0, 0.5, 0.9])
    np.testing.assert_allclose(table.predicted_b, [0.05, 0.55, 2.95 / 3])
    np.testing.assert_allclose(table.observed_b, [0.5, 0.5, 2 / 3])
    assert table.count_b.tolist() == [2, 1, 3]
    with pytest.raises(ValueError, match="prefer_p"):
        calibration([1.2], [1])
