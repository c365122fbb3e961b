"""Does training depend on where it runs? Meshes of eight devices, and two processes, against one device.

    python -m experiments.bench_mesh [--record]

Trains DPO and the joint step from the same parameters on the same batches: on one device, on every mesh
(data x fsdp x tensor) of eight forced CPU devices, and on the same meshes over two processes of four devices each,
which find each other through jax.distributed. Differences of losses are relative, the largest over the steps; the
collectives in the compiled steps are counted and compared with those a mesh is for. About ten minutes of CPU time.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from experiments import rundir
from experiments.cli import parse_study, publish, tables_and_bars
from experiments.mesh_losses import Cases

ONE = "1x1x1"
DEVICES = 8
BARS = {"fp64": 1e-9, "fp32": 1e-4}
# What devices send each other. data: sums of gradients and losses. fsdp: parameters are gathered where they are used,
# gradients summed and cut (a compiler for TPU or GPU writes the two as reduce-scatter). tensor: sums that end a branch.
EXPECTED = {
    "data": {"all-reduce"},
    "fsdp": {"all-reduce", "all-gather", "reduce-scatter"},
    "tensor": {"all-reduce"},
}
NEEDED = {"data": {"all-reduce"}, "fsdp": {"all-gather"}, "tensor": {"all-reduce"}}


@dataclasses.dataclass(frozen=True)
class BenchMesh:
    """Which meshes, for how long."""

    name: str = "mesh"  # of the record
    workdir: str = "runs/bench_mesh"
    meshes: tuple[str, ...] = ("8x1x1", "2x4x1", "2x2x2")  # data x fsdp x tensor
    objectives: tuple[str, ...] = ("dpo", "joint")
    precisions: tuple[str, ...] = ("fp64", "fp32")
    steps: int = 20
    learning_rate: float = 1e-4
    processes: int = 2  # of the second comparison; they share the eight devices
    flags: str = ""  # more XLA flags
    seeds: tuple[int, ...] = (0,)


def run(config: BenchMesh, workdir) -> dict[str, Any]:
    """Trains in processes of their own; writes and returns flat results.

    Returns:
      `mesh.<mesh>.<objective>.<precision>` and `mesh.processes.<mesh>.<objective>.<precision>`: the largest relative
      difference of a loss from one device's; `mesh.max_rel_loss_difference.<precision>`: the largest of them all;
      `mesh.collectives.<mesh>`: kinds and numbers in the compiled DPO and joint steps; sentences under `failed`.
    """
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    one = train(config, workdir / "one_process", (ONE, *config.meshes), 1)
    several = train(config, workdir / "processes", config.meshes, config.processes)
    results = {f"mesh.{case}": difference(found, one, case) for case, found in one.items() if not case.startswith(ONE)}
    results |= {f"mesh.processes.{case}": difference(found, one, case) for case, found in several.items()}
    for precision in config.precisions:
        ours = [value for name, value in results.items() if name.endswith(precision)]
        results[f"mesh.max_rel_loss_difference.{precision}"] = float(np.max(ours))
    for mesh in config.meshes:
        results[f"mesh.collectives.{mesh}"] = sent(mesh, one)
    found = one | {f"processes.{case}": values for case, values in several.items()}
    results["failed"] = failures(results, config) + unexpected(found)
    rundir.write_results(workdir, results)
    return results


def train(config: BenchMesh, folder: epath.Path, meshes: Sequence[str], processes: int) -> dict[str, dict[str, Any]]:
    """What `mesh_losses` finds, in one process or in several."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = Cases(tuple(meshes), config.objectives, config.precisions, config.steps, config.learning_rate,
                  seed=config.seeds[0])  # fmt: skip
    (folder / "cases.json").write_text(json.dumps(dataclasses.asdict(cases)))
    flags = f"--xla_force_host_platform_device_count={DEVICES // processes} {config.flags}".strip()
    script = ["experiments.mesh_losses", str(folder / "cases.json"), str(folder / "found.json")]
    starter = [str(Path(__file__).with_name("run_tpu.sh")), "--local", str(processes), "--python", sys.executable,
               "--logs", str(folder), "--env", f"XLA_FLAGS={flags}"]  # fmt: skip
    done = subprocess.run([*starter, *script], capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise RuntimeError(f"mesh_losses in {processes} processes: {done.stderr[-3000:]}")
    return json.loads((folder / "found.json").read_text())


def difference(found: Mapping[str, Any], one: Mapping[str, Any], case: str) -> float:
    """The largest |loss - loss on one device| / |loss on one device| over the steps."""
    reference = one[ONE + case.removeprefix(case.split(".")[0])]["losses"]
    return float(np.max([abs(a - b) / abs(b) for a, b in zip(found["losses"], reference, strict=True)]))


def sent(mesh: str, found: Mapping[str, Any]) -> list[str]:
    """Sentences such as "dpo: all-gather 14, all-reduce 6", one an objective."""
    lines = {}
    for case, values in found.items():
        if case.startswith(f"{mesh}."):
            counts = ", ".join(f"{kind} {count}" for kind, count in values["collectives"].items())
            lines.setdefault(case.split(".")[1], counts)
    return [f"{objective}: {counts}" for objective, counts in lines.items()]


def unexpected(found: Mapping[str, Any]) -> list[str]:
    """Collectives that a mesh is not for, and those missing without which it would not be one."""
    failed = []
    for case, values in found.items():
        sizes = zip(
            ("data", "fsdp", "tensor"), map(int, case.removeprefix("processes.").split(".")[0].split("x")), strict=True
        )
        axes, kinds = [name for name, size in sizes if size > 1], set(values["collectives"])
        allowed = set().union(*(EXPECTED[axis] for axis in axes))
        needed = set().union(*(NEEDED[axis] for axis in axes))
        if kinds - allowed:
            failed.append(f"{case}: {sorted(kinds - allowed)} between devices, expected only {sorted(allowed)}")
        if needed - kinds:
            failed.append(f"{case}: expected {sorted(needed - kinds)} between devices, got {sorted(kinds)}")
    return failed


def failures(results: Mapping[str, Any], config: BenchMesh) -> list[str]:
    """Every bar that does not hold, as a sentence."""
    largest = {p: results[f"mesh.max_rel_loss_difference.{p}"] for p in config.precisions}
    return [
        f"{p}: losses differ by {x:.1e}, expected at most {BARS[p]:.0e}" for p, x in largest.items() if not x <= BARS[p]
    ]


def tables(results: Mapping[str, Any], config: BenchMesh) -> list[list[dict[str, Any]]]:
    """A row a mesh, objective and precision, in one process and in several; and what is sent."""
    rows, kinds = [], []
    for mesh in config.meshes:
        for objective in config.objectives:
            for precision in config.precisions:
                case = f"{mesh}.{objective}.{precision}"
                pair = (results[f"mesh.{case}"], results[f"mesh.processes.{case}"])
                one, several = (f"{value:.1e}" for value in pair)
                rows.append({"data x fsdp x tensor": mesh, "objective": objective, "precision": precision,
                             "one process": one, f"{config.processes} processes": several})  # fmt: skip
        kinds += [
            {"data x fsdp x tensor": mesh, "sent between devices": line} for line in results[f"mesh.collectives.{mesh}"]
        ]
    return [rows, kinds]


def main(argv: Sequence[str] | None = None) -> None:
    config, record = parse_study(argv, BenchMesh, __doc__)
    results = run(config, config.workdir)
    publish(config, "bench_mesh", tables_and_bars(tables(results, config), results["failed"]), record)


if __name__ == "__main__":
    main()
