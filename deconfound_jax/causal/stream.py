"""The exact fit of a Gaussian design on a log that never lies in memory as a whole.

One pass sums cross products (`totals`). Standardising, level means and the levels'
own columns are linear in what was summed, so they are applied to the sums:

    columns of the model = r A + sum_j H_j T_j,    r = [1, features, numbers]

with H_j the one-hot membership of category j. The moments then go through the same
closed form as those of `fit`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from deconfound_jax.causal.builders import level_means, site_of
from deconfound_jax.causal.conditional import Moments, layout
from deconfound_jax.causal.nested import fit_moments
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.spec import Block, Levels, Spec, equations_of
from deconfound_jax.causal.terms import with_missing_indicators
from deconfound_jax.causal.totals import Columns, Totals, totals
from deconfound_jax.config import Causal
from deconfound_jax.structs import Design, Logs

KINDS = ("linear", "category", "intercept", "endogenous", "guardrail")
_LEVELS = ("category", "intercept")
_LOG_2PI = float(np.log(2 * np.pi))


def fit_stream(
    batches: Iterable[tuple[Logs, np.ndarray]], config: Causal, design: Design | None = None, threads: int = 0
) -> Posterior:
    """Posterior of a Gaussian design from batches of rows, read once; equal to `fit` on all rows together.

    Memory: one batch and its copy in fp64 blocks, and cross products of
    features, columns and levels, whatever the number of rows.

    Args:
      batches: pairs of a log and its features (n, d), the arguments of `fit` in pieces.
      config: draws and priors; its design is used unless one is given.
      design: the causal assumptions: family normal, terms of `KINDS`.
      threads: matrix products at once; 0: one a core.

    Raises:
      ValueError: a design without closed form, no rows, batches that do not fit
        together, values that are not finite, an outcome that never differs.

    Example:
      >>> batches = ((logs.take(rows), features_nd[rows]) for rows in np.array_split(np.arange(len(logs)), 10))
      >>> posterior = fit_stream(batches, Causal(design="category(author, absorbed) + endogenous(p ~ z)"))
    """
    design = design or Design.parse(config.design, config.family, config.response)
    _check(design, config)
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("batches: expected at least one row, got none")
    roles = first[0].roles
    whole = with_missing_indicators(design, first[0])
    found = totals(itertools.chain([first], batches), _columns(whole, roles.outcome), threads)
    spec, stats, scaling = standard_moments(found, whole, config)
    draws, diagnostics = fit_moments(spec, stats, config.draws, config.seed)
    why = f"the design is Gaussian: closed form given a few scalars, from the cross products of {found.rows} rows"
    scaling = {"text.column": np.asarray(roles.text)} | scaling
    return Posterior(draws, design, scaling, {"method": "exact", "why": why, **diagnostics})


def standard_moments(found: Totals, design: Design, config: Causal) -> tuple[Spec, Moments, dict[str, np.ndarray]]:
    """The model's shape, its cross products on standardised scales, and the way back to units."""
    gram_rr, sums, scaling = _standardised(found)
    spec, pieces = _lay_out(found, sums, design, config, scaling)
    plan = layout(spec)
    category_of = {site_of(name): j for j, name in enumerate(found.columns.categories)}
    pieces += [_Piece(np.eye(level.count), category_of[level.name]) for level in plan.kept]
    variables = [*(e.column for e in spec.equations), found.columns.numbers[-1]]
    pieces.append(_Piece(np.asarray([found.place(name) for name in variables])))
    linear_rq, tables = np.zeros((len(gram_rr), plan.n_columns)), {}
    at = 0
    for piece in pieces:
        if piece.category is None:
            span = slice(at, at + len(piece.values))
            linear_rq[piece.values, np.arange(span.start, span.stop)] = 1.0
        else:
            span = slice(at, at + piece.values.shape[1])
            shape = len(piece.values), plan.n_columns
            tables.setdefault(piece.category, np.zeros(shape))[:, span] = piece.values
        at = span.stop
    absorbed = None if plan.absorbed is None else category_of[plan.absorbed.name]
    return spec, _moments(found, gram_rr, sums, linear_rq, tables, absorbed), scaling


class _Piece(NamedTuple):
    """Columns of the model: columns of r (their places), or values by level (c, k) of a category."""

    values: np.ndarray
    category: int | None = None


def _check(design: Design, config: Causal) -> None:
    if design.family != "normal" or design.response != "identity":
        raise ValueError(f"fit_stream: expected normal/identity, got {design.family}/{design.response}; use fit")
    for term in design.terms:
        if term.kind not in KINDS:
            raise ValueError(f"fit_stream: expected terms out of {KINDS}, got {term}; use fit")
    known = {t.column for t in design.terms}
    for term in design.endogenous_terms:
        for z in term.instruments:
            if z in known:
                raise ValueError(f"{term}: expected an instrument that is no confounder, got {z!r}, a term of its own")
    for name, got, expected in (
        ("fit", config.fit, ("auto", "exact")),
        ("text_prior", config.text_prior, ("ridge",)),
    ):
        if got not in expected:
            raise ValueError(f"causal.{name}: fit_stream expects one of {expected}, got {got!r}")


