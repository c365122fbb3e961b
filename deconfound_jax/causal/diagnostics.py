"""Convergence checks on plain arrays."""

from __future__ import annotations

import numpy as np
import scipy.special
import scipy.stats

from deconfound_jax.config import Checks

PARETO_LIMIT = Checks.pareto_k  # above it importance weights have no usable variance (Vehtari et al. 2024)


def pareto_k(log_weight_s: np.ndarray) -> float:
    """Shape k of a generalised Pareto fitted to the largest importance weights.

    Args:
      log_weight_s: log importance weights of s draws, any constant added.

    Returns:
      k: below 0.5 good, above 0.7 the weights cannot be trusted. Infinity where a
      weight is not finite.

    Source: Zhang and Stephens 2009 (the estimator); Vehtari et al. 1507.02646.
    """
    if not np.isfinite(log_weight_s).any() or np.isnan(log_weight_s).any():
        return float("inf")
    weights = np.sort(np.exp(log_weight_s - log_weight_s.max()))
    tail = int(min(0.2 * len(weights), 3 * np.sqrt(len(weights))))
    if tail < 5:
        return float("inf")
    excess = weights[-tail:] - weights[-tail - 1]
    if excess[-1] <= 1e-12:  # a flat tail: proposal equals target
        return float("-inf")
    excess = np.maximum(excess, 1e-300)
    m = 30 + int(np.sqrt(tail))
    quarter = excess[max(int(tail / 4 + 0.5) - 1, 0)]
    theta = 1 / excess[-1] + (1 - np.sqrt(m / (np.arange(1, m + 1) - 0.5))) / (3 * quarter)
    shape = np.log1p(-theta[:, None] * excess[None, :]).mean(1)
    profile = tail * (np.log(-theta / shape) - shape - 1)
    weight = np.exp(profile - profile.max())
    theta_hat = (theta * weight).sum() / weight.sum()
    k = np.log1p(-theta_hat * excess).mean()
    return float((tail * k + 5) / (tail + 10))  # weakly informed towards 0.5, as published


def split_rhat(draws_cs: np.ndarray) -> float:
    """Split R-hat of one scalar over chains (c, s); 1 when chains agree (Gelman et al. 2013)."""
    half = draws_cs.shape[1] // 2
    chains = np.concatenate([draws_cs[:, :half], draws_cs[:, half : 2 * half]])
    within = chains.var(1, ddof=1).mean()
    between = half * chains.mean(1).var(ddof=1)
    return float(np.sqrt(((half - 1) / half * within + between / half) / max(within, 1e-300)))


def rank_rhat(draws_cs: np.ndarray) -> float:
    """Rank-normalised split R-hat of one scalar over chains (c, s): the larger of bulk and folded.

    Ranks make it finite for heavy tails; folding around the median sees chains of equal mean and other width.
    Source: Vehtari, Gelman, Simpson, Carpenter and Buerkner (2021).
    """
    folded = np.abs(draws_cs - np.median(draws_cs))
    return max(split_rhat(_rank_normalised(draws_cs)), split_rhat(_rank_normalised(folded)))


def ess(draws_cs: np.ndarray) -> float:
    """Effective number of draws for the mean of one scalar over chains (c, s), rank-normalised ("bulk").

        ESS = c s / (1 + 2 sum_t rho_t),   the sum cut where a pair of autocorrelations turns negative (Geyer 1992)

    Draws that do not move count as one a chain. Source: Vehtari et al. (2021), equations 10 and 11.
    """
    half = draws_cs.shape[1] // 2
    if half < 2:
        return float(draws_cs.shape[0])
    chains = _rank_normalised(np.concatenate([draws_cs[:, :half], draws_cs[:, half : 2 * half]]))
    c, s = chains.shape
    within = chains.var(1, ddof=1).mean()
    if within < 1e-12:
        return float(draws_cs.shape[0])
    centred = chains - chains.mean(1, keepdims=True)
    spectrum = np.abs(np.fft.rfft(centred, 2 * s, axis=1)) ** 2
    covariance_t = np.fft.irfft(spectrum, axis=1)[:, :s].mean(0) / s
    total = (s - 1) / s * within + chains.mean(1).var(ddof=1)
    rho_t = 1 - (within - covariance_t * s / (s - 1)) / total
    rho_t[0] = 1.0
    pairs = rho_t[: s - s % 2].reshape(-1, 2).sum(1)
    negative = np.flatnonzero(pairs < 0)
    pairs = np.minimum.accumulate(pairs[: negative[0] if len(negative) else None])
    return float(c * s / max(2 * pairs.sum() - 1, 1 / np.log10(c * s)))


def _rank_normalised(draws_cs: np.ndarray) -> np.ndarray:
    """Normal scores of the pooled ranks (Blom 1958); ties share their mean rank."""
    rank = scipy.stats.rankdata(draws_cs).reshape(draws_cs.shape)
    return scipy.special.ndtri((rank - 0.375) / (draws_cs.size + 0.25))
