"""Terms become columns: one function a kind, named in `BUILDERS`.

To add a term, write a function `(term, context) -> pieces`, name it here and in
`design.OPTIONS`; the model, the closed form and the reward follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

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


def none(term: Term, context: Context) -> Iterable[Piece]:
    """No piece of its own: `model` gives the variable an equation."""
    return ()


BUILDERS: dict[str, Callable[[Term, Context], Iterable[Piece]]] = {
    "linear": linear,
    "category": category,
    "intercept": intercept,
    "endogenous": none,
    "guardrail": none,
}


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


def _codes(column: str, context: Context) -> np.ndarray:
    names, codes_n = np.unique(np.asarray(context.logs.columns[column]).astype(str), return_inverse=True)
    context.scaling[f"{column}.names"] = names
    return codes_n
