"""From a prepared log to a posterior: which fit, and why."""

from __future__ import annotations

import numpy as np

from deconfound_jax.causal.families import FAMILIES
from deconfound_jax.causal.nested import fit_nested
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.sampled import fit_nuts, fit_svi
from deconfound_jax.causal.terms import Prepared, prepare
from deconfound_jax.config import Causal
from deconfound_jax.structs import Design, Logs


def fit(logs: Logs, features_nd: np.ndarray, config: Causal, design: Design | None = None) -> Posterior:
    """Posterior of the causal model on a log.

    Args:
      logs: n validated rows.
      features_nd: phi(x) of each row.
      config: fit, draws, priors; its design is used unless one is given.
      design: the causal assumptions, in place of the config's.

    Returns:
      A `Posterior`; read its `status` before its numbers.

    Example:
      >>> posterior = fit(logs, features_nd, Causal(design="category(week)"))
      >>> reward = model_form(posterior, features_nd)
    """
    design = design or Design.parse(config.design, config.family, config.response)
    return fit_prepared(prepare(logs, features_nd, design, config), design, config)


def fit_prepared(prepared: Prepared, design: Design, config: Causal) -> Posterior:
    """The same on arrays that `terms.prepare` made."""
    method, why = choose(prepared, config.fit)
    draws, diagnostics = fit_nested(prepared.spec, prepared.rows, config.draws, config.seed)
    if method == "nuts":
        draws, diagnostics = fit_nuts(prepared, draws, config.draws, config.seed)
    elif method == "svi":
        draws, diagnostics = fit_svi(prepared, draws, config.draws, config.seed)
    scaling = {name: np.asarray(value) for name, value in prepared.scaling.items()}
    draws = {name: np.asarray(value) for name, value in draws.items()}
    return Posterior(draws, design, scaling, {"method": method, "why": why, **diagnostics})


def choose(prepared: Prepared, asked: str) -> tuple[str, str]:
    """The fit's name and the reason; ValueError for `exact` where the design is not Gaussian."""
    conjugate = FAMILIES[prepared.spec.family].conjugate
    if asked == "exact" and not conjugate:
        got = prepared.spec.family
        raise ValueError(f"causal.fit: exact needs the normal family, got {got!r}; use laplace, svi or nuts")
    if asked != "auto":
        return asked, "asked for"
    if conjugate:
        return "exact", "the design is Gaussian: closed form given a few scalars"
    return "laplace", f"the {prepared.spec.family} family has no closed form"
