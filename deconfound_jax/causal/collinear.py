"""Whether a term can be told from the text, and an instrument from the other terms.

A column is a function of others where a regression on them leaves less than a
hundred-millionth of its variance, with more different rows than directions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import numpy as np

from deconfound_jax.causal.bases import lay_spline, spline
from deconfound_jax.structs import Design, Logs, Term

_EXACT = 1e-8  # share of variance left below which a column is a function of others
_SMOOTH = 1e-3  # the same against a spline, which only comes close
_MANY = 50  # levels beyond which a category is not compared with the features
_ALL = slice(None)
Columns = Callable[[object], np.ndarray]  # rows -> columns (n, k) of these rows


def check_separable(logs: Logs, features_nd: np.ndarray, term: Term, design: Design, rows_m: np.ndarray) -> None:
    """Raises for a term that is a linear function of the text's features, or a wanted one that is of a category."""
    for other in design.terms if term.kind in ("treatment", "endogenous") else ():
        if other.kind == "category" and not varies(map(str, logs.columns[other.column]), logs.columns[term.column]):
            raise ValueError(
                f"{term}: expected a column that varies within the levels of {other}, got one value a level; its "
                f"effect cannot be told from the level's. Use intercept({other.column}) or a coarser column"
            )
    if not features_nd.shape[1] or term.kind in ("intercept", "interaction", "selection", "guardrail"):
        return
    own = _columns(logs, term)
    if _is_function(own, lambda rows: features_nd[rows], rows_m):
        raise ValueError(
            f"{term}: expected a column that is not a function of the text, got one that the text's features explain "
            "wholly; its effect cannot be told from the text's. Leave it out, or leave it out of the features"
        )
    if term.kind == "embedding" and _is_function(lambda rows: features_nd[rows], own, rows_m):
        raise ValueError(
            f"{term}: expected texts that vary given {term.column!r}, got features that it explains wholly; the text's "
            "effect cannot be told from it"
        )


def check_instrument(
    logs: Logs, features_nd: np.ndarray, term: Term, name: str, design: Design, rows_m: np.ndarray
) -> None:
    """Raises for an instrument that never varies, is a confounder, or is a function of the text or of a term."""
    values_n = numbers(logs, term, name)
    if np.ptp(values_n) == 0:
        raise ValueError(f"{term}: expected an instrument that varies, got {values_n[0]:g} in every row of {name!r}")
    if _is_function(lambda rows: values_n[rows, None], lambda rows: features_nd[rows], rows_m):
        raise ValueError(f"{term}: expected an instrument that is not a function of the text; {name!r} is one")
    for other in design.terms:
        if name in (other.column, other.by) and other is not term:
            raise ValueError(
                f"{term}: expected an instrument that is no confounder; {name!r} is also in {other}. "
                "Give it one of the two places"
            )
        if other.kind in ("interaction", "selection", "guardrail", "intercept"):
            continue
        if _explains(logs, other, values_n, rows_m):
            raise ValueError(
                f"{term}: expected an instrument that moves {term.column!r} given the other terms, got {name!r}, a "
                f"function of {other}: nothing is left of it. Find another instrument"
            )


def numbers(logs: Logs, term: Term, column: str) -> np.ndarray:
    """A column as finite float64 (n,); a ValueError names the term where it is none."""
    values = np.asarray(logs.columns[column])
    if values.ndim != 1:
        got = f"an array of shape {values.shape}; use embedding({column})"
        raise ValueError(f"{term}: expected one number a row in {column!r}, got {got}")
    try:
        values_n = values.astype(np.float64)
    except ValueError:
        got = f"values such as {values[0]!r}; a term for levels is category({column})"
        raise ValueError(f"{term}: expected numbers in {column!r}, got {got}") from None
    if (bad_n := ~np.isfinite(values_n)).any():
        row = int(bad_n.argmax())
        raise ValueError(f"{term}: expected finite numbers in {column!r}, got {values_n[row]:g} in row {row}")
    return values_n


def sample(logs: Logs, features_nd: np.ndarray, design: Design) -> np.ndarray:
    """Evenly spaced rows, enough to see that a column is no function of the others."""
    width = max([features_nd.shape[1], *(_width(logs, term) for term in design.terms)])
    return np.unique(np.linspace(0, len(logs) - 1, min(len(logs), max(2000, 4 * width))).astype(int))


def varies(levels: Iterable[Hashable], values: Iterable[Hashable]) -> bool:
    """Whether some level holds two different values; stops at the first."""
    first: dict = {}
    return any(first.setdefault(level, value) != value for level, value in zip(levels, values, strict=True))


def _explains(logs: Logs, other: Term, values_n: np.ndarray, rows_m: np.ndarray) -> bool:
    """Whether a column is a function of a term's."""
    if other.kind == "category":
        return not varies(map(str, logs.columns[other.column]), values_n)

    def target(rows):
        return values_n[rows, None]

    if other.kind != "smooth":
        return _is_function(target, _columns(logs, other), rows_m)
    known_n = np.asarray(logs.columns[other.column], np.float64)
    if len(np.unique(known_n)) <= len(known_n) / 2 and not varies(known_n, values_n):
        return True
    scaling: dict = {}
    lay_spline(known_n, np.ones(len(known_n)), "c", other.bases, scaling)
    source = lambda rows: np.concatenate([known_n[rows, None], spline(known_n[rows], "c", scaling)], 1)  # noqa: E731
    return _is_function(target, source, rows_m, _SMOOTH)


def _columns(logs: Logs, term: Term) -> Columns:
    """Columns that stand for a term: numbers, an embedding, or a category's levels where they are few."""
    values = np.asarray(logs.columns[term.column])

    def columns(rows):
        if term.kind != "category":
            return np.asarray(values[rows], np.float64).reshape(len(values[rows]), -1)
        names, codes_n = np.unique(values[rows].astype(str), return_inverse=True)
        width = len(names) - 1 if len(names) <= _MANY else 0
        return (codes_n[:, None] == np.arange(width)[None, :]).astype(np.float64)

    return columns


def _is_function(target: Columns, source: Columns, rows_m: np.ndarray, tolerance: float = _EXACT) -> bool:
    """Whether every target column is a linear function of the source: first on a sample, then on all rows."""
    return all(_nothing_left(target(rows), source(rows), tolerance) for rows in (rows_m, _ALL))


def _nothing_left(target_nk: np.ndarray, source_nq: np.ndarray, tolerance: float) -> bool:
    if not target_nk.shape[1] or not source_nq.shape[1]:
        return False
    target_nk, source_nq = target_nk - target_nk.mean(0)[None, :], source_nq - source_nq.mean(0)[None, :]
    source_nq = source_nq / np.maximum(np.sqrt((source_nq**2).mean(0)), 1e-30)[None, :]
    size_q, vectors_qq = np.linalg.eigh(source_nq.T @ source_nq)
    keep = size_q > 1e-10 * size_q.max()
    # With hardly more different rows than the source has directions, anything is a function of it.
    if size_q.max() <= 0 or len({row.tobytes() for row in source_nq}) <= keep.sum() + 1:
        return False
    squares_k = (target_nk**2).sum(0)
    fitted_rk = (vectors_qq[:, keep].T @ (source_nq.T @ target_nk)) / np.sqrt(size_q[keep])[:, None]
    return bool(squares_k.all() and (squares_k - (fitted_rk**2).sum(0) <= tolerance * squares_k).all())


def _width(logs: Logs, term: Term) -> int:
    if term.kind == "embedding":
        return np.asarray(logs.columns[term.column]).shape[1]
    return _MANY if term.kind in ("category", "smooth") else 1
