"""Heads: rewards and values from hidden states, whatever their precision and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deconfound_jax.models.heads import RewardHead, ValueHead

WIDTH = 2048


def states():
    """Hidden states (2, 3, WIDTH), no mean of zero so that a bfloat16 sum drifts, and the mask of their tokens."""
    hidden_bld = 1 + np.random.default_rng(0).normal(size=(2, 3, WIDTH)).astype(np.float32)
    return jnp.asarray(hidden_bld), jnp.asarray([[True, True, True], [True, True, False]])


def positive(head, *inputs):
    """Parameters of one sign: sums grow with the width, and so do the errors of a narrow sum."""
    return jax.tree.map(jnp.abs, head.init(jax.random.key(1), *inputs))


@pytest.mark.parametrize("head", [RewardHead(), RewardHead("mean"), RewardHead("sum+length"), ValueHead()])
def test_bfloat16_states_give_the_float32_answer_of_the_same_states(head):
    hidden_bld, mask_bl = states()
    narrow_bld = hidden_bld.astype(jnp.bfloat16)
    params = positive(head, hidden_bld, mask_bl)
    found = head.apply(params, narrow_bld, mask_bl)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, head.apply(params, narrow_bld.astype(jnp.float32), mask_bl), rtol=1e-6)
    np.testing.assert_allclose(found, head.apply(params, hidden_bld, mask_bl), rtol=2**-8)
    assert np.abs(found).max() > 0.1


@pytest.mark.parametrize("pooling", ["last", "mean", "sum+length"])
def test_padding_changes_no_reward(pooling):
    hidden_bld, mask_bl = states()
    head = RewardHead(pooling)
    params = positive(head, hidden_bld, mask_bl)
    rewards_b = head.apply(params, hidden_bld[:, :2], mask_bl[:, :2])
    blank_bld = jnp.full((2, 2, WIDTH), jnp.nan)
    for places in ((0, 1, 2, 3), (2, 3, 0, 1)):  # blanks right, then left
        padded_bld = jnp.concatenate([hidden_bld[:, :2], blank_bld], 1)[:, np.array(places)]
        mask = jnp.asarray([[place < 2 for place in places]] * 2)
        np.testing.assert_allclose(head.apply(params, padded_bld, mask), rewards_b, rtol=1e-6)
    assert head.apply(params, blank_bld, jnp.zeros((2, 2), bool)).tolist() == [0.0, 0.0]


def test_last_reads_the_last_token():
    hidden_bld, mask_bl = states()
    params = RewardHead().init(jax.random.key(0), hidden_bld, mask_bl)
    expected_b = np.asarray(hidden_bld)[[0, 1], [2, 1]] @ np.asarray(params["params"]["kernel"])
    np.testing.assert_allclose(RewardHead().apply(params, hidden_bld, mask_bl), expected_b, rtol=1e-5, atol=1e-5)


def test_values_are_one_a_token_and_zero_elsewhere():
    hidden_bld, mask_bl = states()
    params = ValueHead().init(jax.random.key(0), hidden_bld, mask_bl)
    params["params"]["bias"] = jnp.float32(3.0)
    values_bl = ValueHead().apply(params, hidden_bld.at[1, 2].set(jnp.nan), mask_bl)
    expected_bl = np.asarray(hidden_bld) @ np.asarray(params["params"]["kernel"]) + 3
    np.testing.assert_allclose(values_bl, np.where(mask_bl, expected_bl, 0), rtol=1e-5, atol=1e-5)


def test_heads_start_near_zero_and_learn_at_once():
    hidden_bld, mask_bl = states()
    for head in (RewardHead(), ValueHead()):
        params = head.init(jax.random.key(0), hidden_bld, mask_bl)
        assert 0 < np.abs(head.apply(params, hidden_bld, mask_bl)).max() < 0.2
        slope = jax.grad(lambda h, head=head, params=params: head.apply(params, h, mask_bl).sum())(hidden_bld)
        assert np.abs(slope).max() > 0