def _columns(design: Design, outcome: str) -> Columns:
    """Categories, and numbers: linear terms, variables, instruments, the outcome last."""
    levels = [t.column for t in design.terms if t.kind in _LEVELS]
    numbers = [t.column for t in design.terms if t.kind not in _LEVELS]
    numbers += [z for t in design.endogenous_terms for z in t.instruments]
    return Columns((*dict.fromkeys(numbers), outcome), tuple(levels))


def _standardised(found: Totals) -> tuple[np.ndarray, list[np.ndarray], dict[str, np.ndarray]]:
    """Cross products and level sums of the columns with mean 0 and sd 1, and the scaling."""
    mean_r = found.gram_rr[0] / found.gram_rr[0, 0]
    mean_r[0] = 0.0
    sd_r = np.sqrt(np.maximum(np.diagonal(found.gram_rr) / found.gram_rr[0, 0] - mean_r**2, 0.0))
    sd_r = np.where(sd_r > 1e-12, sd_r, 1.0)  # a constant feature stays zero
    change_rr = np.diag(1 / sd_r)
    change_rr[0, 1:] = -mean_r[1:] / sd_r[1:]
    mean_r = found.centre_r + mean_r
    *numbers, outcome = found.columns.numbers
    places = {"features": np.arange(1, 1 + found.features)}
    places |= {site_of(name): np.asarray([found.place(name)]) for name in numbers}
    scaling = {f"{name}.mean": mean_r[place] for name, place in places.items()}
    scaling |= {f"{name}.sd": sd_r[place] for name, place in places.items()}
    y = found.place(outcome)
    if sd_r[y] * np.sqrt(found.gram_rr[y, y] / found.gram_rr[0, 0]) <= 1e-12 * abs(mean_r[y]):
        raise ValueError(f"outcome: expected values that differ, got {mean_r[y]:g} in every row")
    scaling |= {"outcome.mean": mean_r[y], "outcome.sd": sd_r[y]}
    scaling |= {f"{c}.names": names for c, names in zip(found.columns.categories, found.names, strict=True)}
    return change_rr.T @ found.gram_rr @ change_rr, [total @ change_rr for total in found.sums], scaling


def _lay_out(found: Totals, sums, design: Design, config: Causal, scaling: dict) -> tuple[Spec, list[_Piece]]:
    """Blocks and levels as `terms.prepare` makes them, and where their columns come from; adds to the scaling."""
    d = found.features
    blocks = [Block("text", 0, d, config.text_sd if d else 1.0, (), config.text_prior)]
    pieces, levels = [_Piece(np.arange(1 + d))], []

    def add(name: str, piece: _Piece, width: int, sd: float | None) -> Block:
        pieces.append(piece)
        return Block(name, blocks[-1].stop, blocks[-1].stop + width, sd)

    for term in design.terms:
        site = site_of(term.column)
        if term.kind == "linear":
            blocks.append(add(site, _Piece(np.asarray([found.place(term.column)])), 1, 1.0))
        if term.kind not in _LEVELS:
            continue
        j = found.columns.categories.index(term.column)
        absorbed = "absorbed" in term.options
        if term.kind == "category" and not absorbed:
            means_cd = sums[j][:, 1 : 1 + d] / np.maximum(sums[j][:, :1], 1e-12)
            means = level_means(means_cd, np.arange(len(means_cd)), np.ones(len(means_cd)))
            scaling[f"{term.column}.means"] = means
            if means.shape[1]:
                blocks.append(add(f"{site}.means", _Piece(means, j), means.shape[1], None))
        levels.append(Levels(site, len(levels), len(found.names[j]), absorbed))
    shared = tuple(dict.fromkeys(z for t in design.endogenous_terms for z in t.instruments))
    places = np.asarray([found.place(z) for z in shared], int)
    instruments = add("instruments", _Piece(places), len(shared), 1.0) if shared else None
    names = tuple(t.column for t in design.endogenous_terms)
    equations = equations_of(names, design.guardrail.column if design.guardrail else "")
    prior = config.gamma_sd, config.control_sd
    return Spec("normal", tuple(blocks), tuple(levels), instruments, *prior, equations=equations), pieces


def _moments(found: Totals, gram_rr, sums, linear_rq, tables: dict, absorbed: int | None) -> Moments:
    """Moments of the columns r A + sum_j H_j T_j; `tables` holds T_j by category."""

    def by_level(i: int, j: int) -> np.ndarray:
        """H_i' H_j T_j."""
        if i == j:
            return sums[i][:, :1] * tables[j]
        return (found.tables[i, j] if i < j else found.tables[j, i].T) @ tables[j]

    gram_qq = linear_rq.T @ gram_rr @ linear_rq
    for j, table_cq in tables.items():
        mixed_qq = (sums[j] @ linear_rq).T @ table_cq
        gram_qq = gram_qq + mixed_qq + mixed_qq.T
        for i, other_cq in tables.items():
            gram_qq = gram_qq + other_cq.T @ by_level(i, j)
    sums_cq = np.zeros((0, len(gram_qq)))
    if absorbed is not None:
        sums_cq = sums[absorbed] @ linear_rq
        sums_cq = sums_cq + sum(by_level(absorbed, j) for j in tables)
    weight = gram_rr[0, 0]
    return Moments(gram_qq, gram_qq, sums_cq, sums_cq, weight, -0.5 * weight * _LOG_2PI)
