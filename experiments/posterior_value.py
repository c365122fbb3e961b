"""The value of the posterior: DPO on hard labels, on soft labels, and on soft labels with precision weights.

    python -m experiments.posterior_value --record

    hard       1[mean r_a > mean r_b]                     what is left when the posterior is cut to a point
    soft       mean over draws of sigmoid((r_a - r_b) / tau)
    precision  the soft label, weighted by tau^2 / (tau^2 + var(r_a - r_b))

At three sizes of log on the newsroom. A seed's small logs are the first articles of its largest one, whose texts train
one reference for all sizes; the deconfounded reward is fitted on the small log, and the policy sees its texts alone.
Shares of the truth are compared at the KL that all three labels of a seed and size reached, and at the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from deconfound_jax.align.groups import form_groups
from deconfound_jax.causal.reward import Reward, model_form
from deconfound_jax.causal.terms import prepare
from deconfound_jax.config import Dpo, Run
from deconfound_jax.evaluate import truth
from deconfound_jax.recipes.preference import align_dpo, labels
from deconfound_jax.recipes.reference import decoder_features, train_reference
from deconfound_jax.recipes.texts import Texts
from deconfound_jax.simulate import newsroom
from deconfound_jax.train.files import writes
from experiments import rundir
from experiments.cli import markdown, parse_study, progress, publish
from experiments.newsroom_study import Compiled, Curve, compile_once, curve_of, designs, fit_once, newsroom_watch
from experiments.recipes_study import base

VARIANTS = {"hard": ("hard", "one"), "soft": ("soft", "one"), "precision": ("soft", "precision")}  # label, weight


@dataclasses.dataclass(frozen=True)
class PosteriorValue:
    """The study's own knobs; those of training are the recipes study's."""

    name: str = "newsroom_posterior_value"
    workdir: str = "runs/posterior_value"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    articles: tuple[int, ...] = (60, 200, 800)  # of a log, five headlines each
    run: Run = dataclasses.field(default_factory=base)


class Size(NamedTuple):
    """One seed's log of one size, and what was learned from it."""

    curves: Mapping[str, Curve]  # by variant
    verdict: str
    correlation: float  # of the posterior mean with the truth, over the log's texts
    certainty: float  # mean |2 label - 1| of the soft labels: 1 is hard
    weight: float  # mean precision weight


def run(config: PosteriorValue, workdir, on_step: Callable | None = None) -> dict[str, Any]:
    """Every seed, size and variant; returns what results.json holds.

    Raises:
      ValueError: the directory holds a study with other knobs.
    """
    simulation = dataclasses.replace(config.run.simulation, articles=max(config.articles))
    align = dataclasses.replace(config.run.align, recipe="dpo")
    run = dataclasses.replace(config.run, methods=("deconfounded",), simulation=simulation, align=align)
    workdir = rundir.claim(epath.Path(workdir), run, None, "newsroom")  # other seeds may come to it
    compiled = compile_once(run)
    sizes = {seed: run_seed(config, run, compiled, seed, workdir, on_step) for seed in config.seeds}
    results = summarise(config, sizes) | {"newsroom.posterior_value.compilations": compiled.policy.traces()}
    rundir.write_results(workdir, results)
    if writes():
        _plot(config, sizes, workdir)
    return results


def run_seed(config: PosteriorValue, run: Run, c: Compiled, seed: int, workdir, on_step=None) -> dict[int, Size]:
    """One reference, and a reward and three policies a size of log."""
    logs, known = newsroom.simulate(run.simulation, seed)
    tokens_nl = c.tokenizer.encode(logs.text, run.decoder.length)
    record = rundir.record_of(run, workdir, f"seed{seed}-sft", on_step)
    reference = train_reference(c.decoder, c.sft, tokens_nl, run.sft, seed, record)
    features_nd = decoder_features(c.decoder, reference, tokens_nl, run.features)
    watch = [(run.align.evaluate_every, newsroom_watch(c, reference, seed))]
    design, causal = designs(run)["deconfounded"], dataclasses.replace(run.causal, seed=seed)
    found = {}
    for articles in config.articles:
        n = articles * run.simulation.headlines
        log, name = logs.take(np.arange(n)), f"seed{seed}-{articles}"
        prepared = prepare(log, features_nd[:n], design, causal)
        path = workdir / "posterior" / f"{name}.npz"
        posterior = fit_once(prepared, design, causal, path, log.codes(log.roles.group))
        reward = model_form(posterior, features_nd[:n])
        texts = Texts(tokens_nl[:n], log.codes(log.roles.pair_within))
        for variant, dpo in variants(run.dpo).items():
            stage_record = rundir.record_of(run, workdir, f"{name}-{variant}", on_step)
            align_dpo(c.decoder, c.policy, reference, texts, reward, dpo, run.align, seed, stage_record, watch)
        curves = {variant: curve_of(workdir, f"{name}-{variant}") for variant in VARIANTS}
        correlation = float(np.corrcoef(reward.mean, known.reward_n[:n])[0, 1])
        found[articles] = Size(curves, posterior.verdict.status, correlation, *sureness(reward, texts, run.dpo, seed))
    return found


def variants(dpo: Dpo) -> dict[str, Dpo]:
    """The same knobs under each label and weight; both are data, so one compiled step serves all."""
    return {name: dataclasses.replace(dpo, label=label, weight=weight) for name, (label, weight) in VARIANTS.items()}


