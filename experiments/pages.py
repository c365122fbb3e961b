"""Fills the report: from a study's results to a `report.page.Page`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from deconfound_jax.causal import describe
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.reward import contributions
from deconfound_jax.causal.spec import Prepared
from deconfound_jax.causal.terms import prepare
from deconfound_jax.config import Run
from deconfound_jax.evaluate import ab
from deconfound_jax.report import page as pages
from deconfound_jax.report.plots import truth_png
from deconfound_jax.structs import Design, Roles
from experiments import rundir

LIMITS = (
    "The reward is the effect of the words given the design; a confounder that the design does not name stays in it.",
    "Outside the features' reach nothing is learned: two texts with equal features have equal rewards.",
    "Policies are compared at one KL by interpolation along their training; pushed further, orders can change.",
)


def newsroom_page(config: Run, results: Mapping[str, Any], seed: Any, samples: Mapping[str, list[str]],
                  tables: list, verdict: str, workdir: epath.Path) -> None:  # fmt: skip
    """The newsroom study's report: `seed` is the first seed's `newsroom_study.Seed`."""
    best = rundir.best_method(config)
    rewards = {m: seed.rewards[m].mean for m in config.methods}
    popularity_n = seed.logs.columns["popularity"]
    cloud = pages.Cloud("popularity", popularity_n, _two(rewards), {
        m: abs(float(np.corrcoef(r, popularity_n)[0, 1])) for m, r in _two(rewards).items()})  # fmt: skip
    key = f"policy.{config.name}.tokens"
    page = dataclasses.replace(
        _common(config, seed.logs.roles, seed.posteriors[best], seed.prepared[best], seed.logs.fingerprint, verdict),
        title="The newsroom: a simulation whose truth is known",
        summary="Policies aligned on three rewards learned from one confounded log, compared by the true objective.",
        examples=_examples(config, seed.logs.text, seed.rewards),
        samples=samples if config.report.examples == "show" else {},
        clouds=[cloud],
        truth=pages.Truth(seed.truth.reward_n, rewards),
        curves=pages.Curves({m: [seed.curves[m]] for m in config.methods}, results[f"{key}.{best}.kl.seeds"][0]),
        results=tables[0],
        seeds=tables[1],
        wins=verdict,
        checks=_checks(seed.posteriors),
    )
    pages.write(page, workdir / "report.html")
    truth_png(workdir / "truth.png", seed.truth.reward_n, _two(rewards))


def logs_page(config: Run, results: Mapping[str, Any], plan: Any, logs: Any, fitted: Any, tables: list, verdict: str,
              workdir: epath.Path) -> None:  # fmt: skip
    """The report on real logs; its plots show the first part's training rows."""
    first, best = plan.parts[0], rundir.best_method(config)
    name = list(fitted.features)[-1]
    train = logs.take(first.train)
    posterior = fitted.posteriors[first.name, name, best]
    prepared = prepare(train, fitted.features[name][first.train], posterior.design, config.causal)
    rewards = {m: fitted.rewards[first.name, name, m] for m in config.methods}
    at_train = {m: dataclasses.replace(r, draws_sn=r.draws_sn[:, first.train]) for m, r in rewards.items()}
    clouds = []
    for column in config.roles.confounders[:1]:
        means = _two({m: r.mean for m, r in at_train.items()})
        value_n = train.columns[column]
        clouds.append(pages.Cloud(column, value_n, means, {
            m: ab.confounder_correlation(r, value_n) for m, r in means.items()}))  # fmt: skip
    shares = [
        {
            "what": f"held-out rows that a split by group alone would have shared {column} with training",
            "found": f"{share:.1%}",
        }
        for column, share in plan.leaked.items()
    ]
    page = dataclasses.replace(
        _common(config, config.roles, posterior, prepared, logs.fingerprint, verdict),
        title=f"{config.name}: rewards from real logs, judged on randomized arms",
        limits=(*LIMITS[:2], "Policies are judged after their last step, each at the KL its row states."),
        summary="Rewards fitted with and without the confounders' effect, scored on held-out randomized arms.",
        examples=_examples(config, train.text, at_train),
        samples=fitted.samples if config.report.examples == "show" else {},
        clouds=clouds,
        results=tables[0],
        seeds=tables[1] if len(tables) > 2 else (),
        held_out=tables[-1],
        checks=_checks({m: fitted.posteriors[first.name, name, m] for m in config.methods}) + shares,
    )
    pages.write(page, workdir / "report.html")


