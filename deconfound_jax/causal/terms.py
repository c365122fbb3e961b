"""A design and a log become the arrays of a causal model.

`prepare` standardises, sums equal rows, asks `builders` for every term's columns,
and lays the pieces side by side. What each array means is written in `spec`.
"""

from __future__ import annotations

import numpy as np
from scipy.special import ndtri

from deconfound_jax.causal.builders import BUILDERS, Context, numeric, standardise
from deconfound_jax.causal.design_check import check_design
from deconfound_jax.causal.spec import Block, Head, Levels, Prepared, Rows, Selection, Spec, equations_of
from deconfound_jax.config import Causal
from deconfound_jax.structs import Design, Logs, Term


def prepare(
    logs: Logs, features_nd: np.ndarray, design: Design, config: Causal | None = None, head: Head | None = None
) -> Prepared:
    """Builds the model's arrays from a log and its text features.

    Features, outcome and numeric columns are standardised (mean 0, sd 1, a row of
    weight w counting as w rows). Counts of rows equal in text and in every column of
    the design are summed under `empirical_logit`, unless the rows carry weights.

    Args:
      logs: n validated rows.
      features_nd: phi(x), one row of features a row of the log, any scale; width 0: no text.
      design: the causal assumptions.
      config: prior widths and the prior of f.
      head: f(x) as (init, apply) on the standardised features, in place of a linear effect.

    Raises:
      ValueError: features of the wrong length or not finite, an outcome that never
        differs, counts without an exposure, or a column the log does not hold.
    """
    features_nd = np.asarray(features_nd, np.float64)
    if features_nd.ndim != 2 or len(features_nd) != len(logs):
        raise ValueError(f"features: expected ({len(logs)}, d), one row a row of the log, got {features_nd.shape}")
    if not np.isfinite(features_nd).all():
        raise ValueError("features: expected finite numbers, got NaN or infinity")
    config = config or Causal()
    design = with_missing_indicators(design, logs)
    check_design(logs, features_nd, design)
    first_n, row_of_log_n = _equal_rows(logs, features_nd, design)
    scaling: dict = {"text.column": logs.roles.text}
    observed_n = _observed(logs, design)[first_n]
    outcome_n, exposure_n, precision_n, offset = _outcome(logs, design, first_n, row_of_log_n, scaling)
    logs_u = logs.take(first_n)
    weight_n = _weights(logs_u)
    text_nd = standardise(features_nd[first_n], weight_n, "features", scaling)
    context = Context(logs_u, text_nd, weight_n, scaling, np.zeros((len(first_n), 0)))

    blocks, columns, levels, codes, context = _pieces(design, context, _text_block(text_nd, config))
    extra = tuple(dict.fromkeys(z for t in design.terms for z in t.instruments))
    columns += [numeric(z, context) for z in extra]
    name = "exclusions" if design.selection else "instruments"  # a design has one or the other
    outside = Block(name, blocks[-1].stop, blocks[-1].stop + len(extra), 1.0) if extra else None
    names = tuple(t.column for t in design.endogenous_terms)
    equations = equations_of(names, design.guardrail.column if design.guardrail else "")
    endogenous = [numeric(e.column, context) for e in equations]
    spec = Spec(
        _family(design), tuple(blocks), tuple(levels), None if design.selection else outside,
        config.gamma_sd, config.control_sd, equations=equations, categories=int(scaling.get("outcome.categories", 0)),
        selection=Selection(outside) if design.selection else None, head=head,
    )  # fmt: skip
    empty = np.zeros((len(first_n), 0))
    rows = Rows(
        np.concatenate(columns, 1), np.stack(codes, 1) if codes else empty.astype(int), outcome_n,
        np.concatenate(endogenous, 1) if endogenous else empty,
        exposure_n, precision_n, weight_n, observed_n, offset,
    )  # fmt: skip
    return Prepared(spec, rows, scaling, row_of_log_n)


