"""Every recipe under every reward on the newsroom, whose truth is known, at equal KL.

    python -m experiments.recipes_study --record

The causal layer is fitted once a seed; SFT on the log's best texts, DPO, KTO, DRO, GRPO and best-of-n then learn from
four rewards: naive, covariate, ODIN, deconfounded. Knobs of the recipes were chosen on seeds 100 and 101: each comes to
about 1 nat. Policies are compared at equal KL, see `_at_equal_kl`. Half an hour on two cores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from deconfound_jax.align.baselines.data import reward_data
from deconfound_jax.align.baselines.odin import odin
from deconfound_jax.align.baselines.tune import tune
from deconfound_jax.align.scoring import TextReward, scored, text_reward
from deconfound_jax.causal.reward import Reward, model_form
from deconfound_jax.causal.spec import Prepared
from deconfound_jax.causal.terms import prepare
from deconfound_jax.config import Adam, Align, Dro, Grpo, Kto, Odin, Run, Top
from deconfound_jax.evaluate import truth
from deconfound_jax.recipes.best_of_n import best_of_curve
from deconfound_jax.recipes.choice import align_policy, config_of, stage_of
from deconfound_jax.recipes.joint import align_jointly
from deconfound_jax.recipes.reference import decoder_features, train_reference
from deconfound_jax.recipes.stage import Stage
from deconfound_jax.recipes.texts import Texts
from deconfound_jax.simulate import newsroom
from deconfound_jax.structs import Logs
from experiments import rundir
from experiments.cli import parse_study, progress, publish, tables_and_bars
from experiments.newsroom_study import Compiled, compile_once, curve_of, designs, fit_once, joint_of, newsroom_watch
from experiments.presets.newsroom import newsroom as preset

TRAINED = ("top", "dpo", "kto", "dro", "grpo")
REWARDS = ("naive", "covariate", "odin", "deconfounded")
JOINT_WITHIN = 0.03  # true share, of two stages


def base() -> Run:
    """The newsroom preset with a setting for every recipe; accept_risk: baselines train, too."""
    return dataclasses.replace(
        preset(),
        align=Align(evaluate_every=8, samples=2048, kl=1.0, accept_risk=True),
        top=Top(steps=96, batch=160, learning_rate=5e-4, share=0.15),
        kto=Kto(steps=96, batch=160, beta=0.5, learning_rate=2e-4),
        dro=Dro(steps=96, batch=160, tau=0.35, learning_rate=3e-4),
        grpo=Grpo(rounds=64, groups=32, group_size=8, learning_rate=2e-4, kl=0.2, kl_target=0.8),
        checkpoint_every=128,
    )


@dataclasses.dataclass(frozen=True)
class Recipes:
    """The study's own knobs."""

    name: str = "newsroom_recipes"
    workdir: str = "runs/recipes"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    recipes: tuple[str, ...] = (*TRAINED, "best_of_n")
    rewards: tuple[str, ...] = REWARDS
    joint: tuple[str, ...] = ("dpo", "kto", "dro", "grpo")  # recipes that also run as one compiled causal + policy step
    # ODIN's settings, of which a seed takes the one that predicts held-out pairs of its log best: the truth has no say
    odin: tuple[Odin, ...] = tuple(Odin(adam=Adam(learning_rate=rate)) for rate in (0.003, 0.01, 0.03))
    run: Run = dataclasses.field(default_factory=base)


class Learned(NamedTuple):
    """One seed before any policy."""

    seed: int
    logs: Logs
    texts: Texts
    reference: Any
    rewards: Mapping[str, Reward]
    anywhere: Mapping[str, TextReward]
    prepared: Prepared  # of the deconfounded design


def run(config: Recipes, workdir, on_step: Callable | None = None) -> dict[str, Any]:
    """Runs every seed, recipe and reward; returns what results.json holds.

    Raises:
      ValueError: the directory holds a study with other knobs; a reward to compare with is missing.
    """
    if missing := {"naive", "covariate", "deconfounded"} - set(config.rewards):
        raise ValueError(f"rewards: expected naive, covariate and deconfounded among them, got no {sorted(missing)}")
    workdir = rundir.claim(epath.Path(workdir), config.run, None, "newsroom")  # other seeds and recipes may come to it
    run = dataclasses.replace(config.run, methods=("naive", "covariate", "deconfounded"))
    compiled, curves, traces = compile_once(run), {}, {}
    trained = [recipe for recipe in config.recipes if recipe != "best_of_n"]
    scale = run.align.dispatch, run.align.accumulate, compiled.policy.mesh
    stages = {r: stage_of(compiled.decoder, config_of(_of(run, r)), run.features, *scale) for r in trained}
    joints: dict[Any, Stage] = {}
    for seed in config.seeds:
        found = learn(config, run, compiled, seed, workdir, on_step)
        watch = newsroom_watch(compiled, found.reference, seed)
        for recipe in config.recipes:
            for reward in config.rewards:
                at = (recipe, reward, seed)
                if recipe == "best_of_n":
                    curves[at] = best_of(run, compiled, found, reward)
                else:
                    curves[at] = policy(run, compiled, found, stages[recipe], recipe, reward, watch, workdir, on_step)
            if recipe in config.joint:
                curves[recipe, "joint", seed] = jointly(run, compiled, found, joints, recipe, watch, workdir, on_step)
    traces = {r: s.traces() for r, s in stages.items()} | {f"joint_{r}": s.traces() for (r, _), s in joints.items()}
    results = summarise(config, run, curves) | {f"newsroom.{r}.compilations": n for r, n in traces.items()}
    rundir.write_results(workdir, results)
    return results


