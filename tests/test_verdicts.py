"""The verdict table at a small size, and the simulated logs that it runs on."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from deconfound_jax.simulate.failures import BETA, World, simulate
from experiments import verdicts
from experiments.cli import markdown


def test_the_script_writes_what_its_table_says(tmp_path):
    config = verdicts.Config(seeds=(0, 1), scenarios=("clean", "few_groups", "hidden_strong"), draws=64, rows=400)
    results = verdicts.run(config, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert results["verdicts.clean.status.seeds"] == ["consistent"] * 2 and results["verdicts.clean.right"] == 2
    assert results["verdicts.few_groups.right"] == 2
    assert all("groups" in failed for failed in results["verdicts.few_groups.failed.seeds"])
    assert results["verdicts.hidden_strong.flip_at_or_below_truth"] == 2
    assert results["verdicts.hidden_strong.says_untestable"] == results["verdicts.hidden_strong.flipped"] == 2
    said, strengths = verdicts.tables(config, results)
    assert [row["scenario"] for row in said] == list(config.scenarios)
    assert [row["scenario"] for row in strengths] == ["hidden_strong"]
    assert "| clean " in markdown(said)


def test_an_unknown_scenario_is_named(tmp_path):
    with pytest.raises(ValueError, match="expected some of .*'clean'.*got \\['dirty'\\]"):
        verdicts.run(verdicts.Config(scenarios=("dirty",)), tmp_path)


def test_every_scenario_breaks_something_or_is_sound():
    for name, scenario in verdicts.SCENARIOS.items():
        assert bool(scenario.check) == (scenario.right != ("consistent",)), name
        assert not (scenario.flips and scenario.check), f"{name}: an untestable violation fails no check"
    assert verdicts.SCENARIOS["clean"].world == World()


def test_the_hidden_cause_reverses_the_ranking_by_the_formula():
    world = World(rows=200_000, weeks=1, hidden_text=0.5, hidden_outcome=1.6)
    made = simulate(world, 0)
    y, c = made.logs.outcome_n, made.logs.columns["c"]
    right = np.concatenate([np.ones((len(y), 1)), made.features_nd, c[:, None]], 1)
    found = np.linalg.lstsq(right, y, rcond=None)[0][1:4]
    bias = -world.hidden_outcome * 0.5 / (1 + 0.5**2)
    assert found == pytest.approx(made.beta_d + bias * BETA / np.linalg.norm(BETA), abs=0.02)
    assert found @ made.beta_d < 0


def test_a_log_of_one_seed_changes_only_by_the_constant_that_changes():
    clean, broken = simulate(World(rows=50), 3), simulate(dataclasses.replace(World(rows=50), exclusion=2.0), 3)
    assert (clean.features_nd == broken.features_nd).all()
    gap = broken.logs.outcome_n - clean.logs.outcome_n
    assert gap == pytest.approx(2.0 * clean.logs.columns["z"])
