"""Nested levels and dense columns under a Gaussian surrogate: solved with nothing but the dense part factorised.

An image lies in a test, a test in a week. Levels are eliminated from the finest on: given
its own sums C_u = sum w [x, y] and prior precision l, level u takes C_u C_u' / (W_u + l)
out of the dense system, and leaves the share l / (W_u + l) of its sums to the level that
holds it. W_u is the intercept's column of C_u.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse
from scipy.linalg import cho_solve, cholesky, solve_triangular

from deconfound_jax.causal.spec import Levels, Rows, Spec


class Columns(NamedTuple):
    """The design as arrays: dense columns (the intercept first) and a chain of nested levels, finest first."""

    dense_nd: np.ndarray
    sites: tuple[tuple[str, int, int], ...]
    chain: tuple[Levels, ...]
    codes: tuple[np.ndarray, ...]  # of the chain's levels, by row
    into: tuple[scipy.sparse.csr_matrix, ...]  # sums rows into the finest level, then each level into the next
    parent: tuple[np.ndarray, ...]  # level -> the next coarser level


class Surrogate(NamedTuple):
    """Cross products (d + 1, d + 1) of [dense, working response] and their sums by the finest level."""

    gram: np.ndarray
    sums: np.ndarray | None
    constant: float
    information_n: np.ndarray


class Solution(NamedTuple):
    """theta given psi under the surrogate."""

    log_evidence: float  # without the prior of psi
    mean_d: np.ndarray
    levels: tuple[np.ndarray, ...]  # effects, finest first
    lower_dd: np.ndarray  # Cholesky factor of the dense precision
    steps: tuple[tuple[np.ndarray, np.ndarray], ...]  # of the elimination: sums and precisions by level


class Spread(NamedTuple):
    """Second moments of theta given psi: gradients of the evidence, and what the variance of eta is made of."""

    by_log_sd_d: np.ndarray  # d log evidence / d log prior sd of a coefficient
    by_log_sd_chain: np.ndarray
    half_dd: np.ndarray  # inverse of `Solution.lower_dd`
    reach_ud: np.ndarray  # how the finest level's total effect moves with the dense coefficients' noise
    own_u: np.ndarray  # and its own variance


def lay_out(spec: Spec, rows: Rows) -> Columns:
    """The largest set of levels and those that hold it form the chain; other levels are one-hot columns."""
    codes = {v.name: np.asarray(rows.levels_nc[:, v.column]) for v in spec.levels}
    chain, parents = [], []
    for level in sorted(spec.levels, key=lambda v: -v.count):
        if not chain:
            chain.append(level)
            continue
        fine_n, coarse_n = codes[chain[-1].name], codes[level.name]
        parent = np.zeros(chain[-1].count, int)
        parent[fine_n] = coarse_n
        if (parent[fine_n] == coarse_n).all():
            chain.append(level)
            parents.append(parent)
    dense = [np.ones((len(rows.outcome_n), 1)), np.asarray(rows.columns_nq, float)]
    sites = [("intercept", 0, 1), *[(b.name, 1 + b.start, 1 + b.stop) for b in spec.blocks]]
    for level in (v for v in spec.levels if v not in chain):
        sites.append((level.name, sites[-1][2], sites[-1][2] + level.count))
        dense.append(np.eye(level.count)[codes[level.name]])
    up = [codes[v.name] for v in chain[:1]] + parents
    into = [_summing(code, level.count) for code, level in zip(up, chain, strict=True)]
    own = tuple(codes[v.name] for v in chain)
    return Columns(np.concatenate(dense, 1), tuple(sites), tuple(chain), own, tuple(into), tuple(parents))


def take(columns: Columns, index: np.ndarray) -> Columns:
    """The same design on some of its rows."""
    codes = tuple(codes_n[index] for codes_n in columns.codes)
    into = columns.into and (columns.into[0][:, index], *columns.into[1:])
    return columns._replace(dense_nd=columns.dense_nd[index], codes=codes, into=into)


def _summing(codes_n: np.ndarray, count: int) -> scipy.sparse.csr_matrix:
    n = len(codes_n)
    return scipy.sparse.csr_matrix((np.ones(n), (codes_n, np.arange(n))), shape=(count, n))


def solve(columns: Columns, surrogate: Surrogate, log_sd_d, log_sd_chain) -> Solution:
    """Eliminates the chain, factorises the dense rest, and goes back down the chain."""
    d = len(log_sd_d)
    system, log_det = surrogate.gram.copy(), 2 * log_sd_d.sum()
    system[np.arange(d), np.arange(d)] += np.exp(-2 * log_sd_d)
    steps, sums = [], surrogate.sums
    for i, log_sd in enumerate(log_sd_chain):
        precision_u = sums[:, 0] + np.exp(-2 * log_sd)  # column 0 is the intercept's: the level's information
        scaled = sums / np.sqrt(precision_u)[:, None]
        system -= scaled.T @ scaled
        log_det += np.log(precision_u).sum() + 2 * log_sd * len(precision_u)
        steps.append((sums, precision_u))
        if i + 1 < len(log_sd_chain):
            sums = columns.into[i + 1] @ (sums * (np.exp(-2 * log_sd) / precision_u)[:, None])
    lower_dd = cholesky(system[:d, :d], lower=True)
    log_det += 2 * np.log(np.diag(lower_dd)).sum()
    mean_d = cho_solve((lower_dd, True), system[:d, d])
    log_evidence = surrogate.constant - 0.5 * (log_det + system[d, d] - system[:d, d] @ mean_d)
    levels, total_u = [], np.zeros(1)
    for i in reversed(range(len(steps))):
        sums, precision_u = steps[i]
        total_u = total_u[columns.parent[i]] if levels else total_u
        levels.insert(0, (sums[:, d] - sums[:, :d] @ mean_d - sums[:, 0] * total_u) / precision_u)
        total_u = total_u + levels[0]
    return Solution(log_evidence, mean_d, tuple(levels), lower_dd, tuple(steps))


def spread(columns: Columns, found: Solution, log_sd_d, log_sd_chain) -> Spread:
    """Second moments: theta = mean + half' u, and level by level, coarsest first, what hangs on u and what does not."""
    d = len(log_sd_d)
    half_dd = solve_triangular(found.lower_dd, np.eye(d), lower=True)
    by_log_sd_d = (found.mean_d**2 + (half_dd**2).sum(0)) * np.exp(-2 * log_sd_d) - 1
    by_chain, own_u, reach_ud = np.zeros(len(found.steps)), np.zeros(1), np.zeros((1, d))
    for i in reversed(range(len(found.steps))):
        sums, precision_u = found.steps[i]
        if i + 1 < len(found.steps):
            own_u, reach_ud = own_u[columns.parent[i]], reach_ud[columns.parent[i]]
        share_u = sums[:, 0] / precision_u
        level_ud = -(sums[:, :d] / precision_u[:, None]) @ half_dd.T - share_u[:, None] * reach_ud
        square_u = found.levels[i] ** 2 + 1 / precision_u + share_u**2 * own_u + (level_ud**2).sum(1)
        by_chain[i] = (square_u * np.exp(-2 * log_sd_chain[i]) - 1).sum()
        reach_ud = reach_ud + level_ud
        own_u = 1 / precision_u + (1 - share_u) ** 2 * own_u
    return Spread(by_log_sd_d, by_chain, half_dd, reach_ud, own_u)


def fitted(columns: Columns, found: Solution) -> np.ndarray:
    eta_n = columns.dense_nd @ found.mean_d
    for codes_n, effect_u in zip(columns.codes, found.levels, strict=True):
        eta_n = eta_n + effect_u[codes_n]
    return eta_n
