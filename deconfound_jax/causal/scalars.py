"""psi: the scalars of a causal model by name, with priors, on natural and on unconstrained scales.

Scales, the family's own parameters, and what ties the equations together. The
NumPyro model samples them; the nested fits integrate over them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from deconfound_jax.causal.families import FAMILIES
from deconfound_jax.causal.spec import Block, Equation, Scalar, Spec


def scalars(spec: Spec) -> tuple[Scalar, ...]:
    """psi in order: the outcome's scales and family parameters, each equation's, then error correlations."""
    found = _scales(spec, spec.blocks[1:] if spec.head else spec.blocks, "") + list(FAMILIES[spec.family].scalars(spec))
    for equation in spec.equations:
        found += _scales(spec, spec.blocks_of(equation), equation.prefix)
        found.append(Scalar(f"{equation.prefix}sigma", dist.HalfNormal(1.0), True))
    if spec.selection:  # rho = tanh of a logistic variable: uniform
        found += [*_scales(spec, spec.blocks, "selection."), Scalar("rho.atanh", dist.Logistic(0.0, 0.5), False)]
    return (*found, *(Scalar(name, dist.Normal(0.0, spec.control_sd), False) for _, name in controls(spec)))


def controls(spec: Spec) -> tuple[tuple[tuple[int, int], str], ...]:
    """Error correlations: ((row, column) of a lower triangle over equations and outcome, name).

    The coefficient says by how much an error of one sd in the column's equation moves the row's variable.
    """
    prefixes = [e.prefix for e in spec.equations] + [""]
    pairs = [(i, j) for i in range(len(prefixes)) for j in range(i)]
    return tuple(((i, j), f"{prefixes[i]}control{spec.equations[j].suffix}") for i, j in pairs)


def gammas(spec: Spec, equation: Equation | None) -> tuple[tuple[int, str], ...]:
    """Structural coefficients of an equation (None: the outcome's): (column of `endogenous_nm`, site)."""
    prefix = equation.prefix if equation else ""
    return tuple((i, f"{prefix}gamma{spec.equations[i].suffix}") for i in spec.structural(equation))


def error_factor(spec: Spec, psi) -> jax.Array:
    """L (m + 1, m + 1), lower triangular: errors of all variables, outcome last, are L times iid N(0, 1).

    Where the family is not conjugate the outcome's own scale is in the rows' information, and 1 here.
    """
    own = psi["sigma"] if FAMILIES[spec.family].conjugate else jnp.ones(())
    factor = jnp.diag(jnp.stack([*(psi[f"{e.prefix}sigma"] for e in spec.equations), own]))
    for place, name in controls(spec):
        factor = factor.at[place].set(psi[name])
    return factor


def sd_of(psi, prefix: str, block: Block):
    """Prior sd of a block's coefficients: a scalar, or (k,) for a Gaussian process.

    Spectral density of the squared exponential: S(w) = sd^2 sqrt(2 pi) l exp(-(l w)^2 / 2).
    """
    sd = psi[f"{prefix}{block.name}.scale"] if block.sd is None else block.sd
    if not block.spectrum:
        return sd
    length, root_k = psi[f"{prefix}{block.name}.lengthscale"], jnp.asarray(block.spectrum)
    return sd * jnp.sqrt(jnp.sqrt(2 * jnp.pi) * length) * jnp.exp(-0.25 * (length * root_k) ** 2)


def constrain(spec: Spec, raw: jax.Array) -> dict[str, jax.Array]:
    """Unconstrained scalars to natural units, by name: positive ones are exponentials."""
    return {s.name: jnp.exp(raw[i]) if s.positive else raw[i] for i, s in enumerate(scalars(spec))}


def log_prior(spec: Spec, raw: jax.Array) -> jax.Array:
    """Log prior density of the unconstrained scalars, the Jacobian of exp included."""
    terms = [
        s.prior.log_prob(jnp.exp(raw[i])) + raw[i] if s.positive else s.prior.log_prob(raw[i])
        for i, s in enumerate(scalars(spec))
    ]
    return jnp.sum(jnp.stack(terms)) if terms else jnp.zeros(())


def start(spec: Spec) -> list[float]:
    """Where a search for the mode begins, unconstrained: scales at 0.3, the others at their prior's mean."""
    found = []
    for s in scalars(spec):
        half = isinstance(s.prior, dist.HalfNormal)
        found.append(float(jnp.log(0.3)) if half else float(s.prior.loc))
    return found


def _scales(spec: Spec, blocks: tuple[Block, ...], prefix: str) -> list[Scalar]:
    found = []
    for block in blocks:
        if block.sd is None:
            found.append(Scalar(f"{prefix}{block.name}.scale", dist.HalfNormal(1.0), True))
        if block.spectrum:  # on the standardised column: bumps narrower than 0.2 sd are not expected
            found.append(Scalar(f"{prefix}{block.name}.lengthscale", dist.LogNormal(0.0, 0.7), True))
    levels = [v for v in spec.levels if not v.absorbed]
    return found + [Scalar(f"{prefix}{v.name}.scale", dist.HalfNormal(1.0), True) for v in levels]
