"""Smaller cross products with the same posterior: fixed effects projected out, wide features rotated.

Both happen once, before the scalars psi are integrated, so that each psi costs a
factorisation as large as the terms, whatever the number of levels and features.

A level effect with a flat prior takes a weighted mean out of every column and
nothing else, in each equation alike (the equations' errors are tied by a unit
triangular map, under which a flat prior stays flat):

    G - sum_c S_c S_c' / w_c,    S_c the columns' sums within level c, w_c its weight

(Frisch, Waugh and Lovell). Given the other coefficients the effects are then
Gaussian around the levels' mean residuals. The ridge prior of the text does not see
a rotation, so its columns may be made orthogonal.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from deconfound_jax.causal.conditional import Moments, layout
from deconfound_jax.causal.scalars import controls
from deconfound_jax.causal.spec import Levels, Spec

_LOG_2PI = float(np.log(2 * np.pi))


class Dropped(NamedTuple):
    """What `restore` needs to draw projected level effects: the model and the level sums they left."""

    spec: Spec  # before the projection
    level: Levels
    outcome_cq: np.ndarray
    first_cq: np.ndarray


def project(spec: Spec, stats: Moments) -> tuple[Spec, Moments, Dropped | None]:
    """Takes the largest category's fixed effects out of the moments, where it has fixed effects.

    Returns:
      A spec without that category, its moments (an exact restricted likelihood: every
      level uses up one row in each equation), and what `restore` needs; or the
      arguments and None.
    """
    level = layout(spec).absorbed
    # What is left of other levels' columns is no longer diagonal: they can only stay beside a rotated text.
    alone = len(spec.levels) == 1 or _rotatable(spec, stats)
    if not (isinstance(level, Levels) and level.absorbed and alone):
        return spec, stats, None
    out_qq, out_log_weight = _within(stats.outcome_qq, stats.outcome_cq)
    first_qq, first_log_weight = _within(stats.first_qq, stats.first_cq)
    count = len(out_log_weight)
    constant = 0.5 * (count * _LOG_2PI - out_log_weight.sum() - len(spec.equations) * first_log_weight.sum())
    levels = tuple(other for other in spec.levels if other is not level)
    empty_cq = np.zeros((0, len(out_qq)))
    dropped = Dropped(spec, level, np.asarray(stats.outcome_cq), np.asarray(stats.first_cq))
    rest = Moments(out_qq, first_qq, empty_cq, empty_cq, stats.rows - count, stats.constant + constant)
    return spec._replace(levels=levels), rest, dropped


def rotate(spec: Spec, stats: Moments, projected: bool = False) -> tuple[Spec, Moments, np.ndarray | None]:
    """Rotates the text's columns so that their cross products are diagonal, where that saves work.

    Args:
      projected: the moments are within levels of `project`: other levels must stay dense columns.

    Returns:
      spec, moments, and the rotation (d, d): column j in terms of the text's; or the arguments and None.
    """
    start, stop = 1 + spec.blocks[0].start, 1 + spec.blocks[0].stop
    wide = stop - start > max((v.count for v in spec.levels), default=0)
    if not (_rotatable(spec, stats) and (wide or (projected and spec.levels))):
        return spec, stats, None
    if not projected and spec.levels:
        stats = _dense_levels(spec, stats)
    rotation_dd = np.linalg.eigh(stats.outcome_qq[start:stop, start:stop])[1]

    def rotated(gram_qq):
        gram_qq = np.array(gram_qq)
        gram_qq[start:stop] = rotation_dd.T @ gram_qq[start:stop]
        gram_qq[:, start:stop] = gram_qq[:, start:stop] @ rotation_dd
        return gram_qq

    stats = stats._replace(outcome_qq=rotated(stats.outcome_qq), first_qq=rotated(stats.first_qq))
    return spec._replace(orthogonal=True), stats, rotation_dd


def restore(dropped: Dropped, draws: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Draws the projected level effects given draws (s, ...) of all other sites; returns them by site, (s, c).

    With residuals r of the equations, errors L e and level means of r under the
    first equations' and the outcome's row weights: a_f ~ N(mean r_f, L_ff L_ff' / w),
    a_y ~ N(mean' r_y - L_yf L_ff^-1 (mean' r_f - a_f), L_yy^2 / w').
    """
    spec, name = dropped.spec, dropped.level.name
    prefixes = ["", *(e.prefix for e in spec.equations)]
    factor_smm = _error_factors(spec, draws)
    s, c = len(factor_smm), len(dropped.outcome_cq)
    noise_msc = np.random.default_rng([seed, 2]).standard_normal((len(prefixes), s, c))
    first_w, out_w = (np.maximum(cq[:, 0], 1e-300) for cq in (dropped.first_cq, dropped.outcome_cq))
    parts = dict(zip(prefixes, layout(spec).parts, strict=True))
    effects, shift_ksc = {}, []
    for k, prefix in enumerate(prefixes[1:]):
        mean_sc = _residual_sums(parts[prefix], dropped.first_cq, draws) / first_w[None, :]
        error_sc = np.einsum("sj,jsc->sc", factor_smm[:, k, : k + 1], noise_msc[1 : k + 2])
        effects[prefix + name] = mean_sc + error_sc / np.sqrt(first_w)[None, :]
        out_mean_sc = _residual_sums(parts[prefix], dropped.outcome_cq, draws) / out_w[None, :]
        shift_ksc.append(out_mean_sc - effects[prefix + name])
    mean_sc = _residual_sums(parts[""], dropped.outcome_cq, draws) / out_w[None, :]
    if shift_ksc:
        tie_sk = np.linalg.solve(np.swapaxes(factor_smm[:, :-1, :-1], 1, 2), factor_smm[:, -1, :-1, None])[..., 0]
        mean_sc = mean_sc - np.einsum("sk,ksc->sc", tie_sk, np.stack(shift_ksc))
    effects[name] = mean_sc + factor_smm[:, -1, -1, None] * noise_msc[0] / np.sqrt(out_w)[None, :]
    return effects


