"""A design and a log become arrays: the blocks that the causal model is made of.

Every exogenous part of the linear predictor is a block: dense columns times
coefficients, or one coefficient a level. A block's prior is N(0, sd^2) with `sd`
fixed or, where `sd` is None, learned with a HalfNormal(1) prior. The NumPyro
model (`model`) and its conditional algebra (`conditional`) both read the blocks,
so a term is added here and nowhere else: write a function that returns its
columns, and name it in `BUILDERS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from deconfound_jax.config import Causal
from deconfound_jax.structs import Design, Logs, Term


class Block(NamedTuple):
    """Columns `start:stop` of `Rows.columns_nq` under one prior."""

    name: str
    start: int
    stop: int
    sd: float | None = None


class Levels(NamedTuple):
    """One effect for each of `count` levels, codes in `Rows.levels_nc[:, column]`."""

    name: str
    column: int
    count: int


class Spec(NamedTuple):
    """The static shape of a causal model (hashable: one spec, one compilation)."""

    family: str
    blocks: tuple[Block, ...]  # of the outcome equation, "text" first
    levels: tuple[Levels, ...]
    instruments: Block | None  # further columns of the first stage
    gamma_sd: float = 1.0
    control_sd: float = 1.0
    orthogonal: bool = False  # the text's columns are orthogonal under the rows' weights: `conditional` absorbs them

    @property
    def endogenous(self) -> bool:
        return self.instruments is not None

    @property
    def first_blocks(self) -> tuple[Block, ...]:
        """The first stage: every exogenous block of the outcome, and the instruments."""
        return (*self.blocks, self.instruments) if self.instruments else ()


class Rows(NamedTuple):
    """The log as arrays, standardised. Fields are (n, ...) unless said otherwise."""

    columns_nq: Any
    levels_nc: Any  # int codes
    outcome_n: Any  # standardised (normal) or counts (binomial)
    endogenous_n: Any  # standardised; zeros without an endogenous term
    exposure_n: Any  # trials; ones without exposure
    precision_n: Any  # relative precision of the outcome
    weight_n: Any  # a row counts as so many
    offset: Any  # (): added to eta inside the link

    def take(self, index) -> Rows:
        """The rows at `index`."""
        return Rows(*[field[index] for field in self[:-1]], self.offset)


class Prepared(NamedTuple):
    """What `prepare` returns: the model's shape, its arrays, and the way back to units."""

    spec: Spec
    rows: Rows
    scaling: Mapping[str, Any]
    row_of_log_n: np.ndarray  # row of the log -> row of `rows` (equal rows are summed)


def prepare(logs: Logs, features_nd: np.ndarray, design: Design, config: Causal | None = None) -> Prepared:
    """Builds the model's arrays from a log and its text features.

    Features, outcome and numeric columns are standardised (mean 0, sd 1, a row of
    weight w counting as w rows). Counts of rows equal in text and in every column of
    the design are summed, unless the rows carry weights.

    Args:
      logs: n validated rows.
      features_nd: phi(x), one row of features a row of the log, any scale.
      design: the causal assumptions.
      config: prior widths of gamma and c0.

    Raises:
      ValueError: features of the wrong length or not finite, an outcome that never
        differs, counts without an exposure, or a column the log does not hold.
    """
    features_nd = np.asarray(features_nd, np.float64)
    if features_nd.ndim != 2 or len(features_nd) != len(logs):
        raise ValueError(f"features: expected ({len(logs)}, d), one row a row of the log, got {features_nd.shape}")
    if not np.isfinite(features_nd).all():
        raise ValueError("features: expected finite numbers, got NaN or infinity")
    design = _with_missing_indicators(design, logs)
    first_n, row_of_log_n = _equal_rows(logs, features_nd, design)
    scaling: dict[str, Any] = {"text.column": logs.roles.text}
    outcome_n, exposure_n, precision_n, offset = _outcome(logs, design, first_n, row_of_log_n, scaling)
    logs_u = logs.take(first_n)
    weight_n = _weights(logs_u)
    text_nd = _standardise(features_nd[first_n], weight_n, "features", scaling)

    columns, blocks, codes, levels = [text_nd], [Block("text", 0, text_nd.shape[1])], [], []
    for term in design.terms:
        for name, values, sd in BUILDERS[term.kind](term, logs_u, text_nd, scaling):
            if values.ndim == 1:
                levels.append(Levels(name, len(codes), int(values.max()) + 1))
                codes.append(values)
            elif values.shape[1]:
                blocks.append(Block(name, blocks[-1].stop, blocks[-1].stop + values.shape[1], sd))
                columns.append(values)
    instruments, endogenous_n = None, np.zeros(len(first_n))
    if design.endogenous:
        endogenous_n = _numeric(design.endogenous.column, logs_u, scaling)[:, 0]
        columns += [_numeric(z, logs_u, scaling) for z in design.endogenous.instruments]
        instruments = Block("instruments", blocks[-1].stop, blocks[-1].stop + len(design.endogenous.instruments), 1.0)
    config = config or Causal()
    spec = Spec(design.family, tuple(blocks), tuple(levels), instruments, config.gamma_sd, config.control_sd)
    levels_nc = np.stack(codes, 1) if codes else np.zeros((len(first_n), 0), int)
    columns_nq = np.concatenate(columns, 1)
    rows = Rows(columns_nq, levels_nc, outcome_n, endogenous_n, exposure_n, precision_n, weight_n, offset)
    return Prepared(spec, rows, scaling, row_of_log_n)


