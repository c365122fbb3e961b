"""A language model learns the reward: on the posterior, naive and deconfounded, judged on held-out randomized arms.

    python -m experiments.train_reward_model --preset upworthy --logs packages.parquet --workdir runs/reward_model
    python -m experiments.train_reward_model --preset logs --logs FILE --reward_model.target outcome \\
        --reward_model.loss binomial --align.accept_risk        # a baseline on the outcomes themselves

The causal layer is fitted on the first of the preset's logs; each method's posterior labels that log's texts, and a
reward model is trained on them (`--reward_model.*`, adapters by `--align.lora.rank`). Models and the posteriors' own
f(x) are judged on arms of tests that neither has seen. `reward_models/<method>` is a sequence classifier that
transformers loads, where the decoder can be one; `reward_models/<method>.npz` holds what was trained.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from deconfound_jax.causal.reward import Reward
from deconfound_jax.config import Run
from deconfound_jax.models.export import export_reward_model, find_tokenizer_files
from deconfound_jax.models.lora import merge_lora
from deconfound_jax.models.params import save_params
from deconfound_jax.models.pretrained import find_folder
from deconfound_jax.recipes.reward_model import (
    Trained,
    check_reward_model,
    model_rewards,
    reward_model_stage,
    train_reward_model,
)
from deconfound_jax.recipes.stage import Stage
from deconfound_jax.recipes.texts import Texts
from deconfound_jax.structs import Logs
from deconfound_jax.train.files import writes
from deconfound_jax.train.hosts import fetch
from experiments import rundir
from experiments.cli import markdown, parse_run, progress
from experiments.judging import judge
from experiments.logs_plan import Plan, check_config, make_plan, read_logs
from experiments.logs_study import Fitted, feature_name, features_of, fit_rewards, verdict
from experiments.start import Start, row_keys, start

FEATURES = "reward_model"  # what stands in results where others name features
_METRICS = ("pair_accuracy", "pair_accuracy_z196", "winner_hit_rate", "lift_per_1000", "confounder_correlation")


def run(config: Run, workdir, preset: Run | None = None, on_step: Callable | None = None) -> dict[str, Any]:
    """Reads, plans, fits, trains, judges, exports; returns what results.json holds.

    Raises:
      ValueError: what `logs_plan.check_config` and `recipes.reward_model` refuse; no log.
    """
    if not config.logs.path:
        raise ValueError("logs.path: expected a file of logs (`--logs FILE`), got none")
    check_config(config)
    check_reward_model(config.reward_model)
    logs = read_logs(config, epath.Path(workdir))
    workdir = rundir.claim(workdir, config, preset, logs.fingerprint)
    plan = make_plan(config, logs)
    plan = plan._replace(parts=plan.parts[:1])
    fitted, models, stage = learn(config, plan, logs, workdir, on_step)
    results = judge(config, plan, logs, fitted, workdir)
    results |= judge_models(config, plan, logs, fitted, models, workdir)
    results["reward_model.compilations"] = stage.traces()
    if fitted.start.trained is not None:
        rundir.save_policies(workdir, {"sft": fitted.start.trained})  # a base of adapters
    for method, model in models.items():
        whole = model._replace(**fetch({"variables": model.variables, "kernel_d": model.kernel_d}))  # by every process
        if writes():
            results[f"reward_model.{method}.export"] = save(config, fitted.start, whole, workdir, method)
    rundir.write_results(workdir, results)
    return results


def learn(config: Run, plan: Plan, logs: Logs, workdir: epath.Path, on_step=None):
    """Posteriors, then a reward model a method; outcomes are read of the part's training rows alone."""
    begun = start(config, logs, np.setdiff1d(np.arange(len(logs)), plan.parts[0].held_out), workdir, on_step)
    name = feature_name(config)
    features = {name: features_of(config, logs, begun, workdir, on_step)[name]}
    rewards, posteriors = fit_rewards(config, plan, logs, features, on_step)
    fitted = Fitted(rewards, posteriors, {"sft": begun.reference}, begun, features, {})
    align, mesh = config.align, rundir.mesh_of(config)
    stage = reward_model_stage(begun.decoder, config.reward_model, align.accumulate)
    stage = stage.dispatched(align.dispatch).on(mesh)
    names = config.methods if config.reward_model.target == "reward" else ("outcome",)
    return fitted, {m: train(config, plan, logs, fitted, stage, m, workdir, on_step) for m in names}, stage


