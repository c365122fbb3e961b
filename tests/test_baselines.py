"""Baselines in closed form against least squares; LOWESS, pairs, augmentation, tuning, and what data lack."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from deconfound_jax.align.baselines.calibration import calibrated, lowess, posthoc
from deconfound_jax.align.baselines.data import NotDefined, RewardData, RewardModel, linear_model, reward_data
from deconfound_jax.align.baselines.linear import covariate, naive, of_posterior, on_target, projection, residual
from deconfound_jax.align.baselines.pairs import PairRows, form_pairs
from deconfound_jax.align.baselines.rrm import augmented, joint_features
from deconfound_jax.align.baselines.table import BASELINES
from deconfound_jax.align.baselines.tune import held_out_loss, tune
from deconfound_jax.causal.fit import fit
from deconfound_jax.config import Adam, Causal, Lowess
from deconfound_jax.structs import Design

TRUE = np.array([0.3, 0.6, -0.3])
N = 4000


def share(coefficient_d):
    """Of the oracle's reward that the best of a few N(0, I) candidates gets: the cosine with the truth."""
    return coefficient_d @ TRUE / np.linalg.norm(coefficient_d) / np.linalg.norm(TRUE)


def raw(model):
    """Coefficients in the features' own units."""
    return model.linear_d / model.sd_d


def least_squares(x_nk, y_n, weight_n=1.0):
    """Slopes on the columns of x beside an intercept."""
    root = np.sqrt(weight_n) * np.ones(len(y_n))
    x_nk = np.column_stack([x_nk, np.ones(len(y_n))])
    return np.linalg.lstsq(root[:, None] * x_nk, root * y_n, rcond=None)[0][:-1]


@pytest.fixture(scope="module")
def newsroom(entangled):
    """The method's three-feature newsroom, p its confounder; weeks stand beside it."""
    logs, features_nd = entangled(N, seed=3)
    return reward_data(logs, features_nd, Design.parse("endogenous(p ~ z) + category(week)"))


def numbers_only(data):
    return data._replace(levels_nc=None)


def test_closed_forms_equal_least_squares_and_the_newsrooms_table(newsroom):
    x_nd, y_n, p_n = newsroom.features_nd, newsroom.outcome_n, newsroom.numbers_nk[:, 0]
    week_nw = np.eye(8)[newsroom.levels_nc[:, 0]][:, 1:]
    by_hand = {"naive": least_squares(x_nd, y_n)}
    by_hand["covariate"] = least_squares(np.column_stack([x_nd, p_n, week_nw]), y_n)[:3]
    control_nk = np.column_stack([p_n, week_nw])
    by_hand["residual"] = least_squares(x_nd, y_n - control_nk @ least_squares(control_nk, y_n))
    # Projected in standardised units, off the covariance with p.
    z_nd, sd_d = x_nd - x_nd.mean(0), x_nd.std(0)
    away_d = (z_nd / sd_d[None, :]).T @ (p_n - p_n.mean())
    standard_d = by_hand["naive"] * sd_d
    by_hand["projection"] = (standard_d - away_d * (away_d @ standard_d) / (away_d @ away_d)) / sd_d

    table = {"naive": 0.80, "covariate": 0.72, "residual": 0.74, "projection": 0.84}
    fits = {"naive": naive, "covariate": covariate, "residual": residual, "projection": projection}
    for name, baseline in fits.items():
        data = numbers_only(newsroom) if name == "projection" else newsroom
        found_d = raw(baseline(data))
        np.testing.assert_allclose(found_d, by_hand[name], atol=0.02, err_msg=name)  # 512 draws stand for the mean
        assert abs(share(found_d) - table[name]) < 0.045, name
    assert abs(np.corrcoef(projection(numbers_only(newsroom)).score(x_nd), p_n)[0, 1]) < 1e-8
    with pytest.raises(NotDefined, match="projection .*8 columns of confounders span all 3 features"):
        projection(newsroom)


