"""Calibration in small: three cells whose intervals cover, and a wrong likelihood whose intervals do not."""

from __future__ import annotations

import numpy as np
import pytest

from deconfound_jax.causal.batched import fit_batched
from deconfound_jax.causal.nested import fit_nested
from deconfound_jax.causal.spec import Rows
from experiments import calibration, calibration_cells
from experiments.calibration_cells import Ranks

TRUTHS, ROWS, DRAWS = 20, 150, 63
LEAST = 0.65  # 13 of 20: fewer has a chance of 3 in 1,000 where 90% is true


def covers(cell) -> bool:
    ranks = calibration_cells.calibrate(cell, TRUTHS, ROWS, DRAWS, seed=0)
    return min(ranks.coverage("effect"), ranks.coverage("contrast")) >= LEAST


@pytest.mark.parametrize(
    ("family", "design"), [("normal", "iv_weak"), ("bernoulli", "additive"), ("poisson", "additive")]
)
def test_intervals_cover_where_the_model_is_right(family, design):
    assert covers(calibration_cells.cell(family, design))


def test_a_wrong_likelihood_is_caught():
    assert not covers(calibration_cells.wrong_likelihood())


def test_many_fits_at_once_are_the_fits_one_by_one():
    cell = calibration_cells.cell("poisson", "additive")
    _, rows = calibration_cells.simulate(cell, TRUTHS, ROWS, seed=0)
    rows = rows._replace(columns_nq=rows.columns_nq[:, :, : cell.fitted.blocks[-1].stop])
    found, diagnostics = fit_batched(cell.fitted, rows, 255, seed=0)
    assert diagnostics["converged"].mean() > 0.9
    for i in (0, 1):
        one, _ = fit_nested(cell.fitted, Rows(*[field[i] for field in rows]), 255, seed=1)
        for site in ("text", "c", "intercept", "text.scale"):
            batch_s, single_s = found[site][i].reshape(255, -1), one[site].reshape(255, -1)
            # Two independent means of some hundred effective draws each.
            assert (np.abs(batch_s.mean(0) - single_s.mean(0)) < 0.4 * single_s.std(0)).all()
            assert np.allclose(batch_s.std(0), single_s.std(0), rtol=0.35)


def test_coverage_and_ranks_of_known_ranks():
    even = Ranks(np.arange(64), np.zeros(64, int), np.ones(64, bool), 63)
    assert even.coverage("effect") == 1 - 6 / 64 and even.coverage("contrast") == 0.0
    assert even.p_value("effect") == 1.0 and even.p_value("contrast") < 1e-9
    assert even.histogram("effect").tolist() == [4] * calibration_cells.BINS


def test_bars_name_what_does_not_hold():
    good = {"coverage90.a.b.effect": 0.9, "coverage90.mean": 0.9, "rank_p.a.b.effect": 0.2}
    assert not calibration.failures(good)
    bad = good | {"coverage90.a.b.effect": 0.8, "coverage90.mean": 0.92, "rank_p.a.b.effect": 0.001}
    assert len(calibration.failures(bad)) == 3


def test_the_script_runs_small(tmp_path):
    config = calibration.Calibration(
        families=("poisson",),
        designs=("additive",),
        misspecified=False,
        truths=TRUTHS,
        rows=ROWS,
        draws=DRAWS,
        batch=20,
    )
    results = calibration.run(config, tmp_path)
    assert {"coverage90.poisson.additive.effect", "coverage90.poisson.additive.contrast"} <= set(results)
    assert results["coverage90.mean"] == np.mean(
        [results[f"coverage90.poisson.additive.{q}"] for q in ("effect", "contrast")]
    )
    assert (tmp_path / "results.json").exists() and calibration.tables(results)[0][0]["cell"] == "poisson.additive"


def test_every_cell_of_the_default_run_is_there():
    names = [cell.name for cell in calibration.cells(calibration.Calibration())]
    assert len(names) == len(set(names)) == 8 * 3 + 2
