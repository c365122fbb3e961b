"""Tests whose right answer is known: a text cannot move a placebo outcome, a placebo instrument moves nothing.

And what one group does to the answer: rewards with and without it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.stats

from deconfound_jax.causal.builders import site_of
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.sensitivity import outcome_equation
from deconfound_jax.causal.spec import Prepared
from deconfound_jax.causal.working import Raw, covariance, groups_of, least_squares, of_log, raw, sweep

_DIRECTIONS = 20  # of the text that are tested together: a robust covariance of more is unreliable
_GROUPS = 60  # largest ones that are left out, one at a time


class Placebo(NamedTuple):
    """An effect that must be zero: p-value, and the text's coefficients on the placebo (standardised, (d,))."""

    p_value: float
    coefficient_d: np.ndarray


class Influence(NamedTuple):
    """The group without which the rewards change most."""

    correlation: float  # of the log's rewards with and without it
    group: str
    groups: float  # effective number, (sum n_g)^2 / sum n_g^2


def placebo_outcome(posterior: Posterior, prepared: Prepared, placebo_n, groups_n=None) -> Placebo:
    """Does the text (or the declared treatment) move an outcome that it cannot move, once the design is applied?

    The design's own estimator with the placebo as outcome (two-stage least squares where it has instruments), and a
    robust joint F test on the text's leading directions.

    Args:
      placebo_n: (n,) an outcome of the log's rows settled before the text was shown, or out of its reach.
      groups_n: groups of the log's rows, for clustered errors.

    Source: negative control outcomes, Lipsitch, Tchetgen Tchetgen and Cohen (2010).
    """
    treatments = tuple(site_of(t.column) for t in posterior.design.terms if t.kind == "treatment")
    found = raw(posterior, prepared, groups_n, keep=treatments)
    placebo_u = of_log(prepared, "placebo outcome", placebo_n)[found.seen_n]
    # The placebo has a noise of its own: rows weigh by what they count, not by the outcome's precision.
    return _text_effect(found._replace(response_n=placebo_u), prepared.spec.blocks[0].stop)


def placebo_instrument(posterior: Posterior, prepared: Prepared, placebo_n, groups_n=None) -> float:
    """p-value: does a variable made like the instrument, that can move neither p nor y, move y?

    Reduced form of y~ on it given text, terms and levels, robust. Source: negative control instruments (Danieli,
    Nevo, Walk, Weinstein and Zeltzer 2024).
    """
    found = raw(posterior, prepared, groups_n)
    placebo_u = of_log(prepared, "placebo instrument", placebo_n)[found.seen_n]
    work = sweep(found, found.frequency_n * found.precision_n, placebo_u)
    columns = np.concatenate([work.extra_ne, work.text_nd], 1)
    coefficient, lever_nq = least_squares(columns, work.response_n[:, None], work.weight_n)
    influence_n1 = lever_nq[:, :1] * (work.response_n - columns @ coefficient[:, 0])[:, None]
    variance, df = covariance(influence_n1, work, columns.shape[1])
    return float(2 * scipy.stats.t.sf(abs(coefficient[0, 0]) / np.sqrt(max(variance[0, 0], 1e-300)), df))


def leave_a_group_out(posterior: Posterior, prepared: Prepared, groups_n) -> Influence:
    """The rewards of the log's texts, refitted without each group in closed form (scalars held).

    Of many groups the largest are looked at.
    """
    found = raw(posterior, prepared, groups_n)
    work, ridge = outcome_equation(posterior, prepared, found)
    x, w, y = work.text_nd, work.weight_n, work.response_n
    gram, cross = x.T @ (x * w[:, None]), x.T @ (w * y)
    penalty = max(ridge, 1e-9 * work.rows) * np.eye(x.shape[1])
    spread = np.cov(found.text_nd.T, aweights=work.frequency_n).reshape(gram.shape)
    full = np.linalg.solve(gram + penalty, cross)
    mass_g = np.bincount(work.cluster_n, work.frequency_n)
    worst, name_g = (1.0, 0), np.unique(groups_of(prepared, groups_n)[found.seen_n])
    for g in np.argsort(-mass_g)[:_GROUPS]:
        mine = work.cluster_n == g
        rest_gram = gram - x[mine].T @ (x[mine] * w[mine, None])
        rest = np.linalg.solve(rest_gram + penalty, cross - x[mine].T @ (w[mine] * y[mine]))
        norm = np.sqrt(max((full @ spread @ full) * (rest @ spread @ rest), 1e-300))
        worst = min(worst, (float(full @ spread @ rest / norm), int(g)))
    return Influence(worst[0], str(name_g[worst[1]]), float(mass_g.sum() ** 2 / (mass_g**2).sum()))


def _text_effect(found: Raw, text_width: int) -> Placebo:
    """Joint F test that the text's columns (and those kept beside them) have no effect on the response."""
    work = sweep(found, found.frequency_n)
    x_nd, w = work.text_nd, work.weight_n
    df = work.rows - work.lost if work.cluster_n is None else work.cluster_n.max()
    limit = int(max(min(_DIRECTIONS, df // 5), 1))
    turn = np.eye(x_nd.shape[1])
    if x_nd.shape[1] > limit:
        turn = np.linalg.eigh(x_nd.T @ (x_nd * w[:, None]))[1][:, ::-1][:, :limit]
    tested = x_nd @ turn
    second = observed = tested
    if work.instruments_nk.shape[1]:
        stage = np.concatenate([tested, work.instruments_nk], 1)
        second = np.concatenate([tested, stage @ least_squares(stage, work.endogenous_nm, w)[0]], 1)
        observed = np.concatenate([tested, work.endogenous_nm], 1)  # the residual is p's own, not of its fit
    coefficient, lever_nq = least_squares(second, work.response_n[:, None], w)
    residual_n = work.response_n - observed @ coefficient[:, 0]
    q = tested.shape[1]
    variance, df = covariance(lever_nq[:, :q] * residual_n[:, None], work, second.shape[1])
    b = coefficient[:q, 0]
    statistic = float(b @ np.linalg.pinv(variance, hermitian=True) @ b) / q
    return Placebo(float(scipy.stats.f.sf(statistic, q, df)), (turn @ b)[:text_width])
