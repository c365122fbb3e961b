"""The verdict on logs that break one assumption at a time: is the right thing said?

    python -m experiments.verdicts --workdir runs/verdicts [--seeds 0 1 2 ...] [--record]

Every scenario is a simulated log (`deconfound_jax.simulate.failures`), a design, and the verdict that is right for
it, written down before it is run. The limits are `deconfound_jax.config.verdict.Checks`' defaults throughout.
20 seeds of all scenarios: two to four minutes on two cores.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from deconfound_jax.causal.fit import fit_prepared
from deconfound_jax.causal.nuts import fit_nuts
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.reward import model_form
from deconfound_jax.causal.sensitivity import contrast, exclusion, ranking_contrast, strength_of
from deconfound_jax.causal.spec import Prepared
from deconfound_jax.causal.terms import prepare
from deconfound_jax.causal.verdict import Verdict, verdict
from deconfound_jax.config import Causal
from deconfound_jax.simulate.failures import Failure, World, simulate
from deconfound_jax.structs import Design
from experiments import rundir
from experiments.cli import markdown, parse_study, publish

PLAIN = "linear(c) + category(week)"
ONE = f"endogenous(p ~ z) + {PLAIN}"
TWO = f"endogenous(p ~ z + z2) + {PLAIN}"
NEWSROOM = World(text=1.0, noise=0.5, mood=0.6, instrument=0.8, gamma=3.0, kappa=2.0)


class Scenario(NamedTuple):
    """A broken (or sound) assumption and what is right to say."""

    world: World
    design: str
    right: tuple[str, ...]  # statuses
    check: str = ""  # that must fail; empty: none may lead to another status
    flips: str = ""  # untestable violation whose printed strength is held against the truth
    nuts: bool = False


_SOUND, _REFUSE = ("consistent",), ("not_identified",)
SCENARIOS: dict[str, Scenario] = {
    "clean": Scenario(World(), PLAIN, _SOUND),
    "clean_small": Scenario(World(rows=200, groups=50), PLAIN, _SOUND),
    "strong_iv": Scenario(NEWSROOM, ONE, _SOUND),
    "weak_iv": Scenario(
        dataclasses.replace(NEWSROOM, instrument=0.03), ONE, ("bounded", "not_identified"), "instrument strength"
    ),
    "no_overlap": Scenario(World(treatment_noise=0.02), f"treatment(t) + {PLAIN}", _REFUSE, "overlap"),
    "collinear": Scenario(World(copy_noise=0.05), f"linear(copy) + {PLAIN}", _REFUSE, "rank"),
    "invalid_second": Scenario(
        dataclasses.replace(NEWSROOM, second=0.5, second_exclusion=0.4), TWO, ("bounded",), "overidentification"
    ),
    "placebo_moves": Scenario(World(hidden_text=0.5, hidden_outcome=0.7), PLAIN, ("bounded",), "placebo outcome"),
    "few_groups": Scenario(World(groups=6, group_text=0.5, group_outcome=0.5), PLAIN, ("bounded",), "groups"),
    "not_converged": Scenario(World(), PLAIN, _REFUSE, "convergence", nuts=True),
    "invalid_single": Scenario(dataclasses.replace(NEWSROOM, exclusion=2.5), ONE, _SOUND, flips="exclusion z"),
    **{
        f"hidden_{name}": Scenario(World(hidden_text=a, hidden_outcome=b), PLAIN, _SOUND, flips="unmeasured")
        for name, a, b in (("weak", 0.5, 0.8), ("middle", 0.5, 1.6), ("strong", 1.0, 3.0))
    },
}
SAYS = {"exclusion z": "A1", "unmeasured": "A5"}  # the assumption that an untestable violation breaks


@dataclasses.dataclass(frozen=True)
class Config:
    """What is run."""

    name: str = "verdicts"
    workdir: str = "runs/verdicts"
    seeds: tuple[int, ...] = tuple(range(20))
    scenarios: tuple[str, ...] = tuple(SCENARIOS)
    draws: int = 512
    rows: int = 0  # 0: each scenario's own; the suite takes fewer


def run(config: Config, workdir) -> dict[str, Any]:
    """Runs every scenario and seed; writes results.json and returns it."""
    unknown = set(config.scenarios) - set(SCENARIOS)
    if unknown:
        raise ValueError(f"scenarios: expected some of {list(SCENARIOS)}, got {sorted(unknown)}")
    workdir = rundir.claim(workdir, config, None, "simulated")
    results: dict[str, Any] = {}
    for name in config.scenarios:
        found = [judge(config, SCENARIOS[name], seed) for seed in config.seeds]
        key = f"verdicts.{name}"
        for field in found[0]:
            values = [one[field] for one in found]
            results[f"{key}.{field}.seeds"] = values
            if field not in ("status", "failed"):
                results[f"{key}.{field}"] = int(sum(values)) if field in _COUNTS else float(np.mean(values))
    rundir.write_results(workdir, results)
    return results


_COUNTS = ("right", "warnings", "says_untestable", "flip_at_or_below_truth", "interval_contains_truth", "flipped")


def judge(config: Config, scenario: Scenario, seed: int) -> dict[str, Any]:
    """One log, its fit, its verdict, held against what is right."""
    world = dataclasses.replace(scenario.world, rows=config.rows or scenario.world.rows)
    made = simulate(world, seed)
    posterior, prepared = fit_scenario(config, scenario, made, seed)
    iv = bool(prepared.spec.instruments)
    found = verdict(
        posterior, prepared, groups_n=made.logs.columns["group"],
        placebo_outcome_n=made.placebo_n if not scenario.flips and not iv else None,
        placebo_instrument_n=made.logs.columns["z2"] if scenario.design == ONE else None,
    )  # fmt: skip
    right = found.status in scenario.right and (not scenario.check or scenario.check in found.failed)
    row = {
        "status": found.status, "failed": list(found.failed), "right": right, "warnings": bool(found.warnings),
    }  # fmt: skip
    return row | (_hold_against_truth(scenario, made, posterior, prepared, found) if scenario.flips else {})


def fit_scenario(config: Config, scenario: Scenario, made: Failure, seed: int) -> tuple[Posterior, Prepared]:
    """The scenario's design fitted with default priors; where the scenario says so by NUTS without any warm-up."""
    design = Design.parse(scenario.design)
    prepared = prepare(made.logs, made.features_nd, design)
    posterior = fit_prepared(prepared, design, Causal(draws=config.draws, seed=seed))
    if scenario.nuts:
        draws, diagnostics = fit_nuts(prepared, dict(posterior.draws), config.draws, seed, warmup=0)
        posterior = dataclasses.replace(posterior, draws=draws, diagnostics={"method": "nuts", **diagnostics})
    return posterior, prepared


