"""From a prepared log to a posterior: which fit, and why."""

from __future__ import annotations

import numpy as np

from deconfound_jax.causal import nuts, svi
from deconfound_jax.causal.families import FAMILIES
from deconfound_jax.causal.nested import fit_nested
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.sites import starting_draws
from deconfound_jax.causal.spec import Head, Prepared, Spec, summed
from deconfound_jax.causal.terms import prepare
from deconfound_jax.causal.verdict import judged
from deconfound_jax.config import Causal
from deconfound_jax.structs import Design, Logs

# Rows times columns that NUTS takes minutes for on two cores: about 50,000 gradients of them.
NUTS_CELLS = 2_000_000


def fit(
    logs: Logs, features_nd: np.ndarray, config: Causal, design: Design | None = None, head: Head | None = None
) -> Posterior:
    """Posterior of the causal model on a log.

    Args:
      logs: n validated rows.
      features_nd: phi(x) of each row.
      config: fit, draws, priors; its design is used unless one is given.
      design: the causal assumptions, in place of the config's.
      head: f(x) as (init, apply) on the standardised features, in place of a linear effect.

    Returns:
      A `Posterior`; read its `verdict` before its numbers. Errors are clustered by
      `roles.group` where the log has one.

    Example:
      >>> posterior = fit(logs, features_nd, Causal(design="category(week)"))
      >>> reward = model_form(posterior, features_nd)
    """
    design = design or Design.parse(config.design, config.family, config.response)
    prepared = prepare(logs, features_nd, design, config, head)
    posterior = fit_prepared(prepared, design, config)
    if not config.verdict:
        return posterior
    return judged(posterior, prepared, groups_n=logs.codes(logs.roles.group) if logs.roles.group else None)


def fit_prepared(prepared: Prepared, design: Design, config: Causal) -> Posterior:
    """The same on arrays that `terms.prepare` made."""
    method, why = choose(prepared, config.fit)
    prepared = prepared._replace(rows=summed(prepared.spec, prepared.rows))
    if method == "nuts":
        start = starting_draws(prepared, max(config.chains, 64), config.seed)
        draws, diagnostics = nuts.fit_nuts(
            prepared, start, config.draws, config.seed, config.chains, config.warmup, config.nuts_state
        )
    elif method == "svi":
        start, share = svi.start_on_sample(prepared, max(config.draws, 512), config.seed)
        draws, diagnostics = svi.fit_svi(
            prepared, start, config.draws, config.seed, config.svi_steps, batch=config.svi_batch, share=share
        )
    else:
        draws, diagnostics = fit_nested(prepared.spec, prepared.rows, config.draws, config.seed)
    scaling = {name: np.asarray(value) for name, value in prepared.scaling.items()}
    draws = {name: np.asarray(value) for name, value in draws.items()}
    return Posterior(draws, design, scaling, {"method": method, "why": why, **diagnostics})


def choose(prepared: Prepared, asked: str) -> tuple[str, str]:
    """The fit's name and the reason.

    Raises:
      ValueError: `exact` where the design is not Gaussian, `exact` or `laplace` where
        f, its prior or the selection is outside what they hold.
    """
    spec = prepared.spec
    conjugate, sampled = FAMILIES[spec.family].conjugate, needs_sampling(spec)
    if asked in ("exact", "laplace") and sampled:
        raise ValueError(f"causal.fit: expected nuts, svi or auto, got {asked!r}: {sampled}")
    if asked == "exact" and not conjugate:
        raise ValueError(f"causal.fit: exact needs the normal family, got {spec.family!r}; use laplace, svi or nuts")
    if asked != "auto":
        return asked, "asked for"
    if sampled:
        cells = int(np.prod(np.shape(prepared.rows.columns_nq)))
        size = f"{cells:,} cells (rows times columns)"
        if cells <= NUTS_CELLS:
            return "nuts", f"{sampled}; {size} are few enough to sample"
        return "svi", f"{sampled}; {size} are too many to sample"
    if conjugate:
        return "exact", "the design is Gaussian: closed form given a few scalars"
    return "laplace", f"the {spec.family} family has no closed form"


def needs_sampling(spec: Spec) -> str:
    """Why neither closed form nor Laplace holds this model; empty where one does."""
    if spec.selection:
        return "selection with correlated errors is not Gaussian in its coefficients"
    if spec.head:
        return "f is a head: not linear in its parameters"
    if any(block.prior == "horseshoe" for block in spec.blocks):
        return "a horseshoe has a scale of its own for every feature"
    return ""
