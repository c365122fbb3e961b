"""Log-probabilities of texts under a policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from deconfound_jax.models.tokenizer import PAD


def sequence_logprob(apply: Callable, params: Any, tokens_bl):
    """Log-probability of whole texts.

        log pi(x) = sum_{t >= 1, x_t != PAD} log p(x_t | x_0 ... x_{t-1})

    Args:
      apply: (params, tokens (b, l)) -> (logits (b, l, v), anything), such as `Decoder.apply`.
      tokens_bl: int, BEGIN first, PAD to the right (see `check_targets`).
    Returns:
      (b,) nats, float32.

        sequence_logprob(decoder.apply, params, tokenizer.encode(texts, 24))
    """
    logits_blv, _ = apply(params, tokens_bl)
    return token_logprob(logits_blv, tokens_bl).sum(-1)


def token_logprob(logits_blv, tokens_bl):
    """Log-probability of every target: (b, l - 1) nats, the token at t + 1 given those up to t; 0 where it is PAD."""
    chex.assert_rank([logits_blv, tokens_bl], [3, 2])
    chex.assert_equal_shape_prefix([logits_blv, tokens_bl], 2)
    logits_btv, target_bt = logits_blv[:, :-1].astype(jnp.float32), tokens_bl[:, 1:]
    picked_bt = jnp.take_along_axis(logits_btv, target_bt[..., None], axis=-1)[..., 0]
    # The normaliser is subtracted after the pick: log_softmax would hold a second (b, l, v) array.
    return jnp.where(target_bt != PAD, picked_bt - jax.nn.logsumexp(logits_btv, axis=-1), 0.0)


def check_targets(tokens_bl) -> None:
    """Raises ValueError naming the rows that have no target token, whose log-probability would be an empty sum.

    For arrays on the host, before training; rows that only fill up a batch need weight 0, not this check.
    """
    empty = np.flatnonzero(~(np.asarray(tokens_bl)[:, 1:] != PAD).any(axis=1))
    if empty.size:
        raise ValueError(f"tokens: expected a token after BEGIN in every text, rows {empty[:5].tolist()} have none "
                         f"({empty.size} of {len(tokens_bl)})")  # fmt: skip
