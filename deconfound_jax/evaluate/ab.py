"""Scores on randomized arms: a reward is judged by outcomes of texts that chance assigned.

Arms are compared inside a cell only: arms that share group (the test) and context (the image). A
reward sees neither clicks nor impressions of the arms it is judged on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import chex
import numpy as np

from deconfound_jax.evaluate.calibration import calibration
from deconfound_jax.structs import Logs

Z_CLEAR = 1.96  # pairs beyond it are told apart by their own outcomes


class Arms(NamedTuple):
    """Randomized arms, aligned arrays (n,). Codes or strings, but for the two counts."""

    group_n: np.ndarray
    context_n: np.ndarray
    clicks_n: np.ndarray
    impressions_n: np.ndarray
    text_n: np.ndarray
    component_n: np.ndarray  # the unit of the bootstrap: what shares a text, a lede, ...


class PairTable(NamedTuple):
    """Pairs of arms (p,). Differences are first minus second, on the empirical logit."""

    first: np.ndarray  # row of `Arms`
    second: np.ndarray
    z_p: np.ndarray
    difference_p: np.ndarray
    component_p: np.ndarray


def arms_of(logs: Logs, component_n: np.ndarray | None = None) -> Arms:
    """The arms of a log under its roles: cells are `group` and all `context` columns together.

    Args:
      logs: n rows with counts, a group and a text.
      component_n: (n,) unit of the bootstrap; default the group.

    Raises:
      ValueError: the log has no group or no exposure.
    """
    for role in ("group", "exposure"):
        if not getattr(logs.roles, role):
            raise ValueError(
                f"roles.{role}: expected a column, got none; arms are compared inside groups by their counts"
            )
    context = np.stack([logs.codes(c) for c in logs.roles.context] or [np.zeros(len(logs), int)], 1)
    context_n = np.unique(context, axis=0, return_inverse=True)[1].reshape(-1)
    group_n = logs.codes(logs.roles.group)
    component_n = group_n if component_n is None else component_n
    return Arms(group_n, context_n, logs.outcome_n, logs.exposure_n, logs.codes(logs.roles.text), component_n)


def pairs(arms: Arms) -> PairTable:
    """Every pair of arms of one cell with different texts and different click rates.

        z = (l_1 - l_2) / sqrt(v_1 + v_2),  l = log((k + .5) / (n - k + .5)),  v = 1 / (k + .5) + 1 / (n - k + .5)

    Pairs of equal rates have no sign to be judged by and are left out. Raises ValueError for
    impossible counts, and when arms of one cell lie in two components.
    """
    arms = _checked(arms)
    first, second = _judged(arms)
    apart_p = arms.component_n[first] != arms.component_n[second]
    if apart_p.any():
        a, b = int(first[apart_p][0]), int(second[apart_p][0])
        raise ValueError(f"component_n: expected one component a cell, got two in that of rows {a} and {b}")
    difference_p, variance_p = _difference(arms, first, second)
    return PairTable(first, second, difference_p / np.sqrt(variance_p), difference_p, arms.component_n[first])


def pair_correct(reward_n: np.ndarray, table: PairTable) -> np.ndarray:
    """(p,): 1 where the reward orders a pair as its outcomes do, 0 where not, .5 where it ties."""
    reward_n = np.asarray(reward_n, np.float64)
    chex.assert_rank(reward_n, 1)
    if not np.isfinite(reward_n).all():
        raise ValueError(f"reward_n: expected finite rewards, row {int(np.argmin(np.isfinite(reward_n)))} is not")
    gap_p = reward_n[table.first] - reward_n[table.second]
    return (1 + np.sign(gap_p) * np.sign(table.difference_p)) / 2


def scores(reward_n: np.ndarray, arms: Arms, *, reward_draws: np.ndarray | None = None) -> dict[str, float]:
    """How well a reward orders randomized arms.

    Args:
      reward_n: one reward an arm.
      arms: the arms.
      reward_draws: posterior draws (s, n), for the calibration of P(first better).
    Returns:
      pair_accuracy (ties count 1/2), pair_accuracy_z196 (pairs with |z| > 1.96), n_pairs,
      n_pairs_z196; per cell, then averaged: winner_hit_rate (the top-reward arm has the highest
      observed rate; k tied arms count 1/k each), lift_per_1000 (clicks per 1,000 impressions of the
      chosen arm minus the mean of the cell's arms), regret_per_1000 (best observed minus chosen),
      n_cells; with draws also brier and calibration_error (mean |predicted - observed| over bins).
      A score of no pair or no cell is nan.

    >>> arms = Arms([0, 0], [0, 0], [9, 1], [99, 99], ["a", "b"], [0, 0])
    >>> scores([2.0, 1.0], arms)["pair_accuracy"]
    1.0
    """
    arms, reward_n = _checked(arms), np.asarray(reward_n, np.float64)
    chex.assert_equal_shape([reward_n, arms.clicks_n])
    table = pairs(arms)
    correct_p, clear_p = pair_correct(reward_n, table), np.abs(table.z_p) > Z_CLEAR
    result = {
        "pair_accuracy": _mean(correct_p),
        "pair_accuracy_z196": _mean(correct_p[clear_p]),
        "n_pairs": float(len(correct_p)),
        "n_pairs_z196": float(clear_p.sum()),
        **_choices(reward_n, arms),
    }
    if reward_draws is not None:
        draws_sn = np.asarray(reward_draws)
        chex.assert_shape(draws_sn, (None, len(reward_n)))
        prefer_p = ((1 + np.sign(draws_sn[:, table.first] - draws_sn[:, table.second])) / 2).mean(axis=0)
        bins = calibration(prefer_p, table.difference_p)
        miss_b = np.abs(bins.predicted_b - bins.observed_b)
        result["brier"] = _mean((prefer_p - (table.difference_p > 0)) ** 2)
        result["calibration_error"] = float((miss_b @ bins.count_b) / len(prefer_p)) if len(prefer_p) else float("nan")
    return result


def confounder_correlation(reward_n: np.ndarray, confounder_n: np.ndarray) -> float:
    """How strongly a reward moves with a confounder, 0 to 1.

    Floats are a number: the absolute Pearson correlation. Strings and integer codes are levels: the
    multiple correlation, sqrt of the between-level R2 adjusted for the number of levels, at least 0
    (unadjusted, many small levels explain a share (levels - 1) / (n - 1) of pure noise). A constant
    reward or confounder gives 0.
    """
    reward_n, confounder_n = np.asarray(reward_n, np.float64), np.asarray(confounder_n)
    chex.assert_equal_shape([reward_n, confounder_n])
    centred_n = reward_n - reward_n.mean()
    total = centred_n @ centred_n
    if np.ptp(reward_n) == 0:
        return 0.0
    if confounder_n.dtype.kind == "f":
        other_n = confounder_n - confounder_n.mean()
        scale = np.sqrt(total * (other_n @ other_n))
        return 0.0 if np.ptp(confounder_n) == 0 else float(abs(centred_n @ other_n) / scale)
    level_n = np.unique(confounder_n.astype(str), return_inverse=True)[1]
    n, levels = len(level_n), level_n.max() + 1
    if levels == n:
        raise ValueError(f"confounder_n: expected fewer levels than the {n} rows, got {levels} (a number is floats)")
    size_c, sum_c = np.bincount(level_n), np.bincount(level_n, weights=centred_n)
    within = total - (sum_c**2 / size_c).sum()
    return float(np.sqrt(max(0.0, 1 - within / total * (n - 1) / (n - levels))))


def ceiling(arms_train: Arms, arms: Arms) -> dict[str, float]:
    """The pair accuracy of an oracle that knows the true click rates, which noisy outcomes limit.

        truth ~ N(0, tau^2),  observed ~ N(truth, v)   =>   P(same sign) = Phi(|z| sqrt(tau^2 / (tau^2 + v)))

    for a pair's difference of logits, averaged over the pairs judged. tau^2 = mean(d^2 - v) over the
    pairs of `arms_train`, those of equal rates included. Taking each observed rate for the truth
    instead overstates the ceiling (winner's curse).

    Returns:
      pair_ceiling, pair_ceiling_z196 (of the pairs with |z| > 1.96), tau.
    """
    arms_train, arms = _checked(arms_train), _checked(arms)
    difference_p, variance_p = _difference(arms_train, *_compared(arms_train))
    if len(difference_p) == 0:
        raise ValueError("arms_train: expected at least one pair of arms to learn tau from, got none")
    tau2 = max(0.0, _mean(difference_p**2 - variance_p))

    difference_p, variance_p = _difference(arms, *_judged(arms))
    z_p = np.abs(difference_p) / np.sqrt(variance_p)
    chance_p = _normal_cdf(z_p * np.sqrt(tau2 / (tau2 + variance_p)))
    clear = _mean(chance_p[z_p > Z_CLEAR])
    return {"pair_ceiling": _mean(chance_p), "pair_ceiling_z196": clear, "tau": tau2**0.5}


def paired_bootstrap(
    correct_a_lp: np.ndarray, correct_b_lp: np.ndarray, component_p: np.ndarray, n: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Difference in pair accuracy, a minus b, with a 95% percentile interval over components.

    Args:
      correct_a_lp: `pair_correct` (p,), or one row a training log (l, p): logs are averaged within a
        pair first, so the interval is of the pooled difference.
      correct_b_lp: of the other method, on the same pairs.
      component_p: pairs of one component are drawn together, with all of them.
      n: bootstrap draws.
      seed: of the draws.
    Returns:
      (difference, low, high) as shares.
    """
    a_lp, b_lp = np.atleast_2d(correct_a_lp).astype(np.float64), np.atleast_2d(correct_b_lp).astype(np.float64)
    gap_p = a_lp.mean(axis=0) - b_lp.mean(axis=0)
    chex.assert_equal_shape([gap_p, np.asarray(component_p)])
    if len(gap_p) == 0:
        raise ValueError("component_p: expected at least one pair, got none")
    code_p = np.unique(np.asarray(component_p), return_inverse=True)[1]
    sum_c, size_c = np.bincount(code_p, weights=gap_p), np.bincount(code_p)
    rng, difference_s = np.random.default_rng(seed), np.empty(n)
    for start in range(0, n, 200):  # in slices: draws times components may be large
        drawn_sc = rng.integers(len(sum_c), size=(min(200, n - start), len(sum_c)))
        difference_s[start : start + 200] = sum_c[drawn_sc].sum(axis=1) / size_c[drawn_sc].sum(axis=1)
    low, high = np.quantile(difference_s, (0.025, 0.975))
    return float(gap_p.mean()), float(low), float(high)


def _choices(reward_n: np.ndarray, arms: Arms) -> dict[str, float]:
    """Scores of choosing the top-reward arm in each cell that holds at least two texts."""
    rate_n = arms.clicks_n / arms.impressions_n
    rows = []
    for cell in _cells(arms):
        if len(set(arms.text_n[cell])) < 2:
            continue
        rate, best = rate_n[cell], rate_n[cell].max()
        top = reward_n[cell] == reward_n[cell].max()
        chosen = rate[top].mean()
        rows.append(((rate[top] == best).mean(), 1000 * (chosen - rate.mean()), 1000 * (best - chosen)))
    means = np.mean(rows, axis=0) if rows else np.full(3, np.nan)
    names = ("winner_hit_rate", "lift_per_1000", "regret_per_1000")
    return {**{name: float(m) for name, m in zip(names, means, strict=True)}, "n_cells": float(len(rows))}


def _cell_codes(arms: Arms) -> np.ndarray:
    columns = (arms.group_n, arms.context_n)
    group_n, context_n = (np.unique(column.astype(str), return_inverse=True)[1] for column in columns)
    return np.unique(group_n * (context_n.max(initial=0) + 1) + context_n, return_inverse=True)[1]


def _cells(arms: Arms) -> Iterator[np.ndarray]:
    """Row indices of each cell."""
    cell_n = _cell_codes(arms)
    order_n = np.argsort(cell_n, kind="stable")
    yield from np.split(order_n, np.flatnonzero(np.diff(cell_n[order_n])) + 1)


def _compared(arms: Arms) -> tuple[np.ndarray, np.ndarray]:
    """Row pairs (first < second) of one cell with different texts, in order of rows."""
    found = [cell[np.stack(np.triu_indices(len(cell), 1))] for cell in _cells(arms)]
    first, second = np.concatenate(found, axis=1) if found else np.empty((2, 0), int)
    differ_p = arms.text_n[first] != arms.text_n[second]
    order_p = np.lexsort((second[differ_p], first[differ_p]))
    return first[differ_p][order_p], second[differ_p][order_p]


def _judged(arms: Arms) -> tuple[np.ndarray, np.ndarray]:
    """Compared pairs whose outcomes differ, as rates and on the empirical logit (which may tie on its own)."""
    first, second = _compared(arms)
    rate_n, shrunk_n = arms.clicks_n / arms.impressions_n, (arms.clicks_n + 0.5) / (arms.impressions_n + 1)
    keep_p = (rate_n[first] != rate_n[second]) & (shrunk_n[first] != shrunk_n[second])
    return first[keep_p], second[keep_p]


def _difference(arms: Arms, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Differences of empirical logits (p,) and their sampling variances."""
    hit_n, miss_n = arms.clicks_n + 0.5, arms.impressions_n - arms.clicks_n + 0.5
    logit_n, variance_n = np.log(hit_n / miss_n), 1 / hit_n + 1 / miss_n
    return logit_n[first] - logit_n[second], variance_n[first] + variance_n[second]


def _checked(arms: Arms) -> Arms:
    arms = Arms(*map(np.asarray, arms))
    chex.assert_rank(list(arms), 1)
    chex.assert_equal_shape(list(arms))
    clicks_n, impressions_n = arms.clicks_n.astype(np.float64), arms.impressions_n.astype(np.float64)
    bad_n = ~((clicks_n >= 0) & (clicks_n <= impressions_n) & (impressions_n > 0))
    if bad_n.any():
        row = int(np.argmax(bad_n))
        got = f"{clicks_n[row]:g} of {impressions_n[row]:g}"
        raise ValueError(f"clicks_n: expected 0 <= clicks <= impressions and impressions > 0, row {row} has {got}")
    return arms._replace(clicks_n=clicks_n, impressions_n=impressions_n)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _normal_cdf(z_p: np.ndarray) -> np.ndarray:
    return np.asarray([0.5 * (1 + math.erf(z / math.sqrt(2))) for z in z_p])
