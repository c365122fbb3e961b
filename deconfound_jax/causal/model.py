"""The causal model: one NumPyro function that fits, predicts and simulates.

    p_k = first stage(x, c, z) + sum_{j<k} c_kj e_j + s_k e_k,   e ~ N(0, I)     (endogenous design only)
    eta = intercept + f(x) + sum_k g_k(c_k) + gamma'p + c0'e
    y   ~ Family(eta)

f and every g_k are blocks or levels (`spec`). The coefficients of a learned block
are written as scale times a standard normal, so that samplers see no funnel.
Source: the control-function form of a triangular system; DeconfoundLM (2506.00152).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from deconfound_jax.causal.families import FAMILIES
from deconfound_jax.causal.scalars import gammas, scalars, sd_of
from deconfound_jax.causal.spec import FLAT_SD, Equation, Rows, Spec


def causal_model(spec: Spec, rows: Rows, outcome=None, endogenous=None):
    """Samples the sites of the causal model.

    Args:
      spec: its static shape.
      rows: columns, codes, exposure, precision and weight of n rows.
      outcome: (n,) observed outcome, or None to draw one (predict, simulate).
      endogenous: (n, m) observed variables of the equations before the outcome's, or None to draw them.

    Returns:
      The outcome (n,): observed or drawn.

    Sites: intercept, text, <term>, their .scale, the family's own, gamma, control
    (c0), and the same under the prefix of every equation before the outcome's;
    all on standardised scales.
    """
    psi = {s.name: numpyro.sample(s.name, s.prior) for s in scalars(spec)}
    weighted = numpyro.handlers.scale(scale=jnp.asarray(rows.weight_n))
    values, errors = [], []
    for i, equation in enumerate(spec.equations):
        mean_n = _mean(spec, rows, equation, psi, values, errors)
        seen_n = None if endogenous is None else endogenous[:, i]
        scale = psi[f"{equation.prefix}sigma"]
        name = "endogenous" if len(spec.equations) == 1 else f"endogenous.{equation.column}"
        with weighted:
            values.append(numpyro.sample(name, dist.Normal(mean_n, scale), obs=seen_n))
        errors.append((values[-1] - mean_n) / scale)
    eta_n = _mean(spec, rows, None, psi, values, errors)
    with weighted:
        return numpyro.sample("outcome", FAMILIES[spec.family].distribution(eta_n, rows, psi), obs=outcome)


def _mean(spec: Spec, rows: Rows, equation: Equation | None, psi, values, errors):
    """Mean (n,) of one equation given the variables and errors before it."""
    prefix = equation.prefix if equation else ""
    total_n = numpyro.sample(f"{prefix}intercept", dist.Normal(0.0, 1.0)) * jnp.ones(rows.columns_nq.shape[0])
    for block in spec.blocks_of(equation):
        columns_nk = rows.columns_nq[:, block.start : block.stop]
        sd = sd_of(psi, prefix, block)
        total_n = total_n + columns_nk @ _coefficients(prefix + block.name, block.stop - block.start, sd)
    for level in spec.levels:
        sd = FLAT_SD if level.absorbed else psi[f"{prefix}{level.name}.scale"]
        total_n = total_n + _coefficients(prefix + level.name, level.count, sd)[rows.levels_nc[:, level.column]]
    for i, name in gammas(spec, equation):
        total_n = total_n + numpyro.sample(name, dist.Normal(0.0, spec.gamma_sd)) * values[i]
    for equation_j, error_n in zip(spec.equations, errors, strict=False):
        total_n = total_n + psi[f"{prefix}control{equation_j.suffix}"] * error_n
    return total_n


def _coefficients(name: str, size: int, sd):
    raw = numpyro.sample(f"{name}.raw", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
    return numpyro.deterministic(name, sd * raw)
