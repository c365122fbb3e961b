"""Positive definite systems: terms of a normal density with a cheap derivative, and closed forms of small systems."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular


@jax.custom_jvp
def dense_terms(matrix_dd, linear_d, chol_dd, mean_d):
    """b' A^-1 b and log|A| of A = L L', mean A^-1 b.

        d log|A| = tr(A^-1 dA),   d (b' A^-1 b) = 2 mean' db - mean' dA mean

    At half the cost of the derivative of L, which the rule for Cholesky factors goes through.
    """
    return linear_d @ mean_d, 2 * jnp.log(jnp.diagonal(chol_dd)).sum()


@dense_terms.defjvp
def _dense_terms_jvp(primals, tangents):
    # L and the mean follow from A and b: their own tangents say nothing new, but second derivatives need them.
    matrix_dot, linear_dot = tangents[:2]
    _, _, chol_dd, mean_d = primals
    half_dd = solve_triangular(chol_dd, jnp.eye(len(mean_d), dtype=mean_d.dtype), lower=True)
    quadratic_dot = 2 * mean_d @ linear_dot - mean_d @ matrix_dot @ mean_d
    return dense_terms(*primals), (quadratic_dot, jnp.vdot(half_dd.T @ half_dd, matrix_dot))


def divide(level_umm, right_umk):
    """level^-1 right for positive definite systems, in closed form for one or two unknowns."""
    m = level_umm.shape[-1]
    if m > 2:
        return jnp.linalg.solve(level_umm, right_umk)
    a, first = level_umm[:, :1, :1], right_umk[:, :1]
    if m == 1:
        return first / a
    b, d = level_umm[:, :1, 1:], level_umm[:, 1:, 1:]
    lower = (right_umk[:, 1:] - b / a * first) / (d - b**2 / a)
    return jnp.concatenate([(first - b * lower) / a, lower], 1)


def log_det(level_umm):
    """log|level| of each of u systems (u, m, m)."""
    if level_umm.shape[-1] > 2:
        return jnp.linalg.slogdet(level_umm)[1]
    a = level_umm[:, 0, 0]
    if level_umm.shape[-1] == 1:
        return jnp.log(a)
    return jnp.log(a) + jnp.log(level_umm[:, 1, 1] - level_umm[:, 0, 1] ** 2 / a)
