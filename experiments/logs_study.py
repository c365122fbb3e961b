"""Real logs: rewards and policies learned from observational rows, judged on randomized arms.

The order that keeps the judged outcomes out: read and check, split, then hand the
fitting functions `logs.take(training rows)` and the texts of others without their
outcomes; `judge` alone is given the held-out arms.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from deconfound_jax.causal.fit import fit_prepared
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.reward import Reward, model_form
from deconfound_jax.causal.terms import prepare
from deconfound_jax.config import Run
from deconfound_jax.evaluate import ab
from deconfound_jax.logs.split import components, folds, one_arm, split
from deconfound_jax.models import tokenizer
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.features import cached, read_features
from deconfound_jax.recipes.preference import align, dpo_stage
from deconfound_jax.recipes.reference import decoder_features, sft_stage, text_logprobs, train_reference
from deconfound_jax.recipes.stage import Record
from deconfound_jax.structs import Design, Logs, fingerprint
from experiments import rundir
from experiments.newsroom_study import designs, save_run

_log = logging.getLogger(__name__)


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


class Fitted(NamedTuple):
    """Everything learned, before anything is judged."""

    rewards: Mapping[tuple[str, str, str], Reward]  # (part, features, method) -> reward of every row of the file
    posteriors: Mapping[tuple[str, str, str], Posterior]
    policies: Mapping[str, Any]
    decoder: Decoder
    tokenizer: tokenizer.Tokenizer
    tokens_nl: np.ndarray
    features: Mapping[str, np.ndarray]


def run(config: Run, workdir, preset: Run | None = None, on_step: Callable | None = None) -> dict[str, Any]:
    """Reads, plans, fits, judges, reports; returns what results.json holds."""
    workdir = epath.Path(workdir)
    logs = read_logs(config, workdir)
    workdir = rundir.claim(workdir, config, preset, logs.fingerprint)
    plan = make_plan(config, logs)
    shares = ", ".join(f"{column} {share:.1%}" for column, share in plan.leaked.items())
    print(f"{len(logs)} rows. A split by {logs.roles.group} alone would have leaked to held-out rows: {shares}.")
    fitted = learn(config, plan, logs, workdir, on_step)
    results = judge(config, plan, logs, fitted)
    results |= {f"split.{config.name}.leaked.{column}": share for column, share in plan.leaked.items()}
    rundir.write_results(workdir, results)
    from experiments import pages  # jinja2 and matplotlib: an accelerator image may have neither

    pages.logs_page(config, results, plan, logs, fitted, tables(config, results), verdict(config, results), workdir)
    return results


def read_logs(config: Run, workdir: epath.Path) -> Logs:
    """Reads and checks the file that the config names."""
    from deconfound_jax.logs.read import read

    design = Design.parse(config.causal.design, config.causal.family, config.causal.response)
    levels = tuple(t.column for t in design.terms if t.kind in ("category", "intercept"))
    numbers = tuple(t.column for t in design.terms if t.kind in ("linear", "endogenous"))
    known = set(config.roles.columns())
    wanted = (config.logs.observational, config.logs.split.column, *config.logs.split.columns, *levels, *numbers)
    extra = tuple(dict.fromkeys(c for c in wanted if c and c not in known))
    return read(
        config.logs.path, config.roles, categories=levels, numeric=numbers, extra=extra,
        on_bad_rows=config.logs.on_bad_rows, missing=config.logs.missing, rejected_path=workdir / "rejected_rows.jsonl",
    )  # fmt: skip


def make_plan(config: Run, logs: Logs) -> Plan:
    """One-arm logs with a fold each and the observational window, or one plain split."""
    source = config.logs
    window = logs.columns[source.observational].astype(bool) if source.observational else np.zeros(len(logs), bool)
    by_components = source.split.by == "components"
    plain = split(logs, source.split, ~window if by_components else None)
    if not source.one_arm_logs:
        return Plan((Part("log", plain.train, plain.held_out),), plain.component_n, plain.leaked)
    component_n = components(logs, source.split.columns)
    fold_n = folds(component_n, source.one_arm_logs, source.split.seed, ~window)
    parts = []
    for k in range(source.one_arm_logs):
        train = one_arm(logs, np.flatnonzero((fold_n != k) & ~window), source.split.seed + k)
        parts.append(Part(f"one_arm{k}", train, np.flatnonzero(fold_n == k)))
    if window.any():
        parts.append(Part("broken_window", np.flatnonzero(window), np.flatnonzero(fold_n >= 0)))
    return Plan(tuple(parts), component_n, plain.leaked)


def learn(config: Run, plan: Plan, logs: Logs, workdir: epath.Path, on_step=None) -> Fitted:
    """Reference, features, posteriors and policies. Outcomes are read of each part's training rows alone."""
    first, roles = plan.parts[0], logs.roles
    # texts the reference may read: all but the first fold's
    words_n = np.setdiff1d(np.arange(len(logs)), first.held_out)
    texts = logs.text
    words = tokenizer.train_bpe([texts[i] for i in words_n], config.decoder.vocabulary)
    words.save(workdir / "tokenizer.json")
    decoder = Decoder(config.decoder, words.size)
    tokens_nl = words.encode(texts, config.decoder.length)
    cut = words.count_truncated(texts, config.decoder.length)
    if cut:
        _log.warning("decoder.length=%d cuts %d of %d texts short", config.decoder.length, cut, len(texts))
    seed, every = config.seeds[0], config.checkpoint_every
    unique_n = words_n[np.unique(logs.codes(roles.text)[words_n], return_index=True)[1]]
    reference = train_reference(decoder, sft_stage(decoder, config.sft), tokens_nl[unique_n], config.sft, seed,
                                Record(workdir, "sft", every, on_step))  # fmt: skip
    features = {"tokens": decoder_features(decoder, reference, tokens_nl, config.features)}
    if config.features.source != "tokens":
        features[_feature_name(config)] = file_or_encoder(config, logs, workdir, on_step)

    rewards, posteriors = {}, {}
    for i, part in enumerate(plan.parts):
        for name, features_nd in features.items():
            for method, design in designs(config).items():
                prepared = prepare(logs.take(part.train), features_nd[part.train], design, config.causal)
                key = (part.name, name, method)
                posteriors[key] = fit_prepared(prepared, design, config.causal)
                rewards[key] = model_form(posteriors[key], features_nd)
        if on_step:
            on_step("posteriors", i + 1, len(plan.parts), {})

    stage, policies, primary = dpo_stage(decoder, config.dpo), {"sft": reference}, _feature_name(config)
    codes_n = logs.codes(roles.pair_within)[unique_n] if roles.pair_within else None
    for method in config.methods:
        reward = rewards[first.name, primary, method]
        reward = Reward(reward.draws_sn[:, unique_n], reward.form, reward.converged)
        record = Record(workdir, f"dpo-{method}", every, on_step)
        policies[method] = align(
            decoder, stage, reference, tokens_nl[unique_n], reward, codes_n, config.dpo, seed, record
        )
    main = {method: posteriors[first.name, primary, method] for method in config.methods}
    save_run(workdir, policies, main, features[primary][first.train])
    return Fitted(rewards, posteriors, policies, decoder, words, tokens_nl, features)