def test_rows_without_weight_or_outcome_have_no_say(newsroom):
    seen_n = np.arange(N) % 3 > 0
    hidden = newsroom._replace(outcome_n=np.where(seen_n, newsroom.outcome_n, np.nan), observed_n=seen_n.astype(float))
    masked = newsroom._replace(outcome_n=np.where(seen_n, newsroom.outcome_n, 1e6), weight_n=seen_n.astype(float))
    by_hand = least_squares(newsroom.features_nd[seen_n], newsroom.outcome_n[seen_n])
    for data in (hidden, masked):
        np.testing.assert_allclose(raw(naive(data)), by_hand, atol=0.025)
        pairs = form_pairs(data, Adam(), "test")
        assert (pairs.weight_p > 0).any() and (seen_n[pairs.rows_p2].all(1) == (pairs.weight_p > 0)).all()


def test_counts_take_the_causal_layers_route(clicks):
    logs, features_nd, _ = clicks(N, seed=1)
    design = Design.parse("category(week)", response="empirical_logit")
    data = reward_data(logs, features_nd, design)
    own = Design.parse(f"category(week) + intercept({logs.roles.text})", "binomial")
    assert reward_data(logs, features_nd, own).levels_nc.shape == (N, 1), "a text's own deviation is no confounder"
    found = naive(data)
    direct = of_posterior(fit(logs, features_nd, Causal(verdict=False), design.without_terms()))
    np.testing.assert_allclose(raw(found), raw(direct), rtol=1e-6)
    hit_n, miss_n = logs.outcome_n + 0.5, logs.exposure_n - logs.outcome_n + 0.5
    logit_n, variance_n = np.log(hit_n / miss_n), 1 / hit_n + 1 / miss_n
    spread = np.var(logit_n)
    weight_n = 1 / (1 + variance_n / max(spread - variance_n.mean(), 0.05 * spread))
    np.testing.assert_allclose(raw(found), least_squares(features_nd, logit_n, weight_n), atol=0.02)
    pairs = form_pairs(data, Adam(), "test")
    first, second = pairs.rows_p2[7]
    z = (logit_n[first] - logit_n[second]) / math.sqrt(variance_n[first] + variance_n[second])
    assert pairs.label_p[7] == pytest.approx(0.5 * (1 + math.erf(z / math.sqrt(2))))


def test_a_reward_model_scores_new_texts():
    model = RewardModel(np.array([1.0, 0.0]), np.array([2.0, 1.0]), np.array([3.0, -1.0]),
                        np.array([[1.0], [0.5]]), np.array([0.25]), np.array([4.0]))  # fmt: skip
    features_nd = np.array([[3.0, 1.0], [1.0, 0.0]])  # z = (1, 1) and (0, 0)
    by_hand = [2 + 4 * math.tanh(1.75), 4 * math.tanh(0.25)]
    np.testing.assert_allclose(model.score(features_nd), by_hand, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda m, x: m.score(x))(model, features_nd), by_hand, rtol=1e-6)
    reward = linear_model([0.0], [1.0], [2.0]).reward(np.array([[1.0], [4.0]]))
    np.testing.assert_allclose(reward.mean, [-3.0, 3.0])
    assert (
        reward.draws_sn.shape == (1, 2)
        and reward.verdict is None
        and reward.prefer(1, 0, 6.0) == pytest.approx(1 / (1 + math.exp(-1)))
    )
    with pytest.raises(ValueError, match=r"features: expected \(n, 2\)"):
        model.score(np.zeros((3, 1)))


def lowess_by_hand(y_n, x_n, weight_n, fraction):
    near, fitted = int(fraction * len(x_n)), []
    for x0 in x_n:
        far_n = np.abs(x_n - x0)
        kernel_n = np.clip(1 - (far_n / np.sort(far_n)[near - 1]) ** 3, 0, None) ** 3 * weight_n
        line = np.polynomial.polynomial.polyfit(x_n - x0, y_n, 1, w=np.sqrt(kernel_n))
        fitted.append(line[0])
    return np.array(fitted)


