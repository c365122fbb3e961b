"""The trained baselines' objectives, terms and bins against NumPy in fp64."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from deconfound_jax.align.baselines import causal_rewards as mmd
from deconfound_jax.align.baselines import causal_rm, inform, odin, rrm
from deconfound_jax.align.baselines.data import RewardData
from deconfound_jax.align.baselines.pairs import PairRows
from deconfound_jax.align.baselines.training import Batch, Texts
from deconfound_jax.config import CausalRm

RNG = np.random.default_rng(0)
B, D, K = 6, 4, 2
TEXTS = Texts(RNG.normal(size=(B, 2, D)), RNG.normal(size=(B, 2, K)))
LABEL, WEIGHT = np.array([1.0, 0.0, 0.5, 0.8, 1.0, 0.3]), np.array([1.0, 2.0, 1.0, 0.5, 0.0, 3.0])
PAIRS = PairRows(np.zeros((B, 2), int), LABEL, WEIGHT)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def bt(reward_b2):
    gap = reward_b2[:, 0] - reward_b2[:, 1]
    return -LABEL * np.log(sigmoid(gap)) - (1 - LABEL) * np.log(sigmoid(-gap))


def evaluated(objective, params, frozen, texts, examples, key=None):
    """Per-example losses, penalty and metrics in fp64, without compiling each operation."""
    with jax.enable_x64(True):
        found = jax.jit(objective)(params, frozen, Batch(texts, examples), jax.random.key(0) if key is None else key)
        return jax.tree.map(np.asarray, found)


def multiple_correlation(reward_m, control_mk, weight_m):
    """sqrt(R^2) of weighted least squares with an intercept."""
    root = np.sqrt(weight_m)
    x = root[:, None] * np.column_stack([np.ones(len(reward_m)), control_mk])
    left = root * reward_m - x @ np.linalg.lstsq(x, root * reward_m, rcond=None)[0]
    centred = root * (reward_m - np.average(reward_m, weights=weight_m))
    return np.sqrt(1 - left @ left / (centred @ centred))


def test_odin_by_hand():
    heads = RNG.normal(size=(2, D))
    params = {"heads_2d": heads, "log_scale": np.array(0.4)}
    frozen = {"orthogonality": 0.7, "correlation": 1.3}
    per_pair, weight, penalty, metrics = evaluated(odin.objective, params, frozen, TEXTS, PAIRS)
    unit = heads / np.linalg.norm(heads, axis=1, keepdims=True)
    quality, other = TEXTS.features_nd @ unit[0], TEXTS.features_nd @ unit[1]
    np.testing.assert_allclose(per_pair, bt(math.exp(0.4) * (quality + other)), rtol=1e-9)
    r = [multiple_correlation(v.ravel(), TEXTS.controls_nk.reshape(-1, K), np.repeat(WEIGHT, 2))
         for v in (quality, other, quality + other)]  # fmt: skip
    by_hand = 0.7 * abs(unit[0] @ unit[1]) + 1.3 * ((1 - r[1]) + r[0] + r[2])
    np.testing.assert_allclose(penalty, by_hand, atol=2e-5)  # the ridge of the controls' covariance
    np.testing.assert_allclose(metrics["quality"], r[0], atol=1e-5)
    assert (weight == WEIGHT).all()


def test_the_correlation_is_absolute_and_multiple_and_ignores_empty_levels():
    reward, c = RNG.normal(size=30), RNG.normal(size=(30, 2))
    weight = RNG.integers(0, 3, size=30).astype(float)
    r = jax.jit(jax.value_and_grad(odin.correlation))
    one = c.copy()
    one[:, 1] = 0  # a level that the batch lacks
    twice = np.repeat(np.arange(30), weight.astype(int))
    by_hand = abs(np.corrcoef(reward[twice], c[twice, 0])[0, 1])
    for sign in (1, -1):
        assert float(r(sign * reward, one, weight)[0]) == pytest.approx(by_hand, abs=1e-4)
    assert float(r(c @ [0.5, -2.0] + 3, c, np.ones(30))[0]) == pytest.approx(1.0, abs=1e-4)
    assert np.isfinite(r(np.zeros(30), one, weight)[1]).all()


def test_heads_are_centred_from_width_64():
    for width in (63, 64):
        heads = np.random.default_rng(1).normal(size=(2, width)) + 1.0
        expected = heads - heads.mean(1, keepdims=True) if width == 64 else heads
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(odin.unit(heads), expected, rtol=1e-4, atol=1e-6)


def discrepancy_by_hand(reward, bins, weight, width):
    """Double loops over texts, one confounder's pairs of bins."""

    def mean(a, b):
        in_a, in_b = np.flatnonzero(bins == a), np.flatnonzero(bins == b)
        total = sum(weight[i] * weight[j] * math.exp(-((reward[i] - reward[j]) ** 2) / (2 * width**2))
                    for i in in_a for j in in_b)  # fmt: skip
        return total / weight[in_a].sum() / weight[in_b].sum()

    present = [m for m in range(bins.max() + 1) if weight[bins == m].sum() > 0]
    return sum(mean(a, a) + mean(b, b) - 2 * mean(a, b) for a in present for b in present if a < b)


