"""Maximum likelihood: supervised fine-tuning."""

from __future__ import annotations

import jax.numpy as jnp

from deconfound_jax.align.logprobs import token_logprob
from deconfound_jax.models.tokenizer import PAD


def token_nll(logits_blv, tokens_bl):
    """Mean negative log-likelihood of a text's targets.

        l_b = -1/T_b sum_{t >= 1, x_t != PAD} log p(x_t | x_0 ... x_{t-1}),   T_b the number of targets

    Args:
      logits_blv: (b, l, v), those at t predict the token at t + 1.
      tokens_bl: (b, l) int, BEGIN first, PAD to the right.
    Returns:
      (b,) nats per target token; 0 for a text without targets.
    """
    targets_b = jnp.sum(tokens_bl[:, 1:] != PAD, axis=1)
    return -token_logprob(logits_blv, tokens_bl).sum(-1) / jnp.maximum(targets_b, 1)
