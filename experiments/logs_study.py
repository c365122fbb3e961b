"""Real logs: rewards and policies learned from observational rows, judged on randomized arms.

The order that keeps the judged outcomes out: read and check, split, then hand the
fitting functions `logs.take(training rows)` and the texts of others without their
outcomes; `judge` alone is given the held-out arms.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from deconfound_jax.align.policy import variables_of
from deconfound_jax.align.scoring import text_reward
from deconfound_jax.causal.fit import fit_prepared
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.reward import Reward, model_form
from deconfound_jax.causal.terms import prepare
from deconfound_jax.causal.verdict import judged
from deconfound_jax.config import Run
from deconfound_jax.models.encoders import ENCODERS, encode_by
from deconfound_jax.models.features import cached, read_features
from deconfound_jax.recipes.choice import SCORES_OWN, align_policy, check_scale, config_of, residual_of, stage_of
from deconfound_jax.recipes.curve import policy_watch
from deconfound_jax.recipes.reference import decoder_features
from deconfound_jax.recipes.texts import Texts
from deconfound_jax.structs import Logs, fingerprint
from deconfound_jax.train.files import writes
from experiments import rundir
from experiments.judging import judge
from experiments.logs_plan import Part, Plan, check_config, make_plan, read_logs
from experiments.newsroom_study import designs
from experiments.start import Start, row_keys, start

_log = logging.getLogger(__name__)
_SHOWN = 6  # texts of a policy in the report


class Fitted(NamedTuple):
    """Everything learned, before anything is judged."""

    rewards: Mapping[tuple[str, str, str], Reward]  # (part, features, method) -> reward of every row of the file
    posteriors: Mapping[tuple[str, str, str], Posterior]
    policies: Mapping[str, Any]  # variables of the start's decoder
    start: Start
    features: Mapping[str, np.ndarray]
    samples: Mapping[str, list[str]]  # a few texts of each policy


def run(config: Run, workdir, preset: Run | None = None, on_step: Callable | None = None) -> dict[str, Any]:
    """Reads, plans, fits, judges, reports; returns what results.json holds."""
    check_config(config)
    check_scale(config, rundir.mesh_of(config))
    logs = read_logs(config, epath.Path(workdir))
    workdir = rundir.claim(workdir, config, preset, logs.fingerprint)
    plan = make_plan(config, logs)
    shares = ", ".join(f"{column} {share:.1%}" for column, share in plan.leaked.items())
    print(f"{len(logs)} rows. A split by {logs.roles.group} alone would have leaked to held-out rows: {shares}.")
    fitted = learn(config, plan, logs, workdir, on_step)
    results = judge(config, plan, logs, fitted, workdir)
    results |= {f"split.{config.name}.leaked.{column}": share for column, share in plan.leaked.items()}
    rundir.write_results(workdir, results)
    if writes() and (pages := rundir.pages()) is not None:
        pages.logs_page(config, results, plan, logs, fitted, tables(config, results), verdict(config, results), workdir)
    return results


def learn(config: Run, plan: Plan, logs: Logs, workdir: epath.Path, on_step=None) -> Fitted:
    """Reference, features, posteriors and policies. Outcomes are read of each part's training rows alone."""
    first = plan.parts[0]
    # texts the reference may read: all but the first fold's
    words_n = np.setdiff1d(np.arange(len(logs)), first.held_out)
    begun = start(config, logs, words_n, workdir, on_step)
    features = features_of(config, logs, begun, workdir, on_step)
    rewards, posteriors = fit_rewards(config, plan, logs, features, on_step)
    trained = train_policies(config, plan, logs, begun, rewards, posteriors, workdir, on_step)
    primary = feature_name(config)
    main = {method: posteriors[first.name, primary, method] for method in config.methods}
    saved = trained if begun.trained is None else {"sft": begun.trained} | trained
    rundir.save_run(workdir, saved, main, features[primary][first.train])
    base = {"base": begun.reference} if config.align.lora.rank else {}
    policies = {"sft": begun.reference} | {m: variables_of(params, base) for m, params in trained.items()}
    draw, key = begun.sampler(_SHOWN), jax.random.key(20_000 + config.seeds[0])
    samples = {m: begun.tokenizer.decode(draw(p, begun.reference, key)[0]) for m, p in policies.items()}
    return Fitted(rewards, posteriors, policies, begun, features, samples)


