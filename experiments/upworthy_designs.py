"""Upworthy through richer designs: what each term adds on randomized headlines that no fit has seen.

    python -m experiments.upworthy_designs --data ../shared/data/upworthy --record

Three logs, five resamples each (two cores: about half an hour). Every method sees the same rows; pairs of arms that
share test and image, lie outside the log and have |z| > 1.96 judge it. `naive` and the designs are one beta-binomial
model with every scale learned; `ridge` is on the empirical logit; `contrasts` is the ridge on differences inside tests;
`logit_normal` is `full` with another overdispersion, whose evidence may be compared with that of `full`; `full_cv` is
`full` with the text's prior sd chosen by cross-validation over groups of the log, as the ridge's strength is.
The bars: `full` is at least one point better than the better of naive and ridge on the mean of each log's resamples,
and above zero over the three logs together (paired bootstrap over components).
Without the data the script says so and stops; `--simulated` runs a miniature in seconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from deconfound_jax.causal.terms import empirical_logit
from deconfound_jax.evaluate import ab
from deconfound_jax.structs import Design
from experiments import designs_logs, rundir
from experiments.cli import markdown, parse_study, publish
from experiments.designs_fits import DESIGNS, Fitted, fit_contrasts, fit_design, fit_ridge, logit_normal, refit
from experiments.designs_strength import choose_text_sd

GAIN = 0.01  # the bar on each log's mean
NAIVE = ("naive", "ridge")


@dataclasses.dataclass(frozen=True)
class UpworthyDesigns:
    """Where the data is, and how wide the designs are."""

    name: str = "upworthy_designs"  # of the record
    data: str = "../shared/data/upworthy"  # folder of packages.parquet and minilm_features.npz
    simulated: bool = False  # a miniature with a known effect in place of the data
    workdir: str = "runs/upworthy_designs"
    resamples: int = 5  # folds, each with its own random arms
    rank: int = 64  # directions kept of each set of level means
    lede_width: int = 64  # principal components of the lede
    strengths: tuple[float, ...] = (0.002, 0.004, 0.008, 0.016, 0.032, 0.064)  # prior sd of a text coefficient
    bootstrap: int = 2000
    seeds: tuple[int, ...] = (0,)  # of folds, arms and cross-validation


Hits = dict[str, list[np.ndarray]]  # method -> per fold, right or wrong on each clear pair


def run(config: UpworthyDesigns, workdir, on_fit: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Fits, judges, writes and returns flat results.

    Returns:
      `<log>.<method>.pair_accuracy_z196` and `.seeds`, `.log_evidence` of the first resample; the same under
      `<log>.<method>.text_sd_<value>`; `<log>.full.gain_z196` with `.low`, `.high`, `.seeds` over the better naive,
      `<log>.better_naive`; `pooled.full.gain_z196...`, and `full_cv` alike; `failed`: bars that do not
      hold, as sentences.
    """
    data = _archive(config)
    results: dict[str, Any] = {"skipped": []}
    gaps: dict[str, list] = {"full": [], "full_cv": []}
    for log in designs_logs.LOGS:
        hits, component_p = _study(config, data, log, results, on_fit or (lambda line: None))
        better = max(NAIVE, key=lambda method: np.mean([c.mean() for c in hits[method]]))
        results[f"{log}.better_naive"] = better
        for method in (m for m in hits if m not in NAIVE and "text_sd" not in m):
            results |= _gain(config, hits[method], hits[better], component_p, f"{log}.{method}")
        for method, pairs in gaps.items():
            pairs.append((np.concatenate(hits[method]), np.concatenate(hits[better])))
    for method, pairs in gaps.items():
        ours, naive = (np.stack(side) for side in zip(*pairs, strict=True))
        pooled = ab.paired_bootstrap(ours, naive, component_p, config.bootstrap, config.seeds[0])
        results |= _interval(f"pooled.{method}.gain_z196", pooled)
    results["failed"] = failures(results)
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    rundir.write_results(workdir, results)
    return results


def failures(results: Mapping[str, Any]) -> list[str]:
    """Every bar that does not hold, as a sentence."""
    failed = []
    for log in designs_logs.LOGS:
        gain = results[f"{log}.full.gain_z196"]
        if not gain >= GAIN:
            better = results[f"{log}.better_naive"]
            failed.append(f"{log}: full minus {better} {100 * gain:+.1f} points, bar {100 * GAIN:+.1f}")
    low = results["pooled.full.gain_z196.low"]
    if not low > 0:
        failed.append(f"pooled: lower end of full minus naive {100 * low:+.1f} points, bar above 0")
    at_rest = [key for key in results if key.endswith(".not_converged") and results[key]]
    return failed + [f"{key.removesuffix('.not_converged')}: {results[key]} fits did not converge" for key in at_rest]