def sureness(reward: Reward, texts: Texts, dpo: Dpo, seed: int) -> tuple[float, float]:
    """Mean |2 label - 1| and mean precision weight over the pairs that train."""
    groups_mg = form_groups(texts.within_n, len(texts.tokens_nl), dpo.group_size, seed)
    label_mp, weight_mp = labels(reward, groups_mg, variants(dpo)["precision"])
    there_mp = weight_mp > 0
    return float(np.abs(2 * label_mp - 1)[there_mp].mean()), float(weight_mp[there_mp].mean())


def summarise(config: PosteriorValue, sizes: Mapping[int, Mapping[int, Size]]) -> dict[str, Any]:
    """`newsroom.posterior_value.<articles>.<variant>.true_share` at equal KL, `.final_...` at the end; differences
    between variants with their standard error over seeds, and win counts."""
    results: dict[str, Any] = {}
    for articles in config.articles:
        found, key = [sizes[seed][articles] for seed in config.seeds], f"newsroom.posterior_value.{articles}"
        kl = [min(config.run.align.kl, *(max(k for k, _ in curve) for curve in s.curves.values())) for s in found]
        results |= {f"{key}.kl": float(np.mean(kl)), f"{key}.kl.seeds": kl}
        results[f"{key}.verdict"] = [s.verdict for s in found]
        for part in ("correlation", "certainty", "weight"):
            results[f"{key}.{part}"] = float(np.mean([getattr(s, part) for s in found]))
        shares = {v: [truth.at_kl(s.curves[v], k) for s, k in zip(found, kl, strict=True)] for v in VARIANTS}
        final = {v: [s.curves[v][-1][1] for s in found] for v in VARIANTS}
        for v in VARIANTS:
            values = {"true_share": shares[v], "final_true_share": final[v]}
            values["final_kl"] = [s.curves[v][-1][0] for s in found]
            for metric, seeds in values.items():
                results |= {f"{key}.{v}.{metric}": float(np.mean(seeds)), f"{key}.{v}.{metric}.seeds": seeds}
        for v, rival in (("soft", "hard"), ("precision", "hard"), ("precision", "soft")):
            for prefix, of in (("", shares), ("final_", final)):
                results |= _versus(f"{key}.{v}.{prefix}", rival, of[v], of[rival])
    return results


def tables(config: PosteriorValue, results: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """A row a size at equal KL, a row a size at the end of training, a row a size and seed."""
    equal, end, by_seed = [], [], []
    for articles in config.articles:
        key, n = f"newsroom.posterior_value.{articles}", len(config.seeds)
        statuses = results[f"{key}.verdict"]
        row = {"articles": articles, "verdicts consistent": f"{statuses.count('consistent')} of {n}"}
        row |= {"correlation with the truth": results[f"{key}.correlation"]}
        row |= {"soft labels' certainty": results[f"{key}.certainty"], "precision weight": results[f"{key}.weight"]}
        equal.append(row | {"KL": results[f"{key}.kl"]} | _row(key, "", n, results))
        kls = {f"KL {v}": results[f"{key}.{v}.final_kl"] for v in VARIANTS}
        end.append({"articles": articles} | kls | _row(key, "final_", n, results))
        for i, seed in enumerate(config.seeds):
            row = {"articles": articles, "seed": seed, "verdict": statuses[i], "KL": results[f"{key}.kl.seeds"][i]}
            by_seed.append(row | {v: results[f"{key}.{v}.true_share.seeds"][i] for v in VARIANTS})
    return [equal, end, by_seed]


def _row(key: str, prefix: str, n: int, results: Mapping[str, Any]) -> dict[str, Any]:
    row = {v: results[f"{key}.{v}.{prefix}true_share"] for v in VARIANTS}
    for v, rival in (("soft", "hard"), ("precision", "hard"), ("precision", "soft")):
        gap, error = (results[f"{key}.{v}.{prefix}minus_{rival}{part}"] for part in ("", ".error"))
        wins = results[f"{key}.{v}.{prefix}wins_over_{rival}"]
        row[f"{v} - {rival}"] = f"{gap:+.3f} ({error:.3f}), {wins} of {n}"
    return row


def _versus(key: str, rival: str, ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    gap = np.asarray(ours) - np.asarray(theirs)
    error = float(gap.std(ddof=min(1, len(gap) - 1)) / len(gap) ** 0.5)
    names = {f"minus_{rival}": float(gap.mean()), f"minus_{rival}.error": error}
    return {key + name: v for name, v in names.items()} | {f"{key}wins_over_{rival}": int((gap > 0).sum())}


def _plot(config: PosteriorValue, sizes: Mapping[int, Mapping[int, Size]], workdir: epath.Path) -> None:
    """truth.png: the share of the truth along training, a line a seed and variant, a panel a size."""
    try:
        from deconfound_jax.report.kl_plot import Line, kl_png
    except ImportError:  # no matplotlib, as on an accelerator image
        return
    panels = {}
    for articles in config.articles:
        curves = [(v, sizes[seed][articles].curves[v]) for v in VARIANTS for seed in config.seeds]
        panels[f"{articles} articles"] = [Line(v, *zip(*curve, strict=True)) for v, curve in curves]
    kl_png(workdir / "truth.png", panels, "true share")


def main(argv: Sequence[str] | None = None) -> None:
    config, record = parse_study(
        argv, PosteriorValue, "Hard, soft and precision-weighted labels at three sizes of log."
    )
    with progress() as on_step:
        results = run(config, config.workdir, on_step)
    publish(config, "posterior_value", "\n\n".join(map(markdown, tables(config, results))), record)


if __name__ == "__main__":
    main()
