"""Logged texts weighted to the policy that is wanted, or to the policy that is trained."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp


def outcome_weights(draws_sb, weight_b, tau):
    """Weights of reward-weighted regression, averaged over the reward's posterior.

        w_i = mean_s [ exp(r_si / tau) / sum_j omega_j exp(r_sj / tau) ] sum_j omega_j

    Each draw is normalised before the mean, so a constant that the posterior does not know (all rewards higher)
    changes nothing, and no single draw rules. Maximum likelihood under omega w is the policy ref exp(r / tau), up to
    the texts there are.

    Args:
      draws_sb: (s, b) joint draws of the texts' rewards.
      weight_b: (b,) omega >= 0, not all 0: rows counted so often.
      tau: reward per nat; small picks few texts, see `effective_size`.
    Returns:
      (b,) w, of weighted mean 1, 0 where omega is: multiply it into the weight.

        outcome_weights(reward.draws_sn, np.ones(n), tau=reward.mean.std())

    Source: Peters and Schaal 2007, "Reinforcement learning by reward-weighted regression".
    """
    chex.assert_rank([draws_sb, weight_b], [2, 1])
    chex.assert_equal_shape_suffix([draws_sb, weight_b], 1)
    score_sb = jnp.where(weight_b[None] > 0, draws_sb / tau, -jnp.inf)
    total_s1 = jax.nn.logsumexp(score_sb, axis=1, b=weight_b[None], keepdims=True)
    return jnp.exp(score_sb - total_s1).mean(0) * weight_b.sum()


def effective_size(weight_b):
    """Kish's number of equal rows that weighted ones are worth: (sum w)^2 / sum w^2; 0 without any."""
    return jnp.square(weight_b.sum()) / jnp.maximum(jnp.square(weight_b).sum(), jnp.finfo(weight_b.dtype).tiny)


def dr_cpo(logratio_b, gain_b, normaliser_b, ceiling):
    """Doubly robust causal preference optimisation: minus a row's share of the policy's estimated value.

        V = sum_logged w (y - g(x)) + mean_fresh (pi / pi_0) g(x),   w = (pi / pi_R) / sum_logged (pi / pi_R)

        l_i = -exp(h_i - c_i) a_i:    logged rows: h = log pi / pi_R, a = y - g, c = `log_mean_ratio` of the logged
                                      fresh rows:  h = log pi / pi_0, a = g,     c = 0

    pi_R drew the logged texts, pi_0 the fresh ones. Right in the mean if either pi_R or the outcome model g is.
    V is the mean of -l over the logged plus its mean over the fresh.

    Args:
      logratio_b: (b,) h, nats per text.
      gain_b: (b,) a, the outcome's unit, without its confounders' part.
      normaliser_b: (b,) c, nats; with its gradient, for it is part of the estimate.
      ceiling: a ratio counts at most exp(ceiling) and pulls no further there; nats, scalar.
    Returns:
      (b,) the outcome's unit.

    Sources: Lin, Ben-Michael and Morency 2402.14979; Swaminathan and Joachims 2015 (self-normalisation); Ionides 2008
    (the ceiling).
    """
    chex.assert_rank([logratio_b, gain_b, normaliser_b], 1)
    chex.assert_equal_shape([logratio_b, gain_b, normaliser_b])
    return -jnp.exp(jnp.minimum(logratio_b - normaliser_b, ceiling)) * gain_b


def log_mean_ratio(logratio_b, weight_b):
    """log (sum_i w_i exp(h_i) / sum_i w_i), nats: what makes importance ratios of weighted mean 1; 0 without rows."""
    chex.assert_equal_shape([logratio_b, weight_b])
    total = weight_b.sum()
    # Rows of weight 0 may be most of the batch: an empty sum must have a gradient of 0, not of 0 / 0.
    safe_b = jnp.where(total > 0, weight_b, 1.0)
    found = jax.nn.logsumexp(logratio_b, b=safe_b) - jnp.log(safe_b.sum())
    return jnp.where(total > 0, found, 0.0)
