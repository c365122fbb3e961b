"""Generalised linear models by iteratively reweighted least squares: logit and Poisson."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deconfound_jax.causal.classical.absorb import level_codes
from deconfound_jax.causal.classical.arrays import columns, row_weights, vector

MAX_STEPS = 100


class Fitted(NamedTuple):
    """Coefficients on the link scale with their covariance, and each row's expected outcome."""

    coefficient_k: np.ndarray
    error_k: np.ndarray
    covariance_kk: np.ndarray
    mean_n: np.ndarray  # E[y | x], in units of y


def logit(y_n, x_nk, trials_n=None, weight_n=None, cluster_n=None, robust=False, penalty_k=None) -> Fitted:
    """Logistic regression of y successes in n trials.

        y ~ Binomial(n, sigmoid(x'b)),    b = argmax sum_i w_i log p(y_i | x_i, b) - 1/2 sum_k penalty_k b_k^2

    Args:
      y_n: successes, 0 to n.
      x_nk: regressors; no intercept is added.
      trials_n: n of each row; default ones.
      weight_n: a row counts as so many rows.
      cluster_n: clusters that outcomes are correlated in; given, the covariance is clustered.
      robust: without clusters, the sandwich covariance or the inverse information; neither is debiased.
      penalty_k: ridge on each coefficient; its covariance then is that of the penalised score.

    Raises:
      ValueError: outcomes outside 0 to n.
      RuntimeError: no maximum, as when a column separates successes from failures.

    Source: McCullagh and Nelder (1989), chapter 4.
    """
    trials_n = np.ones(len(x_nk)) if trials_n is None else vector("trials", trials_n, len(x_nk))
    y_n = vector("y", y_n, len(x_nk))
    if not ((y_n >= 0) & (y_n <= trials_n)).all():
        raise ValueError(f"y: expected successes from 0 to the trials, got {y_n.min():g} to {y_n.max():g}")
    return _fit("logit", y_n, x_nk, trials_n, weight_n, cluster_n, robust, penalty_k)


def poisson(y_n, x_nk, exposure_n=None, weight_n=None, cluster_n=None, robust=False) -> Fitted:
    """Poisson regression with a log link.

        y ~ Poisson(exposure exp(x'b))

    Arguments, covariance and errors as for `logit`; the exposure is in whatever unit the rate is wanted in.

    Source: McCullagh and Nelder (1989), chapter 6; robust errors: Gourieroux, Monfort and Trognon (1984).
    """
    exposure_n = np.ones(len(x_nk)) if exposure_n is None else vector("exposure", exposure_n, len(x_nk))
    y_n = vector("y", y_n, len(x_nk))
    if not (y_n >= 0).all() or not (exposure_n > 0).all():
        raise ValueError(f"y, exposure: expected counts >= 0 and exposures > 0, got minima {y_n.min():g} and "
                         f"{exposure_n.min():g}")  # fmt: skip
    return _fit("poisson", y_n, x_nk, exposure_n, weight_n, cluster_n, robust, None)


def _fit(family, y_n, x_nk, size_n, weight_n, cluster_n, robust, penalty_k) -> Fitted:
    x_nk = columns("x", x_nk)
    n, k = x_nk.shape
    weight_n = row_weights(weight_n, n)
    clusters, groups = level_codes(cluster_n, n)
    penalty_k = np.zeros(k) if penalty_k is None else vector("penalty", penalty_k, k)
    scale_k = np.sqrt(weight_n @ x_nk**2 / weight_n.sum())
    scale_k = np.where(scale_k > 0, scale_k, 1.0)
    meat = "clustered" if groups else "robust" if robust else "information"
    with jax.enable_x64(True):
        found = newton(family, y_n, x_nk / scale_k, size_n, weight_n, penalty_k / scale_k**2)
    if not bool(found.settled):
        raise RuntimeError(f"{family}: no maximum; does a column separate the outcomes, or do others determine it?")
    inverse_kk, score_nk = np.linalg.inv(np.asarray(found.information_kk)), np.asarray(found.score_nk)
    if meat == "clustered":
        score_nk = np.stack([np.bincount(clusters[:, 0], s, groups[0]) for s in score_nk.T], 1)
    covariance_kk = inverse_kk if meat == "information" else inverse_kk @ score_nk.T @ score_nk @ inverse_kk
    covariance_kk = covariance_kk / np.outer(scale_k, scale_k)
    coefficient_k = np.asarray(found.coefficient_k) / scale_k
    return Fitted(coefficient_k, np.sqrt(np.diag(covariance_kk)), covariance_kk, np.asarray(found.mean_n))


