"""What teaches nothing, or not what it says, is refused by name before a step is traced: by recipes, by configs."""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
from small_log import write_arms
from tiny_policy import FEATURES, LENGTH, TEXTS, log_of, reward_anywhere, reward_of, tiny

from deconfound_jax.causal.reward import Reward
from deconfound_jax.causal.terms import prepare
from deconfound_jax.causal.verdict import Verdict
from deconfound_jax.config import Align, Dpo, Dro, Grpo, Joint, Kto, Top
from deconfound_jax.models.tokenizer import BEGIN, PAD
from deconfound_jax.recipes.choice import align_policy, stage_of
from deconfound_jax.recipes.joint import align_jointly, joint_stage
from deconfound_jax.recipes.rounds import align_grpo
from deconfound_jax.recipes.stage import Record
from deconfound_jax.structs import Design
from experiments import align, logs_plan, logs_study, rundir
from experiments.cli import parse_run
from experiments.start import Start

CONFIGS = {"dpo": Dpo(group_size=4), "top": Top(), "kto": Kto(), "dro": Dro(), "grpo": Grpo()}
RECIPES = ("dpo", "top", "kto", "dro", "joint dpo", "joint kto")  # those that read the log's texts
TOKENS_NL = TEXTS.tokens_nl
RISKY = Align(accept_risk=True)
UNJUDGED = reward_of(TOKENS_NL, 1.0)


def judged(status):
    return dataclasses.replace(UNJUDGED, verdict=Verdict(status, ("the instrument is weak.",), (), (), ()))


def texts_with(rows, tokens_l=None, **changes):
    """The tiny log's texts, those of `rows` replaced."""
    tokens_nl = TOKENS_NL.copy()
    if tokens_l is not None:
        tokens_nl[rows] = tokens_l
    return TEXTS._replace(tokens_nl=tokens_nl, **changes)


def refuse(workdir, recipe, texts, message, reference=..., reward=UNJUDGED, align=RISKY, anywhere=..., joint=None):
    """Runs a recipe that must not begin: no step traced, not a file written."""
    of, name = tiny(), recipe.removeprefix("joint ")
    reference = of.reference if reference is ... else reference
    record, before = Record(workdir, "stage", 10), sorted(os.listdir(workdir))
    if recipe.startswith("joint"):
        joint = joint or Joint(rows=32, warm_rows=64)
        features_nd = np.random.default_rng(0).normal(size=(len(TOKENS_NL), 2))
        prepared = prepare(log_of(TOKENS_NL, 1.0), features_nd, Design.parse("category(week)"))
        stage = joint_stage(of.decoder, prepared.spec, CONFIGS[name], joint)
        with pytest.raises(ValueError, match=message):
            align_jointly(of.decoder, stage, reference, texts, prepared, CONFIGS[name], align, joint, 0, record)
    else:
        stage = stage_of(of.decoder, CONFIGS[name], FEATURES)
        anywhere = reward_anywhere(1.0) if anywhere is ... else anywhere
        with pytest.raises(ValueError, match=message):
            align_policy(of.decoder, stage, reference, texts, reward, anywhere, CONFIGS[name], align, 0, record)
    assert stage.traces() == 0 and sorted(os.listdir(workdir)) == before


