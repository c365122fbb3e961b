"""Maximum likelihood: supervised fine-tuning."""

from __future__ import annotations

import jax.numpy as jnp

from deconfound_jax.models.tokenizer import PAD


def token_nll(logprob_bt, tokens_bl):
    """Mean negative log-likelihood of a text's targets.

        l_b = -1/T_b sum_{t >= 1, x_t != PAD} log p(x_t | x_0 ... x_{t-1}),   T_b the number of targets

    Args:
      logprob_bt: (b, l - 1) nats, 0 where there is no target: `logprobs.token_scores`'.
      tokens_bl: (b, l) int, BEGIN first, PAD where there is no token.
    Returns:
      (b,) nats per target token; 0 for a text without targets.
    """
    targets_b = jnp.sum((tokens_bl[:, 1:] != PAD) & (tokens_bl[:, :-1] != PAD), axis=1)
    return -logprob_bt.sum(-1) / jnp.maximum(targets_b, 1)
