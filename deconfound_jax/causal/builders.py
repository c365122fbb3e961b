"""Terms become columns: one function a kind, named in `BUILDERS`.

To add a term, write a function `(term, context) -> pieces`, name it here and in
`design.OPTIONS`; the model, the closed form and the reward follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from deconfound_jax.causal import bases
from deconfound_jax.structs import Logs, Term


class Piece(NamedTuple):
    """A block of columns, or codes of levels, under one prior (see `spec.Block`, `spec.Levels`)."""

    name: str
    values: np.ndarray  # (n, k) columns or (n,) integer codes
    sd: float | None = None  # None: learned
    spectrum: tuple[float, ...] = ()
    absorbed: bool = False  # codes only: a flat prior


class Context(NamedTuple):
    """What a builder may look at; `scaling` is what it must leave behind to be applied to new values."""

    logs: Logs
    text_nd: np.ndarray  # standardised features
    weight_n: np.ndarray
    scaling: dict
    columns_nk: np.ndarray  # standardised columns of the terms before this one
    levels: tuple[np.ndarray, ...] = ()  # codes (n,) of the levels before this term


# Names the model, or the scaling beside it, already uses; `text` is the default name of a log's text column.
_RESERVED = {"intercept", "text", "sigma", "tail", "dispersion", "gamma", "control", "instruments", "outcome"}
_RESERVED |= {"endogenous", "features", "selection", "guardrail", "rho"}


def site_of(column: str) -> str:
    """The site of a column's effect: its name, or `column.<name>` where the model has a site of that name."""
    return f"column.{column}" if column in _RESERVED else column


def linear(term: Term, context: Context) -> Iterable[Piece]:
    """The standardised column, N(0, 1)."""
    yield Piece(site_of(term.column), numeric(term.column, context), 1.0)


def intercept(term: Term, context: Context) -> Iterable[Piece]:
    """One effect a level."""
    yield Piece(site_of(term.column), _codes(term.column, context))


def category(term: Term, context: Context) -> Iterable[Piece]:
    """Levels plus the level's mean of the features (Mundlak 1978), rotated to its rank; or fixed effects."""
    codes_n = _codes(term.column, context)
    if "absorbed" in term.options:
        yield Piece(site_of(term.column), codes_n, absorbed=True)
        return
    means = level_means(context.text_nd, codes_n, context.weight_n)
    context.scaling[f"{term.column}.means"] = means
    yield Piece(f"{site_of(term.column)}.means", means[codes_n])
    yield Piece(site_of(term.column), codes_n)


def smooth(term: Term, context: Context) -> Iterable[Piece]:
    """A line, N(0, 1), and wiggles around it: a Gaussian process, or a penalised spline; learned scale.

    E[phi(x) | c] on the same basis stands beside it, so that shrinkage of the wiggles
    does not leak into f (regularisation-induced confounding, Hahn et al. 2018).
    """
    site, values_n = site_of(term.column), numeric(term.column, context)[:, 0]
    spectrum: tuple[float, ...] = ()
    if "spline" in term.options:
        bases.lay_spline(values_n, context.weight_n, site, term.bases, context.scaling)
    else:
        spectrum = bases.lay_hilbert(values_n, site, term.bases, context.scaling)
    line_n1, wiggles_nk = _smooth_at(term, values_n, context.scaling)
    yield Piece(f"{site}.line", line_n1, 1.0)
    yield Piece(f"{site}.wiggles", wiggles_nk, None, spectrum)
    yield _expected(site, np.concatenate([line_n1, wiggles_nk], 1), context)


def embedding(term: Term, context: Context) -> Iterable[Piece]:
    """An array a row: its dimensions rotated to their rank, learned scale, and E[phi(x) | c] beside them."""
    site = site_of(term.column)
    values_nk = standardise(_array(term, context.logs.columns[term.column]), context.weight_n, site, context.scaling)
    context.scaling[f"{site}.rotation"] = bases.rotation(values_nk, context.weight_n)
    values_nk = values_nk @ context.scaling[f"{site}.rotation"]
    yield Piece(site, values_nk)
    yield _expected(site, values_nk, context)


