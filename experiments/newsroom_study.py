"""The newsroom study: policies on a simulation whose truth is known, compared at equal KL.

Per seed: simulate, train the reference, fit each method's reward, align a policy on
each, sample along the way. The truth is read only after training, to judge.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from deconfound_jax.align.joint import posterior_draws
from deconfound_jax.align.policy import variables_of
from deconfound_jax.align.scoring import text_reward
from deconfound_jax.causal.fit import fit_prepared
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.reward import Reward, model_form
from deconfound_jax.causal.spec import Prepared, Spec
from deconfound_jax.causal.terms import prepare
from deconfound_jax.causal.verdict import judged
from deconfound_jax.config import Run
from deconfound_jax.evaluate import truth
from deconfound_jax.models import tokenizer
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.params import load_params
from deconfound_jax.recipes.choice import align_policy, check_scale, config_of, residual_of, stage_of
from deconfound_jax.recipes.curve import Draw, policy_sampler, policy_watch
from deconfound_jax.recipes.joint import align_jointly, joint_stage
from deconfound_jax.recipes.reference import decoder_features, sft_stage, train_reference
from deconfound_jax.recipes.stage import Stage
from deconfound_jax.recipes.texts import Texts
from deconfound_jax.simulate import newsroom
from deconfound_jax.structs import Design, Logs
from deconfound_jax.train.files import write_whole, writes
from deconfound_jax.train.hosts import fetch
from deconfound_jax.train.loop import read_metrics
from experiments import rundir

Curve = list[tuple[float, float]]  # (KL, true share) along a policy's training


class Compiled(NamedTuple):
    """What compiles once and serves every seed and method."""

    decoder: Decoder
    tokenizer: tokenizer.Tokenizer
    sft: Stage
    policy: Stage  # of the recipe that align.recipe names
    draw: Draw


class Seed(NamedTuple):
    """What one seed leaves behind for tables and report."""

    logs: Logs
    truth: newsroom.Truth
    features_nd: np.ndarray
    prepared: Mapping[str, Prepared]
    posteriors: Mapping[str, Posterior]
    rewards: Mapping[str, Reward]
    curves: Mapping[str, Curve]


def run(config: Run, workdir, preset: Run | None = None, on_step: Callable | None = None) -> dict[str, Any]:
    """Runs all seeds and writes results.json and report.html; returns the results."""
    if config.features.source != "tokens":
        raise ValueError(f"features.source: the newsroom study fits 'tokens', got {config.features.source!r}")
    simulated = [newsroom.simulate(config.simulation, seed) for seed in config.seeds]
    compiled = compile_once(config)
    workdir = rundir.claim(workdir, config, preset, simulated[0][0].fingerprint)
    if writes():
        compiled.tokenizer.save(workdir / "tokenizer.json")
    joints: dict[Any, Stage] = {}
    seeds = [
        run_seed(config, compiled, joints, seed, logs, known, workdir, on_step)
        for seed, (logs, known) in zip(config.seeds, simulated, strict=True)
    ]
    results = summarise(config, seeds)
    counts = {
        "sft": compiled.sft.traces(),
        config.align.recipe: compiled.policy.traces(),
        "joint": [j.traces() for j in joints.values()],
    }
    rundir.write_results(workdir, results)
    if writes():
        write_whole(workdir / "compilations.json", rundir.dump_json(counts))
        _report(config, results, seeds[0], compiled, workdir)
    return results


def compile_once(config: Run) -> Compiled:
    """The run's steps on its mesh; what does not divide is refused here, before anything is compiled."""
    words = tokenizer.closed(newsroom.vocabulary(config.simulation))
    decoder, align, mesh = Decoder(config.decoder, words.size), config.align, rundir.mesh_of(config)
    check_scale(config, mesh)
    sft = sft_stage(decoder, config.sft, align.accumulate).on(mesh)
    policy = stage_of(decoder, config_of(config), config.features, align.dispatch, align.accumulate, mesh)
    return Compiled(decoder, words, sft, policy, policy_sampler(decoder, align.samples))


def joint_of(config: Run, compiled: Compiled, spec: Spec) -> Stage:
    """The joint step of the recipe that the config names, on the run's mesh."""
    align = config.align
    stage = joint_stage(compiled.decoder, spec, config_of(config), config.joint, config.features, align.dispatch,
                        align.accumulate)  # fmt: skip
    return stage.on(compiled.policy.mesh)


def designs(config: Run) -> dict[str, Design]:
    """Each method's causal assumptions: none, the confounders as covariates, the design."""
    full = Design.parse(config.causal.design, config.causal.family, config.causal.response)
    known = {
        "naive": full.without_terms(),
        "covariate": full.without_instruments(),
        "deconfounded": full,
        "joint": full,
    }
    unknown = set(config.methods) - set(known)
    if unknown:
        raise ValueError(f"methods: expected some of {sorted(known)}, got {sorted(unknown)}")
    return {method: known[method] for method in config.methods}


