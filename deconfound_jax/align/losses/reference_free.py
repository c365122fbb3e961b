"""Preference losses without a reference: pairs of mean log-probabilities a token.

    a_i = log pi(x_i) / T_i, nats per token;   s = P(text 1 is better than text 2)

What holds the policy back is likelihood alone: SimPO has nothing but its margin, ORPO fits the better text.
"""

from __future__ import annotations

import chex
import jax.numpy as jnp

from deconfound_jax.align.losses import soft_logistic


def simpo(mean_first_p, mean_second_p, label_p, beta, margin):
    """Simple preference optimisation: the better text must be likelier per token, by a margin.

        l = -[s log sigmoid(m - gamma) + (1 - s) log sigmoid(-m - gamma)],   m = beta (a_1 - a_2)

    Args:
      mean_first_p, mean_second_p: (p,) a_1 and a_2, nats per token.
      label_p: (p,) s in [0, 1].
      beta: scale of the implicit reward, tokens per nat; margin: gamma >= 0. Scalars, may be traced.
    Returns:
      (p,) nats per pair.

        simpo(logp_a / tokens_a, logp_b / tokens_b, prefer_p, beta=2.0, margin=1.0)

    Source: Meng et al. 2405.14734, eq. 6.
    """
    chex.assert_equal_shape([mean_first_p, mean_second_p, label_p])
    return soft_logistic(beta * (mean_first_p - mean_second_p), label_p, margin)


def orpo(mean_first_p, mean_second_p, label_p, strength):
    """Odds ratio preference optimisation: maximum likelihood of the better text, and the odds between the two.

        l = -[s a_1 + (1 - s) a_2] - lambda [s log sigmoid(m) + (1 - s) log sigmoid(-m)]
        m = logit(P_1) - logit(P_2),   P_i = exp(a_i)

    Args:
      mean_first_p, mean_second_p: (p,) a_1 and a_2 <= 0, nats per token.
      label_p: (p,) s in [0, 1].
      strength: lambda; scalar, may be traced.
    Returns:
      (p,) nats per token, plus lambda times nats per pair.

        orpo(logp_a / tokens_a, logp_b / tokens_b, prefer_p, strength=0.1)

    Source: Hong et al. 2403.07691, eq. 6 and 7.
    """
    chex.assert_equal_shape([mean_first_p, mean_second_p, label_p])
    likelihood_p = label_p * mean_first_p + (1 - label_p) * mean_second_p
    return strength * soft_logistic(_log_odds(mean_first_p) - _log_odds(mean_second_p), label_p) - likelihood_p


def _log_odds(mean_p):
    # A sure text has infinite odds; a text without tokens looks like one.
    mean_p = jnp.minimum(mean_p, -jnp.finfo(mean_p.dtype).eps)
    return mean_p - jnp.log(-jnp.expm1(mean_p))
