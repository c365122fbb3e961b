"""Speed and memory of the exact causal fit, beside the peers' two-stage least squares.

    python -m experiments.bench_causal --size full [--record]      # two cores, about 20 minutes with all peers

Each job runs in a process of its own (`bench_jobs`, `bench_peers`). Peers are found in this interpreter's
environment or in .venv-peers (`make peers`); one that is absent, or that would not fit in memory, is skipped
and said so. Expected on two cores: 1 M x 384 with 10,000 fixed effects and an instrument in 10 s and 2.7 GB.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from etils import epath

from experiments import bench_jobs, bench_peers, rundir
from experiments.cli import markdown, parse_study, publish

PEERS_PYTHON = pathlib.Path(".venv-peers/bin/python")
# The bars, checked at full size.
WIDE_SECONDS, WIDE_GB, PEER_RATIO = 60.0, 4.0, 5.0
GROWTH_GB, CROOKED = 0.25, 0.2  # memory from the smallest to the largest file; time off its straight line
SLOW_BERNOULLI = 20.0  # rows against counts; about 2 where numpyro and jax get along


@dataclasses.dataclass(frozen=True)
class BenchCausal:
    """What is timed, at which size."""

    size: Literal["small", "full"] = "small"
    workdir: str = "runs/bench_causal"
    jobs: tuple[str, ...] = ("wide", "narrow", "peers", "parquet", "svi", "canary")
    isolate: bool = True  # False: in this process, without peak memory (for tests)
    seeds: tuple[int, ...] = (0,)

    @property
    def name(self) -> str:
        """Of the record."""
        return self.size


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Rows and columns of each job."""

    wide: tuple[int, int, int]  # rows, width, levels
    narrow: tuple[int, int]
    parquet: tuple[tuple[int, ...], int, int]  # rows read, width, levels
    svi: tuple[int, int]
    canary: tuple[int, int]  # rows, draws


SIZES = {
    "small": Sizes((4000, 8, 50), (3000, 8), ((2000, 4000, 6000), 8, 20), (1000, 4), (1000, 50)),
    "full": Sizes(
        (1_000_000, 384, 10_000), (1_000_000, 64),
        ((1_000_000, 2_000_000, 5_000_000, 10_000_000), 64, 1000), (50_000, 16), (20_000, 500),
    ),
}  # fmt: skip


