"""Bases of smooth terms, and what text features or a treatment are expected to be given other columns.

Every function is a pair: one lays the basis out and leaves in `scaling` all that new
values need, the other evaluates it from `scaling` alone, at the log's values or new ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from numpyro.contrib.hsgp.laplacian import eigenfunctions, sqrt_eigenvalues
from scipy.interpolate import BSpline

_DEGREE = 3  # of the splines
_BEYOND = 1.2  # half width of a Hilbert space's interval over that of the data, at least
_LENGTHS = 3.2  # and at least so many lengthscales of 1 sd (Riutort-Mayol et al. 2023, equation 21)
_STRENGTHS = np.logspace(-4, 4, 33)  # ridge strengths tried, as multiples of the mean eigenvalue


def lay_hilbert(values_n: np.ndarray, name: str, count: int, scaling: dict) -> tuple[float, ...]:
    """The interval of a Hilbert-space Gaussian process on a standardised column; returns its spectrum.

    phi_j(u) = L^-1/2 sin(w_j (u - centre + L)), w_j = j pi / 2L, and the coefficient of
    phi_j has the kernel's spectral density at w_j as prior variance (`scalars.sd_of`).
    Source: Solin and Sarkka (2020); Riutort-Mayol et al. (2023).
    """
    low, high = float(values_n.min()), float(values_n.max())
    half_width = max(_BEYOND * (high - low) / 2, _LENGTHS)
    scaling[f"{name}.range"] = np.asarray([low, high])
    scaling[f"{name}.half_width"] = half_width
    with jax.enable_x64(True):
        return tuple(float(w) for w in np.ravel(sqrt_eigenvalues(half_width, count, 1)))


def hilbert(values_n: np.ndarray, name: str, count: int, scaling: Mapping[str, Any]) -> np.ndarray:
    """The basis (n, count) at standardised values; beyond the log's range it stays at the border's value."""
    low, high = scaling[f"{name}.range"]
    inside_n = np.clip(values_n, low, high) - (low + high) / 2
    with jax.enable_x64(True):
        return np.asarray(eigenfunctions(inside_n, float(scaling[f"{name}.half_width"]), count), np.float64)


def lay_spline(values_n: np.ndarray, weight_n: np.ndarray, name: str, count: int, scaling: dict) -> None:
    """A cubic B-spline with second-difference penalty as iid coefficients.

    B b with b'D'D b penalised is a line plus Z u, Z = B D'(D D')^-1, u ~ iid N(0, s^2).
    Z is made orthogonal to the line, which has a column of its own, and scaled so that
    Z u has variance s^2 on average over the rows.
    Source: Eilers and Marx (1996); Lang and Brezger (2004); Wood (2017), section 5.
    """
    low, high = float(values_n.min()), float(values_n.max())
    step = (high - low) / (count - _DEGREE)
    knots = low + step * np.arange(-_DEGREE, count + 1)
    second = np.diff(np.eye(count), 2, axis=0)
    change = second.T @ np.linalg.inv(second @ second.T)
    scaling[f"{name}.range"], scaling[f"{name}.knots"] = np.asarray([low, high]), knots
    wiggles_nk = _b_spline(values_n, name, scaling) @ change
    line_n2 = np.stack([np.ones_like(values_n), values_n], 1)
    weighted_n2 = line_n2 * weight_n[:, None]
    along = np.linalg.solve(weighted_n2.T @ line_n2, weighted_n2.T @ wiggles_nk)
    size = np.sqrt(np.average(((wiggles_nk - line_n2 @ along) ** 2).sum(1), weights=weight_n))
    scaling[f"{name}.change"], scaling[f"{name}.along"] = change / size, along / size


def spline(values_n: np.ndarray, name: str, scaling: Mapping[str, Any]) -> np.ndarray:
    """The wiggles Z at standardised values; beyond the log's range they stay at the border's value."""
    inside_n = np.clip(values_n, *scaling[f"{name}.range"])
    line_n2 = np.stack([np.ones_like(inside_n), inside_n], 1)
    return _b_spline(inside_n, name, scaling) @ scaling[f"{name}.change"] - line_n2 @ scaling[f"{name}.along"]


def rotation(values_nk: np.ndarray, weight_n: np.ndarray) -> np.ndarray:
    """R (k, r): values @ R are orthogonal columns of the same geometry, cut to the rank."""
    gram_kk = values_nk.T @ (values_nk * weight_n[:, None])
    size_k, vectors_kk = np.linalg.eigh(gram_kk)
    keep = size_k > 1e-10 * max(size_k.max(initial=0.0), 1e-30)
    return vectors_kk[:, keep][:, ::-1]


def within(values_nk: np.ndarray, levels: Sequence[np.ndarray], weight_n: np.ndarray) -> np.ndarray:
    """Columns less their weighted mean in every level; of several sets of levels by turns."""
    left_nk = values_nk - np.average(values_nk, 0, weight_n)[None, :]
    for codes_n in [*levels] * (1 if len(levels) == 1 else 20):
        count_c = np.maximum(np.bincount(codes_n, weight_n), 1e-12)
        means_ck = np.stack([np.bincount(codes_n, weight_n * column) / count_c for column in left_nk.T], 1)
        left_nk = left_nk - means_ck[codes_n]
    return left_nk


def expected_map(source_nk: np.ndarray, target_nd: np.ndarray, weight_n: np.ndarray) -> np.ndarray:
    """Ridge regression of each target on the source: E[target | source] = source @ map, map (k, d).

    Each target has its own strength, the one with the least generalised cross-validation
    error n RSS / (n - df)^2. Both sides have mean zero under the weights.
    Source: Golub, Heath and Wahba (1979).
    """
    weight_n = weight_n * (len(weight_n) / weight_n.sum())
    weighted_nk = source_nk * weight_n[:, None]
    size_k, vectors_kk = np.linalg.eigh(weighted_nk.T @ source_nk)
    size_k = np.maximum(size_k, 0.0)
    linear_kd = vectors_kk.T @ (weighted_nk.T @ target_nd)
    squares_d = (weight_n[:, None] * target_nd**2).sum(0)
    strengths = _STRENGTHS * max(size_k.mean(), 1e-12)
    scores = np.stack([_gcv(size_k, linear_kd, squares_d, s, len(weight_n)) for s in strengths])
    best_d = strengths[scores.argmin(0)]
    return vectors_kk @ (linear_kd / (size_k[:, None] + best_d[None, :]))


def rank_map(map_kd: np.ndarray) -> np.ndarray:
    """M (k, r) with source @ M a rotation of source @ map, cut to the map's rank."""
    left, size, _ = np.linalg.svd(map_kd, full_matrices=False)
    keep = size > 1e-8 * max(size.max(initial=0.0), 1e-30)
    return (left * size[None, :])[:, keep]


def _gcv(size_k, linear_kd, squares_d, strength: float, n: int) -> np.ndarray:
    shrunk_k = size_k / (size_k + strength)
    # RSS = y'y - 2 b'A^-1 b + b'A^-1 G A^-1 b with A = G + strength
    explained_d = (linear_kd**2 * ((2 - shrunk_k) / (size_k + strength))[:, None]).sum(0)
    left = max(n - 1 - shrunk_k.sum(), 1e-9)  # the mean took one degree
    return np.maximum(squares_d - explained_d, 0.0) / left**2


def _b_spline(values_n: np.ndarray, name: str, scaling: Mapping[str, Any]) -> np.ndarray:
    return BSpline.design_matrix(values_n, scaling[f"{name}.knots"], _DEGREE, extrapolate=True).toarray()
