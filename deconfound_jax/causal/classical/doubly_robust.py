"""Cross-fitted doubly robust estimators: partially linear DML, and AIPW for a binary treatment."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from deconfound_jax.causal.classical.absorb import level_codes
from deconfound_jax.causal.classical.arrays import vector
from deconfound_jax.causal.classical.crossfit import group_folds, logistic_predictions, ridge_predictions


class PartiallyLinear(NamedTuple):
    """The effect of one unit of d on y, its standard error, and the nuisances it came from."""

    effect: float
    error: float
    outcome_hat_n: np.ndarray  # E[y | x]
    treatment_hat_n: np.ndarray  # E[d | x]
    fold_n: np.ndarray


class Aipw(NamedTuple):
    """The average effect of d = 1 against d = 0, its standard error, and the nuisances it came from."""

    effect: float
    error: float
    control_hat_n: np.ndarray  # E[y | d = 0, x]
    treated_hat_n: np.ndarray  # E[y | d = 1, x]
    propensity_n: np.ndarray  # P(d = 1 | x), clipped
    clipped: int  # rows whose propensity was outside [clip, 1 - clip]
    clip: float
    fold_n: np.ndarray


def partially_linear(
    y_n, d_n, x_nq=None, fold_n=None, group_n=None, outcome_hat_n=None, treatment_hat_n=None,
    penalty=1.0, folds=5, seed=0,
) -> PartiallyLinear:  # fmt: skip
    """Double machine learning for a partially linear model, by partialling out.

        y = theta d + g(x) + e,    theta = sum (d - m)(y - l) / sum (d - m)^2,    l = E[y | x], m = E[d | x]

    Args:
      y_n: outcome.
      d_n: treatment, a number.
      x_nq: confounders; needed unless both nuisances are given.
      fold_n: folds; default `group_folds` of the groups (of single rows without groups).
      group_n: groups that folds never split and that errors are clustered in.
      outcome_hat_n, treatment_hat_n: l and m of each row, by fits that did not see it; default ridge.
      penalty: of the ridge regressions.
      folds, seed: of the default folds.

    Raises:
      ValueError: folds that split a group, or a nuisance missing without confounders.

    Source: Chernozhukov et al. (2018), section 4.1.
    """
    y_n = vector("y", y_n)
    d_n = vector("d", d_n, len(y_n))
    fold_n = _folds(fold_n, group_n, len(y_n), folds, seed)
    l_n = _nuisance("outcome_hat", outcome_hat_n, x_nq, lambda: ridge_predictions(y_n, x_nq, fold_n, None, penalty))
    m_n = _nuisance("treatment_hat", treatment_hat_n, x_nq, lambda: ridge_predictions(d_n, x_nq, fold_n, None, penalty))
    left_n = d_n - m_n
    effect = float(left_n @ (y_n - l_n) / (left_n @ left_n))
    score_n = left_n * (y_n - l_n - effect * left_n)
    return PartiallyLinear(effect, _error(score_n, group_n) / float(left_n @ left_n), l_n, m_n, fold_n)


def aipw(
    y_n, d_n, x_nq=None, fold_n=None, group_n=None, control_hat_n=None, treated_hat_n=None, propensity_n=None,
    clip=0.01, penalty=1.0, folds=5, seed=0,
) -> Aipw:  # fmt: skip
    """Augmented inverse propensity weighting for a binary treatment: right if either regression is.

        theta = mean[ g1 - g0 + d (y - g1) / e - (1 - d)(y - g0) / (1 - e) ],    e clipped to [clip, 1 - clip]

    Args:
      y_n: outcome.
      d_n: treatment, 0 or 1.
      x_nq: confounders; needed unless all nuisances are given.
      fold_n, group_n, penalty, folds, seed: as for `partially_linear`.
      control_hat_n, treated_hat_n: E[y | d, x] of each row under d = 0 and d = 1; default ridge within each arm.
      propensity_n: e of each row; default ridge-penalised logistic regression.
      clip: keeps one row from deciding; how many rows it touched is in the result.

    Raises:
      ValueError: a treatment that is not 0 or 1 or never differs, folds that split a group, a nuisance missing
        without confounders.

    Source: Robins, Rotnitzky and Zhao (1994); cross-fitted: Chernozhukov et al. (2018), section 5.1.
    """
    y_n = vector("y", y_n)
    d_n = vector("d", d_n, len(y_n))
    if set(np.unique(d_n)) != {0.0, 1.0}:
        raise ValueError(f"d: expected 0 and 1, got {np.unique(d_n)[:5]}")
    if not 0 <= clip < 0.5:
        raise ValueError(f"clip: expected 0 <= clip < 0.5, got {clip}")
    fold_n = _folds(fold_n, group_n, len(y_n), folds, seed)
    g0_n = _nuisance(
        "control_hat", control_hat_n, x_nq, lambda: ridge_predictions(y_n, x_nq, fold_n, d_n == 0, penalty)
    )
    g1_n = _nuisance(
        "treated_hat", treated_hat_n, x_nq, lambda: ridge_predictions(y_n, x_nq, fold_n, d_n == 1, penalty)
    )
    raw_n = _nuisance("propensity", propensity_n, x_nq, lambda: logistic_predictions(d_n, x_nq, fold_n, None, penalty))
    e_n = np.clip(raw_n, clip, 1 - clip)
    score_n = g1_n - g0_n + d_n * (y_n - g1_n) / e_n - (1 - d_n) * (y_n - g0_n) / (1 - e_n)
    effect = float(score_n.mean())
    error = _error(score_n - effect, group_n) / len(y_n)
    return Aipw(effect, error, g0_n, g1_n, e_n, int((e_n != raw_n).sum()), float(clip), fold_n)


def _folds(fold_n, group_n, n, folds, seed) -> np.ndarray:
    if fold_n is None:
        return group_folds(np.arange(n) if group_n is None else group_n, folds, seed)
    fold_n = level_codes(fold_n, n)[0][:, 0]
    if group_n is not None:
        codes_nc, counts = level_codes(group_n, n)
        pairs = np.unique(np.stack([codes_nc[:, 0], fold_n], 1), axis=0)
        if len(pairs) > counts[0]:
            split = np.asarray(group_n)[codes_nc[:, 0] == pairs[np.argmax(np.diff(pairs[:, 0]) == 0), 0]][0]
            raise ValueError(f"fold: expected every group inside one fold, got group {split} in several")
    return fold_n


def _nuisance(name, given_n, x_nq, fit) -> np.ndarray:
    if given_n is None and x_nq is None:
        raise ValueError(f"{name}: expected the nuisance, or confounders x to fit it on, got neither")
    return fit() if given_n is None else vector(name, given_n)


def _error(score_n, group_n) -> float:
    """Root of the summed squared scores, of groups where there are any."""
    if group_n is not None:
        score_n = np.bincount(level_codes(group_n, len(score_n))[0][:, 0], score_n)
    return float(np.sqrt(score_n @ score_n))
