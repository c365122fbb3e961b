"""The causal model: one NumPyro function that fits, predicts and simulates.

    p_k = first stage(x, c, z) + sum_{j<k} c_kj e_j + s_k e_k,   e ~ N(0, I)     (endogenous design only)
    eta = intercept + f(x) + sum_k g_k(c_k) + gamma'p + c0'e
    y   ~ Family(eta), seen where s = 1                                          (s: selection design only)

f and every g_k are blocks or levels (`spec`); f may be a head. The coefficients of a
learned block are written as scale times a standard normal, so that samplers see no funnel.
Source: the control-function form of a triangular system; DeconfoundLM (2506.00152).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from deconfound_jax.causal import head, selection
from deconfound_jax.causal.families import FAMILIES
from deconfound_jax.causal.scalars import gammas, scalars, sd_of
from deconfound_jax.causal.spec import FLAT_SD, Block, Equation, Rows, Spec

SLAB_SD = 1.0  # widest prior sd of a horseshoe's coefficient: that of the other terms


def causal_model(spec: Spec, rows: Rows, outcome=None, endogenous=None):
    """Samples the sites of the causal model.

    Args:
      spec: its static shape.
      rows: columns, codes, exposure, precision and weight of n rows; `observed_n` says
        which outcomes were seen, where the design selects.
      outcome: (n,) observed outcome, or None to draw one (predict, simulate).
      endogenous: (n, m) observed variables of the equations before the outcome's, or None to draw them.

    Returns:
      The outcome (n,): observed or drawn. A selection design has a site `observed` beside it.

    Sites: intercept, text, <term>, their .scale, the family's own, gamma, control
    (c0), and the same under the prefix of every equation before the outcome's;
    text.local (horseshoe), head.<path> (in place of text), selection.* and rho;
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
    if spec.selection:
        return _selected(spec, rows, psi, eta_n, outcome, weighted)
    with weighted:
        return numpyro.sample("outcome", FAMILIES[spec.family].distribution(eta_n, rows, psi), obs=outcome)


def slab(scale, local_k):
    """Prior sd (k,) of a horseshoe's coefficients: scale local, at most SLAB_SD (Piironen and Vehtari 2017)."""
    wide_k = scale * local_k
    return wide_k / jnp.sqrt(1 + (wide_k / SLAB_SD) ** 2)


def _selected(spec: Spec, rows: Rows, psi, eta_n, outcome, weighted):
    """The outcome, and whether it was seen; a row whose outcome was not seen has it integrated out."""
    family = FAMILIES[spec.family]
    blocks = (*spec.blocks, spec.selection.exclusions)
    index_n = _exogenous(spec, rows, selection.PREFIX, blocks, psi)
    rho = numpyro.deterministic("rho", selection.correlation(psi))
    seen_n = None if outcome is None else rows.observed_n
    with weighted, numpyro.handlers.mask(mask=True if seen_n is None else seen_n > 0):
        outcome_n = numpyro.sample("outcome", family.distribution(eta_n, rows, psi), obs=outcome)
    log_seen_n = selection.log_seen(spec.family, eta_n, outcome_n, index_n, rho, psi, rows)
    with weighted:
        numpyro.sample("observed", selection.Seen(index_n, log_seen_n), obs=seen_n)
    return outcome_n


def _mean(spec: Spec, rows: Rows, equation: Equation | None, psi, values, errors):
    """Mean (n,) of one equation given the variables and errors before it."""
    prefix, blocks = equation.prefix if equation else "", spec.blocks_of(equation)
    if equation is None and spec.head:
        total_n = head.sample(spec.head, rows.columns_nq[:, : blocks[0].stop])
        total_n = total_n + _exogenous(spec, rows, prefix, blocks[1:], psi)
    else:
        total_n = _exogenous(spec, rows, prefix, blocks, psi)
    for i, name in gammas(spec, equation):
        total_n = total_n + numpyro.sample(name, dist.Normal(0.0, spec.gamma_sd)) * values[i]
    for equation_j, error_n in zip(spec.equations, errors, strict=False):
        total_n = total_n + psi[f"{prefix}control{equation_j.suffix}"] * error_n
    return total_n


def _exogenous(spec: Spec, rows: Rows, prefix: str, blocks: tuple[Block, ...], psi):
    """Intercept, blocks and levels of one equation, (n,)."""
    total_n = numpyro.sample(f"{prefix}intercept", dist.Normal(0.0, 1.0)) * jnp.ones(rows.columns_nq.shape[0])
    for block in blocks:
        columns_nk, name = rows.columns_nq[:, block.start : block.stop], prefix + block.name
        sd = sd_of(psi, prefix, block)
        if block.prior == "horseshoe":
            half_cauchy = dist.HalfCauchy(1.0).expand([columns_nk.shape[1]]).to_event(1)
            sd = slab(sd, numpyro.sample(f"{name}.local", half_cauchy))
        total_n = total_n + columns_nk @ _coefficients(name, columns_nk.shape[1], sd)
    for level in spec.levels:
        sd = FLAT_SD if level.absorbed else psi[f"{prefix}{level.name}.scale"]
        total_n = total_n + _coefficients(prefix + level.name, level.count, sd)[rows.levels_nc[:, level.column]]
    return total_n


def _coefficients(name: str, size: int, sd):
    raw = numpyro.sample(f"{name}.raw", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
    return numpyro.deterministic(name, sd * raw)