def file_or_encoder(config: Run, logs: Logs, workdir: epath.Path, on_step=None) -> np.ndarray:
    """Features of every row's text: from a file of arrays, or the sentence encoder, cached by the texts."""
    source = config.features.source
    if source != "minilm":
        return read_features(source, len(logs), config.features.array, logs.roles.text)
    from deconfound_jax.models.encoder import encode

    def compute():
        done = (lambda i, n: on_step("minilm features", i, n, {})) if on_step else None
        return encode(logs.text, config.features.weights, on_batch=done)

    folder = config.features.cache or workdir / "features"
    texts = fingerprint({"text": logs.columns[logs.roles.text]})
    return cached(folder, f"minilm-{texts}-{config.features.weights}", compute)


def judge(config: Run, plan: Plan, logs: Logs, fitted: Fitted) -> dict[str, Any]:
    """Scores on the held-out arms: the only function that reads their outcomes."""
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
        own, ref = (text_logprobs(fitted.decoder, fitted.policies[m], fitted.tokens_nl[held]) for m in (method, "sft"))
        scored = ab.scores(own - ref, arms[0])
        results[f"policy.{config.name}.tokens.{method}.pair_accuracy"] = float(scored["pair_accuracy"])
        results[f"policy.{config.name}.tokens.{method}.pair_accuracy_z196"] = float(scored["pair_accuracy_z196"])
    return results


def tables(config: Run, results: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """Rewards by log, features and method; then a row a one-arm log; then the policies."""
    metrics = ("pair_accuracy", "pair_accuracy_z196", "winner_hit_rate", "lift_per_1000", "confounder_correlation")
    prefixes = [
        k.removesuffix(".pair_accuracy") for k in results if k.startswith("reward.") and k.endswith(".pair_accuracy")
    ]
    overall = []
    for prefix in prefixes:
        _, log, features, method = prefix.split(".")
        overall.append(
            {"log": log, "features": features, "method": method} | {m: results[f"{prefix}.{m}"] for m in metrics}
        )
    by_log = []
    for prefix in prefixes:
        _, log, features, method = prefix.split(".")
        for k, value in enumerate(results.get(f"{prefix}.pair_accuracy_z196.seeds", [])):
            by_log.append({"log": f"{log} {k}", "features": features, "method": method, "pair_accuracy_z196": value})
    policies = [
        {"policy": m, "pair_accuracy": results[f"policy.{config.name}.tokens.{m}.pair_accuracy"],
         "pair_accuracy_z196": results[f"policy.{config.name}.tokens.{m}.pair_accuracy_z196"]}
        for m in config.methods
    ]  # fmt: skip
    return [table for table in (overall, by_log, policies) if table]


def verdict(config: Run, results: Mapping[str, Any]) -> str:
    """Gain of deconfounded over naive on clear pairs, by log and features, with its interval."""
    pieces = []
    for key in (k for k in results if k.endswith("deconfounded.gain_z196")):
        _, log, features, *_ = key.split(".")
        low, high = results[f"{key}.low"], results[f"{key}.high"]
        pieces.append(
            f"{log}, {features} features: {100 * results[key]:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
        )
    return "Deconfounded minus naive on held-out pairs with |z| > 1.96: " + "; ".join(pieces) + "."


def _feature_name(config: Run) -> str:
    source = config.features.source
    return source if source in ("tokens", "minilm") else "file"


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
