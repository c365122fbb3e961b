"""Judges rewards and policies on held-out randomized arms: the only place that reads their outcomes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from deconfound_jax.config import Run
from deconfound_jax.evaluate import ab
from deconfound_jax.recipes.reference import text_logprobs
from deconfound_jax.structs import Logs
from deconfound_jax.train.loop import read_metrics
from experiments.logs_plan import Part, Plan


def judge(config: Run, plan: Plan, logs: Logs, fitted: Any, workdir: epath.Path) -> dict[str, Any]:
    """Scores on the held-out arms of what `logs_study.learn` returned (`fitted`)."""
    results: dict[str, Any] = {}
    groups: dict[tuple[str, str], list[Part]] = {}
    for part in plan.parts:
        for name in fitted.features:
            groups.setdefault((part.name.rstrip("0123456789"), name), []).append(part)
    for (log, name), parts in groups.items():
        correct = {}
        for method in config.methods:
            rows = [_score(config, plan, logs, part, fitted.rewards[part.name, name, method].mean) for part in parts]
            prefix = f"reward.{log}.{name}.{method}"
            for metric in rows[0][0]:
                values = [float(row[0][metric]) for row in rows]
                results[f"{prefix}.{metric}"] = float(np.mean(values))
                if len(values) > 1:
                    results[f"{prefix}.{metric}.seeds"] = values
            statuses = [fitted.posteriors[part.name, name, method].status for part in parts]
            results[f"{prefix}.not_converged"] = sum(s != "converged" for s in statuses)
            correct[method] = [np.concatenate([row[i] for row in rows]) for i in (1, 2, 3)]
        if {"naive", "deconfounded"} <= set(correct):
            results |= _difference(correct, f"reward.{log}.{name}.deconfounded")
    arms = [_arms(plan, logs, part) for part in plan.parts]
    results["ceiling.pair_accuracy"], results["ceiling.pair_accuracy_z196"] = _ceiling(plan, logs, arms[0])
    for method in (m for m in config.methods if m in fitted.policies):
        held = plan.parts[0].held_out
        begun, prompts = fitted.start, fitted.start.prompts(len(held))
        own, ref = (
            text_logprobs(begun.decoder, fitted.policies[m], begun.tokens_nl[held], prompts) for m in (method, "sft")
        )
        scored = ab.scores(own - ref, arms[0])
        results[f"policy.{config.name}.tokens.{method}.pair_accuracy"] = float(scored["pair_accuracy"])
        results[f"policy.{config.name}.tokens.{method}.pair_accuracy_z196"] = float(scored["pair_accuracy_z196"])
        curve = [row["kl"] for row in read_metrics(workdir, f"{config.align.recipe}-{method}") if row.get("eval")]
        results[f"policy.{config.name}.tokens.{method}.kl"] = float(curve[-1])
    return results


def _arms(plan: Plan, logs: Logs, part: Part) -> ab.Arms:
    return ab.arms_of(logs.take(part.held_out), plan.component_n[part.held_out])


def _score(config: Run, plan: Plan, logs: Logs, part: Part, reward_n: np.ndarray):
    """Scores of one reward on one part's held-out arms; per-pair hits, |z| and component for the bootstrap."""
    arms = _arms(plan, logs, part)
    held_n = reward_n[part.held_out]
    scored = dict(ab.scores(held_n, arms))
    main = config.roles.confounders[0] if config.roles.confounders else None
    if main:
        scored["confounder_correlation"] = ab.confounder_correlation(held_n, logs.columns[main][part.held_out])
    table = ab.pairs(arms)
    return scored, ab.pair_correct(held_n, table), np.abs(table.z_p), table.component_p


def _difference(correct: Mapping[str, list[np.ndarray]], prefix: str) -> dict[str, Any]:
    """Paired gain over naive with its 95% bootstrap interval over components, all pairs and clear ones."""
    found = {}
    hits, z, component = correct["deconfounded"]
    for name, keep in (("gain", np.ones(len(z), bool)), ("gain_z196", z > ab.Z_CLEAR)):
        if not keep.any():
            continue  # no pair to be judged by
        interval = ab.paired_bootstrap(hits[None, keep], correct["naive"][0][None, keep], component[keep], seed=0)
        found |= dict(
            zip(
                [f"{prefix}.{name}", f"{prefix}.{name}.low", f"{prefix}.{name}.high"], map(float, interval), strict=True
            )
        )
    return found


def _ceiling(plan: Plan, logs: Logs, arms: ab.Arms) -> tuple[float, float]:
    """What an oracle would score; the spread of true effects is learned on tests outside the first fold."""
    rest = np.setdiff1d(np.arange(len(logs)), plan.parts[0].held_out)
    found = ab.ceiling(ab.arms_of(logs.take(rest), plan.component_n[rest]), arms)
    return found["pair_ceiling"], found["pair_ceiling_z196"]
