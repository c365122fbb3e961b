"""What a study of real logs reads and how it divides the rows, decided without looking at an outcome."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from etils import epath

from deconfound_jax.config import Run
from deconfound_jax.logs.split import components, folds, one_arm, split
from deconfound_jax.recipes.choice import SCORES_OWN
from deconfound_jax.structs import Design, Logs
from deconfound_jax.train.files import writes


class Part(NamedTuple):
    """One log to learn from, and the rows it is judged on."""

    name: str
    train: np.ndarray
    held_out: np.ndarray


class Plan(NamedTuple):
    """Which rows are learned from and which are judged, decided without looking at an outcome."""

    parts: tuple[Part, ...]
    component_n: np.ndarray
    leaked: Mapping[str, float]  # what a split by group alone would have leaked


def check_config(config: Run) -> None:
    """Refuses before any compute what could only fail, or mislead, after it.

    Raises:
      ValueError: a role that judging needs is missing; a method, split or design that
        this study does not do.
    """
    for role in ("group", "exposure"):
        if not getattr(config.roles, role):
            raise ValueError(
                f"roles.{role}: expected a column, got none; arms are judged inside groups by their counts"
            )
    unknown = set(config.methods) - {"naive", "covariate", "deconfounded"}
    if unknown:
        raise ValueError(f"methods: expected naive, covariate or deconfounded on real logs, got {sorted(unknown)}")
    recipe, own = config.align.recipe, config.features.source == "tokens" and not config.policy.source
    if recipe in SCORES_OWN and not own:
        raise ValueError(f"align.recipe: {recipe} scores texts of its own, by features.source=tokens of an own decoder")
    if config.policy.sft and not config.policy.source:
        raise ValueError("policy.sft: expected a published model in policy.source; an own decoder is always "
                         "trained on the log's texts")  # fmt: skip
    by = config.logs.split.by
    if by != "components" and (config.logs.one_arm_logs or config.logs.observational):
        raise ValueError(f"logs.split.by: one_arm_logs and observational need 'components', got {by!r}")
    named = {c for t in Design.parse(config.causal.design).terms for c in (t.column, *t.instruments)}
    idle = set(config.roles.confounders) - named
    if idle and named:
        raise ValueError(
            f"roles.confounders: {sorted(idle)} have no term in causal.design and would not be adjusted for"
        )


def read_logs(config: Run, workdir: epath.Path) -> Logs:
    """Reads and checks the file that the config names; the design's columns are confounders and instruments."""
    from deconfound_jax.logs.read import read

    design = Design.parse(config.causal.design, config.causal.family, config.causal.response)
    levels = tuple(t.column for t in design.terms if t.kind in ("category", "intercept"))
    numbers = tuple(t.column for t in design.terms if t.kind in ("linear", "endogenous"))
    instruments = tuple(z for t in design.terms for z in t.instruments)
    levels = tuple(c for c in levels if c != config.roles.text)  # intercept(text) is no further column
    roles = dataclasses.replace(
        config.roles,
        confounders=tuple(dict.fromkeys((*config.roles.confounders, *levels, *numbers))),
        instruments=tuple(dict.fromkeys((*config.roles.instruments, *instruments))),
    )
    wanted = (config.logs.observational, config.logs.split.column, *config.logs.split.columns)
    extra = tuple(dict.fromkeys(c for c in wanted if c and c not in roles.columns()))
    rejected = workdir / "rejected_rows.jsonl" if writes() else os.devnull
    return read(
        config.logs.path, roles, categories=levels, numeric=numbers, extra=extra,
        on_bad_rows=config.logs.on_bad_rows, missing=config.logs.missing, rejected_path=rejected,
    )  # fmt: skip


def make_plan(config: Run, logs: Logs) -> Plan:
    """One-arm logs with a fold each and the observational window, or one plain split."""
    source = config.logs
    window = logs.columns[source.observational].astype(bool) if source.observational else np.zeros(len(logs), bool)
    by_components = source.split.by == "components"
    plain = split(logs, source.split, ~window if by_components else None)
    if not source.one_arm_logs:
        parts = [Part("log", plain.train[~window[plain.train]], plain.held_out)]
        if window.any():
            parts.append(Part("broken_window", np.flatnonzero(window), plain.held_out))
        return Plan(tuple(parts), plain.component_n, plain.leaked)
    component_n = components(logs, source.split.columns)
    fold_n = folds(component_n, source.one_arm_logs, source.split.seed, ~window)
    parts = []
    for k in range(source.one_arm_logs):
        train = one_arm(logs, np.flatnonzero((fold_n != k) & ~window), source.split.seed + k)
        parts.append(Part(f"one_arm{k}", train, np.flatnonzero(fold_n == k)))
    if window.any():
        parts.append(Part("broken_window", np.flatnonzero(window), np.flatnonzero(fold_n >= 0)))
    return Plan(tuple(parts), component_n, plain.leaked)