def test_causal_rewards_by_hand():
    w, strength = RNG.normal(size=D), 1.7
    first, second = RNG.integers(3, size=(B, 2)), RNG.integers(2, size=(B, 2))
    first[first == 2] = 0
    first[4] = 2  # a bin that only the pair of weight zero has
    member = np.concatenate([np.eye(3)[first], np.eye(2)[second]], -1)
    owner = np.array([0, 0, 0, 1, 1])
    frozen = {"strength": strength, "conditional": 0.0, "alike_kk": 1.0 * (owner[:, None] == owner[None, :])}
    texts, reward = Texts(TEXTS.features_nd, member), TEXTS.features_nd @ w
    width = math.sqrt(reward.var() + 1e-8)

    def total(weight_b2):
        flat = reward.ravel(), weight_b2.ravel()
        return sum(discrepancy_by_hand(flat[0], bins.ravel(), flat[1], width) for bins in (first, second))

    per_pair, _, penalty, _ = evaluated(mmd.objective, {"w_d": w}, frozen, texts, PAIRS)
    np.testing.assert_allclose(per_pair, bt(reward), rtol=1e-9)
    np.testing.assert_allclose(penalty, strength * total(np.repeat(WEIGHT[:, None], 2, 1)), rtol=1e-9)
    chosen = WEIGHT[:, None] * np.stack([LABEL, 1 - LABEL], 1)
    _, _, penalty, _ = evaluated(mmd.objective, {"w_d": w}, frozen | {"conditional": 1.0}, texts, PAIRS)
    np.testing.assert_allclose(penalty, strength * (total(chosen) + total(chosen[:, ::-1])), rtol=1e-9)


def test_bins_are_quantiles_by_weight_and_levels():
    c = np.array([5.0, 1.0, 4.0, 2.0, 3.0, 9.0])
    data = RewardData(np.zeros((6, 1)), c, numbers_nk=c[:, None], levels_nc=np.array([[7], [7], [3], [9], [3], [7]]))
    assert mmd.bins_of(data, 3).T.tolist() == [[2, 0, 1, 0, 1, 2], [1, 1, 0, 2, 0, 1]]
    heavy = data._replace(weight_n=np.array([1.0, 4.0, 1.0, 1.0, 1.0, 1.0]), levels_nc=None)
    assert mmd.bins_of(heavy, 3).T.tolist() == [[2, 0, 2, 1, 1, 2]]


