"""A Gaussian guide with full covariance over what is global, in coordinates whitened by a start.

Full covariance: intercepts, text, gamma, c0, scales, small terms. Independent: effects of
levels, and a head's parameters. One step size then suits every direction; mean-field
guides are many times too sure here. The data speak of a coefficient, sd times raw, so the
guide is Gaussian there, not in raw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree

from deconfound_jax.causal import head
from deconfound_jax.causal.sites import Draws, coefficient_sds, equations, positive
from deconfound_jax.causal.spec import Spec


class Guide(NamedTuple):
    """A NumPyro guide, the map from white coordinates to the model's sites, and their sampler and density."""

    sample: Callable  # (*args, **kwargs) -> None: the guide
    unpack: Callable  # white -> (sites, log Jacobian)
    draw: Callable  # (params, key) -> white
    log_prob: Callable  # (params, white) -> ()


def gaussian_guide(spec: Spec, start: Draws, shrink: float = 1.0) -> Guide:
    """The guide around the draws of `start`.

    Args:
      start: draws of every site, from `sites.starting_draws`.
      shrink: spread at the beginning, in units of the start's: sqrt(share) where the start saw a share of the rows.
    """
    local = {prefix + level.name for level in spec.levels for prefix, _ in equations(spec)}
    local |= {name for name in start if name.startswith(head.PREFIX)}
    logged = positive(spec)
    flat = {name: np.log(v) if name in logged else np.asarray(v) for name, v in start.items()}
    wide_of, centre, spread = _whitened({n: v for n, v in flat.items() if n not in local})
    narrow_of, middle, side = _whitened({n: v for n, v in flat.items() if n in local}, full=False)
    chol, side = jnp.asarray(shrink * spread, jnp.float32), jnp.asarray(shrink * side, jnp.float32)
    constant = jnp.log(jnp.diagonal(chol)).sum() + jnp.log(side).sum()

    def unpack(white):
        sites = wide_of(centre + chol @ white["wide"]) | narrow_of(middle + side * white["narrow"])
        log_jacobian = constant + sum(sites[name].sum() for name in logged)
        sites = {name: jnp.exp(v) if name in logged else v for name, v in sites.items()}
        for name, sd in coefficient_sds(spec, sites):
            log_jacobian = log_jacobian - jnp.log(jnp.broadcast_to(sd, sites[name].shape)).sum()
            sites[f"{name}.raw"] = sites.pop(name) / sd
        return sites, log_jacobian

    def sample(*args, **kwargs):
        loc = numpyro.param("wide.loc", jnp.zeros(len(centre)))
        tril = numpyro.param("wide.scale_tril", jnp.eye(len(centre)), constraint=dist.constraints.lower_cholesky)
        auxiliary = {"is_auxiliary": True}
        white = {"wide": numpyro.sample("wide", dist.MultivariateNormal(loc, scale_tril=tril), infer=auxiliary)}
        loc = numpyro.param("narrow.loc", jnp.zeros(len(middle)))
        scale = numpyro.param("narrow.scale", jnp.ones(len(middle)), constraint=dist.constraints.positive)
        white["narrow"] = numpyro.sample("narrow", dist.Normal(loc, scale).to_event(1), infer=auxiliary)
        sites, log_jacobian = unpack(white)
        for i, (name, value) in enumerate(sites.items()):
            density = -log_jacobian if i == 0 else 0.0  # the Jacobian once, not once a site
            numpyro.sample(name, dist.Delta(value, log_density=density, event_dim=jnp.ndim(value)))

    return Guide(sample, unpack, _draw, _log_prob)


def _whitened(draws: Draws, full: bool = True):
    """Unravel function, mean (d,), and Cholesky factor (d, d) of the covariance, or sds (d,) where not `full`."""
    _, unravel = ravel_pytree({name: jnp.asarray(v[0], jnp.float32) for name, v in draws.items()})
    size = max([len(v) for v in draws.values()], default=2)
    table = [draws[name].reshape(size, -1) for name in sorted(draws)]
    table = np.concatenate(table, 1) if table else np.zeros((size, 0))
    centre = jnp.asarray(table.mean(0), jnp.float32)
    if not full:
        return unravel, centre, table.std(0) + 1e-6
    covariance, d = np.atleast_2d(np.cov(table.T)), table.shape[1]
    own = np.diag(np.diag(covariance))
    share = d / (d + size)  # fewer draws than directions: nearer to the sds alone
    return unravel, centre, np.linalg.cholesky((1 - share) * covariance + share * own + 1e-10 * np.eye(d))


def _draw(params, key):
    wide, narrow = jax.random.split(key)
    return {
        "wide": params["wide.loc"] + params["wide.scale_tril"] @ jax.random.normal(wide, params["wide.loc"].shape),
        "narrow": params["narrow.loc"] + params["narrow.scale"] * jax.random.normal(narrow, params["narrow.loc"].shape),
    }


def _log_prob(params, white):
    wide = dist.MultivariateNormal(params["wide.loc"], scale_tril=params["wide.scale_tril"]).log_prob(white["wide"])
    return wide + dist.Normal(params["narrow.loc"], params["narrow.scale"]).log_prob(white["narrow"]).sum()
