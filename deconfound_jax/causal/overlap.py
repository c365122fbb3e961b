"""Positivity: does what is compared vary where the confounders are equal?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.optimize

from deconfound_jax.causal.working import Raw, sweep

_PRIOR_SD = 2.5  # of a propensity's standardised logit coefficients (Gelman et al. 2008): separation stays finite
_ONE_HOT = 50  # levels that enter a propensity as columns of their own
_CONTRASTS = 2000  # pairs of logged texts whose difference is looked at
_FLOOR = 1e-12  # of an eigenvalue between 0 and 1


class Overlap(NamedTuple):
    """How much of a log speaks about a treatment's effect given the controls."""

    effective_rows: float  # of the arm that has fewer
    share: float  # of that arm's rows
    propensity_n: np.ndarray | None  # P(treated | controls); None for a treatment of many values


class Positivity(NamedTuple):
    """How much of phi's variation is left given terms and levels, for contrasts of logged texts."""

    share: float  # of a contrast's information; the contrast at the 5% quantile
    effective_rows: float
    rank: int  # directions of phi that vary in the log
    deficient: int  # of these, how many do not vary given terms and levels


def overlap(treatment_n, controls_nq, weight_n=None) -> Overlap:
    """Effective sample size of the inverse propensity weights, or of a continuous treatment's residual.

        ESS_1 = n / mean(1 / e),  ESS_0 = n / mean(1 / (1 - e)),  e = P(t = 1 | controls)

    the limit of Kish's (sum w)^2 / sum w^2 over an arm, taken over all rows: where the arms do not overlap at all the
    rows of an arm have weights near 1, and Kish's number looks perfect. A treatment of more than two values:
    n (1 - R^2), the share of its variance that the controls leave.

    Args:
      treatment_n: (n,) two values, or more.
      controls_nq: (n, q) numeric controls, any scale.
      weight_n: a row counts as so many.

    Returns:
      `Overlap`.

    Raises:
      ValueError: a treatment that never differs.

    Example:
      >>> overlap(np.array([0.0, 1.0, 0.0, 1.0]), np.zeros((4, 1))).share
      1.0
    """
    treatment_n, controls_nq = np.asarray(treatment_n, np.float64), np.asarray(controls_nq, np.float64)
    weight_n = np.ones(len(treatment_n)) if weight_n is None else np.asarray(weight_n, np.float64)
    values = np.unique(treatment_n)
    if len(values) < 2:
        raise ValueError(f"treatment: expected values that differ, got {values[0]:g} in every row")
    if len(values) > 2:
        share = _share_left(treatment_n, controls_nq, weight_n)
        return Overlap(share * float(weight_n.sum()), share, None)
    treated_n = treatment_n == values[1]
    propensity_n = propensity(treated_n, controls_nq, weight_n)
    arms = []
    for chance_n in (propensity_n, 1 - propensity_n):
        effective = weight_n.sum() / np.average(1 / np.maximum(chance_n, _FLOOR), weights=weight_n)
        # The mean of fitted chances is the arm's share, so this is at most 1.
        arms.append((float(effective), float(effective / (weight_n @ chance_n))))
    return Overlap(min(a[0] for a in arms), min(a[1] for a in arms), propensity_n)


