"""Fits that work on the NumPyro model itself: NUTS, and SVI with a full covariance.

The guide is Gaussian on the unconstrained scale: full covariance over the global
sites (intercept, text, gamma, c0, scales, small terms), independent over the
effects of levels. It starts at the Laplace fit and is whitened by it, so one step
size suits every direction; mean-field guides are many times too sure here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax.flatten_util import ravel_pytree
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, init_to_value
from numpyro.infer.util import log_density

from deconfound_jax.causal.diagnostics import PARETO_LIMIT, pareto_k, split_rhat
from deconfound_jax.causal.model import causal_model
from deconfound_jax.causal.scalars import scalars, sd_of
from deconfound_jax.causal.spec import FLAT_SD, Prepared, Rows, Spec

Draws = dict[str, np.ndarray]


def fit_nuts(prepared: Prepared, start: Draws, draws: int, seed: int, chains: int = 2, warmup: int = 500):
    """NUTS on the model, started at `start`'s means; converged if R-hat < 1.05 and under 1% divergences."""
    spec, rows = prepared.spec, _single(prepared.rows)
    values = {name: np.float32(v.mean(0)) for name, v in _unscaled(spec, start).items()}
    dense = sum(v.size for v in values.values()) < warmup // 5  # else warm-up cannot learn a full mass matrix
    sampler = MCMC(
        NUTS(causal_model, init_strategy=init_to_value(values=values), target_accept_prob=0.95, dense_mass=dense),
        num_warmup=warmup, num_samples=-(-draws // chains), num_chains=chains,
        chain_method="sequential", progress_bar=False,
    )  # fmt: skip
    sampler.run(jax.random.key(seed), spec, rows, **_observed(spec, rows))
    by_chain = jax.tree.map(np.asarray, sampler.get_samples(group_by_chain=True))
    sites = {name: v.reshape(-1, *v.shape[2:])[:draws] for name, v in by_chain.items() if not name.endswith(".raw")}
    names = [name for name in by_chain if not name.endswith(".raw")]
    rhat = max(
        split_rhat(by_chain[name].reshape(*by_chain[name].shape[:2], -1)[..., i])
        for name in names
        for i in range(by_chain[name][0, 0].size)
    )
    divergent = float(np.mean(sampler.get_extra_fields()["diverging"]))
    return sites, {"rhat": rhat, "divergent": divergent, "converged": bool(rhat < 1.05 and divergent < 0.01)}


def fit_svi(prepared: Prepared, start: Draws, draws: int, seed: int, steps: int = 1500, particles: int = 8):
    """SVI from the Laplace fit; converged if the Pareto k of its importance weights is at most 0.7."""
    spec, rows = prepared.spec, _single(prepared.rows)
    guide, unpack = _guide(spec, start)
    optimizer = optax.adam(optax.exponential_decay(1e-2, steps, 0.01))
    svi = SVI(causal_model, guide, optimizer, Trace_ELBO(num_particles=particles))
    observed = _observed(spec, rows)
    state = svi.init(jax.random.key(seed), spec, rows, **observed)

    def update(state, _):
        return svi.update(state, spec, rows, **observed)

    state, losses = jax.jit(lambda state: jax.lax.scan(update, state, length=steps))(state)
    params = svi.get_params(state)

    def one(key):
        white = _sample_white(params, key)
        sites, log_jacobian = unpack(white)
        log_q = _white_log_prob(params, white) - log_jacobian
        log_p, _ = log_density(causal_model, (spec, rows), observed, sites)
        return sites, log_p - log_q

    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), max(draws, 512))
    sites, log_weight = jax.jit(lambda keys: jax.lax.map(one, keys))(keys)
    k = pareto_k(np.asarray(log_weight, np.float64))
    sites = {name: np.asarray(v)[:draws] for name, v in _scaled(spec, sites).items()}
    finite = bool(np.isfinite(np.asarray(losses)).all())
    return sites, {"pareto_k": k, "elbo": -float(losses[-50:].mean()), "converged": bool(finite and k <= PARETO_LIMIT)}


