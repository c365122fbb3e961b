"""Best-of-n pushed far: by the posterior's mean, or by mean - kappa sd, against the truth.

    python -m experiments.over_optimisation --record

The newsroom's texts, 64 features (a decoder of width 63: summed input embeddings, and the length). One reference
policy is trained on a log that no reward sees; each seed's log fits the rewards, and each seed's pool of the
reference's samples gives best-of-n for every n at once. Two pools: samples as the reference draws them, and hot ones
(temperature 1.5), where texts leave the log's grammar and so the model. Logs of 100 to 1,200 rows, both pools and
kappa = 1 were fixed before anything was measured. The first measurement showed no over-optimisation at 300 rows; the
preset's own log (4,000 rows) and the reward `wide`, whose prior hardly shrinks, were added then, to find where it is.

    share_n = (E truth(best of n) - E truth(reference)) / (E truth(best of 128 by the truth) - E truth(reference))
    drop    = (max_n share_n - share_128) / max_n share_n,   of the mean curve over seeds; error by the jackknife

so a drop is a part of the largest gain over the reference. Where no n gains anything there is none: "no gain", which
counts as over-optimised.

Errors in a linear reward's coefficients flatten the truth's curve and inflate the promise, but on features near normal
they do not turn it down: what does is misfit, here texts past the grammar's length. A posterior cannot know of that,
so mean - kappa sd turns down, too; its sd is that of f against the log's mean text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from deconfound_jax.train.files import writes
from experiments import rundir
from experiments.cli import parse_study, progress, publish, tables_and_bars
from experiments.over_optimisation_curves import (
    SCORES,
    Curves,
    OverOptimisation,
    curves_of,
    pool_of,
    reference_of,
    rewards,
    sampler,
)

MEAN_DROPS, LOWER_DROPS = 0.05, 0.01  # at a log of BAR_ROWS: the mean at least, the lower score at most
BAR_ROWS = 300


def run(config: OverOptimisation, workdir, on_step: Callable | None = None) -> dict[str, Any]:
    """Every seed, log, reward and pool; returns what results.json holds, see `summarise`.

    Raises:
      ValueError: the directory holds another reference.
    """
    data = f"newsroom {config.reference_seed}"  # what the reference was trained on; all else is made anew
    workdir = rundir.claim(epath.Path(workdir), config.run, None, data)
    reference = reference_of(config, rundir.record_of(config.run, workdir, "sft", on_step))
    draw = sampler(config, reference)
    curves: dict[tuple, list[Curves]] = {}
    verdicts: dict[tuple, list[str]] = {}
    for done, seed in enumerate(config.seeds, 1):
        keys, pools = jax.random.split(jax.random.key(seed), len(config.temperatures)), {}
        for key, temperature in zip(keys, config.temperatures, strict=True):
            pools[temperature] = pool_of(reference, draw(key, temperature), config.run)
        for (rows, method), (reward, status) in rewards(config, reference, seed).items():
            verdicts.setdefault((rows, method), []).append(status)
            for temperature, pool in pools.items():
                for score, found in curves_of(reward, pool, config.run.best_of_n).items():
                    curves.setdefault((temperature, rows, method, score), []).append(found)
        if on_step:
            on_step("seeds", done, len(config.seeds), {})
    results = summarise(config, curves, verdicts)
    rundir.write_results(workdir, results)
    if writes():
        _plot(config, results, workdir)
    return results


def drop_of(share_n: np.ndarray) -> float | None:
    """(max - last) / (max - first), a part of the largest gain over n = 1; None where no n gained anything."""
    first, best, last = float(share_n[0]), float(np.max(share_n)), float(share_n[-1])
    return (best - last) / (best - first) if np.argmax(share_n) else None


def jackknife(share_sn: np.ndarray, of: Callable[[np.ndarray], float | None]) -> float | None:
    """Standard error of a function of the mean curve over seeds; None where it has no value without some seed."""
    if len(share_sn) < 2:
        return None
    left_out = [of(np.delete(share_sn, i, axis=0).mean(0)) for i in range(len(share_sn))]
    if any(value is None for value in left_out):
        return None
    return float(np.sqrt((len(left_out) - 1) * np.var(left_out)))


def summarise(config: OverOptimisation, curves: Mapping[tuple, list[Curves]], verdicts: Mapping) -> dict[str, Any]:
    """Flat results: `over_optimisation[.t<temperature>].<rows>.<reward>.<mean|lower>.{best,at_128,drop,...}`.

    The first temperature's keys have no name of it. best, at_128: shares; best_n: where the mean curve has its
    maximum; truth, proxy: mean curves over the sizes n; consistent: verdicts, of as many as there are seeds.
    """
    sizes = config.run.best_of_n.sizes
    last, kl = f"at_{sizes[-1]}", [float(np.log(n) - (n - 1) / n) for n in sizes]
    results: dict[str, Any] = {"over_optimisation.sizes": list(sizes), "over_optimisation.kl": kl}
    for (rows, method), found in verdicts.items():
        results[f"over_optimisation.{rows}.{method}.consistent"] = found.count("consistent")
    for (temperature, rows, method, score), found in curves.items():
        place = f"{_prefix(config, temperature)}.{rows}.{method}"
        key, (share_sn, proxy_sn, off_sn) = f"{place}.{score}", map(np.stack, zip(*found, strict=True))
        mean_n = share_sn.mean(0)
        results |= {
            f"{key}.best": float(mean_n.max()), f"{key}.best_n": sizes[int(mean_n.argmax())],
            f"{key}.{last}": float(mean_n[-1]), f"{key}.{last}.seeds": share_sn[:, -1].tolist(),
            f"{key}.drop": drop_of(mean_n), f"{key}.drop.error": jackknife(share_sn, drop_of),
            f"{key}.truth": mean_n.tolist(), f"{key}.truth.error": _error(share_sn).tolist(),
            f"{key}.proxy": proxy_sn.mean(0).tolist(), f"{key}.off_grammar_{last}": float(off_sn[:, -1].mean()),
            f"{_prefix(config, temperature)}.off_grammar": float(off_sn[:, 0].mean()),
        }  # fmt: skip
        if score == "lower":
            gap_s = share_sn[:, -1] - [one.share[-1] for one in curves[temperature, rows, method, "mean"]]
            results |= {f"{place}.lower_minus_mean": float(gap_s.mean())}
            results |= {f"{place}.lower_minus_mean.error": float(_error(gap_s))}
            results |= {f"{key}.wins_over_mean": int((gap_s > 0).sum())}
    return results


def bars(config: OverOptimisation, results: Mapping[str, Any]) -> list[str]:
    """What does not hold at BAR_ROWS with the deconfounded reward, and at which sizes the mean does over-optimise."""
    failed = []
    for temperature in config.temperatures:
        key = _prefix(config, temperature)
        if f"{key}.{BAR_ROWS}.deconfounded.mean.best" not in results:
            continue
        drops = {score: results[f"{key}.{BAR_ROWS}.deconfounded.{score}.drop"] for score in SCORES}
        place = f"{BAR_ROWS} rows, deconfounded, temperature {temperature:g}"
        if drops["mean"] is not None and drops["mean"] < MEAN_DROPS:
            sizes = {m: over_optimised(config, results, temperature, m) for m in config.rewards}
            where = "; ".join(f"{m} at {', '.join(found) or 'no size'}" for m, found in sizes.items())
            drop = f"drop {drops['mean']:.3f}, bar {MEAN_DROPS}"
            failed.append(f"{place}: the mean does not over-optimise ({drop}). It does (drops of both scores): {where}")
        if drops["lower"] is None or drops["lower"] > LOWER_DROPS:
            failed.append(f"{place}: mean - kappa sd: drop {_words(drops['lower'])}, bar {LOWER_DROPS}")
    return failed


def over_optimised(config: OverOptimisation, results: Mapping[str, Any], temperature: float, reward: str) -> list[str]:
    """Rows of the logs at which the mean falls by MEAN_DROPS of its largest gain, or never gains; with both drops."""
    found = []
    for rows in config.rows:
        key = f"{_prefix(config, temperature)}.{rows}.{reward}"
        drops = [results[f"{key}.{score}.drop"] for score in SCORES]
        if drops[0] is None or drops[0] >= MEAN_DROPS:
            found.append(f"{rows} ({' and '.join(map(_words, drops))})")
    return found


def tables(config: OverOptimisation, results: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """One table a pool: a row a reward and size of log; gains in shares of the oracle's best of the largest n."""
    cases = [(method, rows) for method in config.rewards for rows in config.rows]
    return [[_row(config, results, temperature, *case) for case in cases] for temperature in config.temperatures]