def test_lowess_by_hand():
    x_n, y_n = np.array([0.0, 1.0, 3.0, 4.0, 8.0]), np.array([1.0, 3.0, 2.0, 5.0, 4.0])
    ones_n, weight_n = np.ones(5), np.array([1.0, 2.0, 0.5, 1.0, 3.0])
    for weights_n in (ones_n, weight_n):
        by_hand = lowess_by_hand(y_n, x_n, weights_n, 0.8)
        np.testing.assert_allclose(lowess(y_n, x_n, weights_n, 0.8), by_hand, rtol=1e-9)
    # At 0 with h = 4 the kernel is 1, (1 - 1/64)^3 and (1 - 27/64)^3 at 0, 1 and 3.
    k = np.array([1, (63 / 64) ** 3, (37 / 64) ** 3])
    mean_x, mean_y = k @ x_n[:3] / k.sum(), k @ y_n[:3] / k.sum()
    slope = k @ ((x_n[:3] - mean_x) * y_n[:3]) / (k @ (x_n[:3] - mean_x) ** 2)
    assert lowess(y_n, x_n, None, 0.8)[0] == pytest.approx(mean_y - slope * mean_x)
    # Over all rows a weight of 2 is the row twice; a line comes back as it is; equal x give a mean.
    twice = np.array([0, 1, 1, 2, 3, 4])
    doubled = lowess(y_n, x_n, np.array([1.0, 2.0, 1.0, 1.0, 1.0]), 1.0)
    np.testing.assert_allclose(lowess(y_n[twice], x_n[twice], None, 1.0)[[0, 1, 3, 4, 5]], doubled, rtol=1e-9)
    np.testing.assert_allclose(lowess(2 - 3 * x_n, x_n, None, 0.6), 2 - 3 * x_n, atol=1e-12)
    np.testing.assert_allclose(lowess(y_n, np.full(5, 7.0), None, 0.6), np.full(5, y_n.mean()), rtol=1e-12)
    # Where most rows have x = 0, those are all that is near a quantile between 0 and the next value.
    crowd_n = np.concatenate([np.zeros(754), 1 + np.linspace(0, 3, 246)])
    np.testing.assert_allclose(lowess(np.full(1000, 5.0), crowd_n), 5.0)
    with pytest.raises(ValueError, match="fraction: expected a share that holds 2 to 5 rows"):
        lowess(y_n, x_n, None, 0.3)


def test_lowess_on_quantiles_is_near_the_exact_curve_and_statsmodels_agrees():
    rng = np.random.default_rng(0)
    x_n = rng.normal(size=600)
    y_n = np.sin(2 * x_n) + 0.3 * rng.normal(size=600)
    exact = lowess(y_n, x_n, None, 0.3, points=600)
    assert np.abs(lowess(y_n, x_n, None, 0.3, points=150) - exact).max() < 0.03
    assert np.abs(exact - y_n.mean()).max() > 0.5
    peer = pytest.importorskip("statsmodels.nonparametric.smoothers_lowess")
    theirs = peer.lowess(y_n, x_n, frac=0.3, it=0, delta=0.0, return_sorted=False)
    np.testing.assert_allclose(exact, theirs, atol=1e-6)


def test_calibration_takes_a_function_of_the_confounders_out():
    rng = np.random.default_rng(1)
    level_n = rng.integers(4, size=300)
    c_n = rng.normal(size=300) + 0.5 * level_n
    kept_n = rng.normal(size=300)
    data = RewardData(np.zeros((300, 2)), c_n, numbers_nk=c_n[:, None], levels_nc=level_n[:, None])
    score_n = kept_n + 2 * c_n + np.array([0.0, 5.0, -3.0, 1.0])[level_n]
    found_n = calibrated(score_n, data, Lowess())
    assert found_n.mean() == pytest.approx(score_n.mean())
    assert max(abs(found_n[level_n == level].mean() - found_n.mean()) for level in range(4)) < 1e-6
    assert abs(np.polyfit(c_n, found_n, 1)[0]) < 0.03 and np.corrcoef(found_n, kept_n)[0, 1] > 0.98
    # By hand: a category alone leaves the deviation from its level's mean.
    hand = RewardData(np.zeros((4, 1)), np.zeros(4), levels_nc=np.array([[0], [0], [1], [1]]))
    np.testing.assert_allclose(calibrated(np.array([1.0, 3.0, 8.0, 4.0]), hand, Lowess()), [3.0, 5.0, 6.0, 2.0])
    constant = on_target(np.eye(3), np.full(3, 2.0), np.ones(3))
    np.testing.assert_allclose(constant.linear_d, np.zeros(3))


