"""The DPO objective on groups of texts: one forward pass a group, every pair inside it."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from einops import rearrange

from deconfound_jax.align.groups import pair_index
from deconfound_jax.align.logprobs import sequence_logprob
from deconfound_jax.align.losses.dpo import dpo
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.structs import Pairs


def dpo_objective(decoder: Decoder) -> Callable:
    """Objective `(params, frozen, batch, key) -> (per_example, weight, penalty, metrics)` of soft-label DPO.

        h_i = log pi(x_i) - log pi_ref(x_i)
        l_ij = -[s_ij log sigmoid(beta (h_i - h_j)) + (1 - s_ij) log sigmoid(-beta (h_i - h_j))]

    `frozen` is {"beta": scalar}; `batch` a `Pairs`. Source: Rafailov et al. 2305.18290.
    """

    def objective(params, frozen, batch: Pairs, key):
        b, g, _ = batch.tokens_bgl.shape
        logprob = sequence_logprob(decoder, params, rearrange(batch.tokens_bgl, "b g l -> (b g) l"))
        ratio_bg = rearrange(logprob, "(b g) -> b g", b=b, g=g) - batch.reference_bg
        first, second = pair_index(g)
        h1, h2 = (rearrange(ratio_bg[:, side], "b p -> (b p)") for side in (first, second))
        label, weight = (rearrange(a, "b p -> (b p)") for a in (batch.label_bp, batch.weight_bp))
        agrees = ((h1 > h2) == (label > 0.5)).astype(jnp.float32)
        metrics = {"agreement": jnp.sum(weight * agrees) / jnp.maximum(weight.sum(), 1e-9)}
        return dpo(h1, h2, label, frozen["beta"]), weight, 0.0, metrics

    return objective