def _hold_against_truth(scenario: Scenario, made: Failure, posterior, prepared, found: Verdict) -> dict[str, Any]:
    """Printed flip strength against the violation that was made, and the interval at the true strength.

    The contrast is the verdict's: the better half of the texts by the reward against the worse. Where the violation
    reversed it, a right flip strength is at or below the violation.
    """
    difference_d = ranking_contrast(posterior, prepared, made.features_nd)
    true = float(difference_d @ made.beta_d)
    printed = found.flips[scenario.flips]
    seen = contrast(posterior, prepared, difference_d, made.logs.columns["group"])
    if scenario.flips == "unmeasured":
        strengths = strength_of(posterior, prepared, made.hidden_n, difference_d)
        violation = max(strengths)
        low, high = seen.interval(*strengths)
    else:
        (part,) = exclusion(posterior, prepared, difference_d)
        violation = scenario.world.exclusion
        ends = sorted([part.at(-violation), part.at(violation)])
        error = float(np.std(posterior["text"] @ (difference_d / posterior.scaling["features.sd"])))
        margin = 1.96 * error * float(posterior.scaling["outcome.sd"])
        low, high = ends[0] - margin, ends[1] + margin
    said = [u for u in found.untestable if u.startswith(SAYS[scenario.flips]) and "no better" in u]
    truth_correlation = np.corrcoef(model_form(posterior, made.features_nd).mean, made.features_nd @ made.beta_d)[0, 1]
    return {
        "says_untestable": bool(said), "flipped": true < 0, "printed_flip": printed, "violation": violation,
        "flip_at_or_below_truth": printed <= violation, "interval_contains_truth": bool(low <= true <= high),
        "reward_truth_correlation": float(truth_correlation),
    }  # fmt: skip


def tables(config: Config, results: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """What was said, by scenario; then the untestable violations."""
    said, strengths = [], []
    for name in config.scenarios:
        scenario, key, seeds = SCENARIOS[name], f"verdicts.{name}", len(config.seeds)
        statuses = results[f"{key}.status.seeds"]
        counts = {status: statuses.count(status) for status in ("consistent", "bounded", "not_identified")}
        said.append({
            "scenario": name, "right is": " or ".join(scenario.right), "by": scenario.check or "-",
            "right": f"{results[f'{key}.right']} of {seeds}", **counts,
            "with warnings": results[f"{key}.warnings"],
        })  # fmt: skip
        if scenario.flips:
            strengths.append({
                "scenario": name, "violation": results[f"{key}.violation"],
                "printed flip": results[f"{key}.printed_flip"], "ranking flipped": results[f"{key}.flipped"],
                "flip at or below": f"{results[f'{key}.flip_at_or_below_truth']} of {seeds}",
                "interval has truth": f"{results[f'{key}.interval_contains_truth']} of {seeds}",
                "says untestable": f"{results[f'{key}.says_untestable']} of {seeds}",
                "reward-truth correlation": results[f"{key}.reward_truth_correlation"],
            })  # fmt: skip
    return [said, strengths] if strengths else [said]


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    config, record = parse_study(argv, Config, __doc__)
    results = run(config, config.workdir)
    publish(config, "verdicts", "\n\n".join(map(markdown, tables(config, results))), record)


if __name__ == "__main__":
    main()
