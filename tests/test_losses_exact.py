"""What losses estimate, summed exactly over spaces of a few texts: no sampling, so no tolerance for luck."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deconfound_jax.align.losses import off_policy, policy_gradient, weighted_mean
from deconfound_jax.align.losses.dro import dro

TAU = 0.4
LOGITS, REFERENCE = np.array([0.3, -1.0, 0.8, 0.1]), np.array([0.1, 0.2, 0.3, 0.4])
REWARD = np.array([1.0, -0.5, 0.2, 2.0])


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum()


def slope_of_mean(values, p):
    """Gradient in the logits of sum_x p(x) values(x), values held: p (values - their mean)."""
    return p * (values - (p * values).sum())


def test_estimators_of_the_divergence_and_what_their_gradients_are_of():
    p = softmax(LOGITS)
    estimators = policy_gradient.kl_k1, policy_gradient.kl_k2, policy_gradient.kl_k3

    @jax.jit
    def run(logits):
        # Samples of p: their frequencies are held, as those of texts that were drawn.
        return [jax.value_and_grad(lambda z, k=k: (p * k(jax.nn.log_softmax(z), np.log(REFERENCE))).sum())(logits)
                for k in estimators]  # fmt: skip

    (k1, slope1), (k2, slope2), (k3, slope3) = run(LOGITS)
    divergence = (p * np.log(p / REFERENCE)).sum()
    np.testing.assert_allclose([k1, k3], divergence, rtol=1e-12)
    assert abs(k2 - divergence) > 0.01
    np.testing.assert_allclose(slope1, 0, atol=1e-12)
    np.testing.assert_allclose(slope2, slope_of_mean(np.log(p / REFERENCE), p), rtol=1e-10)
    np.testing.assert_allclose(slope3, p - REFERENCE, rtol=1e-10)  # of KL(reference || policy)


def test_policy_gradients_are_those_of_the_expected_reward():
    p, pairs = softmax(LOGITS), np.array(list(itertools.product(range(4), repeat=2)))
    chance, old, ones = p[pairs].prod(1), np.log(p)[pairs][..., None], np.ones(pairs.shape)
    kinds = [
        (policy_gradient.leave_one_out, policy_gradient.rloo, ()),
        (policy_gradient.centred, policy_gradient.dr_grpo, (1.0,)),
    ]

    @jax.jit
    def run(logits):
        def expected(logits, advantage, loss, length):
            new = jax.nn.log_softmax(logits)[pairs][..., None]
            found = loss(new, old, advantage(REWARD[pairs], ones), ones[..., None], 0.2, *length)
            return (chance * found.mean(1)).sum()

        return [jax.grad(expected)(logits, *kind) for kind in kinds]

    leave_one_out, less_the_mean = run(LOGITS)
    np.testing.assert_allclose(leave_one_out, -slope_of_mean(REWARD, p), rtol=1e-10)
    np.testing.assert_allclose(less_the_mean, leave_one_out / 2, rtol=1e-10)  # (g - 1) / g of it


def test_the_clip_holds_gains_and_lets_losses_through():
    ratio = np.array([0.5, 0.9, 1.5])

    @jax.jit
    def slopes(advantage):
        return jax.grad(lambda h: policy_gradient.ppo_clip(h, jnp.full(3, advantage), 0.2).sum())(np.log(ratio))

    np.testing.assert_allclose(slopes(1.0), [-0.5, -0.9, 0], atol=1e-12)
    np.testing.assert_allclose(slopes(-1.0), [0, 0.9, 1.5], atol=1e-12)


def test_dro_is_zero_at_the_best_policy_and_its_value():
    raised = REFERENCE * np.exp(REWARD / TAU)
    best, value = raised / raised.sum(), TAU * np.log(raised.sum())
    np.testing.assert_allclose(dro(np.log(best / REFERENCE), REWARD, value, TAU), 0, atol=1e-24)
    assert dro(np.log(best / REFERENCE), REWARD, value + 0.1, TAU).min() > 4e-3


def test_outcome_weights_make_of_the_reference_the_best_policy_and_read_no_constant():
    raised = REFERENCE * np.exp(REWARD / TAU)
    weight = jax.jit(off_policy.outcome_weights)(REWARD[None], REFERENCE, TAU)
    np.testing.assert_allclose(REFERENCE * weight, raised / raised.sum(), rtol=1e-12)
    draws = np.stack([REWARD, REWARD[::-1] * 0.3])
    moved = draws + np.array([[0.0], [30.0]])
    both = [off_policy.outcome_weights(d, REFERENCE, TAU) for d in (draws, moved)]
    np.testing.assert_allclose(*both, rtol=1e-10)
    np.testing.assert_allclose((REFERENCE * both[0]).sum(), 1, rtol=1e-12)


def test_dr_cpo_is_right_if_the_model_or_the_behaviour_is():
    policy, behaviour, fresh = softmax(LOGITS), REFERENCE, np.array([0.4, 0.3, 0.2, 0.1])

    @jax.jit
    def error(model, believed):
        # Every text, as often as it is drawn.
        logged = jnp.log(policy / believed)
        normaliser = jnp.full(4, off_policy.log_mean_ratio(logged, behaviour))
        sides = [
            weighted_mean(off_policy.dr_cpo(logged, REWARD - model, normaliser, 50.0), behaviour),
            weighted_mean(off_policy.dr_cpo(jnp.log(policy / fresh), model, jnp.zeros(4), 50.0), fresh),
        ]
        return abs(-sum(sides) - (policy * REWARD).sum())

    wrong_model, wrong_behaviour = REWARD + np.array([0.5, -0.4, 0.9, -1.0]), np.array([0.25, 0.4, 0.05, 0.3])
    assert max(error(wrong_model, behaviour), error(REWARD, wrong_behaviour)) < 1e-12
    assert error(wrong_model, wrong_behaviour) > 0.02


def test_the_ceiling_holds_ratios_and_their_pull():
    def loss(logratio):
        return off_policy.dr_cpo(logratio, jnp.ones(2), jnp.zeros(2), np.log(3.0))

    value, pull = jax.vjp(loss, np.log(np.array([2.0, 30.0])))
    np.testing.assert_allclose(value, [-2, -3], rtol=1e-12)
    np.testing.assert_allclose(pull(np.ones(2))[0], [-2, 0], rtol=1e-12)
