"""Post-hoc calibration: a fitted reward less its local average over the confounder (2409.17407)."""

from __future__ import annotations

import numpy as np

from deconfound_jax.align.baselines.data import (
    NotDefined,
    RewardData,
    RewardModel,
    checked,
    rows_used,
    weights,
)
from deconfound_jax.align.baselines.linear import naive, on_target
from deconfound_jax.causal.classical.arrays import row_weights, vector
from deconfound_jax.config import Lowess


def lowess(y_n, x_n, weight_n=None, fraction: float = 2 / 3, points: int = 200) -> np.ndarray:
    """Local linear regression with tricube weights, at every row's x.

        yhat(x0) = a,   (a, b) = argmin sum_i w_i K(|x_i - x0| / h) (y_i - a - b (x_i - x0))^2
        K(u) = (1 - u^3)^3 for u < 1;   h = distance to the round-down(fraction n)-th nearest row

    Without robustness iterations. Where the neighbourhood holds one value of x, the weighted mean. Exact where x has
    at most `points` different values, else on that many of its quantiles with straight lines between.

    Args:
      y_n, x_n: (n,) finite.
      weight_n: a row counts as so many rows in the regression; one of weight zero is predicted and has no say.
      fraction: share of the rows in a neighbourhood, 0 < fraction <= 1.
      points: places where the curve is computed.

    Returns:
      (n,) in units of y.

    Raises:
      ValueError: a fraction that leaves fewer than two rows.

    Source: Cleveland (1979), Journal of the American Statistical Association 74.
    """
    y_n = vector("y", y_n)
    x_n, weight_n = vector("x", x_n, len(y_n)), row_weights(weight_n, len(y_n))
    x_m, y_m, weight_m = (a[weight_n > 0] for a in (x_n, y_n, weight_n))
    near = int(fraction * len(x_m) + 1e-10)
    if not 2 <= near <= len(x_m):
        raise ValueError(f"fraction: expected a share that holds 2 to {len(x_m)} rows, got {fraction:g}")
    at_q = np.unique(x_m)
    if len(at_q) > points:
        at_q = np.unique(np.quantile(x_m, np.linspace(0, 1, points)))
    return np.interp(x_n, at_q, [_at(x0, x_m, y_m, weight_m, near) for x0 in at_q])


def posthoc(data: RewardData, config: Lowess | None = None, key=None, model: RewardModel | None = None) -> RewardModel:
    """A reward less what the confounders say about it, fitted again by the same f(x).

        r'_i = r_i - LOWESS(r on c)_i + mean r,   for a category less the level's mean;   then r' on phi(x)

    Several confounders are taken out in turns (backfitting). Inside one context a function of c changes no ranking:
    what the second fit keeps is that texts which go with a high c lose.

    Args:
      data: rows.
      config: of the curve.
      key: not used.
      model: the reward to calibrate; default the naive one.

    Raises:
      NotDefined: no confounder.
    """
    config, used_n, weight_n = config or Lowess(), rows_used(checked(data)), weights(data)
    if data.numbers_nk is None and data.levels_nc is None:
        raise NotDefined("posthoc", "the data name no confounder (numbers_nk, levels_nc)")
    score_n = np.asarray((model or naive(data)).score(data.features_nd), np.float64)[used_n]
    return on_target(data.features_nd[used_n], calibrated(score_n, data, config), weight_n[used_n])


def calibrated(score_m, data: RewardData, config: Lowess) -> np.ndarray:
    """Scores (m,) of the used rows less their curve over each confounder, by backfitting."""
    used_n, weight_m = rows_used(data), weights(data)[rows_used(data)]
    numbers = [] if data.numbers_nk is None else list(np.asarray(data.numbers_nk, np.float64)[used_n].T)
    levels = [] if data.levels_nc is None else list(np.asarray(data.levels_nc)[used_n].T)
    centred_m = score_m - np.average(score_m, weights=weight_m)
    curves = [np.zeros_like(centred_m) for _ in (*numbers, *levels)]
    for _ in range(config.sweeps if len(curves) > 1 else 1):
        for place, values_m in enumerate((*numbers, *levels)):
            rest_m = centred_m - sum(curves) + curves[place]
            if place < len(numbers):
                curve_m = lowess(rest_m, values_m, weight_m, config.fraction, config.points)
            else:
                curve_m = _level_means(rest_m, values_m, weight_m)
            curves[place] = curve_m - np.average(curve_m, weights=weight_m)
    return score_m - sum(curves)


def _at(x0: float, x_m, y_m, weight_m, near: int) -> float:
    """The local line's height at x0."""
    far_m = np.abs(x_m - x0)
    width = np.partition(far_m, near - 1)[near - 1]
    inside, kernel_m = far_m < width, 1.0
    if inside.any():
        kernel_m = (1 - np.minimum(far_m / width, 1) ** 3) ** 3
    else:  # between two values of x, one of which has more rows than the neighbourhood: all that are so near
        inside, kernel_m = far_m <= width, np.ones_like(far_m)
    gap_i, y_i, share_i = x_m[inside] - x0, y_m[inside], (weight_m * kernel_m)[inside]
    share_i = share_i / share_i.sum()
    mean = share_i @ gap_i
    spread = share_i @ (gap_i - mean) ** 2
    if spread <= 1e-12 * max(width**2, 1e-300):
        return float(share_i @ y_i)
    slope = share_i @ ((gap_i - mean) * y_i) / spread
    return float(share_i @ y_i - slope * mean)


def _level_means(y_m, codes_m, weight_m) -> np.ndarray:
    codes_m = np.unique(codes_m, return_inverse=True)[1]
    return (np.bincount(codes_m, weight_m * y_m) / np.bincount(codes_m, weight_m))[codes_m]