def removed_effects(posterior: Posterior, prepared: Prepared) -> list[pages.Effect]:
    """How much of the outcome each confounder moves: the sd over rows of its part, with its 90% interval."""
    unit = (
        "logits" if posterior.design.family == "binomial" or posterior.design.response != "identity" else "units of y"
    )
    sd, found = float(posterior.scaling["outcome.sd"]), []
    for name, part_su in contributions(posterior, prepared).items():
        spread_s = sd * part_su.std(1)
        found.append(
            pages.Effect(
                f"{name} (sd over rows)", float(spread_s.mean()), *map(float, np.quantile(spread_s, (0.05, 0.95))), unit
            )
        )
    if "gamma" in posterior.draws:
        column = posterior.design.endogenous.column
        slope_s = posterior.effect(column)
        found.append(
            pages.Effect(
                f"{column} (gamma)",
                float(slope_s.mean()),
                *map(float, np.quantile(slope_s, (0.05, 0.95))),
                f"{unit} per unit",
            )
        )
    return found


def _common(
    config: Run, roles: Roles, posterior: Posterior, prepared: Prepared, fingerprint: str, verdict: str
) -> pages.Page:
    design = Design.parse(config.causal.design, config.causal.family, config.causal.response)
    made = rundir.provenance()
    reproduction = pages.Reproduction(
        made["command"],
        made["machine"],
        made["versions"],
        fingerprint,
        json.dumps(dataclasses.asdict(config), indent=2),
    )
    return pages.Page(
        title="",
        summary="",
        verdict=verdict,
        equations=describe.equations(
            design, roles, gamma_sd=config.causal.gamma_sd, control_sd=config.causal.control_sd
        ),
        diagram_svg=describe.svg(design, roles),
        mermaid=describe.mermaid(design, roles),
        effects=removed_effects(posterior, prepared),
        assumptions=describe.assumptions(design, roles),
        limits=LIMITS,
        reproduction=reproduction,
    )


def _examples(config: Run, texts: list[str], rewards: Mapping[str, Any]) -> list[pages.Example] | None:
    """The texts whose place changes most between naive and deconfounded; None where log text must stay inside."""
    if config.report.examples == "none":
        return None
    if "naive" not in rewards:
        return []
    best = rewards[rundir.best_method(config)]
    rank = {m: np.argsort(np.argsort(r.mean)) for m, r in (("naive", rewards["naive"]), ("best", best))}
    order = np.argsort(rank["best"] - rank["naive"])
    half = config.report.n_examples // 2
    order = order[np.sort(np.unique([texts[i] for i in order], return_index=True)[1])]  # a text once
    pick = [*order[:half], *order[-(config.report.n_examples - half) :]]
    return [
        pages.Example(texts[i], float(rewards["naive"].mean[i]), float(best.mean[i]), float(best.sd[i])) for i in pick
    ]


def _checks(posteriors: Mapping[str, Posterior]) -> list[dict[str, str]]:
    rows = []
    for method, posterior in posteriors.items():
        k = posterior.diagnostics.get("pareto_k")
        found = posterior.status + (f", Pareto k {k:.2f} (limit 0.7)" if k is not None else "")
        rows.append({"what": f"{method}: {posterior.diagnostics['method']} fit", "found": found})
        if (verdict := posterior.verdict) is not None:
            why = "; ".join([*verdict.reasons, *verdict.warnings]) or "nothing in the data contradicts the design"
            rows.append({"what": f"{method}: verdict", "found": f"{verdict.status}: {why}"})
    return rows


def _two(rewards: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Before and after: the naive reward where there is one, and the last method's."""
    methods = list(rewards)
    return {m: rewards[m] for m in dict.fromkeys([methods[0], methods[-1]])}
