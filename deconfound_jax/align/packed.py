"""A prompt and its completions in one row: the prompt is read once, logits are made at completion tokens only.

    row       = prompt | completion 1 | completion 2 | ...
    segments  =   0    |      1       |      2       | ...      a completion sees the prompt and itself
    positions = 0 .. n - 1 | n ...    | n ...                   as if it stood behind the prompt alone

What a completion's tokens are given is what they are given in a row of their own, so log-probabilities are equal.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from einops import rearrange

from deconfound_jax.models.tokenizer import PAD

NOWHERE = -1  # segment of PAD: seen by no token


class Packed(NamedTuple):
    """Rows of b prompts with g completions of at most c tokens each."""

    tokens_bl: jax.Array  # l = prompt length + g c
    positions_bl: jax.Array
    segments_bl: jax.Array
    sources_bgc: jax.Array  # where in the row the state stands that predicts each completion token
    targets_bgc: jax.Array  # these tokens, PAD where there is none


def pack(prompt_bp, completion_bgc) -> Packed:
    """Lays b prompts and their completions out in rows.

    Args:
      prompt_bp: int tokens, at least one each (BEGIN, where there is no prompt), PAD left or right.
      completion_bgc: int tokens, PAD to the right; a completion of PAD only adds nothing.
    """
    chex.assert_rank([prompt_bp, completion_bgc], [2, 3])
    chex.assert_equal_shape_prefix([prompt_bp, completion_bgc], 1)
    prompt_bp = jnp.take_along_axis(prompt_bp, jnp.argsort(prompt_bp == PAD, axis=1, stable=True), 1)
    b, g, c = completion_bgc.shape
    p = prompt_bp.shape[1]
    length_b1 = (prompt_bp != PAD).sum(1, keepdims=True)
    flat = rearrange(completion_bgc, "b g c -> b (g c)")
    within_1l, completion_1l = jnp.tile(jnp.arange(c), g)[None], jnp.repeat(jnp.arange(g), c)[None]
    tokens_bl = jnp.concatenate([prompt_bp, flat], 1)
    place_bl = jnp.broadcast_to(jnp.arange(p)[None], (b, p))
    positions_bl = jnp.concatenate([place_bl, length_b1 + within_1l], 1)
    segments_bl = jnp.concatenate([jnp.zeros((b, p), int), jnp.broadcast_to(1 + completion_1l, (b, g * c))], 1)
    segments_bl = jnp.where(tokens_bl == PAD, NOWHERE, segments_bl)
    # A completion's first token is predicted by the prompt's last state, the others by the one before.
    before_1l = p + completion_1l * c + within_1l - 1
    sources_bl = jnp.where(within_1l == 0, length_b1 - 1, before_1l)
    return Packed(tokens_bl, positions_bl, segments_bl, sources_bl.reshape(b, g, c), completion_bgc)
