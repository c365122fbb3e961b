"""SmolLM2-135M here and in torch: memory and exactness of streamed back-propagation, parity, speed.

    python -m experiments.bench_lm --size full [--record]      # two idle cores, about fifteen minutes

`parity` and `speed` need weights (`python -m experiments.fetch_weights smollm2`) and the peers (`make peers`); what
lacks them is skipped and said so. Both sides run in processes of their own, in turn, on the same weights and the same
rows of ids, in fp32; medians of ten steps; no padding on either side. Expected at full size: at 4,096 tokens and 49,152
ids the temporaries of layer checkpointing are 8 times ours; gradients differ by less than 1e-12 in fp64.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

from etils import epath

from experiments import lm_gradients, lm_memory, lm_speed, rundir
from experiments.bench_causal import all_threads, python_with
from experiments.bench_jobs import in_child
from experiments.cli import parse_study, publish, tables_and_bars
from experiments.fetch_weights import cache_folder

# The bars, checked at full size.
MEMORY_RATIO, SAME, LOGIT = 5.0, 1e-12, 1e-3
SPEED = {
    "dpo.vs_trl_default": 1.2, "dpo.vs_torch": 1.0, "generate.vs_transformers": 1.5,
}  # fmt: skip
BESIDE = ("parity", "speed")  # jobs that run beside the peers


@dataclasses.dataclass(frozen=True)
class BenchLm:
    """What is measured, at which size."""

    size: Literal["small", "full"] = "small"
    workdir: str = "runs/bench_lm"
    jobs: tuple[str, ...] = ("memory", "gradients", "parity", "speed")
    # of the llama family: folder, .gguf file or hub's name; empty: what `fetch_weights smollm2` put into the cache
    weights: str = ""
    seeds: tuple[int, ...] = (0,)

    @property
    def name(self) -> str:
        """Of the record."""
        return self.size


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Arguments of each job's function."""

    memory: dict[str, Any]
    gradients: dict[str, Any]
    rows: dict[str, int]  # of speed: pairs, and tokens of each part
    speed: dict[str, int]
    parity: dict[str, int]


SIZES = {
    "small": Sizes(
        {"shapes": "tiny", "lengths": (512, 1024), "vocabularies": (1024,)},
        {"shapes": "tiny", "rows": 4, "length": 40, "chunk": 16, "block": 300},
        {"pairs": 2, "prompt": 4, "completion": 4},
        {"steps": 2, "samples": 2, "new_tokens": 4},
        {"new_tokens": 4},
    ),
    "full": Sizes(
        {"shapes": "smollm2", "lengths": (512, 1024, 2048, 4096, 8192, 16_384), "vocabularies": (49_152, 262_144)},
        {"shapes": "smollm2", "rows": 4, "length": 200, "chunk": 64, "block": 4096},
        {"pairs": 4, "prompt": 32, "completion": 32},
        {"steps": 10, "samples": 16, "new_tokens": 64},
        {"new_tokens": 24},
    ),
}


