"""The two studies of what the posterior is worth: hand numbers of their curves, and one run of each at toy size."""

from __future__ import annotations

import dataclasses
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from deconfound_jax.align.scoring import TextReward
from deconfound_jax.config import BestOfN
from experiments import over_optimisation as over
from experiments import posterior_value as value
from experiments.over_optimisation_curves import Curves, OverOptimisation, Pool, curves_of
from experiments.presets import PRESETS

SIZES = (1, 2, 3)
# Two draws of a reward on two features: they agree on the first, and nearly cancel on the second.
REWARD = TextReward(jnp.array([[1.0, 3.0], [1.0, -2.0]]), jnp.zeros(2), jnp.ones(2))
FEATURES_ND = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.5, 8.0], [-1.0, 0.0]], np.float32)
TRUE_N = np.array([0.0, 1.0, 2.0, -3.0, -1.0])


def test_best_of_n_by_the_mean_takes_the_unsure_text_and_the_lower_score_does_not():
    found = curves_of(REWARD, Pool(FEATURES_ND, TRUE_N, (TRUE_N < -2).astype(float)), BestOfN(sizes=SIZES))
    # By hand: mean = x1 + .5 x2, and sd = 2.5 |x2|.
    scores = {"mean": np.array([0, 1, 2, 4.5, -1]), "lower": np.array([0, 1, 2, -15.5, -1])}
    subsets = {n: [list(s) for s in itertools.combinations(range(5), n)] for n in SIZES}
    oracle = np.mean([TRUE_N[s].max() for s in subsets[3]]) - TRUE_N.mean()
    for name, score_n in scores.items():
        best = {n: [s[np.argmax(score_n[s])] for s in sets] for n, sets in subsets.items()}
        share = [(TRUE_N[best[n]].mean() - TRUE_N.mean()) / oracle for n in SIZES]
        np.testing.assert_allclose(found[name].share, share, atol=1e-6)
        proxy = [(score_n[best[n]].mean() - score_n.mean()) / oracle for n in SIZES]
        np.testing.assert_allclose(found[name].proxy, proxy, atol=1e-5)
        np.testing.assert_allclose(found[name].off, [(TRUE_N[best[n]] < -2).mean() for n in SIZES], atol=1e-6)
    assert found["mean"].share[-1] < 0 < found["lower"].share[-1]


def test_a_drop_is_a_part_of_the_gain_and_its_error_the_jackknife_s():
    assert over.drop_of(np.array([0.0, 0.8, 0.6])) == pytest.approx(0.25)
    assert over.drop_of(np.array([0.0, 0.5, 0.7])) == 0
    assert over.drop_of(np.array([0.0, -0.2, -0.1])) is None
    value_sn = np.random.default_rng(0).normal(size=(7, 2))
    # Of a mean the jackknife is the standard error.
    expected = value_sn[:, 1].std(ddof=1) / 7**0.5
    assert over.jackknife(value_sn, lambda mean_n: float(mean_n[1])) == pytest.approx(expected)
    assert over.jackknife(value_sn, lambda mean_n: None) is None


def test_bars_name_the_sizes_of_log_where_the_mean_over_optimises():
    run = dataclasses.replace(OverOptimisation().run, best_of_n=BestOfN(sizes=SIZES))
    config = OverOptimisation(seeds=(0, 1), rows=(100, 300), rewards=("deconfounded",), temperatures=(1.0,), run=run)
    shares = {(100, "mean"): [0, 0.5, 0.2], (300, "mean"): [0, 0.5, 0.49], (300, "lower"): [0, 0.5, 0.47]}

    def results(shares):
        curves = {}
        for rows, score in itertools.product(config.rows, ("mean", "lower")):
            share = np.array(shares.get((rows, score), [0.0, 0.3, 0.6]))
            # Two seeds around the wanted mean: a maximum of each seed's own would see larger drops.
            noise = np.array([0.0, 0.3, -0.3])
            curves[1.0, rows, "deconfounded", score] = [Curves(share + sign * noise, share, share) for sign in (1, -1)]
        return over.summarise(config, curves, {(rows, "deconfounded"): ["bounded"] * 2 for rows in config.rows})

    found = results(shares)
    key = "over_optimisation.300.deconfounded"
    assert found[f"{key}.mean.drop"] == pytest.approx(0.02) and found[f"{key}.mean.best_n"] == 2
    assert found[f"{key}.lower_minus_mean"] == pytest.approx(-0.02) and found[f"{key}.lower.wins_over_mean"] == 0
    lines = over.bars(config, found)
    assert [("at 100 (0.600 and 0.000)" in line, "0.060, bar 0.01" in line) for line in lines] == [(1, 0), (0, 1)]
    assert over.bars(config, results({(300, "mean"): [0, 0.5, 0.4]})) == []
    with pytest.raises(ValueError, match=r"rows: expected whole articles of 5 headlines, got \[101\]"):
        over.rewards(dataclasses.replace(config, rows=(101,)), None, 0)


