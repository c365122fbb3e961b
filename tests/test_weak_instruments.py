"""The studies of weak instruments and of leaking groups, small."""

from __future__ import annotations

import numpy as np
import pytest

from experiments import leaking_groups, weak_instruments


@pytest.fixture(scope="module")
def weak(tmp_path_factory):
    config = weak_instruments.WeakInstruments(
        seeds=(0, 1, 2), strengths=(0.8, 0.03), priors=((2.0, 2.0),), rows=500, draws=127, choices=100
    )
    return config, weak_instruments.run(config, tmp_path_factory.mktemp("weak"))


def test_a_strong_instrument_finds_the_truth_and_a_weak_one_is_refused(weak):
    config, results = weak
    prior = weak_instruments.label(config.priors[0])
    assert results[f"share.0.8.{prior}.mean"] > 0.95 > results["share.0.8.naive"] + 0.05
    assert results["share.0.8.two_stage"] > 0.95 > results["share.0.03.two_stage"]
    assert results[f"refused.0.8.{prior}"] == 0.0 and results[f"refused.0.03.{prior}"] == 1.0
    ours = weak_instruments.tables(results, config)[1]
    assert [row["strength"] for row in ours] == ["0.8", "0.03"]


def test_the_scales_are_those_of_the_population():
    drawn = weak_instruments.simulate(0.1, 200_000, seed=0)
    sampled = drawn.logs.columns["p"].std(), drawn.logs.outcome_n.std()
    assert np.allclose(sampled, weak_instruments.scales(0.1), rtol=0.01)


def test_every_weak_instrument_bar_can_fail(weak):
    config, results = weak
    prior = weak_instruments.label(config.priors[0])
    for key in (f"share.0.8.{prior}.mean", "share.0.8.two_stage", f"refused.0.03.{prior}",
                f"coverage90.0.03.{prior}", f"share.0.03.{prior}.improvement"):  # fmt: skip
        assert any(line.startswith(key) for line in weak_instruments.failures(results | {key: 0.0}, config))


def test_pooling_leaks_and_the_corrections_do_not(tmp_path):
    config = leaking_groups.LeakingGroups(sizes=((100, 4),), draws=128, seeds=(0, 1, 2))
    results = leaking_groups.run(config, tmp_path)
    pooled = results["100x4.pooled.bias"]
    assert results["100x4.naive.bias"] > pooled > 0.08
    for name in leaking_groups.CORRECTED:
        assert abs(results[f"100x4.{name}.bias"]) < 0.06 and results[f"100x4.{name}.coverage90"] > 0.6
    assert leaking_groups.failures(results | {"100x4.category.bias": pooled}, config)
    assert leaking_groups.tables(results, config)[0][1]["design"] == "intercept(g)"