def run(config: BenchLm, workdir, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Runs the jobs and writes results.json; keys `<job>.<metric>`.

    Args:
      config: see `BenchLm`.
      workdir: where results lie.
      say: called with a line after each job.
    """
    workdir, sizes = epath.Path(workdir), SIZES[config.size]
    workdir.mkdir(parents=True, exist_ok=True)
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "memory": lambda: lm_memory.memory(**sizes.memory),
        "gradients": lambda: lm_gradients.gradient(**sizes.gradients),
    }
    if unknown := set(config.jobs) - {*steps, *BESIDE}:
        raise ValueError(f"jobs: expected some of {[*steps, *BESIDE]}, got {sorted(unknown)}")
    results: dict[str, Any] = {"skipped": []}
    for name, step in steps.items():
        if name in config.jobs:
            results |= step()
            say(f"{name}: done")
    results |= _beside(config, sizes, workdir, results["skipped"], say)
    results["failed"] = failures(results)
    rundir.write_results(workdir, results)
    return results


def _beside(config: BenchLm, sizes: Sizes, workdir, skipped: list[str], say) -> dict[str, Any]:
    """Parity and speed, where the weights and the peers are."""
    jobs = [job for job in BESIDE if job in config.jobs]
    source, python = config.weights or str(cache_folder() / "smollm2"), python_with("trl")
    if jobs and not config.weights and not os.path.isdir(source):
        skipped += [f"{job}: no weights (python -m experiments.fetch_weights smollm2)" for job in jobs]
        return {}
    found: dict[str, Any] = {}
    if jobs:
        folder, rows = lm_speed.write_inputs(source, workdir, **sizes.rows)
    if "parity" in jobs and python is None:
        skipped.append("parity: no transformers (make peers)")
    elif "parity" in jobs:
        result = in_child({"job": "parity", "folder": folder} | sizes.parity, "experiments.lm_parity", python)
        found |= {f"parity.{key}": value for key, value in result.items()}
        say("parity: done")
    if "speed" in jobs:
        if python is None:
            skipped.append("speed beside the peers: no trl (make peers)")
        found |= lm_speed.compare(folder, rows, peers_python=python, env=all_threads(), **sizes.speed)
    return found


def failures(results: dict[str, Any]) -> list[str]:
    """Every bar that does not hold, as a sentence; the one on memory is for full size."""
    failed, key = [], "memory.checkpoint_over_streamed.T4096.V49152"
    if results.get(key, MEMORY_RATIO) < MEMORY_RATIO:
        failed.append(f"{key}: {results[key]:.3g}, bar at least {MEMORY_RATIO:g}")
    for objective in lm_gradients.OBJECTIVES:
        key = f"gradient.rel_diff.{objective}"
        if not results.get(key, 0.0) <= SAME:
            failed.append(f"{key}: {results[key]:.3g} at {results[f'gradient.worst.{objective}']}, bar {SAME:g}")
    for name, bar in SPEED.items():
        if not results.get(f"speed.{name}", bar) >= bar:
            failed.append(f"speed.{name}: {results[f'speed.{name}']:.3g}, bar at least {bar:g}")
    if not results.get("parity.largest_difference", 0.0) <= LOGIT:
        failed.append(f"parity.largest_difference: {results['parity.largest_difference']:.3g}, bar {LOGIT:g}")
    if results.get("parity.greedy_equal", 0) != results.get("parity.prompts", 0):
        failed.append(f"parity: {results['parity.greedy_equal']} of {results['parity.prompts']} greedy texts are equal")
    return failed


def memory_table(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a vocabulary and length."""
    rows = []
    for key in results:
        if not key.startswith("memory.streamed_mb."):
            continue
        at = key.removeprefix("memory.streamed_mb.")
        length, vocabulary = at.split(".")
        row = {"vocabulary": int(vocabulary[1:]), "tokens": int(length[1:])}
        row |= {
            f"{kind} MB": round(results[f"memory.{kind}_mb.{at}"]) for kind in ("checkpointed", "logits", "streamed")
        }
        rows.append(row | {"checkpointed / streamed": f"{results[f'memory.checkpoint_over_streamed.{at}']:.1f}"})
    return rows


def gradient_table(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row an objective."""
    return [
        {
            "objective": objective, "largest relative difference": f"{results[f'gradient.rel_diff.{objective}']:.1e}",
            "of": results[f"gradient.worst.{objective}"],
        }
        for objective in lm_gradients.OBJECTIVES if f"gradient.rel_diff.{objective}" in results
    ]  # fmt: skip


def speed_tables(results: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Seconds and memory of each job, then the ratios; parity's numbers."""
    names = [key.removeprefix("seconds.") for key in results if key.startswith("seconds.")]
    jobs = [
        {"job": n, "seconds": f"{results[f'seconds.{n}']:.2f}", "peak GB": f"{results[f'peak_gb.{n}']:.2f}"}
        for n in names
    ]
    ratios = [{"peer / ours": k, "ratio": f"{v:.2f}"} for k, v in results.items() if k.startswith("speed.")]
    parity = [{"parity": k.removeprefix("parity."), "": f"{v:.3g}"} for k, v in results.items() if "parity." in k]
    return [jobs, ratios, parity]


def main(argv: Sequence[str] | None = None) -> None:
    config, record = parse_study(argv, BenchLm, __doc__)
    results = run(config, config.workdir, lambda line: print(line, flush=True))
    tables = [memory_table(results), gradient_table(results), *speed_tables(results)]
    skipped = [f"Skipped: {line}" for line in results["skipped"]]
    text = tables_and_bars([table for table in tables if table], results["failed"], skipped)
    publish(config, "bench_lm", text, record)


if __name__ == "__main__":
    main()
