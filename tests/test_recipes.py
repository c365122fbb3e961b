"""Every recipe moves a policy toward its reward, whole and by adapters, in one trace; its rows are the curve."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import chex
import jax
import numpy as np
import pytest
from tiny_policy import FEATURES, TEXTS, count, log_of, reward_anywhere, reward_of, tiny

from deconfound_jax.align.joint import fill_rollouts
from deconfound_jax.align.policy import variables_of
from deconfound_jax.causal.terms import prepare
from deconfound_jax.config import Align, Dpo, Dro, Grpo, Joint, Kto, Lora, Top
from deconfound_jax.recipes.best_of_n import best_of_curve, choose
from deconfound_jax.recipes.choice import align_policy, stage_of
from deconfound_jax.recipes.curve import policy_sampler, policy_watch
from deconfound_jax.recipes.joint import align_jointly, joint_stage
from deconfound_jax.recipes.reference import decoder_features
from deconfound_jax.recipes.stage import Record
from deconfound_jax.recipes.texts import Texts
from deconfound_jax.structs import Design
from deconfound_jax.train.loop import read_metrics

STEPS = 16
PAIRS = Dpo(steps=STEPS, groups=8, group_size=4, strength=1.0, learning_rate=1e-2)
ROUNDS = Grpo(rounds=STEPS, groups=8, group_size=4, kl=0.02, learning_rate=1e-2)
CONFIGS = {
    "top": Top(steps=STEPS, batch=32, learning_rate=1e-2),
    "dpo": PAIRS,
    **{loss: dataclasses.replace(PAIRS, loss=loss) for loss in ("ipo", "simpo", "orpo")},
    "kto": Kto(steps=STEPS, batch=32, learning_rate=1e-2),
    "dro": Dro(steps=STEPS, batch=32, learning_rate=1e-2),
    **{name: dataclasses.replace(ROUNDS, advantage=name) for name in ("grpo", "dr_grpo", "rloo")},
}
RUNS = ((0, 1.0), (1, -1.0))  # (seed, sign of the reward): the second wants what the first avoids


@pytest.fixture(scope="module")
def draw():
    return policy_sampler(tiny().decoder, 256)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, draw):
    """name -> (stage, policy, folder) of a recipe's first run, one step a dispatch, every parameter trained."""

    @functools.cache
    def first(name):
        stage, workdir = stage_of(tiny().decoder, CONFIGS[name], FEATURES), tmp_path_factory.mktemp(name)
        return stage, train(workdir, stage, CONFIGS[name], draw, *RUNS[0])[0], workdir

    return first


def watched(draw, sign, lora=False):
    """The evaluator at the start and at the end: KL, the policy's own reward, the truth."""
    return [(100, policy_watch(
        draw, tiny().reference, jax.random.key(7), proxy=lambda tokens_nl: sign * count(tokens_nl),
        truth=lambda tokens_nl: {"true_reward": count(tokens_nl).mean()}, lora=lora,
    ))]  # fmt: skip


def train(workdir, stage, config, draw, seed, sign, texts=TEXTS, lora=0):
    """One policy -> what was trained of it, and the rows of its curve."""
    of, align = tiny(), Align(accept_risk=True, lora=Lora(rank=lora))
    record = Record(workdir, f"seed{seed}", 1000)
    found = align_policy(of.decoder, stage, of.reference, texts, reward_of(TEXTS.tokens_nl, sign),
                         reward_anywhere(sign), config, align, seed, record, watched(draw, sign, lora > 0))  # fmt: skip
    return found, curve_of(workdir, seed)


def curve_of(workdir, seed):
    return [row for row in read_metrics(workdir, f"seed{seed}") if row.get("eval")]


