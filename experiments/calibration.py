"""Simulation-based calibration: are the posterior's intervals what they say, for every family and design?

    python -m experiments.calibration [--record]

Truths are drawn from the prior, data from the model, and every data set is fitted as `causal.fit` would (two cores,
idle: about an hour). 90% intervals must cover 83 to 96% of the truths in each cell and 88.5 to 91.5% on the mean over
cells; ranks must be uniform (chi-square, Holm at 5%). Below them what a wrong design does to the same numbers.
Counts under a log link with an endogenous confounder are drawn and fitted with prior sd 0.3 for gamma and c0 and
offset -1: with the default sd of 1 the prior's own data reach counts of 10^17.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from deconfound_jax.causal.verdict import holm
from deconfound_jax.design import FAMILIES
from experiments import rundir
from experiments.calibration_cells import (
    Cell,
    Ranks,
    calibrate,
    cell,
    non_additive,
    with_levels,
    wrong_likelihood,
)
from experiments.cli import parse_study, publish, tables_and_bars

QUANTITIES = ("effect", "contrast")
CELL_BAR, MEAN_BAR, RANK_LEVEL = (0.83, 0.96), (0.885, 0.915), 0.05


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Which cells, how many truths."""

    name: str = "calibration"  # of the record
    workdir: str = "runs/calibration"
    families: tuple[str, ...] = FAMILIES
    designs: tuple[str, ...] = ("additive", "iv_strong", "iv_weak", "selection")
    misspecified: bool = True  # also fit designs that are wrong, beside the bars
    truths: int = 200  # a cell
    rows: int = 300  # of a data set
    draws: int = 255  # of a posterior; one more is a multiple of the histogram's bins
    batch: int = 50  # data sets fitted at once
    seeds: tuple[int, ...] = (0,)


def run(config: Calibration, workdir, on_cell: Callable[[str, Ranks], None] | None = None) -> dict[str, Any]:
    """Runs every cell; writes and returns flat results.

    Args:
      on_cell: sees each cell's name and ranks as they are found.

    Returns:
      `coverage90.<family>.<design>.<effect|contrast>`, `rank_p.*` and `ranks.*` (counts) alike,
      `converged.<family>.<design>`, `coverage90.mean`; sentences under `failed`; cells whose design is wrong under
      `misspecified.*`.
    """
    results: dict[str, Any] = {}
    workdir = epath.Path(workdir)
    (workdir / "cells").mkdir(parents=True, exist_ok=True)
    for chosen in cells(config):
        results |= _of(chosen.name, _ranks(chosen, config, workdir, on_cell))
    results["coverage90.mean"] = float(np.mean([v for k, v in results.items() if k.startswith("coverage90.")]))
    results["failed"] = failures(results)
    for chosen in wrong_cells(config):
        found = _of(chosen.name, _ranks(chosen, config, workdir, on_cell))
        results |= {f"misspecified.{key}": value for key, value in found.items()}
    rundir.write_results(workdir, results)
    return results


def cells(config: Calibration) -> list[Cell]:
    """Every family under every design; selection has a likelihood for two of the families."""
    pairs = [(f, d) for d in config.designs for f in config.families]
    return [cell(f, d) for f, d in pairs if d != "selection" or f in ("normal", "bernoulli")]


def wrong_cells(config: Calibration) -> list[Cell]:
    """Wrong likelihood, wrong form, plain pooling; and the right design for the data of the last."""
    found = [wrong_likelihood(), non_additive(), with_levels(config.rows, True), with_levels(config.rows, False)]
    return found if config.misspecified else []


def failures(results: Mapping[str, Any]) -> list[str]:
    """Every bar that does not hold, as a sentence."""
    failed = []
    for key, value in results.items():
        low, high = MEAN_BAR if key == "coverage90.mean" else CELL_BAR
        if key.startswith("coverage90.") and not low <= value <= high:
            failed.append(f"{key} is {value:.3f}, expected {low} to {high}")
    names = [key for key in results if key.startswith("rank_p.")]
    for name, p in zip(names, holm([results[name] for name in names]), strict=True):
        if p < RANK_LEVEL:
            failed.append(f"{name.removeprefix('rank_p.')}: ranks are not uniform, adjusted p {p:.2g}")
    return failed


def tables(results: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """A row a cell; the wrong designs below."""
    found = []
    for prefix in ("", "misspecified."):
        rows = []
        for key in [k for k in results if k.startswith(f"{prefix}converged.")]:
            name = key.removeprefix(f"{prefix}converged.")
            row = {"cell": name, "converged": results[key]}
            for quantity in QUANTITIES:
                row[f"covers {quantity}"] = results[f"{prefix}coverage90.{name}.{quantity}"]
                row[f"rank p {quantity}"] = results[f"{prefix}rank_p.{name}.{quantity}"]
            rows.append(row)
        found.append(rows)
    return [rows for rows in found if rows]


def _ranks(chosen: Cell, config: Calibration, workdir: epath.Path, on_cell) -> Ranks:
    """A cell's ranks, read where a run of the same size has left them: a killed run goes on, two may share the work."""
    size = {k: v for k, v in dataclasses.asdict(config).items() if k in ("truths", "rows", "draws", "batch", "seeds")}
    size = json.loads(json.dumps(size))
    path = workdir / "cells" / f"{chosen.name}.json"
    if path.exists() and (stored := json.loads(path.read_text()))["size"] == size:
        return Ranks(*[np.asarray(stored[name]) for name in Ranks._fields[:3]], config.draws)
    ranks = _fitted(chosen, config)
    stored = {name: np.asarray(value).tolist() for name, value in zip(Ranks._fields[:3], ranks[:3], strict=True)}
    path.write_text(json.dumps({"size": size} | stored))
    if on_cell:
        on_cell(chosen.name, ranks)
    return ranks


def _fitted(chosen: Cell, config: Calibration) -> Ranks:
    sizes = [min(config.batch, config.truths - done) for done in range(0, config.truths, config.batch)]
    parts = [
        calibrate(chosen, size, config.rows, config.draws, 1000 * seed + i)
        for seed in config.seeds
        for i, size in enumerate(sizes)
    ]
    joined = [np.concatenate(values) for values in zip(*[part[:3] for part in parts], strict=True)]
    return Ranks(*joined, config.draws)


def _of(name: str, ranks: Ranks) -> dict[str, Any]:
    found: dict[str, Any] = {f"converged.{name}": float(np.mean(ranks.converged_b))}
    for quantity in QUANTITIES:
        found[f"coverage90.{name}.{quantity}"] = ranks.coverage(quantity)
        found[f"rank_p.{name}.{quantity}"] = ranks.p_value(quantity)
        found[f"ranks.{name}.{quantity}"] = ranks.histogram(quantity).tolist()
    return found


def main(argv: Sequence[str] | None = None) -> None:
    config, record = parse_study(argv, Calibration, __doc__)

    def show(name: str, ranks: Ranks) -> None:
        covers = ", ".join(f"{q} {ranks.coverage(q):.3f} (p {ranks.p_value(q):.2g})" for q in QUANTITIES)
        print(f"{name}: 90% intervals cover {covers}", flush=True)

    results = run(config, config.workdir, show)
    mean = f"Mean coverage over cells: {results['coverage90.mean']:.3f}."
    publish(config, "calibration", tables_and_bars(tables(results), results["failed"], [mean]), record)


if __name__ == "__main__":
    main()
