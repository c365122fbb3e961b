"""Least squares and instrumental variables: OLS, absorbed fixed effects, 2SLS and LIML, with their standard errors."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deconfound_jax.causal.classical.absorb import level_codes, residualise
from deconfound_jax.causal.classical.arrays import Estimate, columns, row_weights, vector

RANK_TOLERANCE = 1e-9  # of a column's size: what the columns before it leave of it


class Instrumented(NamedTuple):
    """An `Estimate` of the coefficients on [exogenous, endogenous], and how strong the instruments are."""

    coefficient_k: np.ndarray
    error_k: np.ndarray
    covariance_kk: np.ndarray
    residual_n: np.ndarray
    residual_df: int
    kappa: float  # 1 for 2SLS, the smallest root for LIML
    first_stage_f_m: np.ndarray  # partial F of the excluded instruments, homoskedastic, one a variable


def with_intercept(*parts) -> np.ndarray:
    """A column of ones and the parts beside it, (n, 1 + columns)."""
    parts = [columns("part", part) for part in parts]
    return np.concatenate([np.ones((len(parts[0]), 1)), *parts], 1)


def ols(y_n, x_nk, codes_nc=None, weight_n=None, cluster_n=None, robust=True, debiased=True) -> Estimate:
    """Least squares of y on the columns of x, categorical codes absorbed.

        b = (X'WX)^-1 X'Wy,    V = c (X'WX)^-1 S (X'WX)^-1
        S = s^2 X'WX  |  sum_i (w e)_i^2 x_i x_i'  |  sum over clusters of (sum_i w e x)(sum_i w e x)'

    No intercept is added (see `with_intercept`); codes sweep one out, and then x must hold none.

    Args:
      y_n: outcome.
      x_nk: regressors.
      codes_nc: categories whose levels are fixed effects, a column each, or None.
      weight_n: precision of each row's outcome, as in weighted least squares; n stays the number of rows.
      cluster_n: codes of the clusters that errors are correlated in; given, errors are clustered.
      robust: without clusters, White's covariance (HC1 when debiased) or the classical one.
      debiased: c = n / (n - k - absorbed), with clusters G (n - 1) / (G - 1) / (n - k - absorbed); else c = 1.

    Returns:
      `Estimate`, coefficients in units of y per unit of x.

    Raises:
      ValueError: columns that others determine, or no more rows than coefficients.

    Source: White (1980); Liang and Zeger (1986); Frisch and Waugh (1933).
    """
    x_nk = columns("x", x_nk)
    found = _k_class(y_n, x_nk, x_nk[:, :0], x_nk[:, :0], codes_nc, weight_n, cluster_n, robust, debiased, 1.0)
    return Estimate(*found[:5])


def two_stage(
    y_n, exogenous_nk, endogenous_nm, instruments_nq, codes_nc=None, weight_n=None, cluster_n=None,
    robust=True, debiased=False,
) -> Instrumented:  # fmt: skip
    """Two-stage least squares for one or several endogenous variables.

        b = (X'P X)^-1 X'P y,    P = Z (Z'WZ)^-1 Z'W,    X = [exogenous, endogenous], Z = [exogenous, instruments]

    Arguments, covariances and errors as for `ols`; not debiased by default, as is the custom for this estimator.

    Source: Theil (1953); Wooldridge (2010), chapter 5.
    """
    parts = [columns(*part) for part in _named(exogenous_nk, endogenous_nm, instruments_nq)]
    return Instrumented(*_k_class(y_n, *parts, codes_nc, weight_n, cluster_n, robust, debiased, 1.0))


def liml(
    y_n, exogenous_nk, endogenous_nm, instruments_nq, codes_nc=None, weight_n=None, cluster_n=None,
    robust=True, debiased=False,
) -> Instrumented:  # fmt: skip
    """Limited-information maximum likelihood: nearer the truth than 2SLS when instruments are many or weak.

        b = (X'(I - kappa M) X)^-1 X'(I - kappa M) y,    M = I - P,
        kappa = smallest root of det(E'M1 E - kappa E'M E),  E = [y, endogenous],  M1 the residuals on the exogenous

    Arguments as for `two_stage`, to which it is equal when there are as many instruments as endogenous variables.

    Source: Anderson and Rubin (1949); Davidson and MacKinnon (1993), chapter 18.
    """
    parts = [columns(*part) for part in _named(exogenous_nk, endogenous_nm, instruments_nq)]
    return Instrumented(*_k_class(y_n, *parts, codes_nc, weight_n, cluster_n, robust, debiased, None))


def absorbed_df(codes_nc, cluster_n=None) -> int:
    """Coefficients that the levels of the codes use up, an intercept among them.

    Exact for one and two categories (levels less connected components), for more of them an upper bound. One
    category whose levels lie inside clusters counts as none: the clusters' sums are what varies.
    """
    if codes_nc is None:
        return 0
    codes_nc, counts = level_codes(codes_nc, len(codes_nc))
    if not counts:
        return 0
    if cluster_n is not None and len(counts) == 1:
        pairs = np.unique(np.stack([codes_nc[:, 0], level_codes(cluster_n, len(codes_nc))[0][:, 0]], 1), axis=0)
        return 0 if len(pairs) == counts[0] else counts[0]
    return sum(counts) - sum(_components(codes_nc[:, 0], column) for column in codes_nc.T[1:])


def _named(exogenous_nk, endogenous_nm, instruments_nq):
    return (("exogenous", exogenous_nk), ("endogenous", endogenous_nm), ("instruments", instruments_nq))


def _components(a_n, b_n) -> int:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    size = int(a_n.max() + b_n.max() + 2)
    return connected_components(coo_array((np.ones(len(a_n)), (a_n, b_n + a_n.max() + 1)), (size, size)))[0]


def _k_class(y_n, exogenous, endogenous, instruments, codes_nc, weight_n, cluster_n, robust, debiased, kappa):
    """Checks, sweeps the codes out, solves; the fields of `Instrumented`. kappa None is LIML's."""
    y_n = vector("y", y_n, len(exogenous))
    n, m, q = len(y_n), endogenous.shape[1], instruments.shape[1]
    widths = np.cumsum([1, exogenous.shape[1], m])
    if q < m:
        raise ValueError(f"instruments: expected at least {m}, as many as endogenous variables, got {q}")
    everything = np.concatenate([y_n[:, None], exogenous, endogenous, instruments], 1)
    sizes = np.sqrt(row_weights(weight_n, n) @ everything**2)
    if codes_nc is not None:
        everything = residualise(everything, None, codes_nc, weight_n)
    absorbed = absorbed_df(codes_nc, cluster_n if cluster_n is not None else None)
    clusters, groups = level_codes(cluster_n, n)
    residual_df = n - (widths[2] - 1) - absorbed
    if residual_df <= 0:
        raise ValueError(f"x: expected fewer than {n} coefficients for {n} rows, got {n - residual_df}")
    if groups == (1,):
        raise ValueError("cluster: expected at least 2 clusters, got 1")
    meat = "clustered" if groups else "robust" if robust else "unadjusted"
    scale = n / residual_df if debiased else 1.0
    if debiased and groups:
        scale = groups[0] / (groups[0] - 1) * (n - 1) / residual_df
    with jax.enable_x64(True):
        split = tuple(int(w) for w in widths)
        found = _solve(everything, sizes, row_weights(weight_n, n), clusters, kappa, split, groups, meat)
        coefficient_k, covariance_kk, residual_n, kappa, left_z, left_x, drop_m = map(np.asarray, found)
    if min(left_z.min(initial=1), left_x.min(initial=1)) < RANK_TOLERANCE:
        raise ValueError(_deficient(left_z, left_x, widths[1] - 1, m))
    first_f_m = drop_m * (n - (widths[1] - 1) - q - absorbed) / q if q else np.zeros(0)
    covariance_kk = scale * covariance_kk
    errors = np.sqrt(np.diag(covariance_kk))
    return coefficient_k, errors, covariance_kk, residual_n, int(residual_df), float(kappa), first_f_m


def _deficient(left_z, left_x, k, m) -> str:
    if left_z.min(initial=1) < RANK_TOLERANCE:
        place = int(np.argmax(left_z < RANK_TOLERANCE))
        name = f"x column {place}" if place < k else f"instrument {place - k}"
        return f"{name}: expected columns that vary by themselves, got one that the others (or the codes) determine"
    place = int(np.argmax(left_x < RANK_TOLERANCE))
    name = f"endogenous column {place - k}" if place >= k else f"x column {place}"
    return f"{name}: the instruments do not move it apart from the other columns: no coefficient for all {m}"


@functools.partial(jax.jit, static_argnames=("split", "groups", "meat"))
def _solve(everything, sizes, weight_n, clusters, kappa, split, groups, meat):
    root_n = jnp.sqrt(weight_n)[:, None]
    unit = jnp.where(sizes > 0, sizes, 1.0)
    scaled = root_n * everything / unit[None, :]
    y_n, exogenous, endogenous, instruments = jnp.split(scaled, split, axis=1)
    x_nk, z_nl = jnp.concatenate([exogenous, endogenous], 1), jnp.concatenate([exogenous, instruments], 1)
    basis_nl, upper_ll = jnp.linalg.qr(z_nl)
    fitted_nk = basis_nl @ (basis_nl.T @ x_nk)
    q_nk, r_kk = jnp.linalg.qr(fitted_nk)
    kappa_liml, drop_m = _roots(y_n, endogenous, exogenous, basis_nl)
    kappa = kappa_liml if kappa is None else kappa
    # In the basis of the fitted columns X'P X is the identity, however the columns are scaled or correlated.
    turned_nk = jax.scipy.linalg.solve_triangular(r_kk, x_nk.T, trans=1).T
    bread_kk = jnp.linalg.inv(kappa * jnp.eye(len(r_kk)) + (1 - kappa) * turned_nk.T @ turned_nk)
    right_k = kappa * q_nk.T @ y_n[:, 0] + (1 - kappa) * turned_nk.T @ y_n[:, 0]
    turned_k = bread_kk @ right_k
    residual_n = y_n[:, 0] - turned_nk @ turned_k
    score_nk = residual_n[:, None] * q_nk
    if meat == "clustered":
        score_nk = jax.ops.segment_sum(score_nk, clusters[:, 0], groups[0])
    middle_kk = score_nk.T @ score_nk
    if meat == "unadjusted":
        middle_kk = jnp.mean(residual_n**2) * jnp.linalg.inv(bread_kk)
    back_kk = jax.scipy.linalg.solve_triangular(r_kk, jnp.eye(len(r_kk))) / unit[1 : len(r_kk) + 1, None]
    covariance_kk = unit[0] ** 2 * back_kk @ bread_kk @ middle_kk @ bread_kk @ back_kk.T
    root_w = jnp.where(root_n[:, 0] > 0, root_n[:, 0], 1.0)
    left_z, left_x = jnp.abs(jnp.diag(upper_ll)), jnp.abs(jnp.diag(r_kk))
    return unit[0] * back_kk @ turned_k, covariance_kk, unit[0] * residual_n / root_w, kappa, left_z, left_x, drop_m


def _roots(y_n1, endogenous, exogenous, basis_nl):
    """LIML's kappa, and each endogenous variable's (rss without - rss with instruments) / rss with."""
    both = jnp.concatenate([y_n1, endogenous], 1)
    k = exogenous.shape[1]
    short = both - basis_nl[:, :k] @ (basis_nl[:, :k].T @ both)  # the first k columns of the basis span the exogenous
    long = both - basis_nl @ (basis_nl.T @ both)
    rss_short, rss_long = jnp.sum(short**2, 0)[1:], jnp.sum(long**2, 0)[1:]
    size = jnp.sqrt(jnp.sum(long**2, 0))
    long, short = long / size[None, :], short / size[None, :]
    lower = jnp.linalg.cholesky(long.T @ long)
    half = jax.scipy.linalg.solve_triangular(lower, short.T, lower=True)
    return jnp.linalg.eigvalsh(half @ half.T)[0], rss_short / rss_long - 1