def run(config: BenchCausal, workdir, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Runs the jobs and writes results.json; keys `<job>_<rows>_by_<width>.<metric>`.

    Args:
      config: see `BenchCausal`.
      workdir: where results, the memory plot and, while they are read, Parquet files lie.
      say: called with a line after each job.
    """
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"skipped": [], "warnings": []}
    steps = {"wide": _wide, "narrow": _narrow, "peers": _peers, "parquet": _parquet, "svi": _svi, "canary": _canary}
    if unknown := set(config.jobs) - set(steps):
        raise ValueError(f"jobs: expected some of {[*steps]}, got {sorted(unknown)}")
    for name, step in steps.items():
        if name in config.jobs:
            found = step(config, SIZES[config.size], results, workdir)
            results |= found
            say(f"{name}: " + json.dumps({k: v for k, v in found.items() if not isinstance(v, list)}))
    results["failed"] = failures(results)
    rundir.write_results(workdir, results)
    return results


def label(rows: int, width: int) -> str:
    """`1m_by_384`, `4k_by_8`."""
    short = f"{rows // 1_000_000}m" if rows % 1_000_000 == 0 else f"{rows // 1000}k" if rows % 1000 == 0 else str(rows)
    return f"{short}_by_{width}"


def failures(results: dict[str, Any]) -> list[str]:
    """Every bar that does not hold, as a sentence; bars on speed are for the full size."""
    failed = []

    def bar(key: str, holds: Callable[[float], bool], expected: str) -> None:
        if key in results and results[key] is not None and not holds(results[key]):
            failed.append(f"{key}: {results[key]:.3g}, bar {expected}")

    bar("iv_1m_by_384.seconds", lambda v: v < WIDE_SECONDS, f"under {WIDE_SECONDS:g}")
    bar("iv_1m_by_384.peak_gb", lambda v: v < WIDE_GB, f"under {WIDE_GB:g}")
    bar("iv_1m_by_64.ratio_to_fastest_peer", lambda v: v >= PEER_RATIO, f"at least {PEER_RATIO:g}")
    bar("parquet_10m_by_64.growth_gb", lambda v: v < GROWTH_GB, f"under {GROWTH_GB:g}")
    bar("parquet_10m_by_64.off_the_line", lambda v: v < CROOKED, f"under {CROOKED:g}")
    for key, value in results.items():
        if key.endswith(".gamma") and abs(value - bench_jobs.GAMMA) > 4 * results[f"{key}_sd"]:
            failed.append(f"{key}: {value:.4f}, more than four posterior sds from the truth {bench_jobs.GAMMA:g}")
        if key.endswith(".converged") and not value:
            failed.append(f"{key}: expected true")
    return failed


def straightness(rows: Sequence[int], seconds: Sequence[float]) -> tuple[float, float, float]:
    """Fixed seconds, seconds a million rows, and the largest relative distance from that line."""
    millions = np.asarray(rows) / 1e6
    slope, fixed = np.polyfit(millions, seconds, 1, w=1 / np.asarray(seconds))
    line = fixed + slope * millions
    return float(fixed), float(slope), float(np.abs(np.asarray(seconds) / line - 1).max())


def _job(config: BenchCausal, job: str, **arguments) -> dict[str, Any]:
    if config.isolate:
        return bench_jobs.in_child({"job": job, **arguments})
    return bench_jobs.JOBS[job](**arguments) | {"peak_gb": None}


def _wide(config, sizes: Sizes, results, workdir) -> dict[str, Any]:
    rows, width, levels = sizes.wide
    found = _job(config, "wide", rows=rows, width=width, levels=levels, seed=config.seeds[0])
    return {f"iv_{label(rows, width)}.{k}": v for k, v in (found | {"levels": levels}).items()}


def _narrow(config, sizes: Sizes, results, workdir) -> dict[str, Any]:
    rows, width = sizes.narrow
    found = _job(config, "narrow", rows=rows, width=width, seed=config.seeds[0])
    return {f"iv_{label(rows, width)}.{k}": v for k, v in found.items()}


def _peers(config, sizes: Sizes, results, workdir) -> dict[str, Any]:
    """Every peer that is there; ours over the fastest, with and without first calls."""
    rows, width = sizes.narrow
    prefix, found = f"iv_{label(rows, width)}", {}
    env = all_threads()
    for name, peer in bench_peers.PEERS.items():
        python = python_with(peer.package)
        needed = bench_peers.needed_gb(name, rows, width)
        if python is None or needed > bench_peers.available_gb():
            why = "not installed (make peers)" if python is None else f"needs about {needed:.0f} GB of memory"
            results["skipped"].append(f"{name}: {why}")
            continue
        try:
            arguments = {"job": name, "rows": rows, "width": width, "seed": config.seeds[0]}
            measured = bench_jobs.in_child(arguments, "experiments.bench_peers", python, env)
        except RuntimeError as error:
            results["skipped"].append(f"{name}: {str(error).splitlines()[-1]}")
            continue
        found |= {f"{prefix}.{name}.{k}": v for k, v in measured.items() if k not in ("gamma", "gamma_se")}
        found[f"{prefix}.{name}.estimate"], found[f"{prefix}.{name}.se"] = measured["gamma"], measured["gamma_se"]
    times = [found[f"{prefix}.{n}.seconds"] for n in bench_peers.PEERS if f"{prefix}.{n}.seconds" in found]
    if times and f"{prefix}.seconds" in results:
        cold = [t + found[f"{prefix}.{n}.first_call_seconds"] for n in bench_peers.PEERS
                if (t := found.get(f"{prefix}.{n}.seconds"))]  # fmt: skip
        found[f"{prefix}.ratio_to_fastest_peer"] = min(times) / results[f"{prefix}.seconds"]
        ours = results[f"{prefix}.seconds"] + results[f"{prefix}.first_call_seconds"]
        found[f"{prefix}.ratio_with_first_calls"] = min(cold) / ours
    return found


def _parquet(config, sizes: Sizes, results, workdir) -> dict[str, Any]:
    """Files of growing size, read as a stream; memory and time against rows."""
    sizes_read, width, levels = sizes.parquet
    folder = pathlib.Path(workdir) / "parquet"
    part = min(1_000_000, sizes_read[0])
    if shutil.disk_usage(workdir).free < 5 * sizes_read[-1] * width * 4:
        results["skipped"].append("parquet: too little free disk")
        return {}
    folder.mkdir(exist_ok=True)
    found, seconds, peaks = {}, [], []
    try:
        for start in range(0, sizes_read[-1], part):
            _job(config, "write_parquet", rows=part, width=width, levels=levels, seed=config.seeds[0],
                 folder=str(folder), start=start)  # fmt: skip
        for rows in sizes_read:
            files = [str(path) for path in sorted(folder.glob("*.parquet"))[: rows // part]]
            measured = _job(config, "parquet", files=files, width=width, seed=config.seeds[0])
            found |= {f"parquet_{label(rows, width)}.{k}": v for k, v in measured.items()}
            seconds.append(measured["seconds"])
            peaks.append(measured["peak_gb"])
    finally:
        shutil.rmtree(folder)
    last = f"parquet_{label(sizes_read[-1], width)}"
    fixed, slope, off = straightness(sizes_read, seconds)
    found |= {f"{last}.fixed_seconds": fixed, f"{last}.seconds_per_million": slope, f"{last}.off_the_line": off}
    if None not in peaks:
        found[f"{last}.growth_gb"] = peaks[-1] - peaks[0]
    _plot(found, sizes_read, width, workdir)
    return found


def _svi(config, sizes: Sizes, results, workdir) -> dict[str, Any]:
    rows, width = sizes.svi
    return {f"svi_{label(rows, width)}.{k}": v for k, v in
            _job(config, "svi", rows=rows, width=width, seed=config.seeds[0]).items()}  # fmt: skip


def _canary(config, sizes: Sizes, results, workdir) -> dict[str, Any]:
    rows, draws = sizes.canary
    found = _job(config, "canary", rows=rows, draws=draws, seed=config.seeds[0])
    if found["ratio"] > SLOW_BERNOULLI:
        results["warnings"].append(
            f"NUTS on {rows} Bernoulli rows of 8 groups takes {found['ratio']:.0f} times as long as on their counts, "
            f"above {SLOW_BERNOULLI:g}: numpyro#2225; sum equal rows to binomial counts"
        )
    return {f"canary.{k}": v for k, v in found.items()}


def all_threads() -> dict[str, str]:
    """The environment of a peer: this project's own scripts hold BLAS to one thread."""
    return os.environ | {name: str(os.cpu_count()) for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")}


def python_with(package: str) -> str | None:
    if importlib.util.find_spec(package):
        return sys.executable
    return str(PEERS_PYTHON) if PEERS_PYTHON.exists() else None


def _plot(found: dict[str, Any], rows_read: Sequence[int], width: int, workdir) -> None:
    try:
        from deconfound_jax.report.memory_plot import memory_png
    except ImportError:  # no matplotlib, as on an accelerator image
        return
    prefix = {rows: f"parquet_{label(rows, width)}" for rows in rows_read}
    curves = {
        f"{rows / 1e6:g} M rows": (found[f"{p}.memory_seconds"], found[f"{p}.memory_gb"]) for rows, p in prefix.items()
    }
    memory_png(workdir / "memory.png", curves)


def table(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a job and contestant."""
    rows = []
    for key in results:
        if not key.endswith("seconds") or not isinstance(results[key], float):
            continue
        job, metric = key.rsplit(".", 1)
        if metric not in ("seconds", "bernoulli_seconds", "binomial_seconds"):
            continue
        rows.append({
            "job": job if metric == "seconds" else f"{job} {metric.removesuffix('_seconds')}", "seconds": results[key],
            "first call": results.get(f"{job}.first_call_seconds"), "peak GB": results.get(f"{job}.peak_gb"),
            "gamma": results.get(f"{job}.gamma", results.get(f"{job}.estimate")),
            "sd or se": results.get(f"{job}.gamma_sd", results.get(f"{job}.se")),
        })  # fmt: skip
    return rows


def sentences(results: dict[str, Any]) -> str:
    """What was skipped, warned of, and does not hold; the ratios that have a bar."""
    pieces = []
    wanted = ("ratio_to_fastest_peer", "ratio_with_first_calls", "growth_gb", "off_the_line", "seconds_per_million",
              "rows_per_second", "ratio")  # fmt: skip
    numbers = [f"- {k}: {v:.3g}" for k, v in results.items() if k.rsplit(".", 1)[-1] in wanted and v is not None]
    for title, lines in (("Numbers", numbers), *((t.title(), [f"- {v}" for v in results[t]]) for t in
                                                  ("skipped", "warnings", "failed"))):  # fmt: skip
        if lines:
            pieces.append("\n".join([f"{title}:", "", *lines]))
    return "\n\n".join(pieces)


def main(argv: Sequence[str] | None = None) -> None:
    config, record = parse_study(argv, BenchCausal, __doc__)
    results = run(config, config.workdir, lambda line: print(line, flush=True))
    folder = publish(config, "bench_causal", markdown(table(results)) + "\n\n" + sentences(results), record)
    plot = epath.Path(config.workdir) / "memory.png"
    if folder and plot.exists():
        plot.copy(folder / f"{config.name}.png", overwrite=True)


if __name__ == "__main__":
    main()