def learn(config: Recipes, run: Run, c: Compiled, seed: int, workdir: epath.Path, on_step=None) -> Learned:
    """Reference, features and the four rewards of one seed."""
    logs, _ = newsroom.simulate(run.simulation, seed)
    tokens_nl = c.tokenizer.encode(logs.text, run.decoder.length)
    record = rundir.record_of(run, workdir, f"seed{seed}-sft", on_step)
    reference = train_reference(c.decoder, c.sft, tokens_nl, run.sft, seed, record)
    features_nd = decoder_features(c.decoder, reference, tokens_nl, run.features)
    causal = dataclasses.replace(run.causal, seed=seed)
    rewards, anywhere, prepared = {}, {}, None
    for method, design in designs(run).items():
        prepared = prepare(logs, features_nd, design, causal)
        path = workdir / "posterior" / f"seed{seed}-{method}.npz"
        posterior = fit_once(prepared, design, causal, path, logs.codes(logs.roles.group))
        rewards[method], anywhere[method] = model_form(posterior, features_nd), text_reward(posterior)
    if "odin" in config.rewards:
        data, key = reward_data(logs, features_nd, designs(run)["deconfounded"]), jax.random.key(seed)
        model = odin(data, tune(odin, data, config.odin, key).config, key)
        rewards["odin"] = model.reward(features_nd)
        # As many draws as the posteriors have, all equal: one compilation for all rewards.
        coefficients_sd = np.repeat(np.asarray(model.linear_d)[None], causal.draws, 0)
        arrays = (coefficients_sd, model.mean_d, model.sd_d)
        anywhere["odin"] = TextReward(*(jnp.asarray(a, jnp.float32) for a in arrays))
    texts = Texts(tokens_nl, logs.codes(logs.roles.pair_within))
    return Learned(seed, logs, texts, reference, rewards, anywhere, prepared)


def policy(run: Run, c: Compiled, found: Learned, stage: Stage, recipe: str, reward: str, watch, workdir, on_step):
    """(KL, true share) along the training of one policy."""
    name = f"seed{found.seed}-{recipe}-{reward}"
    align_policy(
        c.decoder, stage, found.reference, found.texts, found.rewards[reward], found.anywhere[reward],
        config_of(_of(run, recipe)), run.align, found.seed, rundir.record_of(run, workdir, name, on_step),
        [(run.align.evaluate_every, watch)],
    )  # fmt: skip
    return curve_of(workdir, name)


def jointly(run: Run, c: Compiled, found: Learned, joints: dict, recipe: str, watch, workdir, on_step):
    """The same, the causal part learning beside the policy."""
    name, spec, knobs = f"seed{found.seed}-{recipe}-joint", found.prepared.spec, config_of(_of(run, recipe))
    if (recipe, spec) not in joints:
        joints[recipe, spec] = joint_of(_of(run, recipe), c, spec)
    align_jointly(c.decoder, joints[recipe, spec], found.reference, found.texts, found.prepared, knobs, run.align,
                  run.joint, found.seed, rundir.record_of(run, workdir, name, on_step),
                  [(run.align.evaluate_every, watch)])  # fmt: skip
    return curve_of(workdir, name)


def best_of(run: Run, c: Compiled, found: Learned, reward: str) -> list[tuple[float, float]]:
    """(KL, true share) of the best of n, from one pool of the reference's samples."""
    key = jax.random.fold_in(jax.random.key(10_000 + found.seed), 1)
    tokens_nl = c.draw(found.reference, found.reference, key)[0]
    features_nd = decoder_features(c.decoder, found.reference, tokens_nl, run.features)
    score_n = scored(found.anywhere[reward].draws(jnp.asarray(features_nd)), run.best_of_n.kappa)
    true_n = newsroom.true_reward(c.tokenizer.decode(tokens_nl))
    gain = truth.expected_best(true_n, 8) - true_n.mean()
    points = best_of_curve(np.asarray(score_n), run.best_of_n.sizes, true_n)
    return [(point.kl, float((point.truth - true_n.mean()) / gain)) for point in points]