def interaction(term: Term, context: Context) -> Iterable[Piece]:
    """The product of two standardised columns, N(0, 1); or of the text's features and a column, learned scale."""
    side = modifier(term, context.scaling["text.column"])
    for column in (term.column, term.by) if side is None else (side,):
        values = np.asarray(context.logs.columns[column])
        if values.dtype.kind not in "fiub":
            raise ValueError(f"{term}: expected numbers or 0/1 flags in {column!r}, got levels such as {values[0]!r}")
    if side is None:
        product_n1 = numeric(term.column, context) * numeric(term.by, context)
        yield Piece(f"{term.column}:{term.by}", product_n1, 1.0)
    else:
        yield Piece(f"text:{side}", context.text_nd * numeric(side, context))


def treatment(term: Term, context: Context) -> Iterable[Piece]:
    """The standardised treatment t, N(0, 1), and beside it what t is expected to be.

    E[t | x, c] is t's mean in every level before it and a ridge regression within
    them on the text and the columns of the terms before this one: shrinkage of their
    effects then does not leak into t's (Hahn et al. 2018). The text's own part of
    `<t>.expected` belongs to f: `<t>.expected.text` in the scaling is its slope on the
    standardised features.
    """
    site, scaling, weight_n = site_of(term.column), context.scaling, context.weight_n
    values_n1 = numeric(term.column, context)
    yield Piece(site, values_n1, 1.0)
    # A treatment that only varies between the levels of an intercept has no mean beside itself.
    levels = [codes_n for codes_n in context.levels if bases.within(values_n1, [codes_n], weight_n).std() > 1e-6]
    beside_nk, known_nk = values_n1, np.concatenate([context.text_nd, context.columns_nk], 1)
    if known_nk.shape[1]:
        source_nk, target_n1 = (bases.within(v, levels, weight_n) for v in (known_nk, values_n1))
        slope_k1 = bases.expected_map(source_nk, target_n1, weight_n)
        expected_n1 = standardise(known_nk @ slope_k1, weight_n, f"{site}.expected", scaling)
        if expected_n1.any():
            text_d = slope_k1[: context.text_nd.shape[1], 0]
            scaling[f"{site}.expected.text"] = text_d / scaling[f"{site}.expected.sd"][0]
            yield Piece(f"{site}.expected", expected_n1, 1.0)
        beside_nk = np.concatenate([values_n1, expected_n1], 1)
    # Levels differ in t by more than in what they expect of it: the means of both (Mundlak 1978).
    means = [level_means(beside_nk, codes_n, weight_n)[codes_n] for codes_n in levels]
    if means:
        yield Piece(f"{site}.means", np.concatenate(means, 1), 1.0)


def none(term: Term, context: Context) -> Iterable[Piece]:
    """No piece of its own: `model` gives the variable an equation."""
    return ()


BUILDERS: dict[str, Callable[[Term, Context], Iterable[Piece]]] = {
    "linear": linear,
    "category": category,
    "intercept": intercept,
    "smooth": smooth,
    "embedding": embedding,
    "interaction": interaction,
    "treatment": treatment,
    "endogenous": none,
    "selection": none,
    "guardrail": none,
}


def modifier(term: Term, text: str) -> str | None:
    """The column that changes the text's effect in an interaction; None where neither side is the text."""
    names = {"text", text}
    if term.column in names and term.by in names:
        raise ValueError(f"{term}: expected the text on one side at most")
    return term.by if term.column in names else term.column if term.by in names else None


