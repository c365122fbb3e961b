"""Policy gradient objectives on groups of sampled texts: GRPO, Dr.GRPO, RLOO.

    objective = policy_gradient_objective(decoder, "rloo", estimator="k1")
    per_text, weight, penalty, metrics = objective(params, {"kl": 0.05, "clip": 0.2}, rollouts, key)

One round's texts may serve several updates: the clip holds what is then an older policy's sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from einops import rearrange

from deconfound_jax.align.knobs import read_knobs
from deconfound_jax.align.logprobs import group_mask, group_scores
from deconfound_jax.align.losses import policy_gradient as pg
from deconfound_jax.align.losses import weighted_mean
from deconfound_jax.align.policy import variables_of
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.structs import Rollouts

ADVANTAGES: Mapping[str, Callable] = {"grpo": pg.standardised, "dr_grpo": pg.centred, "rloo": pg.leave_one_out}
KL_TERMS: Mapping[str, Callable] = {"k2": pg.kl_k2, "k3": pg.kl_k3}  # k1 belongs in the reward
STIFFNESS = 5.0  # by which beta grows for a nat beyond `kl_target`


def policy_gradient_objective(decoder: Decoder, advantage: str = "grpo", estimator: str = "k3") -> Callable:
    """Objective `(params, frozen, batch, key) -> (per_example, weight, penalty, metrics)` over `Rollouts`.

        l = surrogate(A) + beta k(pi, ref),   A from the group's rewards and weights
        beta = kl + 5 max(KL - kl_target, 0),  KL the batch's, by k3

    Args:
      advantage: with its surrogate, `losses.policy_gradient`'s of the same name.
        grpo: standardised in the group, mean over a text's tokens;
        dr_grpo: less the group's mean, sum over tokens by the width of the batch's token axis;
        rloo: less the mean of the group's others, one ratio a text.
      estimator: of the divergence from the reference.
        k2, k3: a term of the loss, taken over tokens as the surrogate is (rloo: summed);
        k1: taken from the reward, r - beta sum_t (log pi_old - log ref), as its gradient would teach nothing.
    Returns:
      The objective; `frozen` has `kl`, in reward units a nat (0: no pull), `kl_target`, in nats a text (infinity: none;
      policies of different rewards then end at one distance), and `clip`. A reward may be one posterior draw a group,
      or a lower bound. Metrics: `kl`, nats a text by k3 under the policy that is trained;
      `clipped`, the share of tokens whose ratio left [1 - clip, 1 + clip]; `entropy`, nats a token; `reward`.

    Raises:
      ValueError: an unknown advantage or estimator; a knob that `frozen` lacks.

    Sources: Shao et al. 2402.03300; Liu et al. 2503.20783; Ahmadian et al. 2402.14740.
    """
    if advantage not in ADVANTAGES:
        raise ValueError(f"advantage: expected one of {sorted(ADVANTAGES)}, got {advantage!r}")
    if estimator not in ("k1", *KL_TERMS):
        raise ValueError(f"estimator: expected one of {['k1', *KL_TERMS]}, got {estimator!r}")

    def objective(params, frozen, batch: Rollouts, key):
        kl, kl_target, clip = read_knobs(frozen, ("kl", "kl_target", "clip"), advantage)
        mask_bgt = group_mask(batch.tokens_bgl, batch.prompt_bq)
        scores = group_scores(decoder, variables_of(params, frozen), batch.tokens_bgl, batch.prompt_bq)
        reward_bg, metrics = batch.reward_bg, jax.lax.stop_gradient(_metrics(scores, batch, mask_bgt, clip))
        beta = kl + STIFFNESS * jnp.maximum(metrics["kl"] - kl_target, 0.0)
        if estimator == "k1":
            spent_bgt = jnp.where(mask_bgt, pg.kl_k1(batch.old_bgl, batch.reference_bgl), 0.0)
            reward_bg = reward_bg - beta * spent_bgt.sum(-1)
        advantage_bg = jax.lax.stop_gradient(ADVANTAGES[advantage](reward_bg, batch.weight_bg))
        loss_bg = _surrogate(advantage, scores.logprob, batch.old_bgl, advantage_bg, mask_bgt, clip)
        if estimator in KL_TERMS:
            term_bgt = jnp.where(mask_bgt, KL_TERMS[estimator](scores.logprob, batch.reference_bgl), 0.0)
            loss_bg = loss_bg + beta * _over_tokens(advantage, term_bgt, mask_bgt)
        loss_n, weight_n = (rearrange(a, "b g -> (b g)") for a in (loss_bg, batch.weight_bg))
        return loss_n, weight_n, 0.0, metrics

    return objective


def _surrogate(advantage, logprob_bgt, old_bgt, advantage_bg, mask_bgt, clip):
    found = logprob_bgt, old_bgt, advantage_bg, mask_bgt, clip
    if advantage == "dr_grpo":
        return pg.dr_grpo(*found, length=mask_bgt.shape[-1])
    return pg.grpo(*found) if advantage == "grpo" else pg.rloo(*found)


def _over_tokens(advantage, value_bgt, mask_bgt):
    """A token's term over its text, by the surrogate's own rule."""
    if advantage == "grpo":
        return pg.token_mean(value_bgt, mask_bgt)
    return value_bgt.sum(-1) / (mask_bgt.shape[-1] if advantage == "dr_grpo" else 1)


def _metrics(scores, batch: Rollouts, mask_bgt, clip):
    weight_bgt = mask_bgt * batch.weight_bg[..., None]
    outside_bgt = jnp.abs(jnp.expm1(scores.logprob - batch.old_bgl)) > clip
    kl_bg = jnp.where(mask_bgt, pg.kl_k3(scores.logprob, batch.reference_bgl), 0.0).sum(-1)
    return {
        "kl": weighted_mean(kl_bg, batch.weight_bg),
        "clipped": weighted_mean(outside_bgt.astype(kl_bg.dtype), weight_bgt),
        "entropy": weighted_mean(scores.entropy, weight_bgt),
        "reward": weighted_mean(batch.reward_bg, batch.weight_bg),
    }
