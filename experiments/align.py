"""The main job: logs in, confounders' effect out, a policy aligned on what is left, one report.

    python -m experiments.align --preset newsroom --workdir runs/newsroom
    python -m experiments.align --preset upworthy --logs packages.parquet --workdir runs/upworthy

A run directory that holds checkpoints is resumed; with another config it is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax

from deconfound_jax.config import Run
from experiments import logs_study, newsroom_study, rundir
from experiments.cli import markdown, parse_run, progress


def run(config: Run, workdir, preset: Run | None = None, on_step: Callable | None = None) -> dict[str, Any]:
    """Runs the study the config describes and returns what `results.json` holds.

    A log file is a study of real logs; without one the newsroom is simulated.
    """
    study = logs_study if config.logs.path else newsroom_study
    return study.run(config, workdir, preset=preset, on_step=on_step)


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    config, preset, known = parse_run(argv, "Fits the causal layer and aligns a policy on what is left.")
    print(f"devices: {', '.join(map(str, jax.devices()))}; workdir: {known.workdir}")
    with progress() as on_step:
        results = run(config, known.workdir, preset, on_step)
    study = logs_study if config.logs.path else newsroom_study
    print("\n" + (table := "\n\n".join(markdown(rows) for rows in study.tables(config, results))))
    print("\n" + (verdict := study.verdict(config, results)))
    workdir = rundir.epath.Path(known.workdir)
    print(f"report: {workdir / 'report.html'}\nresults: {workdir / 'results.json'}")
    if known.record:
        print(f"recorded: {rundir.record(workdir, 'align', config, table + chr(10) * 2 + verdict)}")


if __name__ == "__main__":
    main()
