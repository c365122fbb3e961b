"""The causal layer's knobs."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Causal:
    """Design, fit and form of the reward."""

    design: str = ""  # e.g. "category(week) + endogenous(popularity ~ z)"; see Design.parse
    family: Literal[
        "normal", "student_t", "bernoulli", "binomial", "beta_binomial", "poisson", "negative_binomial", "ordinal"
    ] = "normal"
    # empirical_logit: counts under the normal family, closed form
    response: Literal["identity", "empirical_logit"] = "identity"
    # auto: exact where the design is Gaussian, else laplace
    fit: Literal["auto", "exact", "laplace", "nuts", "svi"] = "auto"
    draws: int = 512  # posterior draws kept
    text_prior: Literal["ridge", "horseshoe"] = "ridge"  # of f(x); horseshoe: few features matter (sampled fits only)
    text_sd: float | None = None  # prior sd of f's coefficients on standardised scales; None: learned
    gamma_sd: float = 1.0  # prior sd of the endogenous coefficient, in sd of y per sd of p
    control_sd: float = 1.0  # prior sd of c0, the control function's coefficient
    seed: int = 0  # of draws and samplers
