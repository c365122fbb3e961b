"""Objectives: what they hand to the losses, by hand on a table of token scores.

The table is a language model whose context is the prompt alone: log p(token) = table[token] * sum(prompt) / 10.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deconfound_jax.align import preference, rollouts, scored
from deconfound_jax.align.logprobs import Scores, group_mask
from deconfound_jax.align.losses import weighted_mean
from deconfound_jax.models.tokenizer import PAD
from deconfound_jax.structs import Pairs, Rollouts, Scored

VOCABULARY = 13
PROMPT = np.array([[1, 4, 5], [1, 6, PAD]], np.int32)
TEXTS = np.random.default_rng(0).integers(2, VOCABULARY, (2, 3, 4)).astype(np.int32)
TEXTS[0, 1, 2:] = PAD
LENGTHS = (TEXTS != PAD).sum(-1)
WHOLE = np.concatenate([np.ones((2, 3, 1), np.int32), TEXTS], -1)  # BEGIN first
TABLE = -np.linspace(0.2, 3.0, VOCABULARY).astype(np.float32)
OTHER = 1.5 * TABLE - np.float32(0.2)
KNOBS = {"beta": 0.3, "noise": 0.1, "margin": 0.5, "strength": 0.4, "tau": 0.5, "kl": 0.2, "clip": 0.2, "ceiling": 1.0,
         "kl_target": np.inf}  # fmt: skip
LABEL, WEIGHT = np.float32([[0.9, 0.2, 0.5], [1.0, 0.0, 0.7]]), np.float32([[1, 2, 0], [1, 0.5, 1]])
REWARD = np.float32([[1.0, -0.5, 0.3], [0.2, 0.7, -2.0]])
REFERENCE = np.float32([[-5, -3, -6], [-7, -5, -4]])


def by_table(decoder, variables, tokens_bgl, prompt_bq=None):
    assert set(variables) == {"table"}, "a decoder gets the policy's variables alone"
    mask = group_mask(tokens_bgl, prompt_bq)
    targets = tokens_bgl[..., -mask.shape[-1] :]
    factor = jnp.ones((len(targets), 1, 1)) if prompt_bq is None else factors(prompt_bq)
    return Scores(jnp.where(mask, variables["table"][targets] * factor, 0.0), jnp.where(mask, 1.5, 0.0), None)


def factors(prompt_bq):
    return jnp.where(prompt_bq == PAD, 0, prompt_bq).sum(1)[:, None, None] / 10


@pytest.fixture(scope="module")
def table():
    """(builder, its choices) -> (batch, frozen, params) -> per example, weight, penalty, metrics, gradient."""

    @functools.cache
    def compiled(builder, *choices):
        objective = builder(None, *choices)

        @jax.jit
        def gradient(params, frozen, batch):
            def total(params):
                per_example, weight, penalty, metrics = objective(params, frozen, batch, None)
                return weighted_mean(per_example, weight) + penalty, (per_example, weight, penalty, metrics)

            return jax.grad(total, has_aux=True)(params)

        def run(batch, frozen=KNOBS, **params):
            slope, found = gradient({"table": jnp.asarray(TABLE), **params}, frozen, batch)
            return *found, slope

        return run

    with pytest.MonkeyPatch.context() as patch:
        for module in (preference, scored, rollouts):
            patch.setattr(module, "group_scores", by_table)
        yield compiled


def logprobs(table=TABLE, prompt=None):
    """Nats of TEXTS, (2, 3), by hand."""
    factor = np.ones((2, 1)) if prompt is None else np.where(prompt == PAD, 0, prompt).sum(1, keepdims=True) / 10
    return np.where(TEXTS == PAD, 0, table[TEXTS]).sum(-1) * factor


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("prompt", [None, PROMPT], ids=["whole", "prompted"])
def test_every_pair_of_a_group_with_its_label_and_weight(table, prompt):
    batch = Pairs(WHOLE if prompt is None else TEXTS, REFERENCE, LABEL, WEIGHT, prompt)
    loss, weight, penalty, metrics, _ = table(preference.preference_objective, "sigmoid")(batch)
    ratio = logprobs(prompt=prompt) - REFERENCE
    margins = np.concatenate([[h[0] - h[1], h[0] - h[2], h[1] - h[2]] for h in ratio])
    label, expected = LABEL.ravel(), 0.3 * margins
    by_hand = -label * np.log(sigmoid(expected)) - (1 - label) * np.log(sigmoid(-expected))
    np.testing.assert_allclose(loss, by_hand, rtol=1e-5)
    np.testing.assert_array_equal(weight, WEIGHT.ravel())
    assert penalty == 0
    agree = (WEIGHT.ravel() * ((margins > 0) == (label > 0.5))).sum() / WEIGHT.sum()
    assert metrics["agreement"] == pytest.approx(agree) and 0 < agree < 1
    halves = np.concatenate([[h[0] + h[1], h[0] + h[2], h[1] + h[2]] for h in ratio]) / 2
    assert metrics["logratio"] == pytest.approx((WEIGHT.ravel() * halves).sum() / WEIGHT.sum(), rel=1e-5)


@pytest.mark.parametrize("name", preference.PAIR_LOSSES)
def test_a_pair_loss_reads_its_own_scores_and_knobs(table, name):
    chosen = preference.PAIR_LOSSES[name]
    reference = REFERENCE if chosen.reference else None
    batch = Pairs(WHOLE, reference, LABEL, WEIGHT)
    loss, _, _, metrics, gradient = table(preference.preference_objective, name)(batch)
    score = logprobs() - REFERENCE if chosen.reference else logprobs() / LENGTHS
    pair = [(i, j) for i in range(3) for j in range(i + 1, 3)]
    first, second = (np.float32([score[b, p[side]] for b in range(2) for p in pair]) for side in (0, 1))
    knobs = {"simpo": (0.3, 0.5), "orpo": (0.4,), "conservative": (0.3, 0.1), "robust": (0.3, 0.1)}.get(name, (0.3,))
    np.testing.assert_allclose(loss, chosen.loss(first, second, LABEL.ravel(), *knobs), rtol=1e-4)
    assert np.abs(gradient["table"]).max() > 1e-3
    assert ("logratio" in metrics) == chosen.reference


def test_log_ratios_a_token(table):
    loss, *_ = table(preference.preference_objective, "ipo", True)(Pairs(WHOLE, REFERENCE, LABEL, WEIGHT))
    ratio = (logprobs() - REFERENCE) / LENGTHS
    np.testing.assert_allclose(loss[1], (ratio[0, 0] - ratio[0, 2] - (0.2 - 0.5) / 0.3) ** 2, rtol=1e-5)


SINGLE = Scored(WHOLE[:, 0], REFERENCE[:, 0], REWARD[:, 0], np.zeros(2, np.float32), LABEL[:, 1], np.float32([1, 2]))
PROMPTED = SINGLE._replace(tokens_bl=TEXTS[:, 0], prompt_bq=PROMPT)


def test_sft_is_the_mean_over_targets(table):
    loss, weight, _, _, _ = table(scored.sft_objective)(SINGLE._replace(reference_b=None), {})
    np.testing.assert_allclose(loss, -logprobs()[:, 0] / LENGTHS[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(weight, [1, 2])
    prompted, *_ = table(scored.sft_objective)(PROMPTED, {})
    np.testing.assert_allclose(prompted, -logprobs(prompt=PROMPT)[:, 0] / LENGTHS[:, 0], rtol=1e-6)


def kto_by_hand(ratio, z0):
    """Values, and the gradient of their weighted mean in the log-ratios where z0 is a number."""
    lead, d = 0.3 * (ratio - z0), SINGLE.label_b
    values = d * sigmoid(-lead) + (1 - d) * sigmoid(lead)
    return values, np.array([1, 2]) / 3 * 0.3 * sigmoid(lead) * sigmoid(-lead) * (1 - 2 * d)


@pytest.mark.parametrize("shift", [6.0, -6.0])
def test_kto_of_whole_texts_compares_with_the_batchs_drift(table, shift):
    batch = SINGLE._replace(reference_b=SINGLE.reference_b - shift)
    loss, weight, _, metrics, gradient = table(scored.kto_objective)(batch, {"beta": 0.3})
    ratio = logprobs()[:, 0] - batch.reference_b
    z0 = max((ratio[0] + 2 * ratio[1]) / 3, 0)
    assert (z0 > 0) == (shift > 0)
    values, slope = kto_by_hand(ratio, z0)
    np.testing.assert_allclose(loss, values, rtol=1e-5)
    np.testing.assert_allclose(metrics["z0"], z0, rtol=1e-5)
    expected = np.zeros(VOCABULARY)
    for row in range(2):
        np.add.at(expected, TEXTS[row, 0], slope[row])
    np.testing.assert_allclose(gradient["table"], expected, atol=1e-6)
    assert np.abs(expected).max() > 1e-3


@pytest.mark.parametrize("where", ["reference", "base"])
def test_kto_of_prompted_texts_compares_with_mismatched_ones(table, where):
    frozen = {"beta": 0.3, where: {"table": jnp.asarray(OTHER)}}
    loss, _, _, metrics, gradient = table(scored.kto_objective)(PROMPTED, frozen)
    factor = np.array([10, 7]) / 10
    mismatched = [(TABLE - OTHER)[TEXTS[1 - row, 0]].sum() * factor[row] for row in range(2)]
    z0 = max(np.mean(mismatched), 0)  # both at weight 1 * 2
    assert z0 > 0.5
    np.testing.assert_allclose(metrics["z0"], z0, rtol=1e-5)
    values, slope = kto_by_hand(logprobs(prompt=PROMPT)[:, 0] - SINGLE.reference_b, z0)
    np.testing.assert_allclose(loss, values, rtol=1e-5)
    expected = np.zeros(VOCABULARY)
    for row in range(2):
        np.add.at(expected, TEXTS[row, 0], slope[row] * factor[row])
    np.testing.assert_allclose(gradient["table"], expected, atol=1e-6)


def test_dro_trains_its_value_beside_the_policy(table):
    loss, weight, _, metrics, gradient = table(scored.dro_objective)(
        SINGLE, {"tau": 0.5}, value={"v": jnp.float32(0.25)}
    )
    gap = SINGLE.reward_b - 0.25 - 0.5 * (logprobs()[:, 0] - SINGLE.reference_b)
    np.testing.assert_allclose(loss, gap**2 / 2, rtol=1e-5)
    mean = (gap[0] + 2 * gap[1]) / 3
    np.testing.assert_allclose(gradient["value"]["v"], -mean, rtol=1e-5)
    assert metrics["gap"] == pytest.approx(mean, rel=1e-5) and metrics["value"] == 0.25
    np.testing.assert_array_equal(weight, [1, 2])


def test_dr_cpo_weighs_its_two_sides_alike(table):
    flat, logged = TEXTS.reshape(6, 4), np.float32([1, 0, 1, 0, 0, 1])
    batch = scored.OffPolicy(
        WHOLE.reshape(6, 5), REFERENCE.ravel(), REWARD.ravel(), logged, np.float32([1, 1, 2, 1, 3, 0])
    )
    loss, weight, _, metrics, _ = table(scored.dr_cpo_objective)(batch)
    ratio = np.exp(np.where(flat == PAD, 0, TABLE[flat]).sum(1) - REFERENCE.ravel())
    share = np.array([1, 0, 2, 0, 0, 0]) * ratio / (ratio[0] + 2 * ratio[2])
    assert (share * 3 / np.array([1, 1, 2, 1, 1, 1]) < np.e).all(), "under the ceiling"
    value = (share * REWARD.ravel()).sum()
    value += (np.array([0, 1, 0, 1, 3, 0]) * np.minimum(ratio, np.e) * REWARD.ravel()).sum() / 5
    assert metrics["value"] == pytest.approx(value, rel=1e-5)
    assert weighted_mean(loss, weight) == pytest.approx(-value / 2, rel=1e-5)
    assert metrics["effective"] == pytest.approx(1 / (share**2).sum(), rel=1e-5)


def sampled(reward=REWARD):
    mask = TEXTS != PAD
    old = np.where(mask, TABLE[TEXTS] + 0.4 * np.cos(TEXTS), 0).astype(np.float32)
    reference = np.where(mask, OTHER[TEXTS] + 0.3, 0).astype(np.float32)
    return Rollouts(WHOLE, old, reference, reward, WEIGHT)


def advantages(reward, kind):
    total = WEIGHT.sum(1, keepdims=True)
    centred = reward - (WEIGHT * reward).sum(1, keepdims=True) / total
    if kind == "grpo":
        return centred / (np.sqrt((WEIGHT * centred**2).sum(1, keepdims=True) / total) + 1e-4)
    return centred * (1 if kind == "dr_grpo" else total / (total - 1))


GRADIENTS = [("grpo", "k3"), ("dr_grpo", "k2"), ("rloo", "k1"), ("rloo", "k3")]


@pytest.mark.parametrize("beyond", [np.inf, -0.1, 0.1])
@pytest.mark.parametrize(("kind", "estimator"), GRADIENTS)
def test_policy_gradients_by_hand(table, kind, estimator, beyond):
    batch, mask = sampled(), TEXTS != PAD
    new, old, reference = np.where(mask, TABLE[TEXTS], 0), batch.old_bgl, batch.reference_bgl
    d = reference - new
    kl = (WEIGHT * (np.exp(d) - 1 - d).sum(-1)).sum() / WEIGHT.sum()
    frozen = KNOBS | {"kl_target": kl + beyond}
    loss, weight, penalty, metrics, _ = table(rollouts.policy_gradient_objective, kind, estimator)(batch, frozen)
    beta = 0.2 + (0.5 if beyond < 0 else 0)  # a tenth of a nat beyond the target
    k1 = (old - reference).sum(-1) if estimator == "k1" else 0.0
    a = advantages(REWARD - beta * k1, kind)[..., None]
    ratio = np.exp((new - old).sum(-1, keepdims=True) if kind == "rloo" else new - old)
    surrogate = -np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a) * (1 if kind == "rloo" else mask)
    term = {"k1": 0 * d, "k2": d**2 / 2, "k3": np.exp(d) - 1 - d}[estimator]
    divisor = {"grpo": LENGTHS, "dr_grpo": 4, "rloo": 1}[kind]
    expected = (surrogate.sum(-1) + beta * term.sum(-1)) / divisor
    counted = WEIGHT.ravel() > 0  # the advantage of a text that does not count is 0, whatever its reward
    np.testing.assert_allclose(loss[counted], expected.ravel()[counted], rtol=1e-4)
    np.testing.assert_array_equal(weight, WEIGHT.ravel())
    assert metrics["kl"] == pytest.approx(kl, rel=1e-5)
    assert metrics["reward"] == pytest.approx((WEIGHT * REWARD).sum() / WEIGHT.sum(), rel=1e-5)
    outside = (WEIGHT[..., None] * (mask & (np.abs(np.exp(new - old) - 1) > 0.2))).sum()
    assert metrics["clipped"] == pytest.approx(outside / (WEIGHT * LENGTHS).sum(), rel=1e-5) and outside > 0
    assert metrics["entropy"] == pytest.approx(1.5)


@pytest.mark.parametrize(("kind", "estimator"), GRADIENTS)
def test_equal_rewards_of_a_group_teach_nothing(table, kind, estimator):
    run, frozen = table(rollouts.policy_gradient_objective, kind, estimator), KNOBS | {"kl": 0.0}
    *_, gradient = run(sampled(np.float32([[0.1] * 3, [-7.3] * 3])), frozen)
    np.testing.assert_array_equal(gradient["table"], 0)
    *_, gradient = run(sampled(), frozen)
    assert np.abs(gradient["table"]).max() > 1e-2


def test_what_is_missing_is_named():
    pairs = Pairs(WHOLE, None, LABEL, WEIGHT)
    with pytest.raises(ValueError, match=r"loss: expected one of .*'sigmoid'.*, got 'dpo'"):
        preference.preference_objective(None, "dpo")
    with pytest.raises(ValueError, match=r"frozen: expected \['beta', 'margin'\] for simpo, .* without \['margin'\]"):
        preference.preference_objective(None, "simpo")({}, {"beta": 1.0}, pairs, None)
    with pytest.raises(ValueError, match="advantage: expected one of .*'rloo'.*, got 'ppo'"):
        rollouts.policy_gradient_objective(None, "ppo")
    with pytest.raises(ValueError, match="estimator: expected one of .*'k3'.*, got 'k4'"):
        rollouts.policy_gradient_objective(None, estimator="k4")
    with pytest.raises(ValueError, match="params: expected a collection 'value'"):
        scored.dro_objective(None)({"params": {}}, {"tau": 1.0}, SINGLE, None)
    for name, objective in (("kto", scored.kto_objective), ("dro", scored.dro_objective)):
        with pytest.raises(ValueError, match=f"batch.reference_b: .* {name} compares with them, got None"):
            objective(None)({"value": {"v": 0.0}}, KNOBS, SINGLE._replace(reference_b=None), None)
    with pytest.raises(ValueError, match="batch.reference_bg: .* sigmoid compares"):
        preference.preference_objective(None)({}, KNOBS, pairs, None)
    with pytest.raises(ValueError, match="'reference' or 'base' for kto's z0"):
        scored.kto_objective(None)({}, {"beta": 1.0}, PROMPTED, None)