EMPTY = [BEGIN, *[PAD] * (LENGTH - 1)]  # nothing is left behind BEGIN
CASES = {
    "cut to nothing": (
        texts_with([3, 9], EMPTY),
        r"tokens: expected a token after BEGIN in every text, rows \['k3', 'k9'\]",
    ),
    "cut to nothing behind a prompt": (
        texts_with([3, 9], PAD, prompt_nq=TOKENS_NL[:, :1]),
        r"tokens: expected one behind every prompt, rows k3, k9 have none",
    ),
    "no prompt": (
        texts_with([], prompt_nq=np.where(np.arange(len(TOKENS_NL)) == 5, PAD, BEGIN)[:, None]),
        r"prompt: expected a token in every row, rows k5 have none",
    ),
    "another vocabulary": (
        texts_with([7], [BEGIN, 10, *[PAD] * (LENGTH - 2)]),
        r"tokens: expected ids below the decoder's vocabulary of 10, got 10 \(rows k7\)",
    ),
    "a prompt of another vocabulary": (
        texts_with([], prompt_nq=np.where(np.arange(len(TOKENS_NL)) == 5, 99, BEGIN)[:, None]),
        r"prompt: expected ids below the decoder's vocabulary of 10, got 99 \(rows k5\)",
    ),
    "other prompts in a pair": (
        texts_with([], prompt_nq=np.where(np.arange(len(TOKENS_NL)) == 5, 4, BEGIN)[:, None]),
        r"roles\.pair_within: expected one prompt inside a value, rows k5 differ",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_texts_that_cannot_be_learned(tmp_path, case):
    for recipe in RECIPES:
        refuse(tmp_path, recipe, *CASES[case])


def test_a_missing_reference(tmp_path):
    for recipe in (*RECIPES, "grpo", "joint grpo"):
        refuse(tmp_path, recipe, TEXTS, r"reference: expected the parameters of a reference policy", None)


@pytest.mark.parametrize("recipe", ["dpo", "joint dpo"])
def test_pairs_that_compare_nothing(tmp_path, recipe):
    equal = texts_with([1], TOKENS_NL[0])
    refuse(tmp_path, recipe, equal, r"pairs: .*got 1 pairs of equal ones, the first of rows k[01], k[01]; .*=drop")
    alone = texts_with([], within_n=np.arange(len(TOKENS_NL)))
    refuse(tmp_path, recipe, alone, r"roles\.pair_within: expected at least two rows .*got 64 rows of 64 values")
    drop = dataclasses.replace(RISKY, equal_texts="drop")
    all_equal = texts_with(slice(None), TOKENS_NL[0])
    refuse(tmp_path, recipe, all_equal, r"roles\.pair_within: expected a pair of different texts", align=drop)


@pytest.mark.parametrize("recipe", CONFIGS)
def test_a_reward_that_may_not_train(tmp_path, recipe):
    safe = Align()
    refuse(tmp_path, recipe, TEXTS, r"reward\.verdict: expected a verdict, got none", align=safe)
    for status in ("not_identified", "bounded"):
        message = f"{status}: the instrument is weak.*accept_risk"
        refuse(tmp_path, recipe, TEXTS, message, reward=judged(status), align=safe)


def test_a_reward_of_other_texts_or_without_noise_of_its_own(tmp_path):
    more = Reward(np.concatenate([UNJUDGED.draws_sn, UNJUDGED.draws_sn], 1), "model")
    for recipe in ("dpo", "top", "kto", "dro"):
        message = r"reward\.draws_sn: expected one value a text \(64\), got 128"
        refuse(tmp_path, recipe, TEXTS, message, reward=more)
        residual = dataclasses.replace(UNJUDGED, form="residual")
        refuse(tmp_path, recipe, TEXTS, r"reward\.form: draws of the residual form lack", reward=residual)
    codes = texts_with([], within_n=np.arange(2 * len(TOKENS_NL)) // 4)
    refuse(tmp_path, "dpo", codes, r"texts\.within_n: expected one value a text \(64\), got 128")


def test_knobs_that_leave_nothing_to_learn():
    cases = (
        (Grpo(group_size=1), r"grpo\.group_size: expected at least 2 texts to compare, got 1"),
        (Dpo(group_size=1), r"dpo\.group_size: expected at least 2 texts to compare, got 1"),
        (Dpo(loss="robust", noise=0.5), r"dpo\.noise: expected 0 to below 1/2 for the robust loss, got 0\.5"),
        (Top(share=25.0), r"top\.share: expected a share between 0 and 1, got 25"),
    )
    for config, message in cases:
        with pytest.raises(ValueError, match=message):
            stage_of(tiny().decoder, config, FEATURES)


def test_grpo_asks_for_a_reward_of_any_text_and_for_prompts(tmp_path):
    refuse(tmp_path, "grpo", TEXTS, r"anywhere: expected a reward of any text for grpo", anywhere=None)
    behind = texts_with([], prompt_nq=TOKENS_NL[:, :2])
    refuse(tmp_path, "grpo", behind, r"prompt: expected one token before a text for grpo, got 2; grpo_stage with fewer")
    elsewhere = texts_with([], prompt_nq=np.where(np.arange(len(TOKENS_NL)) == 5, PAD, BEGIN)[:, None])
    refuse(tmp_path, "grpo", elsewhere, r"prompt: expected a token in every row, rows 5 have none")
    of, stage = tiny(), stage_of(tiny().decoder, CONFIGS["grpo"], FEATURES)
    for prompts_nq, message in (([[BEGIN], [PAD]], "prompt: .* rows 1 have none"), ([[12]], "prompt: .* got 12")):
        with pytest.raises(ValueError, match=message):
            align_grpo(of.decoder, stage, of.reference, reward_anywhere(1.0), UNJUDGED, CONFIGS["grpo"], RISKY, 0,
                       Record(tmp_path, "grpo", 10), prompts_nq=np.array(prompts_nq))  # fmt: skip
    assert stage.traces() == 0 and not os.listdir(tmp_path)


def test_a_warm_up_that_outlasts_the_log(tmp_path):
    message = r"joint\.warm_rows: expected at most the log's 64 rows, got 65"
    refuse(tmp_path, "joint dpo", TEXTS, message, joint=Joint(rows=32, warm_rows=65))


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    return write_arms(tmp_path_factory.mktemp("arms") / "arms.parquet")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--roles.pair-within headline", r"roles\.pair_within: expected at least two rows with an equal value"),
        ("--align.equal-texts refuse --decoder.length 3", r"pairs: expected two different texts, got \d+ pairs of"),
        ("--align.no-accept-risk", "not_identified: the instrument is weak"),
        ("--align.recipe kto --align.no-accept-risk", "not_identified: the instrument is weak"),
    ],
)
def test_the_logs_study_refuses_by_its_flags(tmp_path, arms, flags, message):
    """From the command line to the recipe; the reference is not trained and the reward not fitted for it."""
    argv = ["--preset", "upworthy_smoke", "--logs", arms, "--methods", "deconfounded", *flags.split()]
    config = parse_run(argv, "")[0]
    logs = logs_plan.read_logs(config, rundir.epath.Path(tmp_path))
    plan = logs_plan.make_plan(config, logs)
    # Words as numbers below ten: texts that are cut short are equal.
    codes = {word: 4 + i % 6 for i, word in enumerate(sorted({w for text in logs.text for w in text.split()}))}
    length = config.decoder.length
    tokens_nl = np.full((len(logs), length), PAD, np.int32)
    for row, text in zip(tokens_nl, logs.text, strict=True):
        found = [BEGIN, *(codes[word] for word in text.split())][:length]
        row[: len(found)] = found
    begun = Start(tiny().decoder, tiny().reference, None, tokens_nl, None)
    reward = Reward(
        np.random.default_rng(0).normal(size=(4, len(logs))), "model", verdict=judged("not_identified").verdict
    )
    rewards = {("one_arm0", name, "deconfounded"): reward for name in ("tokens", "lm")}
    with pytest.raises(ValueError, match=message):
        logs_study.train_policies(config, plan, logs, begun, rewards, {}, rundir.epath.Path(tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_study_refuses_what_trains_nothing_before_it_begins(tmp_path, arms):
    real = ["--preset", "upworthy_smoke", "--logs", arms, "--align.recipe"]
    cases = (
        (["--preset", "smoke", "--align.recipe", "best_of_n"], r"align\.recipe: expected one that trains"),
        ([*real, "best_of_n"], r"align\.recipe: expected one that trains"),
        ([*real, "grpo", "--features.source", "lm"], r"align\.recipe: grpo scores texts of its own"),
        ([*real, "grpo", "--policy.source", "org/name"], r"align\.recipe: grpo scores texts of its own"),
        ([*real, "dpo", "--policy.sft"], r"policy\.sft: expected a published model in policy\.source"),
    )
    for argv, message in cases:
        config = parse_run(argv, "")[0]
        with pytest.raises(ValueError, match=message):
            align.run(config, tmp_path / "run")
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