def test_posthoc_refits_the_calibrated_reward(newsroom):
    data = numbers_only(newsroom)
    model = naive(data)
    found_d = raw(posthoc(data, model=model))
    c_n, score_n = data.numbers_nk[:, 0], model.score(data.features_nd)
    by_hand = least_squares(data.features_nd, score_n - np.polyval(np.polyfit(c_n, score_n, 1), c_n))
    np.testing.assert_allclose(found_d, by_hand, atol=0.05)  # features and p are Gaussian: the curve is a line
    assert share(raw(model)) < share(found_d) < 0.9


def test_pairs_are_formed_within_and_judged_by_outcomes():
    data = RewardData(np.zeros((5, 1)), np.array([1.0, 2.0, 2.0, 7.0, 0.0]), pair_within_n=np.array([0, 0, 0, 1, 2]))
    pairs = form_pairs(data, Adam(group_size=3), "test")
    assert sorted(map(sorted, pairs.rows_p2.tolist())) == [[0, 1], [0, 2], [1, 2]]
    y_n = data.outcome_n
    by_hand = [0.5 if y_n[a] == y_n[b] else float(y_n[a] > y_n[b]) for a, b in pairs.rows_p2]
    assert pairs.label_p.tolist() == by_hand and 0.5 in by_hand
    across = form_pairs(data._replace(pair_within_n=None), Adam(group_size=5), "test")
    assert len(across.rows_p2) == 10
    with pytest.raises(NotDefined, match="odin is not defined here: no pairs"):
        form_pairs(data._replace(pair_within_n=np.arange(5)), Adam(), "odin")


def test_augmentation_puts_texts_of_other_prompts_beside_each_pair():
    prompt_n = np.repeat([7, 8, 9, 5], 2)
    base = PairRows(np.arange(8).reshape(4, 2), np.array([1.0, 0.0, 0.5, 1.0]), np.array([1.0, 2.0, 1.0, 0.0]))
    for seed in range(5):
        found = augmented(base, prompt_n, seed)
        assert found.rows_p3.shape == (60, 3)
        assert (found.weight_p == np.repeat(base.weight_p, 15)).all()
        for i in range(4):
            rows, label = found.rows_p3[15 * i : 15 * i + 15], found.label_p[15 * i : 15 * i + 15]
            own, others = prompt_n[rows[:, :2]] == prompt_n[2 * i], prompt_n[rows[:, :2]] != prompt_n[2 * i]
            assert rows[0].tolist() == [2 * i, 2 * i + 1, 2 * i] and label[0] == base.label_p[i]
            assert own[1:9, 0].all() and others[1:9, 1].all() and (label[1:9] == 1).all()
            assert others[9:].all() and (label[9:] == 0.5).all()
            assert (prompt_n[rows[:, 2]] == prompt_n[2 * i]).all()
            assert not np.isin(rows[1:, 1], [6, 7]).any() or i == 3  # a pair without weight is drawn by none
    with pytest.raises(NotDefined, match="rrm is not defined here: all pairs have one prompt"):
        augmented(base, np.zeros(8, int))
    with pytest.raises(ValueError, match="pairs: expected texts of one prompt"):
        augmented(base, np.arange(8))
    np.testing.assert_allclose(joint_features([[2.0, 3.0]], [[5.0, -1.0]]), [[2.0, 3.0, 10.0, -3.0]])