def run_seed(config: Run, compiled: Compiled, joints: dict, seed: int, logs: Logs, known: newsroom.Truth,
             workdir: epath.Path, on_step) -> Seed:  # fmt: skip
    """Reference, fits and policies of one seed."""
    c, causal = compiled, dataclasses.replace(config.causal, seed=seed)
    tokens_nl = c.tokenizer.encode(logs.text, config.decoder.length)
    reference = train_reference(c.decoder, c.sft, tokens_nl, config.sft, seed,
                                rundir.record_of(config, workdir, f"seed{seed}-sft", on_step))  # fmt: skip
    features_nd = decoder_features(c.decoder, reference, tokens_nl, config.features)
    watch = [(config.align.evaluate_every, newsroom_watch(c, reference, seed, bool(config.align.lora.rank)))]
    texts = Texts(tokens_nl, logs.codes(logs.roles.pair_within))
    prepared, posteriors, rewards, policies = {}, {}, {}, {"sft": reference}
    for method, design in designs(config).items():
        prepared[method] = prepare(logs, features_nd, design, causal)
        record = rundir.record_of(config, workdir, f"seed{seed}-{method}", on_step)
        if method == "joint":
            spec, knobs = prepared[method].spec, config_of(config)
            stage = joints.setdefault(spec, joint_of(config, c, spec))
            state = align_jointly(c.decoder, stage, reference, texts, prepared[method], knobs, config.align,
                                  config.joint, seed, record, watch)  # fmt: skip
            policies[method] = state.params
            posteriors[method] = _joint_posterior(prepared[method], design, causal, state)
            rewards[method] = model_form(posteriors[method], features_nd)
            continue
        path = workdir / "posterior" / f"seed{seed}-{method}.npz"
        posteriors[method] = fit_once(prepared[method], design, causal, path, logs.codes(logs.roles.group))
        rewards[method] = model_form(posteriors[method], features_nd)
        policies[method] = align_policy(
            c.decoder, c.policy, reference, texts, rewards[method], text_reward(posteriors[method]),
            config_of(config), rundir.risked(config.align, method), seed, record, watch,
            residual_of(config_of(config), posteriors[method], prepared[method]),
        )  # fmt: skip
    if seed == config.seeds[0]:
        rundir.save_run(workdir, policies, posteriors, features_nd)
    curves = {m: curve_of(workdir, f"seed{seed}-{m}") for m in config.methods}
    return Seed(logs, known, features_nd, prepared, posteriors, rewards, curves)


def newsroom_watch(compiled: Compiled, reference: Any, seed: int, lora: bool = False) -> Callable:
    """Evaluator of a policy by the truth: KL, true share, the share of texts off the grammar."""
    c, key = compiled, jax.random.key(10_000 + seed)
    base_f = newsroom.true_reward(c.tokenizer.decode(c.draw(reference, reference, key)[0]))

    def truly(tokens_nl):
        texts = c.tokenizer.decode(tokens_nl)
        off = float(np.mean([newsroom.parse(text) is None for text in texts]))
        return {"true_share": truth.true_share(newsroom.true_reward(texts), base_f), "off_grammar": off}

    return policy_watch(c.draw, reference, jax.random.fold_in(key, 1), truth=truly, lora=lora)


def summarise(config: Run, seeds: list[Seed]) -> dict[str, Any]:
    """Flat results: shares at the KL that every method of a seed reached, rewards against the truth."""
    results: dict[str, Any] = {}
    common = [min(config.align.kl, *(max(kl for kl, _ in s.curves[m]) for m in config.methods)) for s in seeds]
    results[f"policy.{config.name}.tokens.sft.true_share"] = 0.0  # by definition of the share
    results[f"policy.{config.name}.tokens.sft.kl"] = 0.0
    for method in config.methods:
        shares = [truth.at_kl(s.curves[method], kl) for s, kl in zip(seeds, common, strict=True)]
        _add(results, f"policy.{config.name}.tokens.{method}.true_share", shares)
        _add(results, f"policy.{config.name}.tokens.{method}.kl", common)
        _add(
            results, f"policy.{config.name}.tokens.{method}.final_true_share", [s.curves[method][-1][1] for s in seeds]
        )
        _add(results, f"policy.{config.name}.tokens.{method}.final_kl", [s.curves[method][-1][0] for s in seeds])
        rewards = [(s.rewards[method].mean, s) for s in seeds]
        _add(results, f"reward.{config.name}.tokens.{method}.truth_correlation",
             [float(np.corrcoef(r, s.truth.reward_n)[0, 1]) for r, s in rewards])  # fmt: skip
        _add(results, f"reward.{config.name}.tokens.{method}.confounder_correlation",
             [float(abs(np.corrcoef(r, s.logs.columns["popularity"])[0, 1])) for r, s in rewards])  # fmt: skip
        results[f"reward.{config.name}.tokens.{method}.status"] = [s.posteriors[method].status for s in seeds]
        if method != "joint":  # its scalars are a point: there is no spread for the checks to read
            found = [s.posteriors[method].verdict.status for s in seeds]
            results[f"reward.{config.name}.tokens.{method}.verdict"] = found
    best = rundir.best_method(config)
    for rival in (m for m in config.methods if m != best):
        mine, other = (results[f"policy.{config.name}.tokens.{m}.true_share.seeds"] for m in (best, rival))
        results[f"policy.{config.name}.tokens.{best}.wins_over_{rival}"] = sum(
            a > b for a, b in zip(mine, other, strict=True)
        )
    r2 = truth.probe_r2(seeds[0].features_nd, seeds[0].truth.attributes_nk, seed=0)
    results[f"features.{config.name}.tokens.probe_r2"] = [float(v) for v in r2]
    return results