class Newton(NamedTuple):
    """Where Newton's method ended: the scores are those of single rows, weighted."""

    coefficient_k: jax.Array
    mean_n: jax.Array
    information_kk: jax.Array  # penalty included
    score_nk: jax.Array
    settled: jax.Array


@functools.partial(jax.jit, static_argnames="family")
def newton(family, y_n, x_nk, size_n, weight_n, penalty_k) -> Newton:
    """Maximises the penalised log-likelihood by Newton steps, halved while they lose."""
    link_mean = {"logit": jax.nn.sigmoid, "poisson": jnp.exp}[family]

    def log_likelihood(b_k):
        eta_n = x_nk @ b_k
        total_n = size_n * (jax.nn.softplus(eta_n) if family == "logit" else jnp.exp(eta_n))
        return weight_n @ (y_n * eta_n - total_n) - 0.5 * penalty_k @ b_k**2

    def parts(b_k):
        rate_n = link_mean(x_nk @ b_k)
        mean_n = size_n * rate_n
        variance_n = mean_n * (1 - rate_n) if family == "logit" else mean_n
        score_nk = (weight_n * (y_n - mean_n))[:, None] * x_nk
        information_kk = x_nk.T @ ((weight_n * variance_n)[:, None] * x_nk) + jnp.diag(penalty_k)
        return mean_n, information_kk, score_nk

    def step(state):
        b_k, value, _, count = state
        _, information_kk, score_nk = parts(b_k)
        gradient_k = score_nk.sum(0) - penalty_k * b_k
        move_k = jnp.linalg.solve(information_kk, gradient_k)
        decrement = gradient_k @ move_k  # twice what a full step is expected to gain

        def shorter(t):
            return (t > 1e-6) & ~(log_likelihood(b_k + t * move_k) >= value - 1e-12 * jnp.abs(value))

        t = jax.lax.while_loop(shorter, lambda t: t / 2, jnp.ones_like(value))
        b_k = b_k + t * move_k
        return b_k, log_likelihood(b_k), decrement, count + 1

    start_k = _start(family, y_n, x_nk, size_n, weight_n, penalty_k)
    first = (start_k, log_likelihood(start_k), jnp.asarray(jnp.inf, x_nk.dtype), 0)
    b_k, _, decrement, _ = jax.lax.while_loop(
        lambda s: (s[2] > 1e-18 * (1 + jnp.abs(s[1]))) & (s[3] < MAX_STEPS), step, first
    )
    settled = decrement <= 1e-12 * (1 + jnp.abs(log_likelihood(b_k)))
    return Newton(b_k, *parts(b_k), settled)


def _start(family, y_n, x_nk, size_n, weight_n, penalty_k):
    """One reweighted least-squares step from the outcomes themselves, pulled inwards."""
    if family == "logit":
        rate_n = (y_n + 0.5) / (size_n + 1)
        eta_n, variance_n = jnp.log(rate_n / (1 - rate_n)), size_n * rate_n * (1 - rate_n)
    else:
        overall = weight_n @ y_n / (weight_n @ size_n)
        rate_n = (y_n / size_n + overall) / 2
        eta_n, variance_n = jnp.log(rate_n), size_n * rate_n
    working_n = eta_n + (y_n - size_n * rate_n) / variance_n
    weighted_nk = (weight_n * variance_n)[:, None] * x_nk
    return jnp.linalg.solve(x_nk.T @ weighted_nk + jnp.diag(penalty_k), weighted_nk.T @ working_n)