def test_tuning_reads_held_out_pairs_of_the_log_by_group():
    rng = np.random.default_rng(2)
    features_nd, group_n = rng.normal(size=(120, 2)), np.repeat(np.arange(24), 5)
    data = RewardData(features_nd, features_nd[:, 0] + 0.5 * rng.normal(size=120), group_n=group_n)
    asked = []

    def baseline(data, config, key):
        left_out = np.unique(group_n[data.weight_n == 0])
        assert left_out.size and (data.weight_n[np.isin(group_n, left_out)] == 0).all()
        asked.append((config, key, left_out.size))
        return linear_model([0.0, 0.0], [1.0, 1.0], config)

    found = tune(baseline, data, [(0.0, 1.0), (1e-3, 0.0), (-1.0, 0.0)], key="key")
    assert found.config == (1e-3, 0.0) and found.losses[1] < 0.6 < found.losses[0]
    assert sum(size for config, _, size in asked if config == (0.0, 1.0)) == 24 and asked[0][1] == "key"
    # By hand: two training pairs that agree as one in two ask for scale 1 / 100 of the unit, the smallest.
    pairs = PairRows(np.array([[0, 1], [1, 0], [2, 3]]), np.array([1.0, 1.0, 0.0]), np.ones(3))
    four = RewardData(np.array([[0.0], [1.0], [0.0], [2.0]]), np.zeros(4))
    held = held_out_loss(linear_model([0.0], [1.0], [1.0]), four, pairs, np.array([False, False, True, True]))
    assert held == pytest.approx(math.log1p(math.exp(-0.02)))
    with pytest.raises(ValueError, match="configs: expected at least one"):
        tune(baseline, data, [])


SIX = RewardData(np.arange(12.0).reshape(6, 2) % 5, np.arange(6.0), numbers_nk=np.arange(6.0)[:, None])
NEED_CONFOUNDERS = ("covariate", "residual", "projection", "odin", "causal_rewards", "conditional_causal_rewards",
                    "posthoc")  # fmt: skip
NEED_PAIRS = ("odin", "causal_rewards", "conditional_causal_rewards", "inform")


@pytest.mark.parametrize(
    ("name", "data", "missing"),
    [
        *[(name, SIX._replace(numbers_nk=None), "no confounder") for name in NEED_CONFOUNDERS],
        *[(name, SIX._replace(pair_within_n=np.arange(6)), "no pairs") for name in NEED_PAIRS],
        ("odin", SIX._replace(levels_nc=(np.arange(6) % 6)[:, None], pair_within_n=np.array([0, 0, 1, 2, 3, 4])),
         "a correlation with 6 columns over 2 texts"),
        ("causal_rewards", SIX._replace(numbers_nk=np.ones((6, 1))), "no confounder that varies"),
        ("rrm", SIX, "no prompts"),
        ("rrm", SIX._replace(prompt_n=np.zeros(6, int)), r"prompt_features_nd of shape \(6, 2\) are needed, got None"),
        ("rrm", SIX._replace(prompt_n=np.zeros(6, int), prompt_features_nd=np.zeros((6, 2))), "one prompt"),
        *[(name, SIX, "every outcome was seen") for name in ("causal_rm_ips", "causal_rm_dr")],
        ("causal_rm_ips", SIX._replace(observed_n=np.ones(6)), "every outcome was seen"),
        ("causal_rm_dr", SIX._replace(observed_n=np.array([1, 1, 0, 1, 1, 1.0])), "neither 0 or 1 nor counts"),
    ],
)  # fmt: skip
def test_a_baseline_says_what_the_data_lack(name, data, missing):
    with pytest.raises(NotDefined, match=f"^{name} is not defined here: .*{missing}") as caught:
        BASELINES[name].fit(data, BASELINES[name].config, None)
    assert caught.value.baseline == name


def test_data_are_checked_by_field():
    wrong = {
        "numbers_nk": (np.zeros(6), r"data.numbers_nk: expected 6 rows and rank 2, got shape \(6,\)"),
        "outcome_n": (np.array([0, 1, np.nan, 2, 3, 4]), "data.outcome_n: expected finite numbers"),
        "weight_n": (np.zeros(6), "data.weight_n: expected a row of positive weight"),
    }
    for field, (value, message) in wrong.items():
        with pytest.raises(ValueError, match=message):
            naive(SIX._replace(**{field: value}))
