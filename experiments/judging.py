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
            key, bars = f"reward.{log}.{name}.deconfounded", {"gain": 0.0, "gain_z196": ab.Z_CLEAR}
            results |= _intervals(correct["deconfounded"], correct["naive"], bars, key)
    arms = [_arms(plan, logs, part) for part in plan.parts]
    results["ceiling.pair_accuracy"], results["ceiling.pair_accuracy_z196"] = _ceiling(plan, logs, arms[0])
    return results | _policies(config, plan, arms[0], fitted, workdir)


def _policies(config: Run, plan: Plan, arms: ab.Arms, fitted: Any, workdir: epath.Path) -> dict[str, Any]:
    """Pair accuracy of each policy's implicit reward, log pi - log pi_ref, with its interval; last KL; gain over naive.

    Source of the implicit reward: Rafailov et al. 2305.18290, eq. 5 (beta and the prompt's constant order no pair).
    """
    results: dict[str, Any] = {}
    held, begun, table = plan.parts[0].held_out, fitted.start, ab.pairs(arms)
    # Arms that differ by their image alone have one text, which is read once.
    tokens_ul, text_n = np.unique(begun.tokens_nl[held], axis=0, return_inverse=True)

    def logprobs(policy: str) -> np.ndarray:
        prompts = begun.prompts(len(tokens_ul))
        return text_logprobs(begun.decoder, fitted.policies[policy], tokens_ul, prompts)[text_n.reshape(-1)]

    reference_n, correct = logprobs("sft"), {}
    for method in (m for m in config.methods if m in fitted.policies):
        own_n = logprobs(method)
        key = f"policy.{config.name}.tokens.{method}"
        correct[method] = [ab.pair_correct(own_n - reference_n, table), np.abs(table.z_p), table.component_p]
        chance = [np.zeros(len(table.z_p)), *correct[method][1:]]
        results |= _intervals(correct[method], chance, {"pair_accuracy": 0.0, "pair_accuracy_z196": ab.Z_CLEAR}, key)
        curve = [row for row in read_metrics(workdir, f"{config.align.recipe}-{method}") if row.get("eval")]
        results[f"{key}.kl"], results[f"{key}.kl_error"] = float(curve[-1]["kl"]), float(curve[-1]["kl_error"])
    if {"naive", "deconfounded"} <= set(correct):
        key = f"policy.{config.name}.tokens.deconfounded"
        results |= _intervals(correct["deconfounded"], correct["naive"], {"gain": 0.0, "gain_z196": ab.Z_CLEAR}, key)
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


def _intervals(ours: list[np.ndarray], other: list[np.ndarray], names: Mapping[str, float], prefix: str):
    """Mean difference of hits, ours minus the other's, with its 95% bootstrap interval over components.

    Args:
      ours, other: hits, |z| and component of the same pairs; hits of 0 for the other give ours alone.
      names: metric -> |z| above which pairs count.
    """
    found: dict[str, float] = {}
    hits, z, component = ours
    for name, least in names.items():
        keep = z > least if least else np.ones(len(z), bool)
        if not keep.any():
            continue  # no pair to be judged by
        interval = ab.paired_bootstrap(hits[None, keep], other[0][None, keep], component[keep], seed=0)
        keys = [f"{prefix}.{name}", f"{prefix}.{name}.low", f"{prefix}.{name}.high"]
        found |= dict(zip(keys, map(float, interval), strict=True))
    return found


def _ceiling(plan: Plan, logs: Logs, arms: ab.Arms) -> tuple[float, float]:
    """What an oracle would score; the spread of true effects is learned on tests outside the first fold."""
    rest = np.setdiff1d(np.arange(len(logs)), plan.parts[0].held_out)
    found = ab.ceiling(ab.arms_of(logs.take(rest), plan.component_n[rest]), arms)
    return found["pair_ceiling"], found["pair_ceiling_z196"]
