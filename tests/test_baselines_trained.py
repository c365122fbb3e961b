"""Training of the baselines, and what each does on a log made to show it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deconfound_jax.align.baselines import causal_rewards as mmd
from deconfound_jax.align.baselines import causal_rm, inform, odin, rrm
from deconfound_jax.align.baselines.data import RewardData
from deconfound_jax.align.baselines.pairs import PairRows
from deconfound_jax.align.baselines.training import train
from deconfound_jax.config import Adam, CausalRewards, CausalRm, InfoRm, Odin, Rrm

QUICK = Adam(steps=150, batch=128)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_training_takes_the_start_with_the_lowest_loss_and_compiles_once():
    traces = []

    def two_wells(params, frozen, batch, key):
        traces.append(1)
        loss_b = (params["w"] ** 2 - 4) ** 2 + frozen["slope"] * params["w"] + 0 * batch.texts
        return loss_b, jnp.ones_like(loss_b), 0.0, {}

    starts = {"w": np.array([3.0, -1.0, 1.0])}
    examples = PairRows(np.arange(8), np.zeros(8), np.ones(8))
    found = [train(two_wells, starts, np.zeros(8), examples, {"slope": slope}, Adam(steps=200, batch=4),
                   jax.random.key(0)) for slope in (1.0, -1.0)]  # fmt: skip
    compiled = len(traces)
    for (params, losses), well in zip(found, (-2.0, 2.0), strict=True):
        assert params["w"] == pytest.approx(well, abs=0.1)
        assert np.ptp(losses) > 3
    train(two_wells, starts, np.ones(8), examples, {"slope": 0.5}, Adam(steps=200, batch=4, learning_rate=0.01),
          jax.random.key(1))  # fmt: skip
    assert len(traces) == compiled, "another knob, key or step size compiled anew"
    with pytest.raises(FloatingPointError, match="expected a finite loss from some start"):
        train(two_wells, starts, np.full(8, np.nan), examples, {"slope": 1.0}, Adam(steps=200, batch=4),
              jax.random.key(0))  # fmt: skip


@pytest.fixture(scope="module")
def shadowed():
    """Texts of twelve features: two that work, one that only follows the confounder, which moves the outcome."""
    rng = np.random.default_rng(5)
    features_nd, c = rng.normal(size=(1500, 12)), rng.normal(size=1500)
    features_nd[:, 2] = c + 0.5 * rng.normal(size=1500)
    good = features_nd[:, 0] - 0.5 * features_nd[:, 1]
    data = RewardData(features_nd, good + 3 * c + 0.5 * rng.normal(size=1500), numbers_nk=c[:, None])
    naive = np.linalg.lstsq(features_nd, data.outcome_n - data.outcome_n.mean(), rcond=None)[0]
    return data, good, features_nd @ naive


def correlation(a, b):
    return np.corrcoef(a, b)[0, 1]


@pytest.mark.parametrize(
    ("baseline", "config", "left", "kept"),
    [
        (odin.odin, Odin(restarts=2, adam=QUICK), 0.1, 0.6),
        (mmd.causal_rewards, CausalRewards(adam=QUICK), 0.15, 0.6),
        (mmd.conditional_causal_rewards, CausalRewards(adam=QUICK), 0.3, 0.2),
    ],
)
def test_rewards_let_go_of_a_shadow_of_the_confounder(shadowed, baseline, config, left, kept):
    data, good, naive = shadowed
    assert correlation(naive, data.numbers_nk[:, 0]) > 0.8 and correlation(naive, good) < 0.5
    score = baseline(data, config, jax.random.key(1)).score(data.features_nd)
    assert abs(correlation(score, data.numbers_nk[:, 0])) < left
    assert correlation(score, good) > kept


def test_inform_keeps_what_predicts_and_a_tight_bottleneck_keeps_less(shadowed):
    data, _, naive = shadowed
    scores = [np.asarray(inform.inform(data, InfoRm(beta=beta, latent=8, adam=QUICK)).score(data.features_nd))
              for beta in (1e-3, 0.3)]  # fmt: skip
    assert correlation(scores[0], naive) > 0.95  # the confounder's shadow with it
    assert scores[1].std() < 0.5 * scores[0].std()


def test_rrm_learns_what_answers_the_prompt():
    rng = np.random.default_rng(6)
    psi, artifact = rng.normal(size=(60, 5)), 4
    prompt_n = np.repeat(np.arange(60), 5)
    phi = psi[prompt_n] + 0.5 * rng.normal(size=(300, 5))
    phi[:, artifact] = rng.normal(size=300)
    quality = phi[:, 0] - psi[prompt_n, 0]
    data = RewardData(phi, quality + 0.5 * phi[:, artifact], prompt_n=prompt_n, prompt_features_nd=psi[prompt_n])
    model = rrm.rrm(data, Rrm(QUICK))
    own = model.score(rrm.joint_features(phi, psi[prompt_n]))
    elsewhere = model.score(rrm.joint_features(phi, psi[(prompt_n + rng.integers(1, 60, size=300)) % 60]))
    assert (own > elsewhere).mean() > 0.85
    # Fourteen of fifteen comparisons say nothing for the artifact: its slope is small beside what makes an answer.
    assert abs(correlation(own, phi[:, artifact])) < 0.4


@pytest.fixture(scope="module")
def selected():
    """Clicks on texts: x1 does nothing, but rows are seen where x1 and the confounder agree, and c moves clicks."""
    rng = np.random.default_rng(7)
    x, c = rng.normal(size=(6000, 2)), rng.normal(size=6000)
    liked = rng.random(6000) < sigmoid(x[:, 1] + 1.5 * c)
    propensity = 0.12 + 0.8 * sigmoid(3 * x[:, 0] * c)
    observed = rng.random(6000) < propensity
    flip = rng.random(6000) < np.where(liked, 0.2, 0.1)
    data = RewardData(x, np.where(observed, liked ^ flip, np.nan), numbers_nk=c[:, None], observed_n=1.0 * observed,
                      propensity_n=propensity)  # fmt: skip
    return data, liked


def test_causal_rm_takes_selection_and_noise_out(selected):
    data, liked = selected
    adam = Adam(steps=200, batch=1000)
    known, none = CausalRm(q01=0.2, q10=0.1, adam=adam), CausalRm(adam=adam)
    blind = data._replace(propensity_n=np.ones(6000))  # as if every text had the same chance

    def slopes(baseline, data, config):
        model = baseline(data, config)
        return model.linear_d / model.sd_d

    full = _logistic(data.features_nd, liked)
    naive = slopes(causal_rm.causal_rm_ips, blind, none)
    assert naive[0] > 0.2 and naive[1] < 0.8 * full[1], "selection lifts x1, noise flattens x2"
    for name, baseline, rows in (
        ("ips", causal_rm.causal_rm_ips, data),
        ("dr", causal_rm.causal_rm_dr, data),
        ("dr, wrong propensity", causal_rm.causal_rm_dr, blind),
    ):
        found = slopes(baseline, rows, known)
        assert abs(found[0]) < 0.12 and abs(found[1] - full[1]) < 0.17, (name, found, full)


def test_feedback_estimates_clips_and_imputes(selected):
    data, liked = selected
    clean, noisy = (causal_rm.feedback(data, config, "x") for config in (CausalRm(0.2, 0.1, clip=0.4), CausalRm()))
    np.testing.assert_allclose(clean.imputed_n, np.clip((noisy.imputed_n - 0.1) / 0.7, 0, 1))
    c = data.numbers_nk[:, 0]
    for of in (c > 1, c < -1):  # by confounder: the imputation saw the rows that were seen, and c
        assert clean.imputed_n[of].mean() == pytest.approx(liked[of].mean(), abs=0.06)
    np.testing.assert_allclose(clean.propensity_n, np.maximum(data.propensity_n, 0.4))
    assert (clean.outcome_n[data.observed_n == 0] == 0).all()
    estimated = causal_rm.feedback(data._replace(propensity_n=None), CausalRm(), "x").propensity_n
    assert estimated.mean() == pytest.approx(data.observed_n.mean(), abs=0.05)


def _logistic(x_nd, y_n):
    """Newton's logistic slopes beside an intercept."""
    design, b = np.column_stack([x_nd, np.ones(len(x_nd))]), np.zeros(x_nd.shape[1] + 1)
    for _ in range(20):
        p = sigmoid(design @ b)
        b = b + np.linalg.solve((design * (p * (1 - p))[:, None]).T @ design, design.T @ (y_n - p))
    return b[:-1]