def gained(curve, sign):
    """How far the true reward moved where the reward points."""
    return sign * (curve[-1]["true_reward"] - curve[0]["true_reward"])


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("dr_grpo", "rloo")])
def test_a_recipe_follows_its_reward_in_one_trace(whole, draw, name):
    stage, first, workdir = whole(name)
    second, _ = train(workdir, stage, CONFIGS[name], draw, *RUNS[1])
    for policy, (seed, sign) in zip((first, second), RUNS, strict=True):
        curve = curve_of(workdir, seed)
        assert [row["step"] for row in curve] == [0, STEPS]
        assert curve[0]["kl"] == pytest.approx(0, abs=1e-5) and curve[-1]["kl"] > 0.1
        assert gained(curve, sign) > 0.3
        for row in curve:
            assert row["proxy"] == pytest.approx(sign * row["true_reward"])
        tokens_nl, own_n, reference_n = draw(policy, tiny().reference, jax.random.key(7))
        assert curve[-1]["kl"] == pytest.approx(float(np.mean(own_n - reference_n)), rel=1e-5)
        assert curve[-1]["true_reward"] == count(tokens_nl).mean()
    assert stage.traces() == 1, "a seed and a reward are no reasons to compile"


def test_the_unit_of_a_reward_is_its_spread_over_the_log(tmp_path, whole, draw):
    stage, first, _ = whole("grpo")
    of, judged, anywhere = tiny(), reward_of(TEXTS.tokens_nl, RUNS[0][1]), reward_anywhere(RUNS[0][1])
    judged = dataclasses.replace(judged, draws_sn=8 * judged.draws_sn)  # clicks of eight times as many readers
    anywhere = anywhere._replace(coefficients_sd=8 * anywhere.coefficients_sd)
    found = align_policy(of.decoder, stage, of.reference, TEXTS, judged, anywhere, CONFIGS["grpo"],
                         Align(accept_risk=True), RUNS[0][0], Record(tmp_path, "x", 1000))  # fmt: skip
    chex.assert_trees_all_close(found, first, rtol=1e-4, atol=1e-5)
    # In the joint graph there is no log to take the spread over: its features' covariance stands for it.
    features_nd = np.asarray(decoder_features(of.decoder, of.reference, TEXTS.tokens_nl, FEATURES), np.float64)
    standard_nd = (features_nd - features_nd.mean(0)) / features_nd.std(0)
    frozen = {"covariance": np.cov(standard_nd, rowvar=False, ddof=0).astype(np.float32)}
    fill = fill_rollouts(lambda params, frozen, batch, coefficients_sd, key: coefficients_sd)
    draws_sd = np.random.default_rng(0).normal(size=(6, standard_nd.shape[1])).astype(np.float32)
    in_sd = np.asarray(fill((), frozen, None, draws_sd, None))
    assert (standard_nd @ in_sd.mean(0)).std() == pytest.approx(1, rel=1e-3)
    np.testing.assert_allclose(in_sd / in_sd[0, 0], draws_sd / draws_sd[0, 0], rtol=1e-4)


@pytest.mark.parametrize("name", ["top", "dpo", "kto", "dro", "rloo"])
def test_adapters_alone_are_trained_behind_a_prompt(tmp_path, draw, name):
    of, (seed, sign) = tiny(), RUNS[1]
    before = [leaf.tobytes() for leaf in map(np.asarray, jax.tree.leaves(of.reference))]
    stage = stage_of(of.decoder, CONFIGS[name], FEATURES)
    behind = Texts(TEXTS.tokens_nl[:, 1:], TEXTS.within_n, TEXTS.tokens_nl[:, :1])
    policy, curve = train(tmp_path, stage, CONFIGS[name], draw, seed, sign, behind, lora=4)
    assert set(policy) == {"lora"} and stage.traces() == 1
    assert gained(curve, sign) > 0.1 and 0.01 < curve[-1]["kl"] < 1
    whole = variables_of(policy, {"base": of.reference})
    assert curve[-1]["true_reward"] == count(draw(whole, of.reference, jax.random.key(7))[0]).mean()
    assert before == [leaf.tobytes() for leaf in map(np.asarray, jax.tree.leaves(of.reference))]