def train(config: Run, plan: Plan, logs: Logs, fitted: Fitted, stage: Stage, method: str, workdir: epath.Path,
          on_step=None) -> Trained:  # fmt: skip
    """The reward model of one method's posterior, or, for `outcome`, of the log's own outcomes."""
    part, begun, roles = plan.parts[0], fitted.start, logs.roles
    codes_n = logs.codes(roles.pair_within)[part.train] if roles.pair_within else None
    texts = Texts(begun.tokens_nl[part.train], codes_n, begun.prompts(len(part.train)), row_keys(logs)[part.train])
    if method == "outcome":
        learned = logs.take(part.train)
    else:
        reward = fitted.rewards[part.name, feature_name(config), method]
        learned = dataclasses.replace(reward, draws_sn=reward.draws_sn[:, part.train])
    record = rundir.record_of(config, workdir, f"reward_model-{method}", on_step)
    return train_reward_model(begun.decoder, stage, begun.reference, texts, learned, config.reward_model,
                              rundir.risked(config.align, method), config.seeds[0], record)  # fmt: skip


def judge_models(config: Run, plan: Plan, logs: Logs, fitted: Fitted, models: Mapping[str, Trained],
                 workdir: epath.Path) -> dict[str, Any]:  # fmt: skip
    """Scores of the models on the held-out arms, under `reward.<log>.reward_model.<method>`."""
    part, begun, name = plan.parts[0], fitted.start, feature_name(config)
    rewards, posteriors = {}, {}
    for method, model in models.items():
        found_n = model_rewards(begun.decoder, model, begun.tokens_nl, begun.prompts(len(logs)))
        rewards[part.name, FEATURES, method] = Reward(found_n[None], FEATURES)
        # The status in results is that of the posterior that was learned from.
        labelled_by = method if method in config.methods else config.methods[0]
        posteriors[part.name, FEATURES, method] = fitted.posteriors[part.name, name, labelled_by]
    judged = Fitted(rewards, posteriors, fitted.policies, begun, {FEATURES: None}, {})
    return judge(dataclasses.replace(config, methods=tuple(models)), plan, logs, judged, workdir)


def save(config: Run, begun: Start, model: Trained, workdir: epath.Path, method: str) -> str:
    """Writes a model that lies on the host and, where there is a classifier of its shape, an export of it.

    Returns:
      "", or why there is no export.
    """
    variables, kernel_d = model.variables, model.kernel_d
    trained = {name: leaf for name, leaf in variables.items() if name == "lora" or "lora" not in variables}
    folder = workdir / "reward_models"
    save_params(folder / f"{method}.npz", {**trained, "reward": {"kernel": kernel_d}})
    if (folder / method).exists():
        return ""  # of a run that was resumed
    params = {"params": variables["params"]}
    params = merge_lora(params, variables["lora"]) if "lora" in variables else params
    shape, files, family, marks = begun.decoder.config, [], "gpt2", ()
    try:
        if config.policy.source:
            source = find_folder(config.policy.source)
            family, files = json.loads((source / "config.json").read_text())["model_type"], find_tokenizer_files(source)
            marks = (begun.tokenizer.eos, *begun.tokenizer.stop)
        else:
            shape = dataclasses.replace(shape, forbidden=())  # of samples: a classifier draws none
        pad = next(i for i in range(begun.decoder.vocabulary) if i not in marks)  # what no text ends with
        head_d = model.unit * kernel_d
        export_reward_model(folder / method, family, shape, params, head_d, pad, model.pooling, files)
    except (ValueError, OSError) as why:
        logging.getLogger(__name__).warning("%s is not exported: %s", method, why)
        return str(why)
    return ""


def tables(config: Run, results: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """A row a reward: posteriors and models."""
    rows = []
    for key in (k for k in results if k.startswith("reward.") and k.endswith(".pair_accuracy")):
        prefix = key.removesuffix(".pair_accuracy")
        _, log, features, method = prefix.split(".")
        what = "language model" if features == FEATURES else f"posterior, {features} features"
        row = {"log": log, "reward": what, "labels": method}
        rows.append(row | {metric: results.get(f"{prefix}.{metric}") for metric in _METRICS})
    return [rows]


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    config, preset, known = parse_run(argv, "Trains reward models on posteriors and judges them.")
    print(f"devices: {', '.join(map(str, jax.devices()))}; workdir: {known.workdir}")
    with progress() as on_step:
        results = run(config, known.workdir, preset, on_step)
    text = "\n\n".join([*map(markdown, tables(config, results)), verdict(config, results)])
    print(text)
    if known.record:
        print(f"recorded: {rundir.record(epath.Path(known.workdir), 'train_reward_model', config, text)}")


if __name__ == "__main__":
    main()