def _guide(spec: Spec, start: Draws):
    """A NumPyro guide in coordinates whitened by the draws in `start`, and its unpacking."""
    local = {f"{prefix}{level.name}" for level in spec.levels for prefix in _prefixes(spec)}
    positive = {s.name for s in scalars(spec) if s.positive}
    flat = {name: np.log(v) if name in positive else v for name, v in start.items()}
    wide = {name: v for name, v in flat.items() if name not in local}
    narrow = {name: v for name, v in flat.items() if name in local}
    _, wide_of = ravel_pytree({name: jnp.asarray(v[0], jnp.float32) for name, v in wide.items()})
    _, narrow_of = ravel_pytree({name: jnp.asarray(v[0], jnp.float32) for name, v in narrow.items()})
    table = np.concatenate([wide[name].reshape(len(wide[name]), -1) for name in sorted(wide)], 1)
    centre, chol = table.mean(0), np.linalg.cholesky(np.cov(table.T) + 1e-10 * np.eye(table.shape[1]))
    side = [narrow[name].reshape(len(narrow[name]), -1) for name in sorted(narrow)]
    side = np.concatenate(side, 1) if side else np.zeros((2, 0))
    centre, chol, middle, spread = (jnp.asarray(a, jnp.float32) for a in (centre, chol, side.mean(0), side.std(0)))
    constant = jnp.log(jnp.diagonal(chol)).sum() + jnp.log(spread).sum()

    def unpack(white):
        sites = wide_of(centre + chol @ white["wide"]) | narrow_of(middle + spread * white["narrow"])
        log_jacobian = constant + sum(sites[name].sum() for name in positive)
        sites = {name: jnp.exp(v) if name in positive else v for name, v in sites.items()}
        for name, sd in _coefficient_sds(spec, sites):  # the data speak of sd times raw: Gaussian there, not in raw
            log_jacobian = log_jacobian - jnp.log(jnp.broadcast_to(sd, sites[name].shape)).sum()
            sites[f"{name}.raw"] = sites.pop(name) / sd
        return sites, log_jacobian

    def guide(*args, **kwargs):
        d, c = len(centre), len(middle)
        loc = numpyro.param("wide.loc", jnp.zeros(d))
        tril = numpyro.param("wide.scale_tril", jnp.eye(d), constraint=dist.constraints.lower_cholesky)
        auxiliary = {"is_auxiliary": True}
        white = {"wide": numpyro.sample("wide", dist.MultivariateNormal(loc, scale_tril=tril), infer=auxiliary)}
        loc = numpyro.param("narrow.loc", jnp.zeros(c))
        scale = numpyro.param("narrow.scale", jnp.ones(c), constraint=dist.constraints.positive)
        white["narrow"] = numpyro.sample("narrow", dist.Normal(loc, scale).to_event(1), infer=auxiliary)
        sites, log_jacobian = unpack(white)
        for i, (name, value) in enumerate(sites.items()):
            density = -log_jacobian if i == 0 else 0.0  # the Jacobian once, not once a site
            numpyro.sample(name, dist.Delta(value, log_density=density, event_dim=jnp.ndim(value)))

    return guide, unpack


def _sample_white(params, key):
    wide, narrow = jax.random.split(key)
    return {
        "wide": params["wide.loc"] + params["wide.scale_tril"] @ jax.random.normal(wide, params["wide.loc"].shape),
        "narrow": params["narrow.loc"] + params["narrow.scale"] * jax.random.normal(narrow, params["narrow.loc"].shape),
    }


def _white_log_prob(params, white):
    wide = dist.MultivariateNormal(params["wide.loc"], scale_tril=params["wide.scale_tril"]).log_prob(white["wide"])
    return wide + dist.Normal(params["narrow.loc"], params["narrow.scale"]).log_prob(white["narrow"]).sum()


def _coefficient_sds(spec: Spec, sites) -> list[tuple[str, jax.Array]]:
    """Every site that the model writes as sd times raw, with its sd (scalar, or one a coefficient)."""
    found = []
    for equation in (None, *spec.equations):
        prefix = equation.prefix if equation else ""
        found += [(prefix + b.name, jnp.asarray(sd_of(sites, prefix, b))) for b in spec.blocks_of(equation)]
        for level in spec.levels:
            sd = FLAT_SD if level.absorbed else sites[f"{prefix}{level.name}.scale"]
            found.append((prefix + level.name, jnp.asarray(sd)))
    return found


def _prefixes(spec: Spec) -> list[str]:
    return ["", *(equation.prefix for equation in spec.equations)]


def _unscaled(spec: Spec, draws: Draws) -> Draws:
    """Draws of coefficients to draws of the model's own (raw) sites."""

    def one(sites):
        raw = dict(sites)
        for name, sd in _coefficient_sds(spec, sites):
            raw[f"{name}.raw"] = raw.pop(name) / sd
        return raw

    return jax.tree.map(np.asarray, jax.vmap(one)(jax.tree.map(jnp.asarray, draws)))


def _scaled(spec: Spec, draws) -> Draws:
    """The inverse of `_unscaled`."""

    def one(sites):
        found = dict(sites)
        for name, sd in _coefficient_sds(spec, sites):
            found[name] = found.pop(f"{name}.raw") * sd
        return found

    return jax.vmap(one)(draws)


def _observed(spec: Spec, rows: Rows) -> dict:
    observed = {"outcome": rows.outcome_n}
    return observed | ({"endogenous": rows.endogenous_nm} if spec.endogenous else {})


def _single(rows: Rows) -> Rows:
    single = Rows(*[jnp.asarray(field, jnp.float32) for field in rows])
    return single._replace(levels_nc=jnp.asarray(rows.levels_nc, jnp.int32))
