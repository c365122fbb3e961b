"""Reward models: Bradley-Terry on pairs, and the outcome's own likelihood on single texts.

Pointwise losses leave out what no parameter moves, so they are log-likelihoods up to a constant of the row.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from deconfound_jax.align.losses import soft_logistic


def bradley_terry(reward_first_p, reward_second_p, label_p, margin=0.0, centering=0.0):
    """Pairwise reward model with a soft label, a margin and a pull of rewards to mean zero.

        l = -[s log sigmoid(d - m) + (1 - s) log sigmoid(-d - m)] + eta (r_1 + r_2)^2,   d = r_1 - r_2

    Only differences count in the first part; the second settles the constant, so that rewards of different prompts
    and training runs can be averaged.

    Args:
      reward_first_p, reward_second_p: (p,) r_1 and r_2, in logits.
      label_p: (p,) s = P(text 1 is better) in [0, 1].
      margin: m >= 0, scalar or (p,): how far apart the texts are known to be.
      centering: eta >= 0, scalar.
    Returns:
      (p,) nats per pair.

        bradley_terry(r_a, r_b, prefer_p, centering=0.01)

    Sources: Bradley and Terry 1952; Touvron et al. 2307.09288, eq. 2 (margin); Eisenstein et al. 2312.09244
    (centering).
    """
    chex.assert_equal_shape([reward_first_p, reward_second_p, label_p])
    drift_p = reward_first_p + reward_second_p
    return soft_logistic(reward_first_p - reward_second_p, label_p, margin) + centering * drift_p**2


def normal_nll(reward_n, outcome_n, precision_n):
    """Regression on an outcome, or a posterior mean, that is known with a precision.

        l = 1/2 lambda (y - r)^2

    Args:
      reward_n, outcome_n: (n,) r and y, the outcome's unit.
      precision_n: (n,) lambda = 1 / variance of y given r; 0 where nothing is known.
    Returns:
      (n,) nats per row, up to its constant.

        normal_nll(r_n, posterior_mean_n, 1 / (noise**2 + sd_n**2))
    """
    chex.assert_rank([reward_n, outcome_n, precision_n], 1)
    chex.assert_equal_shape([reward_n, outcome_n, precision_n])
    return 0.5 * precision_n * jnp.square(outcome_n - reward_n)


def binomial_nll(reward_n, hits_n, exposure_n):
    """Hits among exposures, at a rate whose logit is the reward.

        l = -[y log sigmoid(r) + (n - y) log sigmoid(-r)]

    Exposure 1 is logistic regression; hits between 0 and exposure need not be whole, so they may be soft labels.

    Args:
      reward_n: (n,) r, logits.
      hits_n, exposure_n: (n,) y and n, 0 <= y <= n.
    Returns:
      (n,) nats per row, up to its constant.

        binomial_nll(r_n, clicks_n, impressions_n)
    """
    chex.assert_rank([reward_n, hits_n, exposure_n], 1)
    chex.assert_equal_shape([reward_n, hits_n, exposure_n])
    return -(hits_n * jax.nn.log_sigmoid(reward_n) + (exposure_n - hits_n) * jax.nn.log_sigmoid(-reward_n))


def ordinal_nll(reward_n, label_nk, cuts_k):
    """Proportional odds: an ordered grade, given as probabilities of each.

        P(grade <= j) = sigmoid(c_j - r),     l = -sum_j s_j log P(grade = j)

    Args:
      reward_n: (n,) r, logits.
      label_nk: (n, k) s, probabilities of the k grades; one-hot where the grade is known.
      cuts_k: (k - 1,) c, rising: `rising_cuts`'.
    Returns:
      (n,) nats per row.

        ordinal_nll(r_n, jax.nn.one_hot(stars_n, 5), rising_cuts(raw_k))

    Source: McCullagh 1980.
    """
    chex.assert_rank([reward_n, label_nk, cuts_k], [1, 2, 1])
    chex.assert_equal(label_nk.shape, (len(reward_n), len(cuts_k) + 1))
    gap_nk = cuts_k[None, :] - reward_n[:, None]
    # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)): no difference of near-equal numbers.
    below_nk = jnp.pad(jax.nn.log_sigmoid(gap_nk), ((0, 0), (0, 1)))
    above_nk = jnp.pad(jax.nn.log_sigmoid(-gap_nk), ((0, 0), (1, 0)))
    between_k = jnp.pad(jnp.log(-jnp.expm1(cuts_k[:-1] - cuts_k[1:])), 1)
    return -jnp.sum(label_nk * (below_nk + above_nk + between_k[None, :]), axis=1)


def rising_cuts(raw_k):
    """Cut points from free numbers: the first as it is, then steps of exp(raw).

    c_j = raw_0 + sum_{1 <= i <= j} exp(raw_i)
    """
    chex.assert_rank(raw_k, 1)
    return raw_k[0] + jnp.concatenate([jnp.zeros_like(raw_k[:1]), jnp.cumsum(jnp.exp(raw_k[1:]))])
