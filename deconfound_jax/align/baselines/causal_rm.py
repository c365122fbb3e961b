"""CausalRM: feedback that errs and is seen for some texts only, corrected in the loss (2603.18736)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from deconfound_jax.align.baselines.data import (
    NotDefined,
    RewardData,
    RewardModel,
    checked,
    confounders,
    linear_model,
    rows_used,
)
from deconfound_jax.align.baselines.training import Batch, starts, texts_of, train
from deconfound_jax.causal.classical.crossfit import group_folds, logistic_predictions
from deconfound_jax.config import CausalRm


class Feedback(NamedTuple):
    """What the losses read of each row."""

    row_n: np.ndarray
    outcome_n: np.ndarray  # in [0, 1]: a click, or the share of an exposure; 0 where unseen
    observed_n: np.ndarray
    propensity_n: np.ndarray  # P(observed | row), clipped
    imputed_n: np.ndarray  # P(the user liked the text | row), for the doubly robust loss
    weight_n: np.ndarray


def causal_rm_ips(data: RewardData, config: CausalRm | None = None, key=None) -> RewardModel:
    """A pointwise reward on feedback corrected for its noise, seen rows weighted up by how rarely they are seen.

        r = w'z + a,   l(r, 1) = -log sigmoid(r),   l(r, 0) = -log sigmoid(-r)
        loss = E[(o / pi) l~(r, y)],   l~ of `denoised`

    Args:
      data: rows with `observed_n`; outcomes 0 or 1, or counts of an exposure. `propensity_n` is estimated where it is
        not given: cross-fitted logistic regression of o on text and confounders.
      config: the noise rates, which have to be known, and the clip of pi.
      key: of the start and batches; default `jax.random.key(0)`.

    Raises:
      NotDefined: no `observed_n`, one that never is 0, or outcomes outside [0, 1].
      ValueError: noise rates that add up to 1 or more.

    Source: 2603.18736.
    """
    return _trained("causal_rm_ips", 0.0, data, config, key)


def causal_rm_dr(data: RewardData, config: CausalRm | None = None, key=None) -> RewardModel:
    """The same, doubly robust: right where either the propensity or the imputation is.

        loss = E[l^ + (o / pi) (l~ - l^)],   l^ = p l(r, 1) + (1 - p) l(r, 0)

    p = P(liked | text, confounders) by a cross-fitted regression on the seen rows, corrected for the noise rates.

    Arguments, errors and source as for `causal_rm_ips`.
    """
    return _trained("causal_rm_dr", 1.0, data, config, key)


def denoised(loss_one, loss_zero, outcome, q01, q10):
    """The surrogate loss whose mean over noisy feedback is the loss on what users meant.

        l~(., 1) = [(1 - q10) l(., 1) - q01 l(., 0)] / (1 - q01 - q10)
        l~(., 0) = [(1 - q01) l(., 0) - q10 l(., 1)] / (1 - q01 - q10)

    Args:
      loss_one, loss_zero: loss of a positive and of a negative answer, any shape.
      outcome: in [0, 1]; a share of clicks mixes the two.
      q01: P(feedback 0 | liked).
      q10: P(feedback 1 | not liked).
    """
    span = 1 - q01 - q10
    surrogate_one = ((1 - q10) * loss_one - q01 * loss_zero) / span
    surrogate_zero = ((1 - q01) * loss_zero - q10 * loss_one) / span
    return outcome * surrogate_one + (1 - outcome) * surrogate_zero


def objective(params, frozen, batch: Batch, key):
    """(o / pi) l~ of each row; `frozen["doubly"]` 1: l^ + (o / pi) (l~ - l^)."""
    found = batch.examples
    reward_b = batch.texts.features_nd @ params["w_d"] + params["a"]
    one_b, zero_b = -jax.nn.log_sigmoid(reward_b), -jax.nn.log_sigmoid(-reward_b)
    corrected_b = denoised(one_b, zero_b, found.outcome_n, frozen["q01"], frozen["q10"])
    imputed_b = frozen["doubly"] * (found.imputed_n * one_b + (1 - found.imputed_n) * zero_b)
    per_row = imputed_b + found.observed_n / found.propensity_n * (corrected_b - imputed_b)
    return per_row, found.weight_n, 0.0, {}


def feedback(data: RewardData, config: CausalRm, baseline: str) -> Feedback:
    """Outcomes, propensities and imputations of every row; errors as for `causal_rm_ips`."""
    if config.q01 + config.q10 >= 1:
        raise ValueError(f"q01 + q10: expected less than 1, got {config.q01 + config.q10:g}")
    if data.observed_n is None or np.all(data.observed_n):
        raise NotDefined(baseline, "every outcome was seen (observed_n)")
    used_n, observed_n = rows_used(data), np.asarray(data.observed_n, np.float64)
    outcome_n = np.where(used_n, data.outcome_n, 0.0)
    if data.exposure_n is not None:
        outcome_n = outcome_n / np.where(used_n, data.exposure_n, 1.0)
    if outcome_n.min() < 0 or outcome_n.max() > 1:
        raise NotDefined(baseline, "outcomes are neither 0 or 1 nor counts of an exposure")
    counted_n = np.ones(len(used_n)) if data.weight_n is None else np.asarray(data.weight_n, np.float64)
    known_nq = data.features_nd
    if data.numbers_nk is not None or data.levels_nc is not None:
        known_nq = np.concatenate([known_nq, confounders(data, baseline)], 1)
    group_n = np.arange(len(used_n)) if data.group_n is None else data.group_n
    fold_n, present_n = group_folds(group_n, config.folds), counted_n > 0
    propensity_n = data.propensity_n
    if propensity_n is None:
        propensity_n = logistic_predictions(observed_n, known_nq, fold_n, present_n, config.penalty)
    # A share of clicks has the mean that a logistic regression fits, too.
    noisy_n = logistic_predictions(outcome_n, known_nq, fold_n, used_n, config.penalty)
    imputed_n = np.clip((noisy_n - config.q10) / (1 - config.q01 - config.q10), 0.0, 1.0)
    return Feedback(
        np.arange(len(used_n)), outcome_n, observed_n, np.maximum(propensity_n, config.clip), imputed_n, counted_n
    )


def _trained(name: str, doubly: float, data: RewardData, config: CausalRm | None, key) -> RewardModel:
    config = config or CausalRm()
    rows = feedback(checked(data), config, name)
    # The reward is of all texts, seen or not: so are mean and sd.
    texts, mean_d, sd_d = texts_of(data._replace(observed_n=None))
    params_r, key = starts(key, 1, {"w_d": ((len(mean_d),), 0.1 * len(mean_d) ** -0.5), "a": ((), 0.0)})
    knobs = {"q01": config.q01, "q10": config.q10, "doubly": doubly}
    params, _ = train(objective, params_r, texts, rows, knobs, config.adam, key)
    return linear_model(mean_d, sd_d, params["w_d"])