@pytest.mark.parametrize("name", ["dro", "grpo"])
def test_two_steps_a_dispatch_are_the_same_steps(tmp_path, whole, draw, name):
    _, single, workdir = whole(name)
    stage = stage_of(tiny().decoder, CONFIGS[name], FEATURES, dispatch=2)
    double, _ = train(tmp_path, stage, CONFIGS[name], draw, *RUNS[0])
    assert stage.traces() == 1
    rows = [[row | {"clock": 0} for row in read_metrics(place, "seed0")] for place in (workdir, tmp_path)]
    assert len(rows[0]) == len(rows[1]) == STEPS + 2
    if name == "dro":
        assert rows[0] == rows[1]
        chex.assert_trees_all_equal(single, double)
        return
    for one, two in zip(*rows, strict=True):
        # A scan's body is fused otherwise: a round's sums differ in their last bits, the texts it draws do not.
        assert one == {k: pytest.approx(v, rel=1e-4, abs=1e-6) if isinstance(v, float) else v for k, v in two.items()}


def test_the_step_size_falls_over_all_updates_of_all_rounds():
    of, config = tiny(), dataclasses.replace(ROUNDS, rounds=10, updates=4)
    prepared = prepare(log_of(TEXTS.tokens_nl, 1.0), np.eye(len(TEXTS.tokens_nl), 2), Design.parse("category(week)"))
    joint = joint_stage(of.decoder, prepared.spec, config, Joint(rows=32, warm_rows=64), FEATURES)
    for stage in (stage_of(of.decoder, config, FEATURES), joint):
        params, moved = {"w": np.ones((), np.float32)}, []
        state = stage.optimizer.init(params)
        for _ in range(40):
            change, state = stage.optimizer.update({"w": np.ones((), np.float32)}, state, params)
            moved.append(abs(float(change["w"])))
        assert np.argmax(moved) in (3, 4) and 0.3 < moved[20] / max(moved) < 0.8 and moved[-1] > 0


@pytest.mark.parametrize("name", ["kto", "dro", "dr_grpo"])
def test_a_joint_recipe_follows_the_outcomes_of_its_log(tmp_path, draw, name):
    of, config, joint = tiny(), CONFIGS[name], Joint(rows=32, warm_rows=64, draws=8)
    features_nd = decoder_features(of.decoder, of.reference, TEXTS.tokens_nl, FEATURES)
    stage = None
    for seed, sign in RUNS:
        prepared = prepare(log_of(TEXTS.tokens_nl, sign), features_nd, Design.parse("category(week)"))
        stage = stage or joint_stage(of.decoder, prepared.spec, config, joint, FEATURES)
        align_jointly(of.decoder, stage, of.reference, TEXTS, prepared, config, Align(), joint, seed,
                      Record(tmp_path, f"seed{seed}", 1000), watched(draw, sign))  # fmt: skip
        curve = curve_of(tmp_path, seed)
        assert [row["step"] for row in curve] == [0, STEPS + 1], "the second batch of rows ends the warm-up"
        assert gained(curve, sign) > 0.3
    assert stage.traces() == 1


def test_best_of_n_is_the_mean_over_all_subsets():
    score_m = np.array([0.4, -1.0, 2.0, 0.4, 1.5, -0.3, 0.4])
    truth_m = np.array([1.0, 5.0, -2.0, 1.0, 0.5, 3.0, 1.0])  # equal where scores are: which one is taken is no matter
    for point in best_of_curve(score_m, (1, 2, 3, 6, 7), truth_m):
        subsets = [list(subset) for subset in itertools.combinations(range(7), point.n)]
        best = [max(subset, key=lambda i: score_m[i]) for subset in subsets]
        assert point.proxy == pytest.approx(score_m[best].mean())
        assert point.truth == pytest.approx(truth_m[best].mean())
        # KL of the best of n of a continuous score: the integral of log(n u^(n-1)) n u^(n-1) over [0, 1].
        u = (np.arange(100_000) + 0.5) / 100_000
        density = point.n * u ** (point.n - 1)
        assert point.kl == pytest.approx(float((density * np.log(density)).mean()), abs=1e-4)
    assert best_of_curve(score_m, (2,))[0].truth is None
    with pytest.raises(ValueError, match=r"best_of: expected 1 to 7 \(the number of values\), got 8"):
        best_of_curve(score_m, (8,))
    np.testing.assert_array_equal(choose(score_m[:6].reshape(2, 3)), [2, 1])
