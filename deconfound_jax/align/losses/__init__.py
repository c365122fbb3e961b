"""Losses: arrays in, one value per example out. The mean is taken here and nowhere else.

    dpo             pairs of log-ratios to a reference: DPO, hinge, IPO, conservative, robust, per token
    reference_free  pairs of log-probabilities: SimPO, ORPO
    reward_model    rewards: Bradley-Terry on pairs; normal, binomial and ordinal likelihood on single texts
    likelihood      tokens: supervised fine-tuning
    kto, dro        single texts with a log-ratio: graded desirability; regression on the reward
    off_policy      logged texts weighted to the policy: outcome weights, DR-CPO
    policy_gradient sampled groups: advantages, PPO's clip, GRPO, Dr.GRPO, RLOO, estimators of the divergence

Statistics of a batch (KTO's z0, a group's mean) are arguments, computed with the weights by the caller.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp


def weighted_mean(per_example, weight):
    """The mean over examples: 2 in `weight` is the row twice, 0 is the row left out.

        sum_i w_i l_i / sum_i w_i,   0 when every weight is 0

    Args:
      per_example, weight: same shape; weight >= 0.
    Returns:
      a scalar. A masked row's value is never read, whatever it is.
    """
    chex.assert_equal_shape([per_example, weight])
    total = jnp.sum(weight)
    summed = jnp.sum(weight * jnp.where(weight > 0, per_example, 0.0))
    return summed / jnp.where(total > 0, total, 1.0)


def soft_logistic(margin_p, label_p, target=0.0):
    """Logistic loss of a comparison whose answer is a probability: what DPO, SimPO, ORPO and reward models share.

        l = -[s log sigmoid(m - target) + (1 - s) log sigmoid(-m - target)]

    Args:
      margin_p: (p,) m, how far the first text is ahead.
      label_p: (p,) s = P(the first text is better), in [0, 1].
      target: scalar or (p,) >= 0: how far the better text must be ahead; 0 gives the cross-entropy of s and sigmoid(m).
    Returns:
      (p,) nats per pair, the same for swapped texts with 1 - s.
    """
    chex.assert_rank([margin_p, label_p], 1)
    chex.assert_equal_shape([margin_p, label_p])
    first_p, second_p = jax.nn.log_sigmoid(margin_p - target), jax.nn.log_sigmoid(-margin_p - target)
    return -(label_p * first_p + (1 - label_p) * second_p)
