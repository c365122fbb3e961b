"""A randomized trial made into a confounded log whose answer is known: rejection sampling of rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Resampled(NamedTuple):
    """Rows that were kept, and with which probability each row of the trial could be."""

    index_m: np.ndarray  # rows of the trial, in order
    accept_n: np.ndarray


def confound_trial(treatment_n, propensity_n, seed: int = 0) -> Resampled:
    """Keeps rows so that treatment follows the covariates as stated, and the effect given them stays what it was.

        P(keep i) = q(t_i | c_i) / (P(t_i) M),    M = max over rows of q(t | c) / P(t),    q(1 | c) = propensity

    Kept rows have the covariates of the trial, treatment drawn from q, and the trial's outcome given both: adjusting
    for what the propensity is a function of identifies the trial's effect. Dropping rows by arm alone, or by a
    function of the outcome, would not.

    Args:
      treatment_n: the randomized treatment, 0 or 1, independent of the covariates.
      propensity_n: q(1 | c_i), strictly between 0 and 1: a function of covariates settled before treatment.
      seed: of the coin of each row.

    Returns:
      `Resampled`: about n / M rows.

    Raises:
      ValueError: a treatment that is not 0 and 1, or a propensity outside (0, 1).

    Example:
      >>> kept = confound_trial(treatment_n, np.where(field_n == 1, 0.85, 0.15))
      >>> log = trial.take(kept.index_m)

    Source: Keith, Feldman, Jurgens, Bragg and Bhattacharya (2023), RCT rejection sampling, algorithm 2.
    """
    treatment_n, propensity_n = np.asarray(treatment_n, np.float64), np.asarray(propensity_n, np.float64)
    if set(np.unique(treatment_n)) != {0.0, 1.0}:
        raise ValueError(f"treatment: expected 0 and 1, got {np.unique(treatment_n)[:5]}")
    if propensity_n.shape != treatment_n.shape or not ((propensity_n > 0) & (propensity_n < 1)).all():
        raise ValueError(f"propensity: expected {treatment_n.shape} numbers strictly between 0 and 1")
    treated_share = treatment_n.mean()
    ratio_n = np.where(treatment_n == 1, propensity_n / treated_share, (1 - propensity_n) / (1 - treated_share))
    accept_n = ratio_n / ratio_n.max()
    kept = np.random.default_rng(seed).random(len(accept_n)) < accept_n
    return Resampled(np.flatnonzero(kept), accept_n)
