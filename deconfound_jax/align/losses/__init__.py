"""Losses: arrays in, one value per example out. The mean is taken here and nowhere else."""

from __future__ import annotations

import chex
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
