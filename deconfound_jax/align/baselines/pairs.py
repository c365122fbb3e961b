"""Pairs of rows for the baselines that compare: formed once, kept as row numbers beside the arrays they point into."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import ndtr

from deconfound_jax.align.baselines.data import NotDefined, RewardData, response, rows_used, weights
from deconfound_jax.align.groups import form_groups, pair_index
from deconfound_jax.config import Adam


class PairRows(NamedTuple):
    """p pairs of rows."""

    rows_p2: np.ndarray
    label_p: np.ndarray  # P(the first is better)
    weight_p: np.ndarray  # product of the rows' weights; 0 leaves a pair out


def form_pairs(data: RewardData, config: Adam, baseline: str) -> PairRows:
    """Every pair inside groups of texts with an equal `pair_within`, or of any texts, judged by their outcomes.

        label = 1, 1/2 or 0 as y_1 > y_2, equal or less;
        counts: Phi((y_1 - y_2) / sqrt(v_1 + v_2)), v the empirical logits' sampling variance

    Confounded outcomes are what the baselines are given: no label is corrected here.

    Raises:
      NotDefined: no two used rows share a `pair_within`.
    """
    used_n, weight_n = rows_used(data), weights(data)
    within_n = None if data.pair_within_n is None else np.asarray(data.pair_within_n)
    try:
        groups_mg = form_groups(within_n, len(used_n), config.group_size, config.seed)
    except ValueError as error:
        raise NotDefined(baseline, f"no pairs ({error})") from error
    first, second = pair_index(config.group_size)
    rows_p2 = np.stack([groups_mg[:, first], groups_mg[:, second]], -1).reshape(-1, 2)
    rows_p2 = rows_p2[(rows_p2 >= 0).all(1)]
    weight_p = weight_n[rows_p2].prod(1)
    if not weight_p.any():
        raise NotDefined(baseline, "no two rows with seen outcomes share a pair_within")
    y_n, variance_n = response(data)
    gap_p = y_n[rows_p2[:, 0]] - y_n[rows_p2[:, 1]]
    if variance_n is None:
        label_p = 0.5 * (1 + np.sign(gap_p))
    else:
        label_p = ndtr(gap_p / np.sqrt(variance_n[rows_p2].sum(1)))
    return PairRows(rows_p2, label_p, weight_p)
