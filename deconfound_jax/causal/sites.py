"""Sites as the model samples them, and as they are read: coefficients are sd times raw.

A sampler works on `<name>.raw` ~ N(0, 1); a posterior holds `<name>` = sd raw. The sd
is a scale, a horseshoe's slab, a Gaussian process's spectral density, or a constant.
Also: where a sampled fit starts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from deconfound_jax.causal import head, selection
from deconfound_jax.causal.model import slab
from deconfound_jax.causal.nested import fit_nested
from deconfound_jax.causal.scalars import scalars, sd_of
from deconfound_jax.causal.spec import FLAT_SD, Prepared, Rows, Spec

Draws = dict[str, np.ndarray]


def coefficient_sds(spec: Spec, found) -> list[tuple[str, jax.Array]]:
    """Every site that the model writes as sd times raw, with its sd (a scalar, or one a coefficient)."""
    pairs = []
    for prefix, blocks in equations(spec):
        for block in blocks:
            sd = jnp.asarray(sd_of(found, prefix, block))
            if block.prior == "horseshoe":
                sd = slab(sd, found[f"{prefix}{block.name}.local"])
            pairs.append((prefix + block.name, sd))
        for level in spec.levels:
            sd = FLAT_SD if level.absorbed else found[f"{prefix}{level.name}.scale"]
            pairs.append((prefix + level.name, jnp.asarray(sd)))
    if spec.head:
        pairs += [(site, jnp.asarray(sd)) for site, (_, sd) in head.leaves(spec.head, spec.blocks[0].stop).items()]
    return pairs


def equations(spec: Spec):
    """(prefix, blocks) of every equation: the outcome's, those before it, the selection's."""
    yield "", spec.blocks[1:] if spec.head else spec.blocks
    for equation in spec.equations:
        yield equation.prefix, spec.blocks_of(equation)
    if spec.selection:
        yield selection.PREFIX, (*spec.blocks, spec.selection.exclusions)


def positive(spec: Spec) -> set[str]:
    """Sites that are sampled on the log scale: positive scalars and a horseshoe's local scales."""
    local = [f"{p}{b.name}.local" for p, blocks in equations(spec) for b in blocks if b.prior == "horseshoe"]
    return {s.name for s in scalars(spec) if s.positive} | set(local)


def to_raw(spec: Spec, found) -> dict:
    """One draw of coefficients as the model's own sites."""
    raw = dict(found)
    for name, sd in coefficient_sds(spec, found):
        raw[f"{name}.raw"] = raw.pop(name) / sd
    return raw


def from_raw(spec: Spec, raw) -> dict:
    """The inverse of `to_raw`; a selection's rho beside its scalar."""
    found = dict(raw)
    for name, sd in coefficient_sds(spec, raw):
        found[name] = found.pop(f"{name}.raw") * sd
    return found | ({"rho": selection.correlation(raw)} if spec.selection else {})


def observed(spec: Spec, rows: Rows) -> dict:
    """What the model is conditioned on."""
    return {"outcome": rows.outcome_n} | ({"endogenous": rows.endogenous_nm} if spec.endogenous else {})


def starting_draws(prepared: Prepared, draws: int, seed: int) -> Draws:
    """Draws of every site of the model from nested fits that lack what those cannot hold.

    A horseshoe starts as a ridge, a head at its own initial parameters beside the fitted
    terms, selection as two fits of their own: the outcome on the rows seen, a probit on all.
    """
    spec, rng = prepared.spec, np.random.default_rng([seed, 2])
    plain = _plain(spec)
    rows = prepared.rows._replace(columns_nq=prepared.rows.columns_nq[:, : plain.first_blocks[-1].stop])
    seen = rows.take(np.flatnonzero(rows.observed_n > 0)) if spec.selection else rows
    found, _ = fit_nested(plain, seen, draws, seed)
    if spec.selection:
        stop = spec.selection.exclusions.stop
        everyone = prepared.rows._replace(
            columns_nq=prepared.rows.columns_nq[:, :stop], outcome_n=prepared.rows.observed_n, offset=0.0
        )
        probit = _plain(spec._replace(family="probit"))
        probit = probit._replace(blocks=(*probit.blocks, spec.selection.exclusions))
        chosen, _ = fit_nested(probit, everyone, draws, seed + 1)
        found |= {selection.PREFIX + name: value for name, value in chosen.items()}
        found["rho.atanh"] = 0.3 * rng.normal(size=draws)
    if spec.head:
        found.pop("text")
        start = head.initial(spec.head, spec.blocks[0].stop, jax.random.key(seed))
        found |= {
            name: np.asarray(value) + 0.1 * rng.normal(size=(draws, *value.shape)) for name, value in start.items()
        }
    known = {s.name for s in scalars(spec)}
    found = {name: value for name, value in found.items() if not name.endswith(".scale") or name in known}
    width = spec.blocks[0].stop
    local = sorted(name for name in positive(spec) if name.endswith(".local"))
    return found | {name: np.exp(0.5 * rng.normal(size=(draws, width))) for name in local}


def _plain(spec: Spec) -> Spec:
    """The nearest design that the nested fits hold: linear f, ridge prior, no selection."""
    blocks = tuple(block._replace(prior="ridge") for block in spec.blocks)
    return spec._replace(blocks=blocks, selection=None, head=None)
