"""Best-of-n by mean - kappa sd: alignment without training; `recipes.rejection` trains on what it chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np


class BestOf(NamedTuple):
    """One point of the over-optimisation curve."""

    n: int
    kl: float  # log n - (n - 1) / n, nats: an upper bound, exact where no two samples tie
    proxy: float  # expected score of the chosen text
    truth: float | None  # its expected true reward, where that is known


def best_of_curve(score_m: np.ndarray, sizes: Sequence[int], truth_m: np.ndarray | None = None) -> list[BestOf]:
    """Expected score and truth of the best of n, for each n, from one pool of m samples.

        E_n[v] = sum_i v_(i) C(i - 1, n - 1) / C(m, n),   i the rank by score

    the average over all subsets of n samples of the pool: no further sampling, and far less noise than one draw of n.

    Args:
      score_m: what is maximised, such as `align.scoring.scored(draws, kappa=1)`.
      sizes: n, at most m.
      truth_m: true reward of the same samples.

    Raises:
      ValueError: a size below 1 or above m.

    Source: Nakano et al. 2112.09332, appendix I (the estimator); Beirami et al. 2401.01879 (the bound of the KL).
    """
    score_m = np.asarray(score_m, np.float64)
    chex.assert_rank(score_m, 1)
    m = len(score_m)
    order = np.argsort(score_m, kind="stable")
    found = []
    for n in sizes:
        chance_m = chance_of_best(m, n)
        truth = None if truth_m is None else float(chance_m @ np.asarray(truth_m, np.float64)[order])
        found.append(BestOf(n, float(np.log(n) - (n - 1) / n), float(chance_m @ score_m[order]), truth))
    return found


def choose(score_bg) -> jax.Array:
    """The best sample of each prompt, (b,): what rejection-sampling SFT trains on."""
    chex.assert_rank(score_bg, 2)
    return jnp.argmax(jnp.asarray(score_bg), axis=1)


def chance_of_best(m: int, n: int) -> np.ndarray:
    """P(the sample of rank i is the best of n drawn without replacement), (m,), worst first."""
    if not 1 <= n <= m:
        raise ValueError(f"best_of: expected 1 to {m} (the number of values), got {n}")
    below_m = np.arange(m)
    # The ratio of binomials as a product: the binomials themselves overflow.
    chance_m = np.full(m, n / m)
    for j in range(1, n):
        chance_m *= np.maximum(below_m - j + 1, 0) / (m - j)
    return chance_m
