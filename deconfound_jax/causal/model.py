"""The causal model: one NumPyro function that fits, predicts and simulates.

    p   = first stage(x, c, z) + s1 e,  e ~ N(0, 1)         (endogenous design only)
    eta = intercept + f(x) + sum_k g_k(c_k) + gamma p + c0 e
    y   ~ Family(eta)

f and every g_k are blocks (`terms`). The coefficients of a learned block are
written as scale times a standard normal, so that samplers see no funnel. Source:
the control-function form of a triangular system; DeconfoundLM (2506.00152).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from deconfound_jax.causal.families import FAMILIES
from deconfound_jax.causal.terms import Block, Levels, Rows, Spec


def causal_model(spec: Spec, rows: Rows, outcome=None, endogenous=None):
    """Samples the sites of the causal model.

    Args:
      spec: its static shape.
      rows: columns, codes, exposure, precision and weight of n rows.
      outcome: (n,) observed outcome, or None to draw one (predict, simulate).
      endogenous: (n,) observed endogenous confounder, or None to draw it.

    Returns:
      The outcome (n,): observed or drawn.

    Sites: intercept, text, <term>, their .scale, sigma, gamma, control (c0), and
    the same under "first." for the first stage; all on standardised scales.
    """
    family = FAMILIES[spec.family]
    weighted = numpyro.handlers.scale(scale=jnp.asarray(rows.weight_n))
    eta_n = numpyro.sample("intercept", dist.Normal(0.0, 1.0)) + _effects(spec.blocks, spec.levels, rows, "")
    if spec.endogenous:
        mean_n = numpyro.sample("first.intercept", dist.Normal(0.0, 1.0))
        mean_n = mean_n + _effects(spec.first_blocks, spec.levels, rows, "first.")
        s1 = numpyro.sample("first.sigma", dist.HalfNormal(1.0))
        gamma = numpyro.sample("gamma", dist.Normal(0.0, spec.gamma_sd))
        control = numpyro.sample("control", dist.Normal(0.0, spec.control_sd))
        with weighted:
            p_n = numpyro.sample("endogenous", dist.Normal(mean_n, s1), obs=endogenous)
        eta_n = eta_n + gamma * p_n + control * (p_n - mean_n) / s1
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0)) if family.has_sigma else None
    with weighted:
        return numpyro.sample("outcome", family.distribution(eta_n, rows, sigma), obs=outcome)


def _effects(blocks: tuple[Block, ...], levels: tuple[Levels, ...], rows: Rows, prefix: str):
    total_n = jnp.zeros(rows.columns_nq.shape[0])
    for block in blocks:
        values_nk = rows.columns_nq[:, block.start : block.stop]
        total_n = total_n + values_nk @ _coefficients(prefix + block.name, block.stop - block.start, block.sd)
    for level in levels:
        total_n = total_n + _coefficients(prefix + level.name, level.count, None)[rows.levels_nc[:, level.column]]
    return total_n


def _coefficients(name: str, size: int, sd: float | None):
    scale = numpyro.sample(f"{name}.scale", dist.HalfNormal(1.0)) if sd is None else sd
    raw = numpyro.sample(f"{name}.raw", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
    return numpyro.deterministic(name, scale * raw)