def columns_at(term: Term, values: Mapping[str, np.ndarray], scaling: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A term's columns (n, k) by site at given values of its columns, from what its builder left behind.

    Args:
      term: linear, smooth, embedding, treatment or interaction; other kinds have no
        columns of their own. Of a treatment the column alone, not what it is expected
        to be; of an interaction with the text the column that multiplies the features.
      values: raw values (n,) by column; of an embedding (n, k).
      scaling: of the prepared log.
    """
    site = site_of(term.column)
    if term.kind in ("linear", "treatment"):
        return {site: _standard(values, term.column, scaling)}
    if term.kind == "smooth":
        line_n1, wiggles_nk = _smooth_at(term, _standard(values, term.column, scaling)[:, 0], scaling)
        found = {f"{site}.line": line_n1, f"{site}.wiggles": wiggles_nk}
    elif term.kind == "embedding":
        found = {site: _standard(values, term.column, scaling) @ scaling[f"{site}.rotation"]}
    elif term.kind == "interaction":
        side = modifier(term, str(scaling["text.column"]))
        if side is not None:
            return {f"text:{side}": _standard(values, side, scaling)}
        product_n1 = _standard(values, term.column, scaling) * _standard(values, term.by, scaling)
        return {f"{term.column}:{term.by}": product_n1}
    else:
        return {}
    source_nk = np.concatenate(list(found.values()), 1)
    source_nk = source_nk - scaling[f"{site}.expected.mean"][None, :]
    return found | {f"{site}.expected": source_nk @ scaling[f"{site}.expected.map"]}


def numeric(column: str, context: Context) -> np.ndarray:
    """A numeric column, standardised, (n, 1)."""
    values_n1 = np.asarray(context.logs.columns[column], np.float64)[:, None]
    return standardise(values_n1, context.weight_n, site_of(column), context.scaling)


def standardise(values_nk: np.ndarray, weight_n: np.ndarray, name: str, scaling: dict) -> np.ndarray:
    """Columns with mean 0 and sd 1 under the weights; leaves `<name>.mean` and `<name>.sd` behind."""
    mean_k = np.average(values_nk, 0, weight_n)
    sd_k = np.sqrt(np.average((values_nk - mean_k[None, :]) ** 2, 0, weight_n))
    sd_k = np.where(sd_k > 1e-12, sd_k, 1.0)  # a constant feature stays zero
    scaling[f"{name}.mean"], scaling[f"{name}.sd"] = mean_k, sd_k
    return (values_nk - mean_k[None, :]) / sd_k[None, :]


def level_means(values_nd: np.ndarray, codes_n: np.ndarray, weight_n: np.ndarray) -> np.ndarray:
    """Weighted means by level (c, d), rotated and cut to their rank."""
    counts_c = np.maximum(np.bincount(codes_n, weight_n), 1e-12)
    means_cd = np.stack([np.bincount(codes_n, weight_n * column) / counts_c for column in values_nd.T], 1)
    left, size, _ = np.linalg.svd(means_cd, full_matrices=False)
    rank = int((size > 1e-8 * max(size.max(initial=0.0), 1e-30)).sum())
    return (left * size[None, :])[:, :rank]


def _smooth_at(term: Term, values_n: np.ndarray, scaling: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The line (n, 1) and the wiggles (n, k) at standardised values."""
    site = site_of(term.column)
    if "spline" in term.options:
        return values_n[:, None], bases.spline(values_n, site, scaling)
    return values_n[:, None], bases.hilbert(values_n, site, term.bases, scaling)


def _expected(site: str, source_nk: np.ndarray, context: Context) -> Piece:
    """E[phi(x) | c], a ridge regression of the features on c's columns, rotated to its rank; learned scale."""
    mean_k = np.average(source_nk, 0, context.weight_n)
    centred_nk = source_nk - mean_k[None, :]
    change = bases.rank_map(bases.expected_map(centred_nk, context.text_nd, context.weight_n))
    context.scaling[f"{site}.expected.mean"], context.scaling[f"{site}.expected.map"] = mean_k, change
    return Piece(f"{site}.expected", centred_nk @ change)


def _array(term: Term, values: np.ndarray) -> np.ndarray:
    values_nk = np.asarray(values, np.float64)
    if values_nk.ndim != 2:
        raise ValueError(f"{term}: expected an array (n, k), one row of numbers a row, got shape {values_nk.shape}")
    return values_nk


def _standard(values: Mapping[str, np.ndarray], column: str, scaling: Mapping[str, Any]) -> np.ndarray:
    """Raw values of a column on its standardised scale, (n, k)."""
    raw_nk, site = np.asarray(values[column], np.float64), site_of(column)
    raw_nk = raw_nk[:, None] if raw_nk.ndim == 1 else raw_nk
    return (raw_nk - scaling[f"{site}.mean"][None, :]) / scaling[f"{site}.sd"][None, :]


def _codes(column: str, context: Context) -> np.ndarray:
    names, codes_n = np.unique(np.asarray(context.logs.columns[column]).astype(str), return_inverse=True)
    context.scaling[f"{column}.names"] = names
    return codes_n
