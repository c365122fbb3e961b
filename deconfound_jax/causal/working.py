"""A fitted design as one weighted linear model: what the classical checks are computed on.

    y~ = phi(x)'beta + p'gamma + (terms, levels) + noise / sqrt(w)

The normal families are that model. Elsewhere y~ = eta + l'(eta) / w, w = -l''(eta), is the
working response at the posterior mean of eta (McCullagh and Nelder 1989): one Newton step,
so tests are those of the generalised linear model to first order. Terms and absorbed levels are swept
out of every column here, once; what remains is small algebra.

A category counts as fixed effects (its levels beside their means of phi say the same about
the text). A pooled intercept, declared independent of the text, is not swept out: rows of a level are
a cluster of the covariances, unless the levels are few.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deconfound_jax.causal.builders import site_of
from deconfound_jax.causal.classical.absorb import residualise
from deconfound_jax.causal.classical.linear import absorbed_df
from deconfound_jax.causal.families import FAMILIES
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.predict import predict
from deconfound_jax.causal.scalars import scalars
from deconfound_jax.causal.spec import Prepared, doubled

FEW_LEVELS = 20  # a pooled intercept of fewer levels is swept out: too few to be clusters
_BESIDE = (".means", ".expected")  # blocks beside a term's own: conditional means of phi or of a treatment


class Working(NamedTuple):
    """Columns with terms and levels swept out (weights: `weight_n`), standardised units, seen rows only."""

    response_n: np.ndarray
    text_nd: np.ndarray
    endogenous_nm: np.ndarray
    instruments_nk: np.ndarray
    extra_ne: np.ndarray  # further columns that a check asked for
    weight_n: np.ndarray  # frequency times precision
    frequency_n: np.ndarray  # a row counts as so many
    cluster_n: np.ndarray | None
    lost: int  # degrees of freedom of what was swept out

    @property
    def rows(self) -> float:
        return float(self.frequency_n.sum())


class Raw(NamedTuple):
    """The same before the sweep, with what is swept out."""

    response_n: np.ndarray
    precision_n: np.ndarray
    frequency_n: np.ndarray
    seen_n: np.ndarray  # indices of the rows of `Prepared` that are used
    text_nd: np.ndarray
    endogenous_nm: np.ndarray
    instruments_nk: np.ndarray
    controls_nq: np.ndarray
    codes_nc: np.ndarray
    swept: tuple[tuple[str, str, int | slice], ...]  # (term as written, "block" or "level", its place)
    cluster_n: np.ndarray | None


def raw(
    posterior: Posterior, prepared: Prepared, groups_n: np.ndarray | None = None, keep: tuple[str, ...] = ()
) -> Raw:
    """Collects the working response and the columns of a design.

    Args:
      posterior, prepared: of one fit.
      groups_n: group of each row of the log (the unit that errors are correlated in), or None.
      keep: names of blocks that stand beside the text's columns instead of being swept out.
    """
    rows, spec = prepared.rows, prepared.spec
    seen_n = np.flatnonzero(np.asarray(rows.observed_n) > 0)
    response_n, precision_n = working_response(posterior, prepared)
    swept, cluster_n = _swept(posterior, prepared, seen_n)
    if groups_n is not None:
        cluster_n = np.unique(groups_of(prepared, groups_n)[seen_n], return_inverse=True)[1]
    kept = [slice(b.start, b.stop) for b in spec.blocks if b.name in keep]
    swept = tuple(part for part in swept if part[0] not in keep)
    blocks = [place for _, kind, place in swept if kind == "block"]
    levels = [place for _, kind, place in swept if kind == "level"]
    columns_nq = np.asarray(rows.columns_nq, np.float64)[seen_n]
    pick = spec.instruments
    return Raw(
        response_n[seen_n], precision_n[seen_n], np.asarray(rows.weight_n, np.float64)[seen_n], seen_n,
        np.concatenate([columns_nq[:, : spec.blocks[0].stop], *[columns_nq[:, place] for place in kept]], 1),
        np.asarray(rows.endogenous_nm, np.float64)[seen_n][:, list(spec.structural(None))],
        columns_nq[:, pick.start : pick.stop] if pick else columns_nq[:, :0],
        np.concatenate([columns_nq[:, place] for place in blocks], 1) if blocks else columns_nq[:, :0],
        np.asarray(rows.levels_nc)[seen_n][:, levels], swept, cluster_n,
    )  # fmt: skip


def sweep(found: Raw, weight_n: np.ndarray, extra_ne: np.ndarray | None = None) -> Working:
    """Sweeps terms and levels out of every column, by least squares under `weight_n`."""
    n = len(found.response_n)
    extra_ne = np.zeros((n, 0)) if extra_ne is None else np.asarray(extra_ne, np.float64).reshape(n, -1)
    parts = [found.response_n[:, None], found.text_nd, found.endogenous_nm, found.instruments_nk, extra_ne]
    codes_nc = found.codes_nc if found.codes_nc.shape[1] else None
    swept = residualise(np.concatenate(parts, 1), found.controls_nq, codes_nc, weight_n)
    y, text, p, z, extra = np.split(swept, np.cumsum([part.shape[1] for part in parts])[:-1], axis=1)
    lost = max(absorbed_df(codes_nc), 1) + _rank(found.controls_nq, weight_n)
    return Working(y[:, 0], text, p, z, extra, weight_n, found.frequency_n, found.cluster_n, lost)


def working(posterior: Posterior, prepared: Prepared, groups_n: np.ndarray | None = None) -> Working:
    """`raw` and `sweep` under the outcome's weights."""
    found = raw(posterior, prepared, groups_n)
    return sweep(found, found.frequency_n * found.precision_n)


