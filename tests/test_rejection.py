"""Recipes on the reference's own texts: rejection sampling against the best of n, outcome weights, DR-CPO."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policy import FEATURES, LENGTH, ROWS, TEXTS, count, reward_anywhere, reward_of, tiny

from deconfound_jax.align.scoring import TextReward
from deconfound_jax.align.update import split
from deconfound_jax.causal.reward import Reward
from deconfound_jax.config import Align, DrCpo, Rejection, Rwr
from deconfound_jax.models.sample import generate
from deconfound_jax.models.tokenizer import BEGIN, END, PAD
from deconfound_jax.recipes.best_of_n import best_of_curve
from deconfound_jax.recipes.choice import align_policy, config_of, stage_of
from deconfound_jax.recipes.curve import policy_sampler, policy_watch
from deconfound_jax.recipes.joint import joint_stage
from deconfound_jax.recipes.off_policy import LoggedTexts, with_fresh
from deconfound_jax.recipes.reference import decoder_features, text_logprobs
from deconfound_jax.recipes.rejection import best_samples, rejection_stage
from deconfound_jax.recipes.rounds import featuriser, frozen_reward
from deconfound_jax.recipes.stage import Record
from deconfound_jax.recipes.texts import Texts
from deconfound_jax.train.loop import read_metrics
from experiments import newsroom_study, rundir
from experiments.presets import PRESETS

STEPS, N = 24, 4
REJECTION = Rejection(steps=STEPS, batch=64, n=N, learning_rate=1e-2)
RISKED = Align(accept_risk=True)
FLAT = TextReward(jnp.zeros((16, 25)), jnp.zeros(25), jnp.ones(25))  # an outcome model that knows nothing


@pytest.fixture(scope="module")
def draw():
    return policy_sampler(tiny().decoder, 1024)


def train(folder, stage, config, draw, seed=0, sign=1.0, anywhere=None, reward=None, residual=None, align=RISKED):
    """What was trained, and the rows of its curve."""
    of, record = tiny(), Record(folder, f"seed{seed}", 1000)
    watch = policy_watch(draw, of.reference, jax.random.key(7), truth=lambda x: {"truth": float(count(x).mean())})
    found = align_policy(
        of.decoder, stage, of.reference, TEXTS, reward or reward_of(TEXTS.tokens_nl, sign),
        anywhere or reward_anywhere(sign), config, align, seed, record, [(STEPS // 2, watch)], residual,
    )  # fmt: skip
    return found, read_metrics(folder, record.name)


def curve(rows):
    return [(row["kl"], row["truth"]) for row in rows if row.get("eval")]


def test_rejection_sampling_tends_to_the_best_of_n(tmp_path, draw):
    of, stage = tiny(), stage_of(tiny().decoder, REJECTION, FEATURES)
    pool_n = count(draw(of.reference, of.reference, jax.random.key(8))[0])
    for seed, sign in ((0, 1.0), (1, -1.0)):
        _, rows = train(tmp_path, stage, REJECTION, draw, seed, sign)
        best = best_of_curve(sign * pool_n, [N])[0]
        (_, before), *_, (kl, after) = curve(rows)
        # Its limit is the best of n itself: as much truth, and no more KL.
        gain = best.proxy - sign * pool_n.mean()
        assert 0.6 * gain < sign * (after - before) < 1.4 * gain
        assert 0.3 < kl < best.kl + 0.1
        score = np.mean([row["score"] for row in rows if "score" in row])
        assert score == pytest.approx(best.proxy, abs=0.15), "the reference is sampled, and it does not move"
    assert stage.traces() == 1


def test_the_best_by_mean_minus_kappa_sd_is_kept_for_each_prompt():
    of, b, n = tiny(), 6, 8
    # Draws agree on good words, and disagree on long texts, whose mean is a little higher.
    sure = reward_anywhere(1.0)
    reward = sure._replace(coefficients_sd=sure.coefficients_sd[:2].at[:, -1].add(jnp.asarray([3.0, -2.0])))
    frozen, prompt_bq = frozen_reward(reward) | {"reference": of.reference}, np.full((b, 1), BEGIN, np.int32)
    key, stop = jax.random.key(0), (END,)
    drawn_bnl = generate(of.decoder, of.reference, key, prompt_bq, LENGTH - 1, n, stop=stop).tokens
    whole_nl = np.insert(np.asarray(drawn_bnl).reshape(b * n, -1), 0, BEGIN, axis=1)
    draws_sn = np.asarray(reward.draws(decoder_features(of.decoder, of.reference, whole_nl, FEATURES)))
    fill = best_samples(of.decoder, featuriser(of.decoder, FEATURES), Rejection(n=n, kappa=1.0), LENGTH - 1, stop)
    found = jax.jit(fill)(None, frozen, prompt_bq, reward.coefficients_sd, key)
    score_bn = (draws_sn.mean(0) - draws_sn.std(0)).reshape(b, n)
    np.testing.assert_allclose(found.reward_b, score_bn.max(1), atol=1e-4)
    np.testing.assert_array_equal(found.weight_b, (np.asarray(found.tokens_bl) != PAD).sum(1))
    # Texts may tie: what was chosen is one of the prompt's, and has the highest score.
    same_bn = (np.asarray(found.tokens_bl)[:, None] == np.asarray(drawn_bnl)).all(-1)
    np.testing.assert_allclose(np.where(same_bn, score_bn, -np.inf).max(1), score_bn.max(1), atol=1e-5)
    by_mean_b = draws_sn.mean(0).reshape(b, n).argmax(1)
    assert not same_bn[np.arange(b), by_mean_b].all(), "the mean alone chooses otherwise"


def test_outcome_weighted_sft_follows_its_reward(tmp_path, draw):
    config = Rwr(steps=STEPS, batch=32, tau=0.5, learning_rate=1e-2)
    stage = stage_of(tiny().decoder, config, FEATURES)
    for seed, sign in ((0, 1.0), (1, -1.0)):
        (_, before), *_, (kl, after) = curve(train(tmp_path, stage, config, draw, seed, sign)[1])
        assert sign * (after - before) > 0.5 and kl > 0.1
    # A posterior that knows nothing weighs all texts alike: SFT on the log, which has as many bad words as good ones.
    flat = Reward(np.zeros((4, ROWS), np.float32), "model")
    assert (
        abs(curve(train(tmp_path, stage, config, draw, 2, reward=flat)[1])[-1][1] - count(TEXTS.tokens_nl).mean()) < 0.3
    )
    assert stage.traces() == 1


DR_CPO = DrCpo(steps=STEPS, batch=32, learning_rate=1e-2)


def seen(sign: float) -> Reward:
    """What was observed of the log's texts: the true reward with noise, and a constant that is nobody's."""
    noise_n = 0.5 * np.random.default_rng(3).normal(size=ROWS)
    return Reward((sign * count(TEXTS.tokens_nl) + noise_n + 5)[None], "residual")


def test_dr_cpo_learns_from_either_side(tmp_path, draw):
    stage = stage_of(tiny().decoder, DR_CPO, FEATURES)
    nothing = Reward(np.zeros((4, ROWS), np.float32), "model")
    cases = {
        "both": {"residual": seen(1.0)},
        "the other way": {"residual": seen(-1.0), "sign": -1.0},
        # The outcome model knows nothing: logged outcomes alone.
        "logged": {"residual": seen(1.0), "reward": nothing, "anywhere": FLAT},
        # Nothing was observed beyond what the model says: fresh texts alone.
        "fresh": {"residual": Reward(reward_of(TEXTS.tokens_nl, 1.0).draws_sn + 5, "residual")},
    }
    for seed, (name, case) in enumerate(cases.items()):
        _, rows = train(tmp_path, stage, DR_CPO, draw, seed, **case)
        (_, before), *_, (_, after) = curve(rows)
        assert case.get("sign", 1.0) * (after - before) > 0.3, name
        assert {"value", "effective"} <= set(rows[-2])
    assert stage.traces() == 1


def test_rejection_by_a_reward_that_knows_nothing_leaves_the_policy_where_it_is(tmp_path, draw):
    stage = stage_of(tiny().decoder, REJECTION, FEATURES)
    kl = curve(train(tmp_path, stage, REJECTION, draw, anywhere=FLAT)[1])[-1][0]
    assert kl < 0.08, "short texts do not gain on long ones"


def test_dr_cpo_lays_logged_and_fresh_texts_side_by_side():
    of, reward = tiny(), reward_anywhere(1.0)
    frozen = frozen_reward(reward) | {"reference": of.reference, "unit": jnp.float32(2.0)}
    behind_bl, numbers_b = TEXTS.tokens_nl[:3, 1:], np.arange(3, dtype=np.float32)
    batch = LoggedTexts(behind_bl, numbers_b, -numbers_b, np.full((3, 1), BEGIN, np.int32))
    fill = jax.jit(with_fresh(of.decoder, featuriser(of.decoder, FEATURES)))
    found = fill(None, frozen, batch, reward.coefficients_sd, jax.random.key(0))
    np.testing.assert_array_equal(found.logged_b, [1, 0, 1, 0, 1, 0])
    np.testing.assert_array_equal(found.tokens_bl[::2], behind_bl)
    np.testing.assert_array_equal([found.behaviour_b[::2], found.gain_b[::2]], [numbers_b, -numbers_b])
    whole_nl = np.insert(np.asarray(found.tokens_bl[1::2]), 0, BEGIN, axis=1)
    features_nd = decoder_features(of.decoder, of.reference, whole_nl, FEATURES)
    np.testing.assert_allclose(found.gain_b[1::2], reward.draws(features_nd).mean(0) / 2, atol=1e-4)
    logprob_n = text_logprobs(of.decoder, of.reference, whole_nl)
    np.testing.assert_allclose(found.behaviour_b[1::2], logprob_n, atol=1e-3)
    # In microbatches: each has texts of both sides.
    four = LoggedTexts(TEXTS.tokens_nl[:4, 1:], *np.zeros((2, 4), np.float32), np.full((4, 1), BEGIN, np.int32))
    fill = with_fresh(of.decoder, featuriser(of.decoder, FEATURES), accumulate=2)
    found = split(jax.jit(fill)(None, frozen, four, reward.coefficients_sd, jax.random.key(0)), 2)
    np.testing.assert_array_equal(found.logged_b, [[1, 0, 1, 0]] * 2)
    np.testing.assert_array_equal(found.tokens_bl[:, ::2], TEXTS.tokens_nl[[[0, 2], [1, 3]], 1:])


def test_what_is_missing_is_refused_by_name(tmp_path):
    of, reward = tiny(), reward_of(TEXTS.tokens_nl, 1.0)
    with pytest.raises(ValueError, match="rejection.n: expected at least 2 samples to choose from, got 1"):
        rejection_stage(of.decoder, Rejection(n=1), FEATURES)
    asked = Texts(TEXTS.tokens_nl[:, 1:], TEXTS.within_n, TEXTS.tokens_nl[:, :1])
    anywhere, beyond = reward_anywhere(1.0), TEXTS._replace(tokens_nl=TEXTS.tokens_nl + 90)
    cases = [
        (Rejection(), None, None, TEXTS, RISKED, "anywhere: expected a reward of any text for rejection"),
        (Rejection(), anywhere, None, TEXTS, Align(), "reward.verdict: expected a verdict"),
        (DrCpo(), None, seen(1.0), TEXTS, RISKED, "anywhere: expected a reward of any text for dr_cpo"),
        (DrCpo(), anywhere, None, TEXTS, RISKED, "residual: expected a reward of the log's outcomes for dr_cpo"),
        (DrCpo(), anywhere, reward, TEXTS, RISKED, "residual: expected the outcome .* got a reward of form 'model'"),
        (DrCpo(), anywhere, seen(1.0), asked, RISKED, "prompt: expected whole texts of an own decoder for dr_cpo"),
        (DrCpo(), anywhere, seen(1.0), TEXTS, Align(), "reward.verdict: expected a verdict"),
        (Rwr(), None, None, beyond, RISKED, "tokens: expected ids below the decoder's vocabulary of 10"),
        (Rwr(), None, None, TEXTS, Align(), "reward.verdict: expected a verdict"),
    ]  # fmt: skip
    for config, anywhere, residual, texts, align, message in cases:
        stage = stage_of(of.decoder, config, FEATURES)
        with pytest.raises(ValueError, match=message):
            align_policy(of.decoder, stage, of.reference, texts, reward, anywhere, config, align, 0,
                         Record(tmp_path, "none", 10), (), residual)  # fmt: skip
        assert stage.traces() == 0 and not list(tmp_path.iterdir())


def test_a_newsroom_run_reaches_them(tmp_path, monkeypatch):
    monkeypatch.setattr(rundir, "pages", lambda: None)
    smoke = PRESETS["smoke"]()
    with pytest.raises(ValueError, match="align.recipe: expected dpo, kto, dro or grpo for the joint step, got 'rwr'"):
        joint_stage(tiny().decoder, None, Rwr(), smoke.joint)
    for recipe, config in (("rejection", smoke.rejection), ("rwr", smoke.rwr), ("dr_cpo", smoke.dr_cpo)):
        assert config_of(dataclasses.replace(smoke, align=Align(recipe=recipe))) is config
    align = dataclasses.replace(smoke.align, recipe="dr_cpo")
    config = dataclasses.replace(smoke, methods=("deconfounded",), align=align, dr_cpo=DrCpo(steps=5, batch=8))
    newsroom_study.run(config, tmp_path)
    rows = [row for row in read_metrics(tmp_path, "seed0-deconfounded") if row.get("eval")]
    assert [row["step"] for row in rows] == [0, 5] and all(np.isfinite(row["true_share"]) for row in rows)
    assert json.loads((tmp_path / "compilations.json").read_text())["dr_cpo"] == 1
