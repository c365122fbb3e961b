"""Filters of next-token logits: their definitions, those of transformers, and the draw that follows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deconfound_jax.models.filters import _invert, draw, filter_logits
from deconfound_jax.models.tokenizer import PAD


def filtered(logits_v, seen, temperature, top_k, top_p, min_p, penalty):
    """The filters again, one row, one after the other, with sorting."""
    score_v = np.array(logits_v, np.float64)
    for token in {token for token in seen if token != PAD}:
        score_v[token] = score_v[token] / penalty if score_v[token] > 0 else score_v[token] * penalty
    score_v /= temperature
    if top_k:
        score_v[score_v < np.sort(score_v)[-min(top_k, len(score_v))]] = -np.inf
    order_v = np.argsort(-score_v)
    share_v = np.exp(score_v - score_v.max()) / np.exp(score_v - score_v.max()).sum()
    before_v = np.cumsum(share_v[order_v]) - share_v[order_v]
    if top_p < 1:
        score_v[order_v[before_v >= top_p]] = -np.inf
    score_v[np.exp(score_v - score_v.max()) < min_p] = -np.inf
    return score_v


SETTINGS = [  # temperature, top_k, top_p, min_p, repetition_penalty
    (1.0, 0, 1.0, 0.0, 1.0), (0.7, 0, 1.0, 0.0, 1.0), (1.0, 5, 1.0, 0.0, 1.0), (1.0, 0, 0.6, 0.0, 1.0),
    (1.0, 0, 1.0, 0.2, 1.0), (1.0, 0, 1.0, 0.0, 1.5), (1.3, 40, 0.9, 0.02, 1.2), (0.5, 7, 0.5, 0.3, 0.8),
    (1.0, 1000, 0.001, 0.0, 1.0),
]  # fmt: skip


def filter_inputs():
    rng = np.random.default_rng(0)
    logits_rv = (3 * rng.normal(size=(6, 300))).astype(np.float32)
    history_rl = rng.integers(0, 300, (6, 30)).astype(np.int32)
    history_rl[:, ::3] = PAD
    history_rl[:, 1] = logits_rv.argmax(1)
    return logits_rv, history_rl


@pytest.mark.parametrize("knobs", SETTINGS, ids=str)
def test_filters_equal_their_definitions(knobs):
    logits_rv, history_rl = filter_inputs()
    found_rv = np.asarray(jax.jit(filter_logits)(logits_rv, history_rl, *knobs))
    expected_rv = [filtered(row, seen, *knobs) for row, seen in zip(logits_rv, history_rl, strict=True)]
    np.testing.assert_allclose(found_rv, expected_rv, rtol=1e-5)


@pytest.mark.parametrize("knobs", SETTINGS, ids=str)
def test_filters_equal_those_of_transformers(knobs):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    temperature, top_k, top_p, min_p, penalty = knobs
    logits_rv, history_rl = filter_inputs()
    history_rl = np.where(history_rl == PAD, history_rl[:, 1:2], history_rl)  # transformers has no PAD of ours
    chain = [transformers.RepetitionPenaltyLogitsProcessor(penalty), transformers.TemperatureLogitsWarper(temperature)]
    chain += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    chain += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    chain += [transformers.MinPLogitsWarper(min_p)]
    score_rv = torch.tensor(logits_rv)
    for change in chain:
        score_rv = change(torch.tensor(history_rl).long(), score_rv)
    found_rv = jax.jit(filter_logits)(logits_rv, history_rl, *knobs)
    np.testing.assert_allclose(found_rv, score_rv.numpy(), rtol=1e-5)


def test_equal_scores_stay_together_and_one_token_always_stays():
    logits_rv = jnp.array([[0.0, -0.0, 1.0, 1.0, 1.0, -1e9], [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]])
    none = jnp.full((2, 1), PAD)
    kept = jnp.isfinite(filter_logits(logits_rv, none, top_k=2))
    assert kept.tolist() == [[False, False, True, True, True, False], [True] * 6]
    assert jnp.isfinite(filter_logits(logits_rv, none, top_k=4)).tolist()[0] == [True] * 5 + [False]
    assert jnp.isfinite(filter_logits(logits_rv, none, top_p=0.0)).any(1).all()
    assert jnp.isfinite(filter_logits(logits_rv, none, min_p=1.0)).any(1).all()


def test_a_weight_of_zero_is_never_drawn():
    weight_rk = jnp.array([[0.0, 0.0, 1.0, 0.0, 2.0, 0.0]] * 3)
    assert _invert(jnp.array([0.0, 1 / 3, 1 - 2**-23]), weight_rk).tolist() == [2, 4, 4]


def test_draws_follow_the_scores_and_never_leave_them():
    score_v = np.random.default_rng(0).normal(size=700).astype(np.float32)  # three blocks, the last one short
    score_v[::3] = -np.inf
    count, expected_v = 20_000, np.exp(score_v) / np.exp(score_v).sum()
    keys_r = jax.random.split(jax.random.key(0), count)
    drawn_r = jax.jit(lambda keys: draw(keys, jnp.broadcast_to(score_v, (count, 700))))(keys_r)
    counted_v = np.bincount(drawn_r, minlength=700)
    assert len(counted_v) == 700 and (counted_v[::3] == 0).all()
    chi2 = np.sum((counted_v - count * expected_v)[expected_v > 0] ** 2 / (count * expected_v[expected_v > 0]))
    assert abs(chi2 - 465) < 5 * np.sqrt(2 * 465)
