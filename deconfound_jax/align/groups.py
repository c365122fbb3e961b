"""Groups of texts that are compared with each other, and the pairs inside a group.

A group's texts share one forward pass; all its pairs are used. Groups are formed
inside `Roles.pair_within` (the article, the prompt) or, without it, across rows.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from deconfound_jax.causal.reward import precision_weight, prefer


def pair_index(group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """First and second member of every unordered pair in a group, (p,) each."""
    first, second = np.triu_indices(group_size, 1)
    return first, second


def form_groups(codes_n: np.ndarray | None, n: int, group_size: int, seed: int) -> np.ndarray:
    """Rows in groups of `group_size`, inside equal codes or across all rows.

    Args:
      codes_n: (n,) the value inside which pairs are formed; None: any two rows.
      n: rows.
      group_size: texts of a group; larger sets are cut, a remainder of one is left out.
      seed: of the order.

    Returns:
      (m, group_size) row numbers, -1 where a group is smaller.

    Raises:
      ValueError: no two rows share a value.
    """
    order = np.random.default_rng(seed).permutation(n)
    sets = [order] if codes_n is None else np.split(order := order[np.argsort(codes_n[order], kind="stable")],
                                                    np.flatnonzero(np.diff(codes_n[order])) + 1)  # fmt: skip
    groups = []
    for rows in sets:
        for start in range(0, len(rows), group_size):
            piece = rows[start : start + group_size]
            if len(piece) > 1:
                groups.append(np.pad(piece, (0, group_size - len(piece)), constant_values=-1))
    if not groups:
        raise ValueError(
            f"roles.pair_within: expected at least two rows with an equal value, got {n} rows of {len(sets)} values"
        )
    return np.stack(groups)


def pair_labels(draws_sn: np.ndarray, groups_mg: np.ndarray, tau: float, weighting: str):
    """Soft label and weight of every pair, (m, p) each, from joint reward draws.

    label = mean over draws of sigmoid((r_i - r_j) / tau); weight 1, or `precision`;
    0 where a member is missing.
    """
    first, second = pair_index(groups_mg.shape[1])
    a, b = groups_mg[:, first], groups_mg[:, second]
    label, weight = _labels(np.asarray(draws_sn, np.float32), a, b, tau, weighting == "precision")
    return np.asarray(label), np.asarray(weight) * ((a >= 0) & (b >= 0))


def epochs(n: int, batch: int, seed: int) -> Callable[[int], np.ndarray]:
    """step -> (batch,) numbers below n, a fresh order each epoch: a pure function, so resume needs no state."""
    per_epoch = max(n // batch, 1)

    def at(step: int) -> np.ndarray:
        epoch, position = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(n)
        return np.resize(order, max(n, batch))[position * batch : (position + 1) * batch]

    return at


def _labels_of(draws_sn, a_mp, b_mp, tau, precise):
    def one(pair):
        first, second = draws_sn[:, pair[0]], draws_sn[:, pair[1]]
        weight = precision_weight(first, second, tau) if precise else jax.numpy.ones(first.shape[1])
        return prefer(first, second, tau), weight

    return jax.lax.map(one, (a_mp, b_mp))


_labels = jax.jit(_labels_of, static_argnums=4)
