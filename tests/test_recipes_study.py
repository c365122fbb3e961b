"""The study of recipes at toy size: every recipe under every reward and jointly, its tables and bars, its resume."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

from deconfound_jax.config import Adam, BestOfN, Grpo, Odin
from deconfound_jax.train.loop import read_metrics
from experiments import recipes_study as study
from experiments.presets import PRESETS


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    # The smoke preset's shapes: what `test_experiments` compiles serves here, too.
    run = dataclasses.replace(
        PRESETS["smoke"](),
        grpo=Grpo(rounds=4, groups=4, group_size=4, learning_rate=3e-3),
        best_of_n=BestOfN(sizes=(1, 4, 64)),
    )
    config = study.Recipes(
        seeds=(0,),
        recipes=("dpo", "grpo", "best_of_n"),
        odin=tuple(Odin(restarts=1, adam=Adam(steps=20, learning_rate=rate)) for rate in (0.01, 0.1)),
        joint=("dpo",),
        run=dataclasses.replace(run, align=dataclasses.replace(run.align, evaluate_every=2)),
    )
    workdir = tmp_path_factory.mktemp("recipes")
    return config, workdir, study.run(config, workdir)


def test_every_recipe_and_reward_is_judged_at_one_kl(ran):
    config, workdir, results = ran
    for recipe in config.recipes:
        names = [*config.rewards, *(["joint"] if recipe in config.joint else [])]
        key = f"newsroom.{recipe}"
        reached = [results[f"{key}.{name}.final_kl.seeds"][0] for name in names]
        if recipe != "best_of_n":
            assert len(set(reached)) == len(names), "each reward makes its own policy"
            for name, kl in zip(names, reached, strict=True):
                rows = [row for row in read_metrics(workdir, f"seed0-{recipe}-{name}") if row.get("eval")]
                assert rows[0]["kl"] == pytest.approx(0, abs=1e-5) and rows[-1]["kl"] == kl
                assert rows[-1]["true_share"] == results[f"{key}.{name}.final_true_share.seeds"][0]
        # `align.kl`, or the best of a curve's points where a policy came less far.
        assert 0 < results[f"{key}.kl"] <= config.run.align.kl
        assert all(np.isfinite(results[f"{key}.{name}.true_share"]) for name in names)
    assert {k: v for k, v in results.items() if k.endswith(".compilations")} == {
        f"newsroom.{name}.compilations": 1 for name in ("dpo", "grpo", "joint_dpo")
    }
    assert json.loads((workdir / "results.json").read_text()) == results


def test_tables_and_bars_say_what_the_results_do(ran):
    config, _, results = ran
    overall, by_seed = study.tables(config, results)
    assert [row["recipe"] for row in overall] == list(config.recipes)
    assert [row["joint"] is None for row in overall] == [False, True, True]
    assert by_seed[1]["naive"] == results["newsroom.grpo.naive.true_share.seeds"][0]
    shares = {"naive": 0.4, "covariate": 0.5, "odin": 0.7, "deconfounded": 0.6}
    holds = {f"newsroom.{recipe}.{m}.true_share": share for recipe in config.recipes for m, share in shares.items()}
    holds |= {"newsroom.dpo.joint_minus_two_stage": -0.029}
    assert study.bars(config, holds) == []
    broken = holds | {"newsroom.dpo.covariate.true_share": 0.6, "newsroom.dpo.joint_minus_two_stage": -0.031}
    assert study.bars(config, broken) == [
        "newsroom.dpo: deconfounded 0.600 is not above covariate 0.600",
        "newsroom.dpo: joint minus two stages -0.031, bar 0.03",
    ]


def test_seeds_are_compared_at_the_kl_that_all_their_rewards_reached():
    run = dataclasses.replace(PRESETS["smoke"](), align=dataclasses.replace(PRESETS["smoke"]().align, kl=1.0))
    config = study.Recipes(seeds=(0, 1), recipes=("dpo",), rewards=("naive", "deconfounded"), joint=("dpo",))
    curves = {
        ("dpo", "naive", 0): [(0, 0), (0.5, 0.1)],
        ("dpo", "deconfounded", 0): [(0, 0), (1.0, 0.4)],
        ("dpo", "joint", 0): [(0, 0), (2.0, 1.2)],
        ("dpo", "naive", 1): [(0, 0), (2.0, 1.0)],
        ("dpo", "deconfounded", 1): [(0, 0), (4.0, 1.2)],
        ("dpo", "joint", 1): [(0, 0), (2.0, 0.6)],
    }
    weak = {("dpo", "odin", 0): [(0, 0), (0.25, 0.02)], ("dpo", "odin", 1): [(0, 0), (2.0, 0.2)]}
    with_odin = dataclasses.replace(config, rewards=("naive", "odin", "deconfounded"))
    found = study.summarise(with_odin, run, curves | weak)  # a rival that stays behind does not bound the others
    assert found["newsroom.dpo.odin.kl.seeds"] == [0.25, 1.0] and found["newsroom.dpo.kl.seeds"] == [0.5, 1.0]
    np.testing.assert_allclose(found["newsroom.dpo.odin.true_share.seeds"], [0.02, 0.1])
    found = study.summarise(config, run, curves)
    assert found["newsroom.dpo.kl.seeds"] == [0.5, 1.0]  # what naive reached; then align.kl
    for name, shares in {"naive": [0.1, 0.5], "deconfounded": [0.2, 0.3], "joint": [0.3, 0.3]}.items():
        np.testing.assert_allclose(found[f"newsroom.dpo.{name}.true_share.seeds"], shares)
    assert found["newsroom.dpo.deconfounded.wins_over_naive"] == 1
    assert found["newsroom.dpo.joint_minus_two_stage"] == pytest.approx(0.05)

    held = dataclasses.replace(run, grpo=dataclasses.replace(run.grpo, kl_target=0.8))
    config = dataclasses.replace(config, recipes=("grpo",), joint=())
    found = study.summarise(config, held, {("grpo", *at[1:]): curve for at, curve in curves.items()})
    assert found["newsroom.grpo.deconfounded.true_share.seeds"] == [0.4, 1.2]  # the end: the target holds the KL
    assert found["newsroom.grpo.naive.kl.seeds"] == [0.5, 2.0]


def test_a_study_with_other_knobs_is_refused_by_field(ran):
    config, workdir, _ = ran
    other = dataclasses.replace(config.run, dpo=dataclasses.replace(config.run.dpo, beta=0.9))
    with pytest.raises(ValueError, match=r"dpo\.beta: .* there, 0\.9 asked for"):
        study.run(dataclasses.replace(config, run=other), workdir)


def test_a_resumed_study_ends_as_the_unbroken_one(ran):
    """Its last policy's state, rows and results are lost: it is trained again, and nothing else."""
    config, workdir, results = ran
    lost = "seed0-dpo-joint"
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    shutil.rmtree(workdir / "checkpoints" / lost)
    (workdir / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows if lost not in row))
    (workdir / "results.json").unlink()
    again = study.run(config, workdir)
    counts = {name: again.pop(f"newsroom.{name}.compilations") for name in ("dpo", "grpo", "joint_dpo")}
    assert counts == {"dpo": 0, "grpo": 0, "joint_dpo": 1}
    assert again == {k: v for k, v in results.items() if not k.endswith("compilations")}
    clockless = [[{**json.loads(row), "clock": 0} for row in found if lost in row]
                 for found in (rows, (workdir / "metrics.jsonl").read_text().splitlines())]  # fmt: skip
    assert clockless[0] == clockless[1] and len(clockless[0]) > 4