def tables(config: Run, results: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """The mean row of each policy, and a row a seed."""
    key = f"policy.{config.name}.tokens"
    overall = [{"policy": "sft", "true share": 0.0, "KL": 0.0}]
    for m in config.methods:
        overall.append({
            "policy": m, "true share": results[f"{key}.{m}.true_share"], "KL": results[f"{key}.{m}.kl"],
            "reward-truth correlation": results[f"reward.{config.name}.tokens.{m}.truth_correlation"],
            "reward-popularity correlation": results[f"reward.{config.name}.tokens.{m}.confounder_correlation"],
        })  # fmt: skip
    by_seed = []
    for i, seed in enumerate(config.seeds):
        row = {"seed": seed, "KL": results[f"{key}.{config.methods[0]}.kl.seeds"][i]}
        by_seed.append(row | {m: results[f"{key}.{m}.true_share.seeds"][i] for m in config.methods})
    return [overall, by_seed]


def verdict(config: Run, results: Mapping[str, Any]) -> str:
    """Who won, in how many seeds, and what did not converge."""
    key, best, n = f"policy.{config.name}.tokens", rundir.best_method(config), len(config.seeds)
    pieces = [f"{r} in {results[f'{key}.{best}.wins_over_{r}']} of {n} seeds" for r in config.methods if r != best]
    sentence = f"At equal KL the {best} policy beats {' and '.join(pieces)}." if pieces else ""
    weak = [m for m in config.methods if "not converged" in results[f"reward.{config.name}.tokens.{m}.status"]]
    return sentence + (f" Not converged in some seeds: {', '.join(weak)}." if weak else "")


def fit_once(prepared: Prepared, design: Design, causal, path: epath.Path, groups_n: np.ndarray) -> Posterior:
    """Fits, or reads what a killed run had fitted."""
    if path.exists():
        return Posterior.load(path)
    posterior = judged(fit_prepared(prepared, design, causal), prepared, groups_n=groups_n)
    if not writes():
        return posterior
    path.parent.mkdir(parents=True, exist_ok=True)
    posterior.save(path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)  # a kill while writing leaves no half file under the name
    return posterior


def _joint_posterior(prepared: Prepared, design: Design, causal, state) -> Posterior:
    """What the joint state knows at the end of training; its scalars are a point."""
    draws = posterior_draws(prepared.spec, fetch(state.causal), causal.draws, jax.random.key(causal.seed))
    draws = {name: np.asarray(value, np.float64) for name, value in draws.items()}
    finite = all(np.isfinite(value).all() for value in draws.values())
    why = "carried by the joint step; scalars are a point"
    scaling = {name: np.asarray(value) for name, value in prepared.scaling.items()}
    return Posterior(draws, design, scaling, {"method": "joint", "why": why, "converged": finite})


def curve_of(workdir: epath.Path, name: str) -> Curve:
    rows = [row for row in read_metrics(workdir, name) if row.get("eval")]
    return [(row["kl"], row["true_share"]) for row in rows]


def _add(results: dict, key: str, values: list[float]) -> None:
    results[key], results[f"{key}.seeds"] = float(np.mean(values)), [float(v) for v in values]
    if len(values) > 1:
        results[f"{key}.low"], results[f"{key}.high"] = float(np.min(values)), float(np.max(values))


def _report(config: Run, results: Mapping[str, Any], first: Seed, compiled: Compiled, workdir: epath.Path) -> None:
    if (pages := rundir.pages()) is None:
        return
    trained = {m: load_params(workdir / "policies" / f"{m}.npz") for m in ("sft", *config.methods)}
    samples = {}
    for method, own in trained.items():
        params = variables_of(own, {} if "params" in own else {"base": trained["sft"]})
        tokens = compiled.draw(params, params, jax.random.key(0))[0]
        samples[method] = compiled.tokenizer.decode(tokens[: config.report.n_examples])
    pages.newsroom_page(config, results, first, samples, tables(config, results), verdict(config, results), workdir)
