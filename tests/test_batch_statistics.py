"""The weighted mean, and what losses are given of a batch: z0, advantages, importance and outcome weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_by_hand import ADVANTAGES, TAU

from deconfound_jax.align.losses import kto, likelihood, off_policy, weighted_mean
from deconfound_jax.align.losses import reward_model as rm
from deconfound_jax.models.tokenizer import PAD


def test_weighted_mean_reads_no_masked_value():
    values, weight = jnp.array([2.0, jnp.nan, jnp.inf]), jnp.array([3.0, 0.0, 0.0])
    assert weighted_mean(values, weight) == 2.0
    assert weighted_mean(values, jnp.zeros(3)) == 0.0
    assert weighted_mean(jnp.array([1.0, 4.0, 9.0]), jnp.array([1.0, 2.0, 0.0])) == 3.0  # 1, 4, 4
    gradient = jax.grad(lambda w: weighted_mean(w * jnp.array([1.0, 2.0, 3.0]), weight))(1.0)
    assert gradient == 1.0
    with pytest.raises(AssertionError):
        weighted_mean(values, jnp.ones((3, 1)))


# Of a batch's values and weights: one number, or one a row.
STATISTICS = {
    "reference_point": kto.reference_point,
    "log_mean_ratio": off_policy.log_mean_ratio,
    "outcome_weights": lambda a, w: off_policy.outcome_weights(jnp.stack([a, a**2]), w, TAU),
    **{kind: lambda a, w, f=advantage: f(a[None], w[None])[0] for kind, advantage in ADVANTAGES.items()},
}


@pytest.fixture(scope="module")
def statistics():
    return jax.jit(lambda a, w: {name: statistic(a, w) for name, statistic in STATISTICS.items()})


@pytest.mark.parametrize("name", STATISTICS)
def test_weight_two_is_the_row_twice_and_weight_zero_is_no_row(statistics, name):
    a, b, c, junk = 0.7, -0.2, 1.6, 40.0
    weighted = statistics(jnp.array([a, b, c, junk]), jnp.array([1.0, 2.0, 1.0, 0.0]))[name]
    repeated = statistics(jnp.array([a, b, b, c]), jnp.ones(4))[name]
    if np.ndim(repeated):
        assert weighted[3] == 0, "a masked row's value may be anything but what spoils a sum"
        weighted, repeated = weighted[:3], repeated[jnp.array([0, 1, 3])]
    np.testing.assert_allclose(weighted, repeated, rtol=1e-5)
    unweighted = statistics(jnp.array([a, b, c, junk]), jnp.array([1.0, 1.0, 1.0, 0.0]))[name]
    assert not np.allclose(unweighted[:3] if np.ndim(unweighted) else unweighted, weighted)


def test_a_batch_without_weight_has_finite_statistics(statistics):
    found = statistics(jnp.array([0.7, -0.2, 1.6, 40.0]), jnp.zeros(4))
    for name in STATISTICS.keys() - {"outcome_weights"}:  # nothing to normalise by: the log's weights are never all 0
        np.testing.assert_array_equal(found[name], 0, err_msg=name)


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_advantages_of_a_group_sum_to_zero_and_equal_rewards_have_none(statistics, kind):
    weight = jnp.array([1.0, 2.0, 0.5, 1.0])
    found = statistics(jnp.array([0.3, 2.0, -1.0, 7.0]), weight)[kind]
    assert abs(float((found * weight).sum())) < 1e-5 < float(jnp.abs(found).min())
    # The mean of -7.3's is not -7.3 in floating point; nothing may be left of it, for it is divided by a small sd.
    np.testing.assert_array_equal(statistics(jnp.full(4, -7.3), weight)[kind], 0)


def test_rows_that_weighted_ones_are_worth():
    assert off_policy.effective_size(jnp.array([3.0, 3.0, 0.0])) == 2
    assert off_policy.effective_size(jnp.array([3.0, 1.0])) == pytest.approx(1.6)
    assert off_policy.effective_size(jnp.zeros(2)) == 0


def test_nll_is_the_mean_over_targets_wherever_the_padding_lies():
    tokens = np.array([[1, 5, 4, 2, PAD], [1, 3, 2, PAD, PAD], [PAD, PAD, PAD, 1, 2]], np.int32)
    logprob = np.array([[-1.0, -2.0, -0.5, 0.0], [-3.0, -0.25, 0.0, 0.0], [0.0, 0.0, 0.0, -0.75]], np.float32)
    np.testing.assert_allclose(likelihood.token_nll(logprob, tokens), [3.5 / 3, 3.25 / 2, 0.75], rtol=1e-6)
    assert likelihood.token_nll(np.zeros((1, 4)), np.array([[1, PAD, PAD, PAD, PAD]]))[0] == 0


def test_cut_points_rise_from_any_numbers():
    np.testing.assert_allclose(rm.rising_cuts(jnp.array([-1.0, 0.0, np.log(2.0)])), [-1, 0, 2], rtol=1e-6)
    assert (np.diff(rm.rising_cuts(jnp.array([3.0, -4.0, -9.0, 2.0]))) > 0).all()
