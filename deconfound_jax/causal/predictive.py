"""Posterior predictive checks: does the model make data like the log's?

Realised discrepancies T(y, theta_s) against T(y_rep, theta_s), y_rep drawn from the family at draw s (Gelman, Meng and
Stern 1996), through the residual r = (y - mean) / sd of each row.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from deconfound_jax.causal.families import FAMILIES
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.predict import linear_predictor
from deconfound_jax.causal.scalars import scalars
from deconfound_jax.causal.spec import Prepared, doubled
from deconfound_jax.causal.working import groups_of

_DRAWS = 200
_ROWS = 20_000  # a random part of a longer log: a misfit that it hides moves nothing


class Discrepancy(NamedTuple):
    """A statistic of the log beside its replications."""

    name: str
    observed: float  # mean over draws
    replicated: float
    p_value: float  # two-sided, normal approximation to T(y) - T(y_rep): finer than the number of draws


def predictive_checks(posterior: Posterior, prepared: Prepared, groups_n=None, seed: int = 0) -> list[Discrepancy]:
    """Replicates the outcome at draws of the posterior and compares what the family takes for granted.

    Normal and t: skewness, tails, spread that grows with the prediction. Counts: overdispersion, rows without any,
    tails. Ordinal: dispersion, spread. With groups: variance of the groups' mean residuals.

    Args:
      groups_n: groups of the log's rows, or None.
      seed: of replications, and of the rows looked at in a long log.
    """
    rng = np.random.default_rng(seed)
    seen = np.flatnonzero(np.asarray(prepared.rows.observed_n) > 0)
    pick = np.sort(rng.choice(seen, _ROWS, replace=False)) if len(seen) > _ROWS else seen
    group_n = None
    if groups_n is not None:
        group_n = np.unique(groups_of(prepared, groups_n)[pick], return_inverse=True)[1]
    draws = {name: v[: min(_DRAWS, len(v))] for name, v in posterior.draws.items()}
    part = prepared._replace(rows=prepared.rows.take(pick))
    rows, family = part.rows, prepared.spec.family
    eta_sn = linear_predictor(dataclasses.replace(posterior, draws=draws), part)
    with jax.enable_x64(True):
        psi_s = {s.name: np.asarray(draws[s.name], np.float64) for s in scalars(prepared.spec)}
        made = _replicate(family, doubled(rows), eta_sn, psi_s, seed)
    replicated_sn, mean_sn, sd_sn = (np.asarray(v, np.float64) for v in made)
    y_n = np.asarray(rows.outcome_n, np.float64)
    observed_sn = np.broadcast_to(y_n[None, :], replicated_sn.shape)
    found = []
    for name, statistic in _statistics(family, mean_sn, sd_sn, np.asarray(rows.exposure_n), group_n).items():
        a, b = statistic(observed_sn), statistic(replicated_sn)
        z = (a - b).mean() / max((a - b).std(), 1e-300)
        found.append(Discrepancy(name, float(a.mean()), float(b.mean()), float(2 * scipy.stats.norm.sf(abs(z)))))
    return found


@partial(jax.jit, static_argnames="family")
def _replicate(family, rows, eta_sn, psi_s, seed):
    """y_rep, mean and sd of every row at every draw."""
    law = FAMILIES[family]

    def one(draw):
        eta_n, psi, key = draw
        size_n = rows.exposure_n if law.counts else 1.0
        made_n = law.distribution(eta_n, rows, psi).sample(key)
        return made_n, size_n * law.mean(eta_n, rows, psi), jnp.sqrt(law.variance(eta_n, rows, psi))

    return jax.lax.map(one, (eta_sn, psi_s, jax.random.split(jax.random.key(seed), len(eta_sn))))


def _statistics(family, mean_sn, sd_sn, exposure_n, group_n):
    """Name -> function of outcomes (s, n), to (s,)."""

    def residual(y_sn):
        return (y_sn - mean_sn) / np.maximum(sd_sn, 1e-12)

    def moment(power):
        return lambda y_sn: (residual(y_sn) ** power).mean(1)

    def spread(y_sn):  # covariance of squared residual and prediction
        centred_sn = mean_sn - mean_sn.mean(1, keepdims=True)
        return (residual(y_sn) ** 2 * centred_sn).mean(1) / np.maximum(centred_sn.std(1), 1e-12)

    if family == "ordinal":  # the cut points fit every grade's share: what is left is the spread around them
        found = {"dispersion": moment(2), "spread": spread}
    elif family in ("normal", "student_t"):
        found = {"skewness": moment(3), "tails": moment(4), "spread": spread}
    else:
        found = {"dispersion": moment(2), "zeros": lambda y: (y == 0).mean(1), "tails": moment(4)}
        if family == "bernoulli" and np.all(exposure_n == 1):
            found = {"dispersion": moment(2)}
    if group_n is not None:
        size_g = np.bincount(group_n)

        def by_group(y_sn):
            sums = np.stack([np.bincount(group_n, r_n) for r_n in residual(y_sn)])
            return (sums**2 / size_g[None, :]).mean(1)

        found["groups"] = by_group
    return found