def features_of(config: Run, logs: Logs, begun: Start, workdir: epath.Path, on_step=None) -> dict[str, np.ndarray]:
    """phi(x) of every row's text: an own decoder's, and those that the config names."""
    found = {}
    if config.features.source == "tokens" or not config.policy.source:
        found["tokens"] = decoder_features(begun.decoder, begun.reference, begun.tokens_nl, config.features)
    if config.features.source != "tokens":
        found[feature_name(config)] = file_or_encoder(config, logs, workdir, on_step)
    return found


def fit_rewards(config: Run, plan: Plan, logs: Logs, features: Mapping, on_step=None) -> tuple[dict, dict]:
    """Posteriors and rewards by (part, features, method); a verdict on those that policies learn from."""
    roles = logs.roles
    rewards, posteriors = {}, {}
    for i, part in enumerate(plan.parts):
        for name, features_nd in features.items():
            for method, design in designs(config).items():
                prepared = prepare(logs.take(part.train), features_nd[part.train], design, config.causal)
                key = (part.name, name, method)
                posteriors[key] = fit_prepared(prepared, design, config.causal)
                if i == 0 and name == feature_name(config):  # the reward that policies learn from
                    groups_n = logs.codes(roles.group)[part.train] if roles.group else None
                    posteriors[key] = judged(posteriors[key], prepared, groups_n=groups_n)
                rewards[key] = model_form(posteriors[key], features_nd)
        if on_step:
            on_step("posteriors", i + 1, len(plan.parts), {})
    return rewards, posteriors


def train_policies(config: Run, plan: Plan, logs: Logs, begun: Start, rewards: Mapping, posteriors: Mapping,
                   workdir: epath.Path, on_step=None) -> dict[str, Any]:  # fmt: skip
    """What was trained of a policy a method, learned from the first part's training rows."""
    first, roles, primary, seed = plan.parts[0], logs.roles, feature_name(config), config.seeds[0]
    knobs, recipe = config_of(config), config.align.recipe
    if recipe in SCORES_OWN and (primary != "tokens" or config.policy.source):
        raise ValueError(f"align.recipe: {recipe} scores texts of its own, by features.source=tokens of an own decoder")
    stage = stage_of(begun.decoder, knobs, config.features, config.align.dispatch, config.align.accumulate,
                     rundir.mesh_of(config))  # fmt: skip
    codes_n = logs.codes(roles.pair_within)[first.train] if roles.pair_within else None
    texts = Texts(begun.tokens_nl[first.train], codes_n, begun.prompts(len(first.train)), row_keys(logs)[first.train])
    lora = bool(config.align.lora.rank)
    watch = policy_watch(begun.sampler(config.align.samples), begun.reference, jax.random.key(10_000 + seed), lora=lora)
    found = {}
    for method in config.methods:
        reward = rewards[first.name, primary, method]
        reward, anywhere, residual = dataclasses.replace(reward, draws_sn=reward.draws_sn[:, first.train]), None, None
        if recipe in SCORES_OWN:
            posterior = posteriors[first.name, primary, method]
            anywhere, residual = text_reward(posterior), residual_in(config, first, logs, begun, method, posterior)
        record = rundir.record_of(config, workdir, f"{recipe}-{method}", on_step)
        found[method] = align_policy(begun.decoder, stage, begun.reference, texts, reward, anywhere, knobs,
                                     rundir.risked(config.align, method), seed, record,
                                     [(config.align.evaluate_every, watch)], residual)  # fmt: skip
    return found