def empirical_logit(clicks_n: np.ndarray, shown_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log((k + 1/2) / (n - k + 1/2)) and its variance 1/(k + 1/2) + 1/(n - k + 1/2); finite at 0 and n clicks."""
    hit, miss = clicks_n + 0.5, shown_n - clicks_n + 0.5
    return np.log(hit / miss), 1 / hit + 1 / miss


def _text_block(text_nd: np.ndarray, config: Causal) -> Block:
    fixed = config.text_sd if text_nd.shape[1] else 1.0  # without text there is no scale to learn
    return Block("text", 0, text_nd.shape[1], fixed, (), config.text_prior)


def _pieces(design: Design, context: Context, text: Block):
    """Blocks and levels of every term, their columns and codes, and the context after the last."""
    blocks, columns, levels, codes = [text], [context.text_nd], [], []
    for term in sorted(design.terms, key=lambda t: t.kind == "treatment"):  # a treatment is predicted from the others
        for piece in BUILDERS[term.kind](term, context):
            if piece.values.ndim == 1:
                levels.append(Levels(piece.name, len(codes), int(piece.values.max()) + 1, piece.absorbed))
                codes.append(piece.values)
                context = context._replace(levels=(*context.levels, piece.values))
            elif piece.values.shape[1]:
                stop = blocks[-1].stop + piece.values.shape[1]
                blocks.append(Block(piece.name, blocks[-1].stop, stop, piece.sd, piece.spectrum))
                columns.append(piece.values)
                context = context._replace(columns_nk=np.concatenate([context.columns_nk, piece.values], 1))
    return blocks, columns, levels, codes, context


def _family(design: Design) -> str:
    """A Bernoulli outcome under selection has the probit link: its error and the selection's are jointly normal."""
    return "probit" if design.selection and design.family == "bernoulli" else design.family


def _observed(logs: Logs, design: Design) -> np.ndarray:
    """1 where the outcome was seen (n,); ones without a selection term."""
    if not design.selection:
        return np.ones(len(logs))
    observed_n = np.asarray(logs.columns[design.selection.column], np.float64)
    if not np.isin(observed_n, (0.0, 1.0)).all() or np.ptp(observed_n) == 0:
        found = np.unique(observed_n)[:3].tolist()
        raise ValueError(f"{design.selection}: expected {design.selection.column!r} to hold 0 and 1, got {found}")
    if not np.isfinite(logs.outcome_n[observed_n > 0]).all():
        raise ValueError(f"{design.selection}: expected an outcome in every row that was seen, got NaN")
    return observed_n


def _weights(logs: Logs) -> np.ndarray:
    return np.asarray(logs.columns[logs.roles.weight], np.float64) if logs.roles.weight else np.ones(len(logs))


def _standardise_outcome(values_n: np.ndarray, weight_n: np.ndarray, scaling: dict) -> np.ndarray:
    if np.ptp(values_n) <= 1e-12 * np.abs(values_n).max():
        raise ValueError(f"outcome: expected values that differ, got {values_n[0]:g} in every row")
    outcome_n = standardise(values_n[:, None], weight_n, "outcome", scaling)[:, 0]
    scaling["outcome.mean"], scaling["outcome.sd"] = scaling["outcome.mean"][0], scaling["outcome.sd"][0]
    return outcome_n


def _outcome(logs: Logs, design: Design, first_n, row_of_log_n, scaling):
    """Outcome, exposure, precision and offset of the summed rows."""
    ones, weight_n = np.ones(len(first_n)), _weights(logs)
    if design.selection:
        outcome_n, offset = _seen_outcome(logs, design, weight_n, scaling)
        return outcome_n, ones, ones, offset
    if design.family in ("normal", "student_t") and design.response == "identity":
        return _standardise_outcome(logs.outcome_n, weight_n, scaling), ones, ones, 0.0
    if design.family == "ordinal":
        grades, codes_n = np.unique(logs.outcome_n, return_inverse=True)
        if len(grades) < 2:
            raise ValueError(f"outcome: expected values that differ, got {grades[0]:g} in every row")
        scaling |= {"outcome.grades": grades, "outcome.categories": len(grades), "outcome.mean": 0.0, "outcome.sd": 1.0}
        return codes_n.astype(float), ones, ones, 0.0
    exposure = np.ones(len(logs)) if design.family == "bernoulli" or not logs.roles.exposure else logs.exposure_n
    if not logs.roles.exposure and design.family not in ("bernoulli", "poisson", "negative_binomial"):
        raise ValueError(f"roles.exposure: expected a column of counts for {design.family}/{design.response}, got none")
    clicks_n = np.bincount(row_of_log_n, logs.outcome_n)
    shown_n = np.bincount(row_of_log_n, exposure)
    if design.response == "empirical_logit":
        logit_n, variance_n = empirical_logit(clicks_n, shown_n)
        outcome_n = _standardise_outcome(logit_n, weight_n[first_n], scaling)
        variance_n = variance_n / scaling["outcome.sd"] ** 2
        # Rows differ in sampling variance on top of what they share: weights by moments.
        shared = max(1 - np.average(variance_n, weights=weight_n[first_n]), 0.05)
        return outcome_n, shown_n, shared / (shared + variance_n), 0.0
    total, of = weight_n @ logs.outcome_n, weight_n @ exposure
    if design.family in ("poisson", "negative_binomial"):
        offset = float(np.log(total + 0.5) - np.log(of))
    else:
        offset = float(empirical_logit(total, of)[0])
    scaling["outcome.mean"], scaling["outcome.sd"] = offset, 1.0
    return clicks_n, shown_n, ones, offset


def _seen_outcome(logs: Logs, design: Design, weight_n: np.ndarray, scaling: dict) -> tuple[np.ndarray, float]:
    """Outcome (n,) on the scale of the rows that were seen, and offset; an unseen outcome is 0 and enters nothing."""
    seen_n, outcome_n = _observed(logs, design) > 0, np.zeros(len(logs))
    if design.family == "normal":
        outcome_n[seen_n] = _standardise_outcome(logs.outcome_n[seen_n], weight_n[seen_n], scaling)
        return outcome_n, 0.0
    outcome_n[seen_n] = logs.outcome_n[seen_n]
    offset = float(ndtri((weight_n @ outcome_n + 0.5) / (weight_n @ seen_n + 1)))
    scaling["outcome.mean"], scaling["outcome.sd"] = offset, 1.0
    return outcome_n, offset


def _equal_rows(logs: Logs, features_nd: np.ndarray, design: Design) -> tuple[np.ndarray, np.ndarray]:
    """First row of each set of rows that are equal in text, features and design, and each row's set.

    Only where the response is not linear in the counts: an empirical logit of a sum has less noise and bias than
    several. Other counts keep their rows, since every check counts them; `spec.summed` sums them inside a fit.
    """
    wanted = design.response == "empirical_logit" and not (design.endogenous_terms or design.guardrail)
    if not wanted or logs.roles.weight or not logs.roles.exposure:
        return np.arange(len(logs)), np.arange(len(logs))
    seen: dict[bytes, int] = {}
    features_n = np.array([seen.setdefault(row.tobytes(), len(seen)) for row in features_nd])
    names = dict.fromkeys(name for term in design.terms for name in term.columns if name in logs.columns)
    codes = np.stack([features_n, logs.codes(logs.roles.text), *[_row_codes(logs, name) for name in names]], 1)
    _, first_n, row_of_log_n = np.unique(codes, axis=0, return_index=True, return_inverse=True)
    return first_n, row_of_log_n.reshape(-1)


def _row_codes(logs: Logs, name: str) -> np.ndarray:
    values = np.asarray(logs.columns[name])
    return logs.codes(name) if values.ndim == 1 else np.unique(values, axis=0, return_inverse=True)[1].reshape(-1)


def with_missing_indicators(design: Design, logs: Logs) -> Design:
    known = {t.column for t in design.terms}
    extra = [c for c in logs.roles.confounders if c.endswith(".missing") and c.removesuffix(".missing") in known]
    terms = (*design.terms, *[Term("linear", c) for c in extra if c not in known])
    for term in terms:
        for name in term.columns:
            if name not in logs.columns and not (term.kind == "interaction" and name == "text"):
                raise ValueError(f"design: {term} needs column {name!r}; the log holds {sorted(logs.columns)}")
    return Design(design.family, terms, design.response)