def working_response(posterior: Posterior, prepared: Prepared) -> tuple[np.ndarray, np.ndarray]:
    """y~ (u,) and its relative precision (u,): the outcome itself in the normal and the t family.

    Under selection the outcome of the seen rows as it is: a linear model of them.
    """
    rows, family = prepared.rows, prepared.spec.family
    if family in ("normal", "student_t") or prepared.spec.selection:
        return np.asarray(rows.outcome_n, np.float64), np.asarray(rows.precision_n, np.float64)
    eta_n = predict(posterior, prepared, "mean", "link")
    psi = {s.name: np.asarray(posterior[s.name].mean(0), np.float64) for s in scalars(prepared.spec)}
    with jax.enable_x64(True):
        first_n, information_n = (np.asarray(v) for v in _curvature(family, jnp.asarray(eta_n), doubled(rows), psi))
    return eta_n + first_n / information_n, information_n


@partial(jax.jit, static_argnames="family")
def _curvature(family, eta_n, rows, psi):
    return FAMILIES[family].curvature(eta_n, rows, psi)


def groups_of(prepared: Prepared, groups_n) -> np.ndarray:
    """Group of each row of `prepared`, from the groups of the log's rows: that of the first row summed into it."""
    groups_n = np.asarray(groups_n)
    if len(groups_n) != len(prepared.row_of_log_n):
        raise ValueError(f"groups: expected {len(prepared.row_of_log_n)}, one a row of the log, got {len(groups_n)}")
    return groups_n[np.unique(prepared.row_of_log_n, return_index=True)[1]]


def of_log(prepared: Prepared, name: str, values_n) -> np.ndarray:
    """Numbers of the log's rows as means over the rows summed into each row of `prepared`, standardised."""
    values_n = np.asarray(values_n, np.float64)
    row_n = prepared.row_of_log_n
    if values_n.shape != row_n.shape or not np.isfinite(values_n).all():
        raise ValueError(f"{name}: expected {len(row_n)} finite numbers, one a row of the log, got {values_n.shape}")
    means_u = np.bincount(row_n, values_n) / np.bincount(row_n)
    if np.ptp(means_u) == 0:
        raise ValueError(f"{name}: expected values that differ, got {means_u[0]:g} in every row")
    return (means_u - means_u.mean()) / means_u.std()


def _swept(posterior: Posterior, prepared: Prepared, seen_n: np.ndarray):
    """Blocks and levels to sweep out, under the name of their term; and clusters from pooled intercepts."""
    spec, texts = prepared.spec, prepared.scaling["text.column"]
    intercepts = {site_of(t.column): t for t in posterior.design.terms if t.kind == "intercept"}
    sites = {site_of(t.column) for t in posterior.design.terms}
    # Functions of what is swept out (or, of a treatment's expectation, of the text): nothing of their own.
    beside = {site + end for site in sites for end in _BESIDE} - sites
    found, clusters = [], []
    for block in spec.blocks[1:]:
        if block.name not in beside:
            found.append((block.name, "block", slice(block.start, block.stop)))
    for level in spec.levels:
        pooled = intercepts.get(level.name)
        if pooled is not None and (pooled.column == texts or level.count >= FEW_LEVELS):
            clusters.append(level)
        else:
            found.append((level.name, "level", level.column))
    if not clusters:
        return tuple(found), None
    coarsest = min(clusters, key=lambda level: level.count)
    return tuple(found), np.asarray(prepared.rows.levels_nc)[seen_n][:, coarsest.column]


def _rank(controls_nq: np.ndarray, weight_n: np.ndarray) -> int:
    if not controls_nq.shape[1]:
        return 0
    centred = controls_nq - np.average(controls_nq, 0, weight_n)[None, :]
    size = np.linalg.eigvalsh(centred.T @ (centred * weight_n[:, None]))
    return int((size > 1e-9 * max(size[-1], 1e-300)).sum())


def least_squares(x_nq: np.ndarray, y_nk: np.ndarray, weight_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted least squares of the columns of y on those of x.

        b = L'y,    L = WX (X'WX)^-1;    a row's influence on b is its row of L times its residual

    Directions of x that do not vary get coefficient 0.

    Returns:
      Coefficients (q, k) and L (n, q).
    """
    scale_q = np.sqrt(np.maximum((weight_n[:, None] * x_nq**2).sum(0), 1e-300))
    unit_nq = x_nq / scale_q[None, :]
    weighted_nq = unit_nq * weight_n[:, None]
    lever_nq = weighted_nq @ np.linalg.pinv(unit_nq.T @ weighted_nq, rcond=1e-10, hermitian=True) / scale_q[None, :]
    return lever_nq.T @ y_nk, lever_nq


def covariance(influence_nq: np.ndarray, work: Working, used: int) -> tuple[np.ndarray, float]:
    """Robust covariance (q, q) of coefficients from influences, and its degrees of freedom.

    Clustered where the rows have clusters, else White's; corrected for `used` coefficients and what was swept out
    (HC1; Cameron and Miller 2015). A row of frequency f counts as f independent rows.
    """
    rows = work.rows
    left = max(rows - work.lost - used, 1.0)
    if work.cluster_n is None:
        return (influence_nq / work.frequency_n[:, None]).T @ influence_nq * rows / left, left
    count = int(work.cluster_n.max()) + 1
    sums_cq = np.zeros((count, influence_nq.shape[1]))
    np.add.at(sums_cq, work.cluster_n, influence_nq)
    return sums_cq.T @ sums_cq * count / max(count - 1, 1) * (rows - 1) / left, float(max(count - 1, 1))