def _within(gram_qq, sums_cq):
    """Cross products within levels, and the logarithms of the levels' weights (levels without a row left out)."""
    sums_cq = np.asarray(sums_cq)
    sums_cq = sums_cq[sums_cq[:, 0] > 0]
    weight_c = sums_cq[:, 0]
    scaled_cq = sums_cq / np.sqrt(weight_c)[:, None]
    within_qq = np.asarray(gram_qq) - scaled_cq.T @ scaled_cq
    within_qq[0], within_qq[:, 0] = 0.0, 0.0  # the intercept lies in the levels' span: no rounding is left of it
    return within_qq, np.log(weight_c)


def _rotatable(spec: Spec, stats: Moments) -> bool:
    """True where the text has a ridge prior and all equations weigh the rows alike."""
    text = spec.blocks[0]
    alike = not spec.equations or np.array_equal(stats.outcome_qq, stats.first_qq)
    return alike and text.prior == "ridge" and not text.spectrum


def _dense_levels(spec: Spec, stats: Moments) -> Moments:
    """Moments whose level sums have become one-hot columns, every level of the spec in its order."""
    plan = layout(spec)
    hot = 1 + max(block.stop for block in spec.first_blocks)
    tail = hot + sum(level.count for level in plan.kept)
    place = {level.name: hot + sum(v.count for v in plan.kept[:i]) for i, level in enumerate(plan.kept)}
    place[plan.absorbed.name] = plan.n_columns
    order = [*range(hot)]
    for level in spec.levels:
        order += range(place[level.name], place[level.name] + level.count)
    order = np.asarray([*order, *range(tail, plan.n_columns)])

    def dense(gram_qq, sums_cq):
        whole = np.block([[np.asarray(gram_qq), sums_cq.T], [sums_cq, np.diag(sums_cq[:, 0])]])
        return whole[np.ix_(order, order)]

    out_qq = dense(stats.outcome_qq, np.asarray(stats.outcome_cq))
    first_qq = dense(stats.first_qq, np.asarray(stats.first_cq))
    return stats._replace(outcome_qq=out_qq, first_qq=first_qq)


def _residual_sums(part, sums_cq, draws) -> np.ndarray:
    """Sums (s, c) within levels of an equation's variable minus its linear part."""
    total_sc = np.asarray(sums_cq)[None, :, part.target]
    for site, start, stop in part.sites:
        columns = part.columns[start - part.sites[0][1] : stop - part.sites[0][1]]
        value_sk = np.asarray(draws[site], float).reshape(len(draws[site]), stop - start)
        total_sc = total_sc - value_sk @ np.asarray(sums_cq)[:, columns].T
    return total_sc


def _error_factors(spec: Spec, draws) -> np.ndarray:
    """`scalars.error_factor` of every draw, (s, m + 1, m + 1), the outcome last."""
    sds = [draws[f"{e.prefix}sigma"] for e in spec.equations] + [draws["sigma"]]
    factor_smm = np.zeros((len(sds[0]), len(sds), len(sds)))
    for k, sd_s in enumerate(sds):
        factor_smm[:, k, k] = sd_s
    for (i, j), name in controls(spec):
        factor_smm[:, i, j] = draws[name]
    return factor_smm
