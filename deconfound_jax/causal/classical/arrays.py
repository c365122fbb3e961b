"""What the reference estimators take and give: columns checked at the door, and the result they share."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """Coefficients with their covariance; errors are the square roots of its diagonal."""

    coefficient_k: np.ndarray
    error_k: np.ndarray
    covariance_kk: np.ndarray
    residual_n: np.ndarray  # in units of y
    residual_df: int  # rows less coefficients, absorbed levels among them


def columns(name: str, values, n: int | None = None) -> np.ndarray:
    """Finite fp64 columns (n, k); a vector is one column. ValueError names what is wrong."""
    values = np.asarray(values, np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or (n is not None and len(values) != n):
        raise ValueError(f"{name}: expected ({'n' if n is None else n}, columns), got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    return values


def vector(name: str, values, n: int | None = None) -> np.ndarray:
    """Finite fp64 values (n,)."""
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or (n is not None and len(values) != n):
        raise ValueError(f"{name}: expected ({'n' if n is None else n},), got shape {values.shape}")
    return columns(name, values)[:, 0]


def row_weights(weight_n, n: int) -> np.ndarray:
    """Weights (n,), >= 0 and not all zero; None means ones."""
    if weight_n is None:
        return np.ones(n)
    weight_n = vector("weight", weight_n, n)
    if not (weight_n >= 0).all() or not weight_n.sum() > 0:
        raise ValueError(f"weight: expected {n} weights >= 0, not all zero, got a minimum of {weight_n.min():g}")
    return weight_n