def test_variants_meet_at_the_largest_common_kl():
    curves = {"hard": [(0, 0), (2.0, 0.8)], "soft": [(0, 0), (0.5, 0.3)], "precision": [(0, 0), (0.8, 0.4)]}
    other = curves | {"soft": [(0, 0), (3.0, 0.6)], "precision": [(0, 0), (1.5, 0.9)]}
    sizes = {
        seed: {60: value.Size(found, status, 0.9, 0.5, 0.7)}
        for seed, found, status in ((0, curves, "consistent"), (1, other, "bounded"))
    }
    config = value.PosteriorValue(seeds=(0, 1), articles=(60,))
    found = value.summarise(config, sizes)
    key = "newsroom.posterior_value.60"
    assert found[f"{key}.kl.seeds"] == [0.5, 1.0]  # the second seed's reached 1.5; the bound is align.kl
    np.testing.assert_allclose(found[f"{key}.hard.true_share.seeds"], [0.2, 0.4])
    np.testing.assert_allclose(found[f"{key}.soft.true_share.seeds"], [0.3, 0.2])
    np.testing.assert_allclose(found[f"{key}.precision.true_share.seeds"], [0.25, 0.6])
    assert found[f"{key}.soft.wins_over_hard"] == 1 and found[f"{key}.precision.wins_over_hard"] == 2
    # Gaps of +.1 and -.2: mean -.05, standard error .15.
    assert found[f"{key}.soft.minus_hard"] == pytest.approx(-0.05)
    assert found[f"{key}.soft.minus_hard.error"] == pytest.approx(0.15)
    assert found[f"{key}.soft.final_minus_hard"] == pytest.approx(-0.35)
    assert value.tables(config, found)[0][0]["verdicts consistent"] == "1 of 2"


def test_both_studies_run(tmp_path):
    # The smoke preset's shapes: what `test_experiments` compiles serves here, too.
    smoke = PRESETS["smoke"]()
    found = value.run(value.PosteriorValue(seeds=(0,), articles=(60,), run=smoke), tmp_path / "value")
    shares = [found[f"newsroom.posterior_value.60.{v}.final_kl"] for v in value.VARIANTS]
    assert np.isfinite(shares).all() and len(set(shares)) == 3 and found["newsroom.posterior_value.compilations"] == 1
    assert 0 < found["newsroom.posterior_value.60.certainty"] < 1
    assert 0 < found["newsroom.posterior_value.60.weight"] < 1

    other = dataclasses.replace(smoke, dpo=dataclasses.replace(smoke.dpo, beta=0.9))
    with pytest.raises(ValueError, match=r"dpo\.beta: .* there, 0\.9 asked for"):
        value.run(value.PosteriorValue(seeds=(0,), articles=(60,), run=other), tmp_path / "value")

    run = dataclasses.replace(smoke, methods=("naive", "deconfounded"), best_of_n=BestOfN(sizes=(1, 4, 64)))
    rewards = ("naive", "deconfounded")  # a third would compile another fit
    config = OverOptimisation(seeds=(0,), rows=(300,), rewards=rewards, samples=64, reference_seed=0, run=run)
    found = over.run(config, tmp_path / "over")
    for prefix in ("over_optimisation", "over_optimisation.t1.5"):
        for score in ("mean", "lower"):
            curve = found[f"{prefix}.300.deconfounded.{score}.truth"]
            assert curve[0] == pytest.approx(0, abs=1e-9) and np.isfinite(curve).all()
            assert np.all(np.diff(found[f"{prefix}.300.deconfounded.{score}.proxy"]) > 0)
    assert len(over.tables(config, found)) == 2
    with pytest.raises(ValueError, match="data: fingerprint newsroom 0 there, newsroom 1 asked for"):
        over.run(dataclasses.replace(config, reference_seed=1), tmp_path / "over")
    for folder in ("value", "over"):
        assert json.loads((tmp_path / folder / "results.json").read_text())
        assert (tmp_path / folder / "truth.png").stat().st_size > 10_000
