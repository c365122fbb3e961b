"""Groups that move with the text: what partial pooling leaks, and what takes it out.

    python -m experiments.leaking_groups [--record]

A group's effect b on the outcome is b ~ N(0, 1), and its texts' feature is x = b / 2 + noise: the group confounds,
the text itself does nothing. Reads one text effect off three designs: pooled intercepts that are declared independent
of the text (`intercept`), pooled ones beside the group's mean of the features (`category`; Mundlak 1978), and fixed
effects (`category(absorbed)`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from deconfound_jax.causal.fit import fit
from deconfound_jax.causal.reward import model_form
from deconfound_jax.config import Causal
from deconfound_jax.structs import Design, Logs, Roles
from experiments import rundir
from experiments.cli import parse_study, publish, tables_and_bars

DESIGNS = {"naive": "", "pooled": "intercept(g)", "category": "category(g)", "absorbed": "category(g, absorbed)"}
CORRECTED = ("category", "absorbed")
TRUTH, LEVEL = 0.0, 0.9  # the text's effect; of the intervals
COVERAGE_BAR, BIAS_BAR = 0.75, 0.05  # 15 of 20 logs: fewer has a chance of 1% where 90% is true


@dataclasses.dataclass(frozen=True)
class LeakingGroups:
    """How many groups of how many rows."""

    name: str = "leaking_groups"  # of the record
    workdir: str = "runs/leaking_groups"
    sizes: tuple[tuple[int, int], ...] = ((600, 4), (120, 20), (2000, 2))  # (groups, rows of a group); bars: the first
    draws: int = 512  # of a posterior
    seeds: tuple[int, ...] = tuple(range(20))


def run(config: LeakingGroups, workdir) -> dict[str, Any]:
    """Fits every design to every log; writes and returns flat results.

    Returns:
      `<groups>x<rows>.<design>.{bias,coverage90,sd,converged}`: mean error of the posterior mean in units of y per
      unit of x, share of intervals that hold 0, mean posterior sd; sentences under `failed`.
    """
    results: dict[str, Any] = {}
    for groups, rows in config.sizes:
        for name, terms in DESIGNS.items():
            design, effects = Design.parse(terms), []
            for seed in config.seeds:
                logs, features_n1 = simulate(groups, rows, seed)
                posterior = fit(logs, features_n1, Causal(draws=config.draws, seed=seed), design)
                unit_sn = model_form(posterior, np.array([[0.0], [1.0]])).draws_sn
                effects.append((unit_sn[:, 1] - unit_sn[:, 0], posterior.converged))
            results |= {f"{groups}x{rows}.{name}.{key}": value for key, value in summary(effects).items()}
    results["failed"] = failures(results, config)
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    rundir.write_results(workdir, results)
    return results


def simulate(groups: int, rows: int, seed: int) -> tuple[Logs, np.ndarray]:
    """y = b + noise, x = b / 2 + noise: the text has no effect."""
    rng = np.random.default_rng(seed)
    code_n = np.repeat(np.arange(groups), rows)
    effect_n = rng.normal(size=groups)[code_n]
    features_n1 = (0.5 * effect_n + rng.normal(size=len(code_n)))[:, None]
    outcome_n = effect_n + rng.normal(size=len(code_n))
    columns = {"outcome": outcome_n, "g": np.asarray([f"g{code}" for code in code_n], object)}
    return Logs.of({"text": np.asarray([f"t{i}" for i in range(len(code_n))], object)} | columns, Roles()), features_n1


def summary(effects: Sequence[tuple[np.ndarray, bool]]) -> dict[str, float]:
    """Bias, coverage and width over logs, from each one's draws (s,) of the effect and whether its fit converged."""
    tail = (1 - LEVEL) / 2
    ends = [np.quantile(draws_s, [tail, 1 - tail]) for draws_s, _ in effects]
    return {
        "bias": float(np.mean([draws_s.mean() - TRUTH for draws_s, _ in effects])),
        "coverage90": float(np.mean([low <= TRUTH <= high for low, high in ends])),
        "sd": float(np.mean([draws_s.std() for draws_s, _ in effects])),
        "converged": float(np.mean([converged for _, converged in effects])),
    }


def failures(results: Mapping[str, Any], config: LeakingGroups) -> list[str]:
    """Every bar that does not hold, as a sentence."""
    size, failed = "x".join(map(str, config.sizes[0])), []
    for name in CORRECTED:
        if (share := results[f"{size}.{name}.coverage90"]) < COVERAGE_BAR:
            failed.append(f"{size}.{name}: intervals hold the truth in {share:.2f} of logs, expected {COVERAGE_BAR}")
        if abs(bias := results[f"{size}.{name}.bias"]) > BIAS_BAR:
            failed.append(f"{size}.{name}: bias {bias:+.3f}, expected at most {BIAS_BAR}")
    return failed


def tables(results: Mapping[str, Any], config: LeakingGroups) -> list[list[dict[str, Any]]]:
    """A row a size and design."""
    rows = []
    for groups, size in config.sizes:
        for name, terms in DESIGNS.items():
            key = f"{groups}x{size}.{name}"
            rows.append({
                "groups": groups, "rows each": size, "design": terms or "none", "bias": results[f"{key}.bias"],
                "posterior sd": results[f"{key}.sd"], "90% intervals cover": results[f"{key}.coverage90"],
                "converged": results[f"{key}.converged"],
            })  # fmt: skip
    return [rows]


def main(argv: Sequence[str] | None = None) -> None:
    config, record = parse_study(argv, LeakingGroups, __doc__)
    results = run(config, config.workdir)
    publish(config, "leaking_groups", tables_and_bars(tables(results, config), results["failed"]), record)


if __name__ == "__main__":
    main()