def residual_in(config: Run, part: Part, logs: Logs, begun: Start, method: str, posterior: Posterior) -> Reward | None:
    """The part's outcomes without the confounders' share, where the recipe learns from them; else None."""
    if config.align.recipe != "dr_cpo":
        return None
    features_nd = decoder_features(begun.decoder, begun.reference, begun.tokens_nl[part.train], config.features)
    prepared = prepare(logs.take(part.train), features_nd, designs(config)[method], config.causal)
    return residual_of(config_of(config), posterior, prepared)


def file_or_encoder(config: Run, logs: Logs, workdir: epath.Path, on_step=None) -> np.ndarray:
    """Features of every row's text: from a file of arrays, or an encoder, cached by the texts."""
    features = config.features
    if features.source not in ENCODERS:
        return read_features(features.source, len(logs), features.array, logs.roles.text)
    done = (lambda i, n: on_step(f"{features.source} features", i, n, {})) if on_step else None
    texts = fingerprint({"text": logs.columns[logs.roles.text]})
    key = f"{features.source}-{texts}-{features.weights}" + (features.pooling if features.source == "lm" else "")
    return cached(features.cache or workdir / "features", key, lambda: encode_by(features, logs.text, done))


def tables(config: Run, results: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """Rewards by log, features and method; then a row a one-arm log; then the policies."""
    metrics = ("pair_accuracy", "pair_accuracy_z196", "winner_hit_rate", "lift_per_1000", "confounder_correlation",
               "not_converged")  # fmt: skip
    prefixes = [
        k.removesuffix(".pair_accuracy") for k in results if k.startswith("reward.") and k.endswith(".pair_accuracy")
    ]
    overall = []
    for prefix in prefixes:
        _, log, features, method = prefix.split(".")
        overall.append(
            {"log": log, "features": features, "method": method} | {m: results.get(f"{prefix}.{m}") for m in metrics}
        )
    by_log = []
    for prefix in prefixes:
        _, log, features, method = prefix.split(".")
        for k, value in enumerate(results.get(f"{prefix}.pair_accuracy_z196.seeds", [])):
            by_log.append({"log": f"{log} {k}", "features": features, "method": method, "pair_accuracy_z196": value})
    policies = []
    for method in config.methods:
        key = f"policy.{config.name}.tokens.{method}"
        row = {"policy": method, "KL": f"{results[f'{key}.kl']:.2f} ± {results[f'{key}.kl_error']:.2f}"}
        policies.append(
            row | {m: _with_interval(results, f"{key}.{m}") for m in ("pair_accuracy", "pair_accuracy_z196")}
        )
    return [table for table in (overall, by_log, policies) if table]


def verdict(config: Run, results: Mapping[str, Any]) -> str:
    """Gain of deconfounded over naive on clear pairs, by log and features, then of the policies, with intervals."""
    pieces = []
    for key in (k for k in results if k.endswith("deconfounded.gain_z196")):
        kind, log, features, *_ = key.split(".")
        what = f"{log}, {features} features" if kind == "reward" else "policies' implicit reward"
        low, high = results[f"{key}.low"], results[f"{key}.high"]
        pieces.append(f"{what}: {100 * results[key]:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]")
    return "Deconfounded minus naive on held-out pairs with |z| > 1.96: " + "; ".join(pieces) + "." if pieces else ""


def _with_interval(results: Mapping[str, Any], key: str) -> str | None:
    """A share and its 95% interval; None where no pair was judged."""
    if key not in results:
        return None
    return f"{results[key]:.3f} [{results[f'{key}.low']:.3f}, {results[f'{key}.high']:.3f}]"


def feature_name(config: Run) -> str:
    """Which features policies learn from, as results name them."""
    source = config.features.source
    return source if source in ("tokens", *ENCODERS) else "file"
