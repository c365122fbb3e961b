"""Reward models: each loss orders texts it has not seen; what they read, refuse, export and leave unread."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from small_log import write_arms
from tiny_policy import GROUP, LENGTH, ROWS, TEXTS, WORDS, count, reward_of, tiny

from deconfound_jax.align.reward_model import Outcomes, pairwise_objective, pointwise_objective, read_rewards
from deconfound_jax.config import Align, Lora, RewardModel
from deconfound_jax.models.params import load_params
from deconfound_jax.models.pretrained import load_reward_model
from deconfound_jax.models.tokenizer import BEGIN, PAD
from deconfound_jax.recipes.reward_model import (
    Trained,
    check_reward_model,
    model_rewards,
    reward_model_stage,
    train_reward_model,
)
from deconfound_jax.recipes.stage import Record
from deconfound_jax.structs import Logs, Pairs, Roles
from experiments import train_reward_model as script
from experiments.presets import PRESETS

PAIRWISE = RewardModel(steps=40, groups=8, group_size=GROUP, learning_rate=1e-2)
CONFIGS = {
    "pairwise": PAIRWISE,
    "normal": dataclasses.replace(PAIRWISE, loss="normal"),
    "binomial": dataclasses.replace(PAIRWISE, loss="binomial", target="outcome"),
    "ordinal": dataclasses.replace(PAIRWISE, loss="ordinal", target="outcome"),
}
RISKED = Align(accept_risk=True)


READ = jax.jit(read_rewards, static_argnums=(0, 1))


def held_out() -> np.ndarray:
    """Texts that are not in the log."""
    rng = np.random.default_rng(5)
    texts = [" ".join(rng.choice(list(WORDS.record["words"]), rng.integers(2, LENGTH - 1))) for _ in range(200)]
    return WORDS.encode(texts, LENGTH)


def pair_accuracy(reward_n, tokens_nl) -> float:
    """Of pairs whose true rewards differ."""
    true_n = count(tokens_nl)
    a, b = np.triu_indices(len(true_n), 1)
    differ = true_n[a] != true_n[b]
    return float((np.sign(reward_n[a] - reward_n[b]) == np.sign(true_n[a] - true_n[b]))[differ].mean())


def log_of(loss: str, sign: float) -> Logs:
    """Clicks of 1,000 or so exposures, or grades from 0 to 4, that move with the true reward."""
    rng, good_n = np.random.default_rng(2), sign * count(TEXTS.tokens_nl)
    columns = {"text": np.asarray([f"t{i}" for i in range(ROWS)], object)}
    if loss == "ordinal":
        grades = np.clip(np.round(2 + good_n + 0.3 * rng.normal(size=ROWS)), 0, 4)
        return Logs.of(columns | {"outcome": grades}, Roles())
    shown = 1000 + rng.integers(500, size=ROWS)
    clicks = rng.binomial(shown, 1 / (1 + np.exp(3 - 0.3 * good_n)))
    return Logs.of(columns | {"shown": shown, "outcome": clicks}, Roles(exposure="shown"))


def train(workdir, stage, config, learned, seed=0, align=RISKED, texts=TEXTS):
    of = tiny()
    return train_reward_model(of.decoder, stage, of.reference, texts, learned, config, align, seed,
                              Record(workdir, "model", 1000))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "rank"), [("pairwise", 0), ("pairwise", 4), ("normal", 0), ("binomial", 0), ("ordinal", 0)]
)
def test_a_reward_model_orders_texts_it_has_not_seen(tmp_path, name, rank):
    config, tokens_nl = CONFIGS[name], held_out()
    stage = reward_model_stage(tiny().decoder, config)
    align = dataclasses.replace(RISKED, lora=Lora(rank=rank))
    for seed, sign in ((0, 1.0), (1, -1.0)):
        learned = reward_of(TEXTS.tokens_nl, sign) if config.target == "reward" else log_of(name, sign)
        model = train(tmp_path / str(seed), stage, config, learned, seed, align)
        found_n = model_rewards(tiny().decoder, model, tokens_nl)
        accuracy = pair_accuracy(found_n, tokens_nl)
        assert accuracy > 0.75 if sign > 0 else accuracy < 0.25, accuracy
        # In units of what was learned from: a word is worth 1 of the reward, 0.3 of a logit of a click.
        worth = {"binomial": 0.3}.get(name, 1.0)
        assert 0.3 < sign * np.polyfit(count(tokens_nl), found_n, 1)[0] / worth < 1.7
    assert stage.traces() == 1


def test_a_completion_is_read_as_in_a_row_of_its_own():
    # What an export relies on: the classifier reads prompt and text in one row.
    of, rng = tiny(), np.random.default_rng(0)
    prompt_bq = np.asarray([[BEGIN, 4, 5], [PAD, BEGIN, 6]], np.int32)
    tokens_bgl = rng.integers(3, 10, (2, 2, 4)).astype(np.int32)
    tokens_bgl[0, 1, 2:] = PAD
    kernel_d = rng.normal(size=24).astype(np.float32)
    packed_bg = READ(of.decoder, "last", of.reference, kernel_d, tokens_bgl, prompt_bq)
    rows = [[*(t for t in prompt_bq[b] if t != PAD), *tokens_bgl[b, g]] for b in (0, 1) for g in (0, 1)]
    rows = np.asarray([row + [PAD] * (LENGTH - len(row)) for row in rows], np.int32)
    whole_bg = READ(of.decoder, "last", of.reference, kernel_d, rows[:, None])[:, 0].reshape(2, 2)
    np.testing.assert_allclose(packed_bg, whole_bg, atol=1e-5)
    assert np.ptp(packed_bg) > 0.1
    with pytest.raises(
        ValueError, match="prompt: expected at most Decoder.length = 8 positions with a text of 4, got 5"
    ):
        read_rewards(of.decoder, "last", of.reference, kernel_d, tokens_bgl, np.ones((2, 5), np.int32))


def test_objectives_hand_rewards_labels_and_knobs_to_their_losses():
    of, frozen = tiny(), {"margin": 0.3, "centering": 0.1}
    tokens_bgl = TEXTS.tokens_nl[:4].reshape(2, 2, LENGTH)
    params = {**of.reference, "reward": {"kernel": np.linspace(-1, 1, 24, dtype=np.float32), "shift": np.float32(0.4)}}
    r = np.asarray(READ(of.decoder, "mean", of.reference, params["reward"]["kernel"], tokens_bgl), np.float64)
    label, weight = np.float32([[0.8], [0.1]]), np.float32([[1.0], [2.0]])
    pairs = Pairs(tokens_bgl, None, label, weight)
    found = jax.jit(pairwise_objective(of.decoder, "mean"))(params, frozen, pairs, None)
    gap, s = r[:, 0] - r[:, 1], label[:, 0]
    expected = s * np.log1p(np.exp(0.3 - gap)) + (1 - s) * np.log1p(np.exp(0.3 + gap)) + 0.1 * r.sum(1) ** 2
    np.testing.assert_allclose(found[0], expected, rtol=1e-5)
    np.testing.assert_allclose(found[1], [1, 2])
    assert found[3]["agreement"] == pytest.approx(((gap > 0) == (s > 0.5)) @ [1, 2] / 3)

    singles = Outcomes(tokens_bgl[0], np.float32([3.0, 1.0]), np.float32([5.0, 2.0]), np.float32([1.0, 0.0]))
    loss_b, weight_b, *_ = jax.jit(pointwise_objective(of.decoder, "binomial", "mean"))(params, {}, singles, None)
    odds = 0.4 + r[0]
    np.testing.assert_allclose(loss_b, [3, 1] * np.log1p(np.exp(-odds)) + [2, 1] * np.log1p(np.exp(odds)), rtol=1e-5)
    np.testing.assert_allclose(weight_b, [1, 0])


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    stage = reward_model_stage(tiny().decoder, PAIRWISE)
    reward = reward_of(TEXTS.tokens_nl, 1.0)
    for loss, target in (("binomial", "reward"), ("pairwise", "outcome")):
        with pytest.raises(
            ValueError, match=f"reward_model.loss: expected one of .* for target={target}, got '{loss}'"
        ):
            check_reward_model(RewardModel(loss=loss, target=target))
    clicks, grades = log_of("binomial", 1.0), log_of("ordinal", 1.0)
    half = Logs.of(grades.columns | {"outcome": grades.outcome_n / 2}, Roles())
    more = Logs.of(clicks.columns | {"shown": clicks.outcome_n - 1}, clicks.roles)
    lost = Logs.of(grades.columns | {"outcome": np.where(np.arange(ROWS) == 3, np.nan, grades.outcome_n)}, Roles())
    switch = {"seen": (np.arange(ROWS) != 5).astype(float)}  # the outcome of row 5 is a number that nobody saw
    blind = Logs.of(grades.columns | switch, Roles(observed="seen"))
    double = TEXTS._replace(tokens_nl=TEXTS.tokens_nl[[0, 0, *range(2, ROWS)]])
    ordinal, binomial = CONFIGS["ordinal"], CONFIGS["binomial"]
    cases = [
        (PAIRWISE, reward, Align(), TEXTS, "reward.verdict: expected a verdict"),
        (PAIRWISE, reward, RISKED, double, "pairs: expected two different texts"),
        (PAIRWISE, reward, RISKED, TEXTS._replace(tokens_nl=TEXTS.tokens_nl + 90), "tokens: expected ids below"),
        (binomial, clicks, Align(), TEXTS, "reward_model.target: outcomes carry the confounders' part"),
        (binomial, more, RISKED, TEXTS, "roles.outcome: expected hits between 0 and the exposures .* rows k0, k1"),
        (ordinal, clicks, RISKED, TEXTS, "reward_model.loss: expected binomial for counts of 'shown', got 'ordinal'"),
        (ordinal, half, RISKED, TEXTS, "roles.outcome: expected at least two grades in whole numbers .* got 0, 0.5"),
        (ordinal, lost, RISKED, TEXTS, "roles.outcome: expected a number in every row, rows k3 have none"),
        (ordinal, blind, RISKED, TEXTS, "roles.outcome: expected a number in every row, rows k5 have none"),
        (ordinal, grades.take(np.arange(5)), RISKED, TEXTS, r"outcomes: expected one a text \(64\), got 5"),
    ]  # fmt: skip
    for config, learned, align, texts, message in cases:
        with pytest.raises(ValueError, match=message):
            train(tmp_path, stage, config, learned, align=align, texts=texts)
    assert stage.traces() == 0 and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="logs.path: expected a file of logs"):
        script.run(PRESETS["smoke"](), tmp_path)


def config_on(path, **changes):
    smoke = PRESETS["upworthy_smoke"]()
    return dataclasses.replace(smoke, logs=dataclasses.replace(smoke.logs, path=path), **changes)


def test_the_script_judges_exports_and_reads_no_outcome_of_held_out_arms(tmp_path, monkeypatch):
    smoke, learn, kept = PRESETS["upworthy_smoke"](), script.learn, {}

    def blind(config, plan, logs, *rest):
        clicks_n = logs.outcome_n.copy()
        clicks_n[plan.parts[0].held_out] = np.nan  # whatever is computed from it cannot be compared
        kept["fit"] = learn(config, plan, Logs.of(logs.columns | {logs.roles.outcome: clicks_n}, logs.roles), *rest)
        return kept["fit"]

    monkeypatch.setattr(script, "learn", blind)
    config = dataclasses.replace(
        smoke, logs=dataclasses.replace(smoke.logs, path=write_arms(tmp_path / "arms.parquet")),
        reward_model=RewardModel(steps=6, groups=4, learning_rate=3e-3),
        align=dataclasses.replace(smoke.align, lora=Lora(rank=2)),
    )  # fmt: skip
    results = script.run(config, tmp_path / "run")
    fitted, models, _ = kept["fit"]
    for method, model in models.items():
        for features in ("tokens", "reward_model"):
            assert 0 <= results[f"reward.one_arm.{features}.{method}.pair_accuracy"] <= 1
        assert results[f"reward_model.{method}.export"] == ""
        saved = load_params(tmp_path / f"run/reward_models/{method}.npz")
        assert set(saved) == {"lora", "reward"}
        np.testing.assert_array_equal(saved["reward"]["kernel"], model.kernel_d)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved))
    assert np.abs(models["naive"].kernel_d - models["deconfounded"].kernel_d).max() > 0
    assert results["reward_model.compilations"] == 1
    assert len(script.tables(config, results)[0]) == 4 and "reward_model features" in script.verdict(config, results)
    assert json.loads((tmp_path / "run" / "results.json").read_text())

    # The folder is the model: adapters merged, the head in units of the reward.
    shape, params, head_d = load_reward_model(tmp_path / "run" / "reward_models" / "deconfounded")
    tokens_nl, decoder = fitted.start.tokens_nl[:5], fitted.start.decoder
    expected_n = model_rewards(decoder, models["deconfounded"], tokens_nl)
    merged = Trained(params, head_d, 1.0, "last")
    np.testing.assert_allclose(model_rewards(decoder.clone(config=shape), merged, tokens_nl), expected_n, rtol=1e-4)
