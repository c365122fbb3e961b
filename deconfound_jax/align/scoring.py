"""f(x) of texts that no log holds, inside a compiled step: draws of coefficients on a frozen model's features."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.reward import text_coefficients


class TextReward(NamedTuple):
    """r_s(x) = beta_s' (phi(x) - mean) / sd: the model form as plain arrays, traced like any other argument."""

    coefficients_sd: jax.Array  # units of the outcome, link scale
    mean_d: jax.Array  # of the log's features
    scale_d: jax.Array

    def draws(self, features) -> jax.Array:
        """Joint draws (s, ...) for features (..., d)."""
        leading = (1,) * (features.ndim - 1)
        standard = (features - self.mean_d.reshape(*leading, -1)) / self.scale_d.reshape(*leading, -1)
        return jnp.einsum("sd,...d->s...", self.coefficients_sd, standard)


def text_reward(posterior: Posterior) -> TextReward:
    """The reward of a fit whose f is linear; a head's f(x) has no coefficients.

    Raises:
      ValueError: the fit had a head.
    """
    if "text" not in posterior.draws:
        raise ValueError(f"text_reward: expected a linear f(x), got sites {sorted(posterior.draws)}")
    coefficients_sd = float(posterior.scaling["outcome.sd"]) * text_coefficients(posterior)
    found = coefficients_sd, posterior.scaling["features.mean"], posterior.scaling["features.sd"]
    return TextReward(*(jnp.asarray(value, jnp.float32) for value in found))


def scored(draws, kappa: float):
    """mean - kappa sd over draws (s, ...): what best-of-n maximises.

    kappa = 1 by default, chosen beforehand: a text that is good in few draws does not win by luck. kappa = 0 is the
    posterior mean.
    """
    chex.assert_scalar_non_negative(kappa)
    return draws.mean(0) - kappa * draws.std(0)


def one_draw_a_group(draws_sbg, key):
    """(b, g): each group's rewards from one joint draw, so that its errors cancel inside the group, not over groups."""
    chex.assert_rank(draws_sbg, 3)
    s, b, _ = draws_sbg.shape
    pick_b = jax.random.randint(key, (b,), 0, s)
    return jnp.take_along_axis(draws_sbg, pick_b[None, :, None], axis=0)[0]


def desirability(draws_sn) -> jax.Array:
    """P(reward above the median text), (n,): each draw against its own median, so a shift of all texts cancels."""
    chex.assert_rank(draws_sn, 2)
    return (draws_sn > jnp.median(draws_sn, axis=1, keepdims=True)).mean(0)


def in_the_top(draws_sn, share: float) -> jax.Array:
    """P(a text is among the best `share` of them), (n,)."""
    chex.assert_rank(draws_sn, 2)
    return (draws_sn >= jnp.quantile(draws_sn, 1 - share, axis=1, keepdims=True)).mean(0)
