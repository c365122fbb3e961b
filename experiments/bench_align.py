"""Alignment in numbers: what the joint graph costs, every recipe under every reward, kills survived, meshes.

    python -m experiments.bench_align [--record]            # an hour on two idle cores
    python -m experiments.bench_align --jobs time newsroom

Four jobs, each with a script of its own that tells more: `experiments.joint_cost`, `recipes_study`, `bench_resume` and
`bench_mesh`. What a job found is kept in the run directory and read again as long as its settings are the same.
Expected: the joint step takes at most 1.05 times the step of two-stage DPO at SmolLM2-135M's shapes; deconfounded above
naive and covariate in every recipe; every kill survived; losses on meshes within 1e-9 (fp64) and 1e-4 (fp32).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from etils import epath

from deconfound_jax.structs import dump_json
from deconfound_jax.train.files import write_whole
from experiments import bench_mesh, bench_resume, recipes_study, rundir
from experiments.bench_jobs import in_child
from experiments.cli import parse_study, preemptible, publish, tables_and_bars

JOINT_OVER_DPO = 1.05  # bar, at SmolLM2's shapes
TIME = {
    "smollm2": {"shapes": "smollm2", "groups": 4, "length": 64, "steps": 10},
    "tiny": {"shapes": "tiny", "groups": 2, "length": 16, "steps": 2, "rows": 64},
}


@dataclasses.dataclass(frozen=True)
class BenchAlign:
    """Which jobs, and the settings of each."""

    name: str = "align"  # of the record
    workdir: str = "runs/bench_align"
    jobs: tuple[Literal["time", "newsroom", "resume", "mesh"], ...] = ("time", "newsroom", "resume", "mesh")
    time: Literal["smollm2", "tiny"] = "smollm2"  # shapes of the decoder
    newsroom: recipes_study.Recipes = recipes_study.Recipes()
    resume: bench_resume.BenchResume = bench_resume.BenchResume()
    mesh: bench_mesh.BenchMesh = bench_mesh.BenchMesh()

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the newsroom's job."""
        return self.newsroom.seeds


def run(config: BenchAlign, workdir, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Runs the jobs and writes results.json; keys `joint_over_dpo.*`, `newsroom.*`, `resume.*`, `mesh.*`.

    Args:
      workdir: each job has a folder in it.
      say: called with a line after each job.
    """
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        "time": lambda: joint_over_dpo(config.time),
        "newsroom": lambda: recipes_study.run(config.newsroom, workdir / "newsroom"),
        "resume": lambda: bench_resume.run(config.resume, workdir / "resume"),
        "mesh": lambda: bench_mesh.run(config.mesh, workdir / "mesh"),
    }
    results: dict[str, Any] = {}
    failed: list[str] = []
    for name in config.jobs:
        found = _kept(workdir / f"{name}.json", getattr(config, name), jobs[name])
        failed += found.pop("failed", [])
        results |= found
        say(f"{name}: done")
    results["failed"] = failed + failures(config, results)
    rundir.write_results(workdir, results)
    return results


def joint_over_dpo(shapes: str) -> dict[str, float]:
    """`joint_cost.cost` in a process of its own: `joint_over_dpo.{time, seconds.dpo, seconds.joint, flops.*}`."""
    found = in_child({"job": "cost"} | TIME[shapes], "experiments.joint_cost")
    return {f"joint_over_dpo.{key}": value for key, value in found.items()}


def failures(config: BenchAlign, results: Mapping[str, Any]) -> list[str]:
    """Bars of the joint step's time and of the newsroom that do not hold, as sentences; other jobs name theirs."""
    failed = []
    if "time" in config.jobs and config.time == "smollm2" and not results["joint_over_dpo.time"] <= JOINT_OVER_DPO:
        failed.append(f"joint_over_dpo.time: {results['joint_over_dpo.time']:.3f}, bar {JOINT_OVER_DPO}")
    if "newsroom" in config.jobs:
        failed += recipes_study.bars(config.newsroom, results)
    return failed


def tables(config: BenchAlign, results: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """The jobs' tables, one behind the other."""
    made: dict[str, Callable[[], list[list[dict[str, Any]]]]] = {
        "time": lambda: [[{
            "joint / DPO, seconds a step": results["joint_over_dpo.time"],
            "joint / DPO, operations": results["joint_over_dpo.flops.joint"] / results["joint_over_dpo.flops.dpo"],
            "DPO s": results["joint_over_dpo.seconds.dpo"], "joint s": results["joint_over_dpo.seconds.joint"],
        }]],
        "newsroom": lambda: recipes_study.tables(config.newsroom, results),
        "resume": lambda: bench_resume.tables(results),
        "mesh": lambda: bench_mesh.tables(results, config.mesh),
    }  # fmt: skip
    return [table for name in config.jobs for table in made[name]()]


def _kept(path: epath.Path, settings: Any, job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the job found under these settings, now or before."""
    asked = json.loads(json.dumps(dataclasses.asdict(settings) if dataclasses.is_dataclass(settings) else settings))
    if path.exists() and (stored := json.loads(path.read_text()))["settings"] == asked:
        return stored["results"]
    found = json.loads(dump_json(job()))
    write_whole(path, dump_json({"settings": asked, "results": found}))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    config, record = parse_study(argv, BenchAlign, __doc__)
    with preemptible():
        results = run(config, config.workdir, lambda line: print(line, flush=True))
    publish(config, "bench_align", tables_and_bars(tables(config, results), results["failed"]), record)


if __name__ == "__main__":
    main()