def propensity(treated_n: np.ndarray, controls_nq: np.ndarray, weight_n: np.ndarray) -> np.ndarray:
    """P(treated | controls) by logistic regression, coefficients N(0, 2.5^2) on standardised controls."""
    x = controls_nq - np.average(controls_nq, 0, weight_n)[None, :]
    sd = np.sqrt(np.average(x**2, 0, weight_n))
    x = np.concatenate([np.ones((len(x), 1)), x[:, sd > 1e-12] / sd[sd > 1e-12][None, :]], 1)
    precision = np.full(x.shape[1], _PRIOR_SD**-2.0)
    precision[0] = 0.0

    def objective(b):
        eta = x @ b
        value = weight_n @ (np.logaddexp(0, eta) - treated_n * eta) + 0.5 * precision @ b**2
        return value, x.T @ (weight_n * (1 / (1 + np.exp(-eta)) - treated_n)) + precision * b

    found = scipy.optimize.minimize(objective, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B")
    return 1 / (1 + np.exp(-(x @ found.x)))


def positivity(found: Raw, seed: int = 0) -> Positivity:
    """Whether the directions of phi in which logged texts differ vary given terms and levels.

    With W an orthonormal basis of phi's columns and M = W~'W~ its cross products once terms and levels are swept out,
    a contrast v has the share v'v / v'M^-1 v of the information it would have without them. M's smallest eigenvalue
    is one less the largest squared canonical correlation of phi and the terms.

    Returns:
      `Positivity` for the contrast at the 5% quantile of random pairs of logged texts.
    """
    w = found.frequency_n
    basis_nr = _whitened(found.text_nd, w)
    n, rank = basis_nr.shape
    if rank == 0:
        return Positivity(1.0, float(w.sum()), 0, 0)
    swept = sweep(found._replace(text_nd=basis_nr), w).text_nd
    values, vectors = np.linalg.eigh(swept.T @ (swept * w[:, None]))
    rng = np.random.default_rng(seed)
    a, b = rng.integers(n, size=(2, _CONTRASTS))
    turned_pr = (basis_nr[a] - basis_nr[b]) @ vectors
    turned_pr = turned_pr[(turned_pr**2).sum(1) > 1e-12]
    lost_p = (turned_pr**2 / np.clip(values, _FLOOR, 1.0)[None, :]).sum(1) / (turned_pr**2).sum(1)
    share = float(np.quantile(1 / lost_p, 0.05)) if len(lost_p) else 1.0
    deficient = int((values < 1e-8).sum())
    return Positivity(share, share * float(w.sum()), rank, deficient)


def controls_of(found: Raw) -> np.ndarray:
    """Text, terms and levels as numeric controls (n, q) of a propensity.

    One-hot columns for up to 50 levels, none beyond: of a level with few rows the treated share is chance.
    """
    parts = [found.text_nd, found.controls_nq]
    for codes_n in found.codes_nc.T:
        names, codes_n = np.unique(codes_n, return_inverse=True)
        if len(names) <= _ONE_HOT:
            parts.append(np.eye(len(names))[codes_n][:, 1:])
    return np.concatenate(parts, 1)


def culprits(found: Raw, limit: float) -> tuple[str, ...]:
    """Terms that alone leave a direction of phi less than `limit` of its variance, worst first."""
    w = found.frequency_n
    basis_nr = _whitened(found.text_nd, w)
    left = {}
    blocks, levels = iter(_block_columns(found)), iter(found.codes_nc.T)
    for name, kind, _ in found.swept:
        column = next(blocks) if kind == "block" else next(levels)
        explained = _explained_by_block(basis_nr, column, w) if kind == "block" else _by_levels(basis_nr, column, w)
        left[name] = 1 - np.linalg.eigvalsh(explained)[-1]
    return tuple(sorted((name for name, share in left.items() if share < limit), key=left.get))


def _whitened(text_nd, weight_n):
    """An orthonormal basis (n, r) of phi's centred columns under the weights."""
    centred = text_nd - np.average(text_nd, 0, weight_n)[None, :]
    values, vectors = np.linalg.eigh(centred.T @ (centred * weight_n[:, None]))
    keep = values > 1e-9 * max(values.max(initial=0.0), 1e-300)
    return centred @ (vectors[:, keep] / np.sqrt(values[keep])[None, :])


def _block_columns(found: Raw):
    start = 0
    for _, kind, place in found.swept:
        if kind == "block":
            width = place.stop - place.start
            yield found.controls_nq[:, start : start + width]
            start += width


def _explained_by_block(basis_nr, block_nk, weight_n):
    inner = _whitened(block_nk, weight_n).T @ (basis_nr * weight_n[:, None])
    return inner.T @ inner


def _by_levels(basis_nr, codes_n, weight_n):
    codes_n = np.unique(codes_n, return_inverse=True)[1]
    mass_c = np.bincount(codes_n, weight_n)
    sums = np.stack([np.bincount(codes_n, weight_n * column) for column in basis_nr.T], 1)
    return sums.T @ (sums / mass_c[:, None])


def _share_left(values_n, controls_nq, weight_n):
    """1 - R^2, corrected for the number of controls."""
    basis_nr = _whitened(controls_nq, weight_n)
    centred = values_n - np.average(values_n, weights=weight_n)
    rest = centred - basis_nr @ (basis_nr.T @ (weight_n * centred))
    n = weight_n.sum()
    share = (weight_n @ rest**2) / (weight_n @ centred**2) * (n - 1) / max(n - 1 - basis_nr.shape[1], 1.0)
    return float(np.clip(share, 0.0, 1.0))
