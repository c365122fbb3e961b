"""Objectives on pairs: one forward pass a group of texts, every pair inside it.

objective = preference_objective(decoder, "sigmoid")
per_pair, weight, penalty, metrics = objective(params, {"beta": 0.3}, pairs, key)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from deconfound_jax.align.groups import pair_index
from deconfound_jax.align.knobs import read_knobs
from deconfound_jax.align.logprobs import group_mask, group_scores
from deconfound_jax.align.losses import weighted_mean
from deconfound_jax.align.losses.dpo import conservative_dpo, dpo, hinge, ipo, per_token, robust_dpo
from deconfound_jax.align.losses.reference_free import orpo, simpo
from deconfound_jax.align.policy import variables_of
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.structs import Pairs


class PairLoss(NamedTuple):
    """A loss (first_p, second_p, label_p, *knobs) -> (p,), and what it is called with."""

    loss: Callable
    knobs: tuple[str, ...]  # keys of `frozen`, in the order of its arguments
    reference: bool = True  # it reads log-ratios to the reference; else log-probabilities a token


PAIR_LOSSES: Mapping[str, PairLoss] = {
    "sigmoid": PairLoss(dpo, ("beta",)),
    "conservative": PairLoss(conservative_dpo, ("beta", "noise")),
    "robust": PairLoss(robust_dpo, ("beta", "noise")),
    "hinge": PairLoss(hinge, ("beta",)),
    "ipo": PairLoss(ipo, ("beta",)),
    "simpo": PairLoss(simpo, ("beta", "margin"), reference=False),
    "orpo": PairLoss(orpo, ("strength",), reference=False),
}


def preference_objective(decoder: Decoder, loss: str = "sigmoid", normalise: bool = False) -> Callable:
    """Objective `(params, frozen, batch, key) -> (per_example, weight, penalty, metrics)` over `Pairs`.

        h_i = log pi(x_i) - log pi_ref(x_i),   l_ij = loss(h_i, h_j, s_ij)

    Args:
      loss: of `PAIR_LOSSES`; its knobs are scalars in `frozen`.
      normalise: log-ratios a token (`losses.dpo.per_token`); simpo and orpo read log-probabilities a token anyway,
        and no reference: `batch.reference_bg` may be None.
    Returns:
      The objective. Metrics: `agreement`, the weighted share of pairs that policy and label order alike, and
      `logratio`, the mean of h over the texts of counted pairs (with a reference): how far the policy moved on the log.

    Raises:
      ValueError: an unknown loss; a knob that `frozen` lacks; a missing reference.

        preference_objective(decoder, "simpo")(params, {"beta": 2.0, "margin": 1.0}, pairs, key)
    """
    if loss not in PAIR_LOSSES:
        raise ValueError(f"loss: expected one of {sorted(PAIR_LOSSES)}, got {loss!r}")
    chosen = PAIR_LOSSES[loss]

    def objective(params, frozen, batch: Pairs, key):
        knobs = read_knobs(frozen, chosen.knobs, loss)
        if chosen.reference and batch.reference_bg is None:
            raise ValueError(f"batch.reference_bg: expected log-probabilities, {loss} compares with them, got None")
        texts = batch.tokens_bgl, batch.prompt_bq
        score_bg = group_scores(decoder, variables_of(params, frozen), *texts).logprob.sum(-1)
        if chosen.reference:
            score_bg = score_bg - batch.reference_bg
        if normalise or not chosen.reference:
            score_bg = per_token(score_bg, group_mask(*texts).sum(-1))
        first, second = pair_index(batch.tokens_bgl.shape[1])
        a_p, b_p = (rearrange(score_bg[:, side], "b p -> (b p)") for side in (first, second))
        label_p, weight_p = (rearrange(a, "b p -> (b p)") for a in (batch.label_bp, batch.weight_bp))
        agrees_p = ((a_p > b_p) == (label_p > 0.5)).astype(jnp.float32)
        metrics = {"agreement": weighted_mean(agrees_p, weight_p)}
        if chosen.reference:
            metrics["logratio"] = weighted_mean((a_p + b_p) / 2, weight_p)
        metrics = jax.lax.stop_gradient(metrics)
        return chosen.loss(a_p, b_p, label_p, *knobs), weight_p, 0.0, metrics

    return objective
