"""Objectives on single texts with the posterior of their reward: SFT, KTO, DRO, and DR-CPO.

    objective = kto_objective(decoder)
    per_text, weight, penalty, metrics = objective(params, {"beta": 0.3}, scored, key)

Each is `(params, frozen, batch, key) -> (per_example, weight, penalty, metrics)`; `frozen` holds the loss's scalars
and, where adapters are trained, `base`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deconfound_jax.align.knobs import read_knobs
from deconfound_jax.align.logprobs import group_mask, group_scores
from deconfound_jax.align.losses import weighted_mean
from deconfound_jax.align.losses.dro import dro
from deconfound_jax.align.losses.kto import kto, reference_point
from deconfound_jax.align.losses.likelihood import mean_nll
from deconfound_jax.align.losses.off_policy import dr_cpo, effective_size, log_mean_ratio
from deconfound_jax.align.policy import variables_of
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.structs import Scored


def sft_objective(decoder: Decoder) -> Callable:
    """Maximum likelihood of `Scored` texts: mean nats per target token, each text by its weight.

        l_b = -log pi(x_b) / T_b

    Outcome-weighted: `losses.off_policy.outcome_weights` of the log's reward draws, multiplied into `weight_b`.
    Rewards and reference are not read and may be None; `frozen` may be {}.
    """

    def objective(params, frozen, batch: Scored, key):
        logprob_b = _logprob(decoder, variables_of(params, frozen), batch.tokens_bl, batch.prompt_bq)
        targets_b = group_mask(batch.tokens_bl[:, None], batch.prompt_bq)[:, 0].sum(-1)
        return mean_nll(logprob_b, targets_b), batch.weight_b, 0.0, {}

    return objective


def kto_objective(decoder: Decoder) -> Callable:
    """KTO with graded desirability over `Scored`: `label_b` is d; `frozen` is {"beta": scalar}.

        l = d sigmoid(beta (z0 - h)) + (1 - d) sigmoid(beta (h - z0)),   h = log pi - log pi_ref

    z0 >= 0 has no gradient. Where texts have prompts it is the published estimate of KL(pi || pi_ref): the mean
    log-ratio of the row before's text behind each prompt, at the product of the two rows' weights; the reference's part
    of it is computed here, by the variables under `frozen["reference"]` or, of adapters, `frozen["base"]`. Without
    prompts every text fits every other's, so z0 is the weighted mean log-ratio of the batch's own texts: the policy's
    drift on the log, not a divergence. Metrics: `z0`, and `logratio`, the weighted mean of h.

    Raises:
      ValueError: beta, the reference's log-probabilities or, with prompts, the reference itself is missing.
    """

    def objective(params, frozen, batch: Scored, key):
        (beta,) = read_knobs(frozen, ("beta",), "kto")
        variables = variables_of(params, frozen)
        if batch.prompt_bq is None:
            logratio_b = _logratio(decoder, variables, batch, "kto")
            z0 = reference_point(logratio_b, batch.weight_b)
        else:
            logratio_b, other_b = _with_mismatched(decoder, variables, frozen, batch)
            z0 = reference_point(other_b, batch.weight_b * jnp.roll(batch.weight_b, 1))
        metrics = {"z0": z0, "logratio": weighted_mean(logratio_b, batch.weight_b)}
        return kto(logratio_b, batch.label_b, beta, z0), batch.weight_b, 0.0, jax.lax.stop_gradient(metrics)

    return objective


def dro_objective(decoder: Decoder) -> Callable:
    """DRO over `Scored`: `params` holds the policy's collections and {"value": {"v": scalar}}, trained together.

        l = 1/2 (r - V - tau h)^2,   h = log pi - log pi_ref

    `frozen` is {"tau": reward per nat}; for rewards known with different errors multiply `losses.dro.reward_precision`
    into `weight_b`. V starts best at the mean reward, its least squares while pi is the reference. One V for all texts
    is right where they share a prompt or have none; else hand in rewards less their prompt's mean. Metrics: `value`,
    `gap`, the weighted mean of r - V - tau h, and `logratio`.

    Raises:
      ValueError: tau, the value or the reference's log-probabilities is missing.
    """

    def objective(params, frozen, batch: Scored, key):
        (tau,) = read_knobs(frozen, ("tau",), "dro")
        if "value" not in params:
            raise ValueError(f"params: expected a collection 'value' with V as its leaf 'v', got {sorted(params)}")
        policy, value = {k: v for k, v in params.items() if k != "value"}, params["value"]["v"]
        logratio_b = _logratio(decoder, variables_of(policy, frozen), batch, "dro")
        gap_b = batch.reward_b - value - tau * logratio_b
        metrics = {"value": value, "gap": gap_b, "logratio": logratio_b}
        metrics |= {name: weighted_mean(metrics[name], batch.weight_b) for name in ("gap", "logratio")}
        return dro(logratio_b, batch.reward_b, value, tau), batch.weight_b, 0.0, jax.lax.stop_gradient(metrics)

    return objective


class OffPolicy(NamedTuple):
    """Logged texts with their outcomes, and fresh ones that an outcome model judges: what DR-CPO eats."""

    tokens_bl: Any
    behaviour_b: Any  # log-probability under what drew the text: the log's policy, or that of the fresh texts; nats
    gain_b: Any  # logged: outcome (its confounders' part removed) minus the model's g(x); fresh: g(x)
    logged_b: Any  # 1 logged, 0 fresh
    weight_b: Any  # 0 masks a text
    prompt_bq: Any = None


def dr_cpo_objective(decoder: Decoder) -> Callable:
    """Doubly robust causal preference optimisation over `OffPolicy`; `frozen` is {"ceiling": nats}.

        V = sum_logged w (y - g) + mean_fresh (pi / pi_0) g,   w self-normalised (see `losses.off_policy.dr_cpo`)

    Both sides weigh alike, so the loss is -V / 2 where both are there. Metrics: `value`, V, and `effective`, how many
    equal rows the logged ones are worth at the policy's ratios: few, and V is noise.

    Raises:
      ValueError: the ceiling is missing.
    """

    def objective(params, frozen, batch: OffPolicy, key):
        (ceiling,) = read_knobs(frozen, ("ceiling",), "dr_cpo")
        variables = variables_of(params, frozen)
        logratio_b = _logprob(decoder, variables, batch.tokens_bl, batch.prompt_bq) - batch.behaviour_b
        logged_b = batch.weight_b * batch.logged_b
        fresh_b = batch.weight_b - logged_b
        normaliser_b = log_mean_ratio(logratio_b, logged_b) * batch.logged_b
        loss_b = dr_cpo(logratio_b, batch.gain_b, normaliser_b, ceiling)
        used_b = logged_b * jnp.exp(jnp.minimum(logratio_b - normaliser_b, ceiling))
        value = -weighted_mean(loss_b, logged_b) - weighted_mean(loss_b, fresh_b)
        metrics = {"value": value, "effective": effective_size(used_b)}
        return loss_b, _share(logged_b) + _share(fresh_b), 0.0, jax.lax.stop_gradient(metrics)

    return objective


def _share(weight_b):
    total = weight_b.sum()
    return weight_b / jnp.where(total > 0, total, 1.0)


def _logprob(decoder, variables, tokens_bl, prompt_bq):
    """Nats of single texts, (b,)."""
    return group_scores(decoder, variables, tokens_bl[:, None], prompt_bq).logprob[:, 0].sum(-1)


def _logratio(decoder, variables, batch: Scored, loss):
    if batch.reference_b is None:
        raise ValueError(f"batch.reference_b: expected log-probabilities, {loss} compares with them, got None")
    return _logprob(decoder, variables, batch.tokens_bl, batch.prompt_bq) - batch.reference_b


def _with_mismatched(decoder, variables, frozen, batch: Scored):
    """Log-ratio of each text behind its own prompt, and of the row before's text behind it: one pass of the policy."""
    if batch.reference_b is None:
        raise ValueError("batch.reference_b: expected log-probabilities, kto compares with them, got None")
    if "reference" not in frozen and "base" not in frozen:
        raise ValueError("frozen: expected the reference's variables as 'reference' or 'base' for kto's z0 of prompted "
                         f"texts, got {sorted(frozen)}")  # fmt: skip
    reference = frozen["reference"] if "reference" in frozen else frozen["base"]
    other_bl = jnp.roll(batch.tokens_bl, 1, axis=0)
    both_bgl = jnp.stack([batch.tokens_bl, other_bl], 1)
    logprob_bg = group_scores(decoder, variables, both_bgl, batch.prompt_bq).logprob.sum(-1)
    other_b = logprob_bg[:, 1] - _logprob(decoder, reference, other_bl, batch.prompt_bq)
    return logprob_bg[:, 0] - batch.reference_b, other_b