def empirical_logit(clicks_n: np.ndarray, shown_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log((k + 1/2) / (n - k + 1/2)) and its variance 1/(k + 1/2) + 1/(n - k + 1/2); finite at 0 and n clicks."""
    hit, miss = clicks_n + 0.5, shown_n - clicks_n + 0.5
    return np.log(hit / miss), 1 / hit + 1 / miss


def site_of(column: str) -> str:
    """The site of a column's effect: its name, or `column.<name>` where the model has a site of that name."""
    return f"column.{column}" if column in _RESERVED else column


def _linear(term: Term, logs: Logs, text_nd: np.ndarray, scaling: dict):
    yield site_of(term.column), _numeric(term.column, logs, scaling), 1.0


def _intercept(term: Term, logs: Logs, text_nd: np.ndarray, scaling: dict):
    names, codes_n = np.unique(np.asarray(logs.columns[term.column]).astype(str), return_inverse=True)
    scaling[f"{term.column}.names"] = names
    yield site_of(term.column), codes_n, None


def _category(term: Term, logs: Logs, text_nd: np.ndarray, scaling: dict):
    """Levels plus the level's mean of the features (Mundlak 1978), rotated to its rank."""
    (level,) = _intercept(term, logs, text_nd, scaling)
    codes_n = level[1]
    weight_n = _weights(logs)
    counts_c = np.maximum(np.bincount(codes_n, weight_n), 1e-12)
    means_cd = np.stack([np.bincount(codes_n, weight_n * column) / counts_c for column in text_nd.T], 1)
    left, size, _ = np.linalg.svd(means_cd, full_matrices=False)
    rank = int((size > 1e-8 * max(size[0], 1e-30)).sum())
    scaling[f"{term.column}.means"] = means = (left * size[None, :])[:, :rank]
    yield f"{site_of(term.column)}.means", means[codes_n], None
    yield level


def _endogenous(term: Term, logs: Logs, text_nd: np.ndarray, scaling: dict):
    return ()  # no block of its own: `model` gives it gamma and a control function


# Names the model, or the scaling beside it, already uses; `text` is the default name of a log's text column.
_RESERVED = {"intercept", "text", "sigma", "gamma", "control", "instruments", "outcome", "endogenous", "features"}
BUILDERS = {"linear": _linear, "category": _category, "intercept": _intercept, "endogenous": _endogenous}


def _weights(logs: Logs) -> np.ndarray:
    return np.asarray(logs.columns[logs.roles.weight], np.float64) if logs.roles.weight else np.ones(len(logs))


def _numeric(column: str, logs: Logs, scaling: dict) -> np.ndarray:
    values_n1 = np.asarray(logs.columns[column], np.float64)[:, None]
    return _standardise(values_n1, _weights(logs), site_of(column), scaling)


def _standardise(values_nk: np.ndarray, weight_n: np.ndarray, name: str, scaling: dict) -> np.ndarray:
    mean_k = np.average(values_nk, 0, weight_n)
    sd_k = np.sqrt(np.average((values_nk - mean_k[None, :]) ** 2, 0, weight_n))
    sd_k = np.where(sd_k > 1e-12, sd_k, 1.0)  # a constant feature stays zero
    scaling[f"{name}.mean"], scaling[f"{name}.sd"] = mean_k, sd_k
    return (values_nk - mean_k[None, :]) / sd_k[None, :]


def _standardise_outcome(values_n: np.ndarray, weight_n: np.ndarray, scaling: dict) -> np.ndarray:
    if np.ptp(values_n) <= 1e-12 * np.abs(values_n).max():
        raise ValueError(f"outcome: expected values that differ, got {values_n[0]:g} in every row")
    outcome_n = _standardise(values_n[:, None], weight_n, "outcome", scaling)[:, 0]
    scaling["outcome.mean"], scaling["outcome.sd"] = scaling["outcome.mean"][0], scaling["outcome.sd"][0]
    return outcome_n


def _outcome(logs: Logs, design: Design, first_n, row_of_log_n, scaling):
    """Outcome, exposure, precision and offset of the summed rows."""
    ones, weight_n = np.ones(len(first_n)), _weights(logs)
    if not _counts(design):
        return _standardise_outcome(logs.outcome_n, weight_n, scaling), ones, ones, 0.0
    if not logs.roles.exposure:
        raise ValueError(f"roles.exposure: expected a column of counts for {design.family}/{design.response}, got none")
    clicks_n = np.bincount(row_of_log_n, logs.outcome_n)
    shown_n = np.bincount(row_of_log_n, logs.exposure_n)
    logit_n, variance_n = empirical_logit(clicks_n, shown_n)
    if design.family == "binomial":
        offset = float(empirical_logit(weight_n @ logs.outcome_n, weight_n @ logs.exposure_n)[0])
        scaling["outcome.mean"], scaling["outcome.sd"] = offset, 1.0
        return clicks_n, shown_n, ones, offset
    outcome_n = _standardise_outcome(logit_n, weight_n[first_n], scaling)
    variance_n = variance_n / scaling["outcome.sd"] ** 2
    # Rows differ in sampling variance on top of what they share: weights by moments.
    shared = max(1 - np.average(variance_n, weights=weight_n[first_n]), 0.05)
    return outcome_n, shown_n, shared / (shared + variance_n), 0.0


def _counts(design: Design) -> bool:
    return design.family == "binomial" or design.response == "empirical_logit"


def _equal_rows(logs: Logs, features_nd: np.ndarray, design: Design) -> tuple[np.ndarray, np.ndarray]:
    """First row of each set of rows that are equal in text, features and design, and each row's set."""
    if not _counts(design) or not logs.roles.exposure or logs.roles.weight:
        return np.arange(len(logs)), np.arange(len(logs))
    names = [logs.roles.text]
    for term in design.terms:
        names += [term.column, *term.instruments]
    seen: dict[bytes, int] = {}
    features_n = np.array([seen.setdefault(row.tobytes(), len(seen)) for row in features_nd])
    codes = np.stack([features_n, *[logs.codes(name) for name in names]], 1)
    _, first_n, row_of_log_n = np.unique(codes, axis=0, return_index=True, return_inverse=True)
    return first_n, row_of_log_n.reshape(-1)


def _with_missing_indicators(design: Design, logs: Logs) -> Design:
    known = {t.column for t in design.terms}
    extra = [c for c in logs.roles.confounders if c.endswith(".missing") and c.removesuffix(".missing") in known]
    terms = (*design.terms, *[Term("linear", c) for c in extra if c not in known])
    for term in terms:
        for name in (term.column, *term.instruments):
            if name not in logs.columns:
                raise ValueError(f"design: {term} needs column {name!r}; the log holds {sorted(logs.columns)}")
    return Design(design.family, terms, design.response)
