"""A choice among a baseline's configs by held-out pairs of the training log: what an honest user could do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from deconfound_jax.align.baselines.data import RewardData, RewardModel, checked, weights
from deconfound_jax.align.baselines.pairs import PairRows, form_pairs
from deconfound_jax.causal.classical.crossfit import group_folds
from deconfound_jax.config import Adam

SCALES = np.geomspace(1e-2, 1e2, 41)  # of a reward in units of its own spread over pairs


class Tuned(NamedTuple):
    """The config with the lowest held-out loss, and every config's."""

    config: Any
    losses: tuple[float, ...]


def tune(
    baseline: Callable, data: RewardData, configs: Sequence[Any], key=None, folds: int = 3, pairs: Adam | None = None
) -> Tuned:
    """The config under which rewards best predict held-out outcomes of the training log, split by group.

        loss = mean over folds of -E[s log sigmoid(a (r_1 - r_2)) + (1 - s) log sigmoid(-a (r_1 - r_2))]

    a is fitted to the training pairs, since a reward such as ODIN's r_Q has no scale of its own. The held-out outcomes
    are as confounded as the others: this can choose step size, steps and width; a strength that takes the confounder
    out costs likelihood and would be chosen weak. Give it strengths that are all acceptable, or one.

    Args:
      baseline: `(data, config, key) -> RewardModel`.
      data: rows; `group_n` is what is held out together, else `pair_within_n`, else rows.
      configs: candidates.
      key: for the baseline, the same in every fold.
      folds: how many.
      pairs: how pairs are formed for judging.

    Returns:
      `Tuned`. Ties go to the first.
    """
    if not configs:
        raise ValueError("configs: expected at least one candidate, got none")
    weight_n, losses = weights(checked(data)), []
    group_n = next((c for c in (data.group_n, data.pair_within_n) if c is not None), np.arange(len(weight_n)))
    fold_n = group_folds(group_n, folds)
    judged = form_pairs(data, pairs or Adam(), "tune")
    for config in configs:
        found = []
        for fold in range(folds):
            model = baseline(data._replace(weight_n=weight_n * (fold_n != fold)), config, key)
            found.append(held_out_loss(model, data, judged, fold_n == fold))
        losses.append(float(np.mean(found)))
    return Tuned(configs[int(np.argmin(losses))], tuple(losses))


def held_out_loss(model: RewardModel, data: RewardData, pairs: PairRows, held_n: np.ndarray) -> float:
    """Mean loss of the pairs inside the held-out rows, the reward scaled to fit the pairs inside the others."""
    score_n = np.asarray(model.score(data.features_nd), np.float64)
    gap_p = score_n[pairs.rows_p2[:, 0]] - score_n[pairs.rows_p2[:, 1]]
    held_p2 = held_n[pairs.rows_p2]
    inside, outside = held_p2.all(1) & (pairs.weight_p > 0), ~held_p2.any(1) & (pairs.weight_p > 0)
    if not inside.any() or not outside.any():
        raise ValueError("folds: expected pairs inside every fold and outside it, got none; take fewer folds")
    unit = max(float(np.sqrt(np.mean(gap_p[outside] ** 2))), 1e-12)

    def loss(scale, of):
        margin_p = scale / unit * gap_p[of]
        per_pair = np.logaddexp(0, -margin_p) + (1 - pairs.label_p[of]) * margin_p
        return np.average(per_pair, weights=pairs.weight_p[of])

    best = SCALES[int(np.argmin([loss(scale, outside) for scale in SCALES]))]
    return float(loss(best, inside))
