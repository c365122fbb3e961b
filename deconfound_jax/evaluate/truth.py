"""Scores against a simulation's truth: what a policy gained, and at what distance from its reference."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import chex
import numpy as np

from deconfound_jax.recipes.best_of_n import chance_of_best


def true_share(policy_f: np.ndarray, reference_f: np.ndarray, best_of: int = 8) -> float:
    """The policy's gain in true reward as a share of what best-of-n by the truth would gain.

        share = (E f(policy) - E f(reference)) / (E max of `best_of` reference samples - E f(reference))

    Args:
      policy_f: true f (n,) of the policy's samples.
      reference_f: true f (m,) of the reference policy's samples, m >= best_of.
      best_of: how many reference samples the oracle chooses from.
    Returns:
      0 at the reference, 1 at the oracle's best-of-n; it may exceed 1 and be negative.
    Raises:
      ValueError: too few samples, or every reference sample has the same f.

    >>> round(true_share([1.0], [0.0, 1.0], best_of=2), 2)
    1.0
    """
    policy_f, reference_f = np.asarray(policy_f, np.float64), np.asarray(reference_f, np.float64)
    chex.assert_rank([policy_f, reference_f], 1)
    if policy_f.size == 0:
        raise ValueError("policy_f: expected at least one sample, got none")
    oracle_gain = expected_best(reference_f, best_of) - reference_f.mean()
    if not oracle_gain > 0:
        raise ValueError(f"reference_f: expected values that differ, and best_of > 1; best-of-n gains {oracle_gain}")
    return float((policy_f.mean() - reference_f.mean()) / oracle_gain)


def expected_best(value_n: np.ndarray, best_of: int) -> float:
    """Exact E[max] of `best_of` draws without replacement from the given values.

        sum_i x_(i) C(i - 1, m - 1) / C(n, m),   x_(1) <= ... <= x_(n)

    Raises ValueError when there are fewer values than draws.
    """
    value_n = np.sort(np.asarray(value_n, np.float64))
    chex.assert_rank(value_n, 1)
    return float(chance_of_best(len(value_n), best_of) @ value_n)


def kl(policy_logprob_n: np.ndarray, reference_logprob_n: np.ndarray) -> tuple[float, float]:
    """KL(policy || reference) in nats a text, from the policy's own samples, and its standard error.

    Args:
      policy_logprob_n: log-probability (n,) of each sampled text under the policy that sampled it.
      reference_logprob_n: of the same texts under the reference.
    Raises:
      ValueError: fewer than two samples.

    >>> kl([-1.0, -2.0], [-2.0, -2.0])
    (0.5, 0.5)
    """
    difference_n = np.asarray(policy_logprob_n, np.float64) - np.asarray(reference_logprob_n, np.float64)
    chex.assert_equal_shape([np.asarray(policy_logprob_n), np.asarray(reference_logprob_n)])
    chex.assert_rank(difference_n, 1)
    if len(difference_n) < 2:
        raise ValueError(f"policy_logprob_n: expected at least 2 samples, got {len(difference_n)}")
    return float(difference_n.mean()), float(difference_n.std(ddof=1) / len(difference_n) ** 0.5)


def at_kl(curve: Sequence[tuple[float, float]], kl: float) -> float | None:
    """The value where training first crosses a given KL, by linear interpolation.

    Args:
      curve: (KL, value) along training, in the order of training; KL need not grow.
      kl: where to read it, nats a text.
    Returns:
      the value, or None when the curve never reaches that KL: say so, do not extrapolate.

    >>> at_kl([(0.0, 0.0), (2.0, 1.0)], 0.5)
    0.25
    """
    if any(not np.isfinite(point).all() for point in curve):
        raise ValueError("curve: expected finite (KL, value) pairs, got one that is not")
    if curve and curve[0][0] == kl:
        return float(curve[0][1])
    for (kl_a, value_a), (kl_b, value_b) in itertools.pairwise(curve):
        if min(kl_a, kl_b) <= kl <= max(kl_a, kl_b):  # never flat: its start would have matched before
            return float(value_a + (value_b - value_a) * (kl - kl_a) / (kl_b - kl_a))
    return None


def probe_r2(
    features_nd: np.ndarray, attributes_nk: np.ndarray, train_share: float = 0.5, seed: int = 0, ridge: float = 1e-6
) -> np.ndarray:
    """Held-out R2 (k,) of a linear probe: do the features carry the attributes?

    Least squares with an intercept on standardised features; `ridge`, a share of the rows, only
    keeps collinear features solvable.

    Args:
      features_nd: any features.
      attributes_nk: what they should tell, finite.
      train_share: rows the probe is fitted on; the others are scored.
      seed: of the split.
    Raises:
      ValueError: nothing left to fit or to score, or an attribute that is constant where it is scored.
    """
    features_nd, attributes_nk = np.asarray(features_nd, np.float64), np.asarray(attributes_nk, np.float64)
    chex.assert_rank([features_nd, attributes_nk], 2)
    chex.assert_equal_shape_prefix([features_nd, attributes_nk], 1)
    n, width = features_nd.shape
    if not (np.isfinite(features_nd).all() and np.isfinite(attributes_nk).all()):
        raise ValueError("features_nd, attributes_nk: expected finite values, got some that are not")
    order_n = np.random.default_rng(seed).permutation(n)
    n_train = round(train_share * n)
    if n_train < 2 or n - n_train < 2:
        raise ValueError(f"train_share: expected at least 2 rows on either side, got {n_train} and {n - n_train}")
    train, test = order_n[:n_train], order_n[n_train:]

    mean_d, sd_d = features_nd[train].mean(axis=0), features_nd[train].std(axis=0)
    scaled_nd = (features_nd - mean_d[None, :]) / np.where(sd_d > 0, sd_d, 1.0)[None, :]
    mean_k = attributes_nk[train].mean(axis=0)
    gram_dd = scaled_nd[train].T @ scaled_nd[train] + ridge * n_train * np.eye(width)
    weight_dk = np.linalg.solve(gram_dd, scaled_nd[train].T @ (attributes_nk[train] - mean_k[None, :]))

    error_nk = attributes_nk[test] - mean_k[None, :] - scaled_nd[test] @ weight_dk
    spread_k = attributes_nk[test].var(axis=0)
    if not (spread_k > 0).all():
        raise ValueError(f"attributes_nk: column {int(np.argmin(spread_k))} is constant over the rows scored")
    return 1 - (error_nk**2).mean(axis=0) / spread_k