def test_inform_by_hand():
    assert inform.gaussian_kl(1.0, 0.0) == pytest.approx(0.5)
    assert float(inform.gaussian_kl(0.0, math.log(4.0))) == pytest.approx(0.5 * (4 - 1 - math.log(4)))
    h = 3
    shapes = {"mean_dh": (D, h), "shift_h": h, "log_variance_dh": (D, h), "log_variance_h": h,
              "hidden_hj": (h, h), "bias_j": h, "out_j": h}  # fmt: skip
    params = {name: 0.5 * RNG.normal(size=shape) for name, shape in shapes.items()}
    key = jax.random.key(3)
    per_pair, _, penalty, _ = evaluated(inform.objective, params, {"beta": 0.2}, TEXTS, PAIRS, key)
    with jax.enable_x64(True):
        noise = np.asarray(jax.random.normal(key, (B, 2, h)))
    mean = TEXTS.features_nd @ params["mean_dh"] + params["shift_h"]
    log_variance = TEXTS.features_nd @ params["log_variance_dh"] + params["log_variance_h"]
    code = mean + np.exp(log_variance / 2) * noise
    reward = np.tanh(code @ params["hidden_hj"] + params["bias_j"]) @ params["out_j"]
    kl = 0.5 * (np.exp(log_variance) + mean**2 - 1 - log_variance)
    np.testing.assert_allclose(per_pair, bt(reward) + 0.2 * kl.sum((1, 2)), rtol=1e-9)
    assert penalty == 0
    # At use the code is its mean, of features in their own units.
    model = inform.model_of(params, np.full(D, 2.0), np.full(D, 0.5))
    at_mean = np.tanh(mean[:, 0] @ params["hidden_hj"] + params["bias_j"]) @ params["out_j"]
    np.testing.assert_allclose(model.score(2 + 0.5 * TEXTS.features_nd[:, 0]), at_mean, rtol=1e-5)


def test_causal_rm_by_hand():
    one, zero, q01, q10 = 0.4, 1.1, 0.2, 0.1
    # Over the noise the surrogate is the loss on what was meant.
    noisy = [causal_rm.denoised(one, zero, y, q01, q10) for y in (0, 1)]
    assert (1 - q01) * noisy[1] + q01 * noisy[0] == pytest.approx(one)
    assert q10 * noisy[1] + (1 - q10) * noisy[0] == pytest.approx(zero)
    assert noisy[1] == pytest.approx((0.9 * 0.4 - 0.2 * 1.1) / 0.7)
    assert causal_rm.denoised(one, zero, 0.25, q01, q10) == pytest.approx(0.25 * noisy[1] + 0.75 * noisy[0])

    z, w = RNG.normal(size=(4, D)), RNG.normal(size=D)
    found = causal_rm.Feedback(np.arange(4), np.array([1.0, 0.0, 0.0, 0.5]), np.array([1.0, 1.0, 0.0, 1.0]),
                               np.array([0.5, 0.8, 0.1, 0.25]), np.array([0.3, 0.9, 0.6, 0.0]), np.ones(4))  # fmt: skip
    params, frozen = {"w_d": w, "a": np.array(0.3)}, {"q01": q01, "q10": q10}
    reward = z @ w + 0.3
    one, zero = -np.log(sigmoid(reward)), -np.log(sigmoid(-reward))
    clean = causal_rm.denoised(one, zero, found.outcome_n, q01, q10)
    guess = found.imputed_n * one + (1 - found.imputed_n) * zero
    ratio = np.array([2.0, 1.25, 0.0, 4.0])
    texts = Texts(z, np.zeros((4, 0)))
    ips, doubly = (
        evaluated(causal_rm.objective, params, frozen | {"doubly": value}, texts, found)[0] for value in (0.0, 1.0)
    )
    np.testing.assert_allclose(ips, ratio * clean, rtol=1e-9)
    np.testing.assert_allclose(doubly, guess + ratio * (clean - guess), rtol=1e-9)
    with pytest.raises(ValueError, match=r"q01 \+ q10: expected less than 1, got 1.2"):
        causal_rm.feedback(RewardData(z, z[:, 0]), CausalRm(q01=0.7, q10=0.5), "causal_rm_ips")


def test_rrm_by_hand():
    phi, psi, w = RNG.normal(size=(B, 3, D)), RNG.normal(size=(B, 3, D)), RNG.normal(size=2 * D)
    sd = RNG.uniform(0.5, 2, size=2 * D)
    reward = np.stack([np.concatenate([phi[:, t], phi[:, t] * psi[:, 2]], 1) @ (w / sd) for t in (0, 1)], 1)
    examples = rrm.PromptPairs(np.zeros((B, 3), int), LABEL, WEIGHT)
    per_pair, _, _, _ = evaluated(rrm.objective, {"w_d": w}, {"sd_d": sd}, Texts(phi, psi), examples)
    np.testing.assert_allclose(per_pair, bt(reward), rtol=1e-9)