def tables(config: UpworthyDesigns, results: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """Methods by log; resamples by log; naive and full by prior strength."""
    methods = dict.fromkeys(("ridge", *DESIGNS["all_arms"], "logit_normal", "full_cv", "contrasts"))
    accuracy = "pair_accuracy_z196"
    overall = [
        {"method": m} | {log: results.get(f"{log}.{m}.{accuracy}") for log in designs_logs.LOGS} for m in methods
    ]
    resamples = [
        {"log": log, "method": m} | {f"{k}": value for k, value in enumerate(results[f"{log}.{m}.{accuracy}.seeds"])}
        for log in designs_logs.LOGS
        for m in ("ridge", "naive", "full")
    ]
    strengths = []
    for sd in config.strengths:
        row: dict[str, Any] = {"text_sd": f"{sd:g}"}
        for log in designs_logs.LOGS:
            naive, full = (results[f"{log}.{m}.text_sd_{sd:g}.{accuracy}"] for m in ("naive", "full"))
            row |= {f"{log} naive": naive, f"{log} full": full, f"{log} gain": f"{100 * (full - naive):+.1f}"}
        strengths.append(row)
    return [overall, resamples, strengths]


def verdict(results: Mapping[str, Any]) -> str:
    """Gains with their intervals, and the bars."""
    lines = []
    for method in ("full", "full_cv"):
        for place in (*designs_logs.LOGS, "pooled"):
            mean, low, high = (100 * results[f"{place}.{method}.gain_z196{end}"] for end in ("", ".low", ".high"))
            over = results.get(f"{place}.better_naive", "the better naive of each log")
            lines.append(f"- {place}: {method} minus {over} {mean:+.1f} points [{low:+.1f}, {high:+.1f}]")
    lines += [f"- bar does not hold: {line}" for line in results["failed"]] or ["- Every bar holds."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    config, record = parse_study(argv, UpworthyDesigns, __doc__)
    if not config.simulated and (absent := designs_logs.missing(config.data)):
        print(f"skipped: {absent} is not there; --data names the folder, --simulated runs a miniature")
        return
    results = run(config, config.workdir, on_fit=lambda line: print(line, flush=True))
    text = "\n\n".join([*map(markdown, tables(config, results)), verdict(results)])
    print()
    publish(config, "upworthy_designs", text, record)


def _archive(config: UpworthyDesigns) -> designs_logs.Archive:
    seed = config.seeds[0]
    if config.simulated:
        return designs_logs.archive(*designs_logs.simulate(seed), config.lede_width, config.resamples, seed)
    return designs_logs.read_archive(config.data, config.lede_width, config.resamples, seed)


def _study(config, data: designs_logs.Archive, log: str, results: dict, on_fit) -> tuple[Hits, np.ndarray]:
    """One log: every method on every resample. Fills `results`; returns hits and each clear pair's component."""
    hits: Hits = {}
    methods = DESIGNS[log] | {"logit_normal": logit_normal(DESIGNS[log]["full"])}
    fitted: dict[str, Fitted] = {}
    component, restless = [], 0
    for part in designs_logs.parts(data, log, config.seeds[0]):
        judged = designs_logs.judged(data, part)
        component.append(judged.table.component_p[judged.clear_p])
        # The window lies in no fold: its fits are the same on every resample.
        if part.fold == 0 or log != "broken_window":
            fitted = _fit_all(config, data, part, methods, fitted)
            restless += sum(1 for f in fitted.values() if f.fit and not f.fit.converged)
        for name, found in fitted.items():
            held_n = found.reward(data.features_nd[part.held_out])
            hits.setdefault(name, []).append(judged.correct(held_n))
        on_fit(
            f"{log} {part.fold}: " + ", ".join(f"{m} {hits[m][-1].mean():.3f}" for m in fitted if "text_sd" not in m)
        )
    for name, right in hits.items():
        values = [float(c.mean()) for c in right]
        results[f"{log}.{name}.pair_accuracy_z196"] = float(np.mean(values))
        results[f"{log}.{name}.pair_accuracy_z196.seeds"] = values
    for name in (m for m in methods if fitted[m].fit):
        results |= {f"{log}.{name}.log_evidence": fitted[name].fit.log_evidence}
        results |= {f"{log}.{name}.psi.{k}": float(v) for k, v in fitted[name].fit.psi.items()}
    results[f"{log}.pairs_z196"] = int(sum(map(len, hits["full"])))
    results[f"{log}.not_converged"] = restless
    return hits, np.concatenate(component)


def _fit_all(config, data: designs_logs.Archive, part, methods: Mapping[str, Design], known: Mapping[str, Fitted]):
    """Every method on one part's rows; designs start at the scales of the resample before."""
    several = part.log != "one_arm"
    logs, features_nd = data.logs.take(part.train), data.features_nd[part.train]
    group_n, seed = data.component_n[part.train], config.seeds[0]
    found = {"ridge": fit_ridge(logs, features_nd, group_n, seed)}
    if several:
        found["contrasts"] = fit_contrasts(logs, features_nd, group_n, seed)
    for name, design in methods.items():
        start = known[name].fit.psi if name in known else None
        found[name] = fit_design(logs, features_nd, design, config.rank, start)
    logit_n = empirical_logit(logs.outcome_n, logs.exposure_n)[0]
    test_n = logs.codes("test") if several else None
    chosen = choose_text_sd(found["full"], logit_n, config.strengths, group_n, test_n, seed)
    found["full_cv"] = refit(found["full"], chosen)
    for sd in config.strengths:
        found |= {f"{name}.text_sd_{sd:g}": refit(found[name], sd) for name in ("naive", "full")}
    return found


def _gain(config, ours: list[np.ndarray], naive: list[np.ndarray], component_p: np.ndarray, prefix: str):
    """A method minus naive: mean over resamples, its bootstrap interval over components, each resample."""
    seeds = [float(a.mean() - b.mean()) for a, b in zip(ours, naive, strict=True)]
    both = (np.concatenate(ours), np.concatenate(naive), component_p, config.bootstrap, config.seeds[0])
    _, low, high = ab.paired_bootstrap(*both)
    found = _interval(f"{prefix}.gain_z196", (float(np.mean(seeds)), low, high))
    return found | {f"{prefix}.gain_z196.seeds": seeds}


def _interval(key: str, values) -> dict[str, float]:
    return dict(zip((key, f"{key}.low", f"{key}.high"), map(float, values), strict=True))


if __name__ == "__main__":
    main()
