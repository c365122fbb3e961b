"""The shape of a causal model and the arrays it is fitted on.

Every exogenous part of a linear predictor is a block (dense columns times
coefficients) or a set of levels (one coefficient each). A `Spec` is hashable:
one spec, one compilation. `terms.prepare` makes both from a log and a design;
the NumPyro model (`model`) and its conditional algebra (`conditional`) read them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

FLAT_SD = 1e3  # stands for a flat prior where a proper one must be sampled: standardised units


class Block(NamedTuple):
    """Columns `start:stop` of `Rows.columns_nq` under one prior.

    sd        fixed prior sd, or None: learned, HalfNormal(1)
    spectrum  square roots of the Laplacian's eigenvalues: a Hilbert-space Gaussian
              process, whose coefficient j has the squared-exponential kernel's
              spectral density at spectrum[j] as prior variance (Riutort-Mayol et al. 2023)
    prior     "ridge": N(0, sd^2); "horseshoe": N(0, sd^2 local_j^2), local_j half-Cauchy
    """

    name: str
    start: int
    stop: int
    sd: float | None = None
    spectrum: tuple[float, ...] = ()
    prior: str = "ridge"


class Levels(NamedTuple):
    """One effect for each of `count` levels, codes in `Rows.levels_nc[:, column]`; absorbed: flat prior."""

    name: str
    column: int
    count: int
    absorbed: bool = False


class Equation(NamedTuple):
    """A variable that the model explains before the outcome: column of `Rows.endogenous_nm`, in this order.

    structural: its value enters the equations after it with a coefficient gamma (an
    endogenous confounder). A guardrail outcome enters by its error only.
    """

    column: str
    prefix: str  # of its sites
    suffix: str  # of `gamma` and `control` that belong to it
    structural: bool = True


class Head(NamedTuple):
    """f(x) as a pure function: init(key, features_nd) -> params, apply(params, features_nd) -> (n,)."""

    init: Callable
    apply: Callable


class Selection(NamedTuple):
    """Who gives feedback at all: probit on every exogenous block and on `exclusions`; errors correlate by rho."""

    exclusions: Block


class Spec(NamedTuple):
    """The static shape of a causal model (hashable: one spec, one compilation)."""

    family: str
    blocks: tuple[Block, ...]  # of the outcome equation, "text" first
    levels: tuple[Levels, ...]
    instruments: Block | None = None  # further columns of the first stages
    gamma_sd: float = 1.0
    control_sd: float = 1.0
    orthogonal: bool = False  # the text's columns are orthogonal under the rows' weights: `conditional` absorbs them
    equations: tuple[Equation, ...] = ()
    categories: int = 0  # of an ordinal outcome
    selection: Selection | None = None
    head: Head | None = None

    @property
    def endogenous(self) -> bool:
        """True where the design has an equation before the outcome's."""
        return bool(self.equations)

    @property
    def first_blocks(self) -> tuple[Block, ...]:
        """Of a first stage: every exogenous block of the outcome, and the instruments."""
        return (*self.blocks, self.instruments) if self.instruments else self.blocks

    def blocks_of(self, equation: Equation | None) -> tuple[Block, ...]:
        """Exogenous blocks of an equation; None is the outcome's."""
        return self.first_blocks if equation and equation.structural else self.blocks

    def structural(self, equation: Equation | None) -> tuple[int, ...]:
        """Columns of `Rows.endogenous_nm` that enter an equation by their value."""
        if equation and equation.structural:
            return ()  # first stages are reduced forms
        return tuple(i for i, e in enumerate(self.equations) if e.structural)


class Rows(NamedTuple):
    """The log as arrays, standardised. Fields are (n, ...) unless said otherwise."""

    columns_nq: Any
    levels_nc: Any  # int codes
    outcome_n: Any  # standardised (normal, student_t), counts, or codes (ordinal)
    endogenous_nm: Any  # standardised, one column an equation
    exposure_n: Any  # trials or exposure; ones without
    precision_n: Any  # relative precision of the outcome
    weight_n: Any  # a row counts as so many
    observed_n: Any  # 1 where the outcome was seen
    offset: Any  # (): added to eta inside the link

    def take(self, index) -> Rows:
        """The rows at `index`."""
        return Rows(*[field[index] for field in self[:-1]], self.offset)


def single(rows: Rows) -> Rows:
    """The rows on the device, in single precision."""
    found = Rows(*[jnp.asarray(field, jnp.float32) for field in rows])
    return found._replace(levels_nc=jnp.asarray(rows.levels_nc, jnp.int32))


def doubled(rows: Rows) -> Rows:
    """The rows on the device, in double precision where that is on."""
    found = Rows(*[jnp.asarray(field, float) for field in rows])
    return found._replace(levels_nc=jnp.asarray(rows.levels_nc, int))


def summed(spec: Spec, rows: Rows) -> Rows:
    """The same likelihood in fewer rows: counts of rows equal in every column are added up, where that is exact.

    Not for overdispersed counts (a sum has another law than one of the whole exposure), nor beside further equations,
    which have a value a row.
    """
    plain = spec.family in ("bernoulli", "binomial", "poisson") and not (spec.equations or spec.selection)
    if not plain or np.any(np.asarray(rows.weight_n) != 1):
        return rows
    key_nk = np.concatenate([rows.columns_nq, rows.levels_nc], 1)
    _, first_u, set_n = np.unique(key_nk, axis=0, return_index=True, return_inverse=True)
    set_n = set_n.reshape(-1)
    outcome_u, exposure_u = np.bincount(set_n, rows.outcome_n), np.bincount(set_n, rows.exposure_n)
    return rows.take(first_u)._replace(outcome_n=outcome_u, exposure_n=exposure_u)


class Prepared(NamedTuple):
    """What `prepare` returns: the model's shape, its arrays, and the way back to units."""

    spec: Spec
    rows: Rows
    scaling: Mapping[str, Any]
    row_of_log_n: np.ndarray  # row of the log -> row of `rows` (equal rows are summed)


class Scalar(NamedTuple):
    """A scalar of the model with its prior; positive ones are handled on the log scale."""

    name: str
    prior: dist.Distribution
    positive: bool


def equations_of(columns: tuple[str, ...], guardrail: str = "") -> tuple[Equation, ...]:
    """The equations of a design: first stages, then the guardrail's.

    A single endogenous confounder has the short names `first.*`, `gamma`, `control`;
    several carry their column's name.
    """
    one = len(columns) == 1
    first = [Equation(c, "first." if one else f"first.{c}.", "" if one else f".{c}") for c in columns]
    return (*first, *([Equation(guardrail, "guardrail.", ".guardrail", False)] if guardrail else []))
