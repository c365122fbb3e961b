"""Designs that cannot work on a log, refused before anything is fitted.

Each check raises a ValueError that names the term, what it needs, what came, and what
to do. What only weakens a design (thin overlap, a weak instrument) is the verdict's.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import numpy as np

from deconfound_jax.causal.builders import modifier
from deconfound_jax.causal.collinear import check_instrument, check_separable, numbers, sample, varies
from deconfound_jax.structs import Design, Logs, Term

_MOST_GRADES = 20
_OVERDISPERSED = ("normal", "student_t", "beta_binomial", "negative_binomial")
_WANTED = {
    "bernoulli": "0 or 1",
    "binomial": "a whole number from 0 to the exposure",
    "beta_binomial": "a whole number from 0 to the exposure",
    "poisson": "a whole number >= 0",
    "negative_binomial": "a whole number >= 0",
    "ordinal": "a whole grade",
}


def check_design(logs: Logs, features_nd: np.ndarray, design: Design) -> None:
    """Raises where no number of rows would let this design separate what it names.

    Refused: a family that does not fit the outcome; columns of the wrong type; a
    confounder that is a function of the text, or levels of one text each; an instrument
    that never varies or is a function of a confounder or of the text; fewer instruments
    than endogenous confounders; an intercept whose every level has one row beside a
    family with a scale of its own; a selection term that does not fit its column.

    Args:
      features_nd: phi(x) of the log's rows; width 0: no text.

    Raises:
      ValueError: naming the term.
    """
    features_nd = np.asarray(features_nd, np.float64)
    _check_outcome(logs, design)
    for term in design.terms:
        _check_columns(logs, term, design)
        if term.kind in ("category", "intercept"):
            _check_levels(logs, features_nd, term, design)
    rows_m = sample(logs, features_nd, design)
    for term in design.terms:
        check_separable(logs, features_nd, term, design, rows_m)
        for name in term.instruments:
            check_instrument(logs, features_nd, term, name, design, rows_m)
    shared = dict.fromkeys(z for t in design.endogenous_terms for z in t.instruments)
    if len(shared) < len(design.endogenous_terms):
        raise ValueError(
            f"{' + '.join(map(str, design.endogenous_terms))}: expected at least as many instruments as endogenous "
            f"columns, got {len(shared)} for {len(design.endogenous_terms)}; add an instrument"
        )


def _check_outcome(logs: Logs, design: Design) -> None:
    name, values_n, seen_n = logs.roles.outcome, logs.outcome_n, np.ones(len(logs), bool)
    if design.selection:
        _check_selection(logs, design.selection)
        seen_n = np.asarray(logs.columns[design.selection.column], np.float64) == 1
    wrong_n = seen_n & ~np.isfinite(values_n)
    if wrong_n.any():
        row = int(wrong_n.argmax())
        got = f"got {values_n[row]:g} in row {row} of {name!r}"
        if design.selection:
            raise ValueError(f"{design.selection}: expected an outcome in every row that was seen, {got}")
        known = logs.roles.observed or "seen"
        raise ValueError(f"outcome: expected a finite number, {got}; where not all are seen use selection({known} ~ w)")
    family = "binomial" if design.response == "empirical_logit" else design.family
    if family == "student_t" and len(np.unique(values_n[seen_n])) == 2:
        raise ValueError(f"Design.family 'student_t': expected many values in {name!r}, got two; use bernoulli")
    if family not in _WANTED:
        return
    wrong_n = values_n != np.round(values_n)
    if family != "ordinal":
        wrong_n |= values_n < 0
    if family == "bernoulli":
        wrong_n |= values_n > 1
    elif family in ("binomial", "beta_binomial") and logs.roles.exposure:
        wrong_n |= values_n > logs.exposure_n
    wrong_n &= seen_n
    if wrong_n.any():
        row = int(wrong_n.argmax())
        other = "normal" if values_n[row] != np.round(values_n[row]) else "binomial with an exposure, poisson or normal"
        raise ValueError(
            f"Design.family {family!r}: expected {_WANTED[family]} in {name!r}, got {values_n[row]:g} in row {row}; "
            f"a family that fits may be {other}"
        )
    if family == "ordinal" and (grades := len(np.unique(values_n[seen_n]))) > _MOST_GRADES:
        raise ValueError(
            f"Design.family 'ordinal': expected at most {_MOST_GRADES} grades in {name!r}, got {grades}; use normal"
        )


def _check_columns(logs: Logs, term: Term, design: Design) -> None:
    """Types, and columns that never vary where the term lives on their variation."""
    if logs.roles.outcome in term.columns:
        raise ValueError(f"{term}: expected columns settled before the outcome, got the outcome itself")
    values = np.asarray(logs.columns[term.column]) if term.column in logs.columns else np.zeros(0)
    if term.kind == "embedding" and (values.ndim != 2 or values.dtype.kind not in "fiu"):
        raise ValueError(f"{term}: expected an array (n, k) of numbers, got {values.dtype} of shape {values.shape}")
    if term.kind == "embedding" and not np.isfinite(values).all():
        raise ValueError(f"{term}: expected finite numbers, got NaN or infinity")
    if term.kind in ("category", "intercept") and values.ndim != 1:
        raise ValueError(f"{term}: expected one level a row, got an array of shape {values.shape}; use embedding")
    if term.kind == "interaction":
        _check_interaction(logs, term, design)
    elif term.kind not in ("category", "intercept", "embedding"):
        values_n = numbers(logs, term, term.column)
        different = len(np.unique(values_n))
        least = {"linear": 1, "smooth": 5}.get(term.kind, 2)
        if different < least:
            raise ValueError(
                f"{term}: expected at least {least} different values of {term.column!r}, got {different}; "
                + ("use linear or category" if term.kind == "smooth" else "nothing can be learned from it")
            )


def _check_interaction(logs: Logs, term: Term, design: Design) -> None:
    side = modifier(term, logs.roles.text)
    for name in (term.column, term.by) if side is None else (side,):
        if name in {t.column for t in design.endogenous_terms}:
            raise ValueError(f"{term}: expected exogenous columns, got {name!r}; its products are endogenous, too")
        numbers(logs, term, name)
        if side is not None and not any(t.column == name and t.kind != "interaction" for t in design.terms):
            raise ValueError(
                f"{term}: expected {name!r} in a term of its own beside it, linear({name}) or smooth({name}); its own "
                "effect would be taken for the text's"
            )


def _check_selection(logs: Logs, term: Term) -> None:
    found = np.unique(numbers(logs, term, term.column))
    if found.tolist() != [0.0, 1.0]:
        raise ValueError(f"{term}: expected {term.column!r} to hold 0 and 1, got {found[:3].tolist()}")
    if logs.roles.observed not in ("", term.column):
        raise ValueError(f"{term}: expected the column of Roles.observed, {logs.roles.observed!r}, got {term.column!r}")


def _check_levels(logs: Logs, features_nd: np.ndarray, term: Term, design: Design) -> None:
    column = logs.columns[term.column]
    weighted = bool(logs.roles.weight) and (np.asarray(logs.columns[logs.roles.weight]) > 1).any()
    single = not weighted and not _repeats(map(str, column))
    if term.kind == "intercept":
        if single and design.family in _OVERDISPERSED:
            raise ValueError(
                f"{term}: expected levels of several rows beside the {design.family} family, whose own scale explains "
                "a single row as well; got one row in every level. Leave the term out, or take a family without one"
            )
        return
    if single:
        raise ValueError(f"{term}: expected levels of several rows, got one in every level: nothing is left to compare")
    if not varies(map(str, column), map(bytes, features_nd)) and features_nd.size and np.ptp(features_nd, 0).any():
        raise ValueError(
            f"{term}: expected levels that hold several texts, got one text in every level; the text's effect cannot "
            f"be told from the level's. Use a coarser column, or intercept({term.column}) if the level is independent "
            "of the text"
        )


def _repeats(values: Iterable[Hashable]) -> bool:
    seen = set()
    return any(value in seen or seen.add(value) for value in values)
