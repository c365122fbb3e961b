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
    # auto: exact where the design is Gaussian, else laplace; nuts (small) or svi for a horseshoe, a head, selection
    fit: Literal["auto", "exact", "laplace", "nuts", "svi"] = "auto"
    draws: int = 512  # posterior draws kept
    text_prior: Literal["ridge", "horseshoe"] = "ridge"  # of f(x); horseshoe: few features matter (sampled fits only)
    text_sd: float | None = None  # prior sd of f's coefficients on standardised scales; None: learned
    gamma_sd: float = 1.0  # prior sd of the endogenous coefficient, in sd of y per sd of p
    control_sd: float = 1.0  # prior sd of c0, the control function's coefficient
    chains: int = 4  # of nuts: fewer hide a mode from R-hat
    warmup: int = 500  # transitions of nuts that only tune it
    nuts_state: str = ""  # file: the chains after warm-up are kept there, and found there warm-up is skipped
    svi_steps: int = 1500  # updates of the guide
    svi_batch: int = 0  # rows an update; 0: all of them
    verdict: bool = True  # `fit` runs the checks and attaches the verdict; False where only numbers are wanted
    seed: int = 0  # of draws and samplers
