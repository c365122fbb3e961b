"""What reads a number from a decoder's hidden states: a text's reward, a token's value.

Hidden states may come in bfloat16; parameters, sums and results are float32: a sum over a width of thousands loses
in bfloat16 more than texts differ by.
"""

from __future__ import annotations

import chex
import jax.numpy as jnp
from flax import linen as nn

from deconfound_jax.models.features import pool


class RewardHead(nn.Module):
    """A text's scalar reward.

        r(x) = w . pool(h(x)),   w ~ Normal(0, 1 / (d + 1)^2)

    Without a constant: rewards count by their differences. The start is near zero (Stiennon et al. 2009.01325), so a
    first step moves the states as well as w.
    """

    pooling: str = "last"  # of `models.features.pool`; last is what other libraries' classifiers read

    @nn.compact
    def __call__(self, hidden_bld, mask_bl):
        """Normed states (b, l, d), mask of the tokens (b, l) -> rewards (b,) float32; 0 for a text without a token."""
        pooled_bd = pool(hidden_bld, mask_bl, self.pooling)
        kernel_d = self.param("kernel", _near_zero, (pooled_bd.shape[-1],), jnp.float32)
        return jnp.sum(pooled_bd * kernel_d[None], -1)


class ValueHead(nn.Module):
    """A value after every token, v_t = w . h_t + c: a baseline of policy gradients; starts near zero."""

    @nn.compact
    def __call__(self, hidden_bld, mask_bl):
        """Normed states (b, l, d), mask of the tokens (b, l) -> values (b, l) float32, 0 where there is no token."""
        chex.assert_rank([hidden_bld, mask_bl], [3, 2])
        chex.assert_equal_shape_prefix([hidden_bld, mask_bl], 2)
        kernel_d = self.param("kernel", _near_zero, (hidden_bld.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (), jnp.float32)
        value_bl = jnp.sum(hidden_bld.astype(jnp.float32) * kernel_d[None, None], -1) + bias
        return jnp.where(mask_bl, value_bl, 0.0)


def _near_zero(key, shape, dtype):
    return nn.initializers.normal(1 / (shape[0] + 1))(key, shape, dtype)
