"""Direct reward optimisation: regression of log-ratios on the reward of single texts."""

from __future__ import annotations

import chex
import jax.numpy as jnp


def dro(logratio_b, reward_b, value, tau):
    """Half the squared gap between a reward and what policy and value say it is.

        l = 1/2 (r - V - tau h)^2,   h = log pi(x) - log pi_ref(x)

    At zero, pi is the best policy for E[r] - tau KL(pi || pi_ref), and V = tau log E_ref exp(r / tau). Texts may come
    from anyone; the reference need not have drawn them.

    Args:
      logratio_b, reward_b: (b,) nats per text, and the reward's unit.
      value: V, scalar or (b,), the reward's unit.
      tau: reward per nat; scalar, may be traced.
    Returns:
      (b,) the reward's unit squared; `reward_precision` is the weight it wants.

        dro(h_b, reward_b, value=params["value"]["v"], tau=0.3)

    Source: Richemond et al. 2405.19107.
    """
    chex.assert_rank([logratio_b, reward_b], 1)
    chex.assert_equal_shape([logratio_b, reward_b])
    return 0.5 * jnp.square(reward_b - value - tau * logratio_b)


def reward_precision(sd_b, spread):
    """Weight of a text whose reward is known with an error: 1 where it is exact, 1/2 where sd = spread.

        w = spread^2 / (spread^2 + sd^2)

    Args:
      sd_b: (b,) posterior standard deviation of the reward.
      spread: standard deviation of rewards over the log, > 0; scalar, may be traced.
    """
    return spread**2 / (spread**2 + jnp.square(sd_b))