def _row(
    config: OverOptimisation, results: Mapping[str, Any], temperature: float, method: str, rows: int
) -> dict[str, Any]:
    last, key = config.run.best_of_n.sizes[-1], f"{_prefix(config, temperature)}.{rows}.{method}"
    row: dict[str, Any] = {"temperature": f"{temperature:g}", "reward": method, "rows": rows}
    for score in SCORES:
        at = f"{key}.{score}"
        row[f"{score}: best (n)"] = f"{results[f'{at}.best']:.3f} ({results[f'{at}.best_n']})"
        row[f"{score}: at {last}"] = results[f"{at}.at_{last}"]
        row[f"{score}: drop"] = _words(results[f"{at}.drop"], results[f"{at}.drop.error"])
    gap = (results[f"{key}.lower_minus_mean{part}"] for part in ("", ".error"))
    row[f"lower - mean at {last}"] = _words(*gap)
    row["wins"] = f"{results[f'{key}.lower.wins_over_mean']} of {len(config.seeds)}"
    return row | {"consistent": results[f"over_optimisation.{rows}.{method}.consistent"]}


def _plot(config: OverOptimisation, results: Mapping[str, Any], workdir: epath.Path) -> None:
    """truth.png: under the deconfounded reward the truth, and dashed what the score promised."""
    try:
        from deconfound_jax.report.kl_plot import Line, kl_png
    except ImportError:  # no matplotlib, as on an accelerator image
        return
    kl, panels = results["over_optimisation.kl"], {}
    for temperature in config.temperatures:
        for rows in sorted({min(config.rows), max(config.rows), BAR_ROWS} & set(config.rows)):
            lines = panels.setdefault(f"{rows} rows, temperature {temperature:g}", [])
            for score in SCORES:
                at = f"{_prefix(config, temperature)}.{rows}.deconfounded.{score}"
                lines.append(Line(score, kl, results[f"{at}.truth"], results[f"{at}.truth.error"]))
                lines.append(Line(score, kl, results[f"{at}.proxy"], style="--"))
    kl_png(workdir / "truth.png", panels, "gain, share of the oracle's", "what the score promised")


def _prefix(config: OverOptimisation, temperature: float) -> str:
    return "over_optimisation" + ("" if temperature == config.temperatures[0] else f".t{temperature:g}")


def _error(value_sn: np.ndarray) -> np.ndarray:
    """Standard error over seeds; 0 of a single one."""
    return value_sn.std(0, ddof=min(1, len(value_sn) - 1)) / len(value_sn) ** 0.5


def _words(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "no gain"
    return f"{value:.3f}" + ("" if error is None else f" ({error:.3f})")


def main(argv: Sequence[str] | None = None) -> None:
    config, record = parse_study(argv, OverOptimisation, "Best-of-n by the posterior's mean and by mean - kappa sd.")
    with progress() as on_step:
        results = run(config, config.workdir, on_step)
    publish(config, "over_optimisation", tables_and_bars(tables(config, results), bars(config, results)), record)


if __name__ == "__main__":
    main()
