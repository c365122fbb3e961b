"""The reward as an interval: what a `bounded` verdict leaves to train on.

    beta(t) = beta_0 - sum_j t_j D_j,   t_j in [low_j, high_j]

gamma known to lie in a set: D_j are the text's coefficients in E[p_j | x, c], since with gamma fixed y - gamma p is
regressed on x. A placebo outcome that moved: D is what the text did to it, t in [0, 1]. Too few groups: no
direction, but a margin of t quantiles and clustered errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy.stats

from deconfound_jax.causal.placebo import placebo_outcome
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.sensitivity import gamma_means, ridge_of
from deconfound_jax.causal.spec import Prepared
from deconfound_jax.causal.working import Working, covariance, working

if TYPE_CHECKING:
    from deconfound_jax.causal.verdict import Verdict


class RewardInterval(NamedTuple):
    """Rewards of texts as intervals, in units of the outcome, features in their own units."""

    centre_d: np.ndarray
    directions_jd: np.ndarray
    low_j: np.ndarray
    high_j: np.ndarray
    covariance_dd: np.ndarray  # of the coefficients, robust, given t
    critical: float  # errors added on each side of a contrast
    mean_d: np.ndarray  # of the log's features: a reward is a contrast with the average text

    def contrast(self, difference_pd) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest value of v'beta for contrasts (p, d), (p,) each."""
        difference_pd = np.atleast_2d(np.asarray(difference_pd, np.float64))
        ends = -difference_pd @ self.directions_jd.T
        a, b = ends * self.low_j[None, :], ends * self.high_j[None, :]
        middle_p = difference_pd @ self.centre_d
        variance_p = np.einsum("pd,de,pe->p", difference_pd, self.covariance_dd, difference_pd)
        margin_p = self.critical * np.sqrt(np.maximum(variance_p, 0.0))
        return middle_p + np.minimum(a, b).sum(1) - margin_p, middle_p + np.maximum(a, b).sum(1) + margin_p

    def rewards(self, features_nd) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest reward of texts against the log's average text, (n,) each."""
        return self.contrast(np.asarray(features_nd, np.float64) - self.mean_d[None, :])

    def sign(self, first_pd, second_pd) -> np.ndarray:
        """+1 where the first text is better over the whole interval, -1 where the second is, 0 elsewhere: not for
        training."""
        low_p, high_p = self.contrast(np.asarray(first_pd, np.float64) - np.asarray(second_pd, np.float64))
        return (low_p > 0).astype(int) - (high_p < 0).astype(int)


def reward_interval(
    posterior: Posterior, prepared: Prepared, gamma_low, gamma_high, groups_n=None, critical: float = 0.0
) -> RewardInterval:
    """The reward for every gamma in [gamma_low, gamma_high], closed form.

        beta(g) = b(y) - g b(p),    b(.) the ridge regression on phi given the terms, ridge = sigma^2 / scale^2

    linear in g, so a contrast's extremes lie at the ends; several gammas range over a box.

    Args:
      gamma_low, gamma_high: one number an endogenous variable, on standardised scales as in `GammaSet`; () for none.
      groups_n: groups of the log's rows, for the errors.
      critical: how many errors of the coefficients widen a contrast on each side.

    Example:
      >>> interval = reward_interval(posterior, prepared, *verdict.gamma_range)
      >>> keep = interval.sign(features_nd[a], features_nd[b]) != 0
    """
    low_j, high_j = (np.atleast_1d(np.asarray(end, np.float64)) for end in (gamma_low, gamma_high))
    work = working(posterior, prepared, groups_n)
    if (
        low_j.shape != (work.endogenous_nm.shape[1],)
        or (low_j > high_j).any()
        or not np.isfinite([low_j, high_j]).all()
    ):
        raise ValueError(
            f"gamma: expected {work.endogenous_nm.shape[1]} finite lows and highs, got {low_j.tolist()}, "
            f"{high_j.tolist()}"
        )
    ridge = ridge_of(posterior, prepared)
    middle = (low_j + high_j) / 2
    right = np.concatenate([work.response_n[:, None], work.endogenous_nm], 1)
    found, cov = _ridge(work, ridge, right, np.concatenate([[1.0], -middle]))
    unit_d, mean_d = _units(posterior), np.asarray(posterior.scaling["features.mean"])
    cov = cov * unit_d[:, None] * unit_d[None, :]
    return RewardInterval(found[:, 0] * unit_d, found[:, 1:].T * unit_d[None, :], low_j, high_j, cov, critical, mean_d)


def bounded_reward(
    posterior: Posterior, prepared: Prepared, verdict: Verdict, *, groups_n=None, placebo_outcome_n=None
) -> RewardInterval:
    """The interval that a verdict leaves, from what it failed.

    Instruments: gamma over its set. Too few groups: clustered errors and t quantiles with (groups - 1) degrees of
    freedom. A placebo outcome that moved: with and without what the text did to it, sd of the outcome for sd of it
    (confounding between none and as strong as the placebo's: equi-confounding, Sofer, Richardson, Colicino, Schwartz
    and Tchetgen Tchetgen 2016).

    Args:
      verdict: of the same fit; a `consistent` one without instruments leaves a point.
      groups_n, placebo_outcome_n: as given to `verdict`.

    Raises:
      ValueError: where nothing bounds the reward, or an argument that the verdict rests on is missing.
    """
    if verdict.status == "not_identified":
        raise ValueError(f"bounded_reward: nothing bounds the reward; {' '.join(verdict.reasons)}")
    if "placebo instrument" in verdict.failed:
        why = verdict["placebo instrument"].sentence
        raise ValueError(f"bounded_reward: {why} The set of gamma rests on exclusion: nothing bounds the reward.")
    low, high = verdict.gamma_range if verdict.gamma else (gamma_means(posterior, prepared),) * 2
    if "gamma set" in verdict.failed and not verdict.gamma:
        raise ValueError(f"bounded_reward: {verdict['gamma set'].sentence}")
    critical = 0.0
    if "groups" in verdict.failed:
        groups = len(np.unique(_given("groups_n", groups_n)))
        critical = float(scipy.stats.t.ppf(0.975, max(groups - 1, 1)))
    found = reward_interval(posterior, prepared, low, high, groups_n, critical)
    if "placebo outcome" not in verdict.failed:
        return found
    placebo_n = _given("placebo_outcome_n", placebo_outcome_n)
    moved_d = placebo_outcome(posterior, prepared, placebo_n, groups_n).coefficient_d * _units(posterior)
    return found._replace(
        directions_jd=np.concatenate([found.directions_jd, moved_d[None, :]]),
        low_j=np.append(found.low_j, 0.0),
        high_j=np.append(found.high_j, 1.0),
    )


def _given(name: str, values):
    if values is None:
        raise ValueError(f"bounded_reward: expected {name}, which the verdict rests on, got none")
    return np.asarray(values)


def _ridge(work: Working, ridge: float, right: np.ndarray, combination: np.ndarray):
    """Coefficients (d, columns of right), and the covariance of their combination."""
    x, w = work.text_nd, work.weight_n
    inverse = np.linalg.inv(x.T @ (x * w[:, None]) + max(ridge, 1e-9 * work.rows) * np.eye(x.shape[1]))
    found = inverse @ (x.T @ (w[:, None] * right))
    residual_n = (right - x @ found) @ combination
    influence = (x @ inverse) * (w * residual_n)[:, None]
    return found, covariance(influence, work, x.shape[1])[0]


def _units(posterior: Posterior) -> np.ndarray:
    return float(posterior.scaling["outcome.sd"]) / np.asarray(posterior.scaling["features.sd"])
