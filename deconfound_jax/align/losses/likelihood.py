"""Maximum likelihood: supervised fine-tuning. With `off_policy.outcome_weights` as weights, outcome-weighted."""

from __future__ import annotations

import chex
import jax.numpy as jnp

from deconfound_jax.models.tokenizer import PAD


def mean_nll(logprob_b, targets_b):
    """Mean negative log-likelihood of a text's targets.

        l_b = -log pi(x_b) / T_b,   T_b the number of scored tokens

    Args:
      logprob_b, targets_b: same shape; nats per text, and scored tokens.
    Returns:
      nats per target token; 0 for a text without targets.

        mean_nll(scores.logprob.sum(-1), mask_bt.sum(-1))
    """
    chex.assert_equal_shape([logprob_b, targets_b])
    return -logprob_b / jnp.maximum(targets_b, 1)


def token_nll(logprob_bt, tokens_bl):
    """`mean_nll` of whole texts, from their tokens.

        l_b = -1/T_b sum_{t >= 1, x_t != PAD} log p(x_t | x_0 ... x_{t-1})

    Args:
      logprob_bt: (b, l - 1) nats, 0 where there is no target: `logprobs.token_scores`'.
      tokens_bl: (b, l) int, BEGIN first, PAD where there is no token.
    Returns:
      (b,) nats per target token; 0 for a text without targets.
    """
    targets_b = jnp.sum((tokens_bl[:, 1:] != PAD) & (tokens_bl[:, :-1] != PAD), axis=1)
    return mean_nll(logprob_bt.sum(-1), targets_b)