def summarise(config: Recipes, run: Run, curves: Mapping) -> dict[str, Any]:
    """Shares at equal KL, win counts, joint against two stages."""
    results: dict[str, Any] = {}
    for recipe in config.recipes:
        names, key = _names(config, recipe), f"newsroom.{recipe}"
        points = {s: _at_equal_kl(run, recipe, {n: curves[recipe, n, s] for n in names}) for s in config.seeds}
        results[f"{key}.kl.seeds"] = [points[s]["deconfounded"][0] for s in config.seeds]
        results[f"{key}.kl"] = float(np.mean(results[f"{key}.kl.seeds"]))
        for name in names:
            reached, values = zip(*(points[s][name] for s in config.seeds), strict=True)
            results[f"{key}.{name}.true_share"] = float(np.mean(values))
            results[f"{key}.{name}.true_share.seeds"] = list(values)
            results[f"{key}.{name}.kl.seeds"] = list(reached)
            results[f"{key}.{name}.final_kl.seeds"] = [curves[recipe, name, s][-1][0] for s in config.seeds]
            results[f"{key}.{name}.final_true_share.seeds"] = [curves[recipe, name, s][-1][1] for s in config.seeds]
        ours = results[f"{key}.deconfounded.true_share.seeds"]
        for rival in (n for n in config.rewards if n != "deconfounded"):
            pairs = zip(ours, results[f"{key}.{rival}.true_share.seeds"], strict=True)
            results[f"{key}.deconfounded.wins_over_{rival}"] = sum(a > b for a, b in pairs)
        if "joint" in names:
            difference = results[f"{key}.joint.true_share"] - results[f"{key}.deconfounded.true_share"]
            results[f"{key}.joint_minus_two_stage"] = difference
    return results


def _at_equal_kl(run: Run, recipe: str, curves: Mapping[str, Sequence]) -> dict[str, tuple[float, float]]:
    """(KL, true share) of each reward's policy where they are compared.

    At the end of training where a target holds the KL; else at the largest KL that naive, covariate, deconfounded and
    joint all reached, at most `align.kl`. A rival that never gets there is read at the largest KL it reached.
    """
    if recipe == "grpo" and run.grpo.kl_target:
        return {name: curve[-1] for name, curve in curves.items()}
    reached = {name: max(k for k, _ in curve) for name, curve in curves.items()}
    common = min(run.align.kl, *(k for name, k in reached.items() if name != "odin"))
    kl = {name: min(common, k) for name, k in reached.items()}
    return {name: (kl[name], truth.at_kl(curve, kl[name])) for name, curve in curves.items()}


def _names(config: Recipes, recipe: str) -> list[str]:
    return [*config.rewards, *(["joint"] if recipe in config.joint else [])]


def bars(config: Recipes, results: Mapping[str, Any]) -> list[str]:
    """What does not hold of what the study must show, as lines."""
    failed = []
    for recipe in config.recipes:
        key = f"newsroom.{recipe}"
        for rival in ("naive", "covariate"):
            ours, theirs = (results[f"{key}.{m}.true_share"] for m in ("deconfounded", rival))
            if not ours > theirs:
                failed.append(f"{key}: deconfounded {ours:.3f} is not above {rival} {theirs:.3f}")
        gap = results.get(f"{key}.joint_minus_two_stage", 0.0)
        if abs(gap) > JOINT_WITHIN:
            failed.append(f"{key}: joint minus two stages {gap:+.3f}, bar {JOINT_WITHIN}")
    return failed


def tables(config: Recipes, results: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """A row a recipe; then a row a recipe and seed."""
    overall, by_seed = [], []
    for recipe in config.recipes:
        key, n = f"newsroom.{recipe}", len(config.seeds)
        row = {
            "recipe": recipe,
            "KL": _range(results[f"{key}.{m}.kl.seeds"] for m in _names(config, recipe) if m != "odin"),
        }
        row |= {m: results[f"{key}.{m}.true_share"] for m in config.rewards}
        row |= {f"over {m}": f"{results[f'{key}.deconfounded.wins_over_{m}']} of {n}" for m in config.rewards[:-1]}
        overall.append(row | {"joint": results.get(f"{key}.joint.true_share")})
        names = _names(config, recipe)
        for i, seed in enumerate(config.seeds):
            row = {"recipe": recipe, "seed": seed}
            row["KL"] = _range([results[f"{key}.{m}.kl.seeds"][i]] for m in names if m != "odin")
            by_seed.append(row | {m: results[f"{key}.{m}.true_share.seeds"][i] for m in names})
    return [overall, by_seed]


def _range(kl: Iterable[Sequence[float]]) -> str:
    """The mean KL of each reward's policies, from the smallest to the largest; one number where they are equal."""
    low, high = min(means := [float(np.mean(seeds)) for seeds in kl]), max(means)
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"


def _of(run: Run, recipe: str) -> Run:
    return dataclasses.replace(run, align=dataclasses.replace(run.align, recipe=recipe))


def main(argv: Sequence[str] | None = None) -> None:
    config, record = parse_study(argv, Recipes, "Every recipe under every reward on the newsroom.")
    with progress() as on_step:
        results = run(config, config.workdir, on_step)
    publish(config, "recipes_study", tables_and_bars(tables(config, results), bars(config, results)), record)


if __name__ == "__main__":
    main()
