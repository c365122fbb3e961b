"""Baselines in closed form: naive, covariate, residual and projection, fitted by the causal layer itself.

So they have its standardisation, its priors and its learned scales: what differs from the deconfounded reward is the
design, not the care.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from deconfound_jax.align.baselines.data import (
    NotDefined,
    RewardData,
    RewardModel,
    checked,
    confounders,
    linear_model,
    rows_used,
    standardisation,
    weights,
)
from deconfound_jax.causal.fit import fit_prepared
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.reward import residual_form, text_coefficients
from deconfound_jax.causal.spec import Prepared
from deconfound_jax.causal.terms import prepare
from deconfound_jax.config import Causal
from deconfound_jax.structs import Design, Logs, Roles, Term


def of_posterior(posterior: Posterior) -> RewardModel:
    """The reward model of a posterior whose f is linear: its mean coefficients, outcome units on the link scale.

        r(x) = E[beta | log]'z(x);   where the effect differs with a column, averaged over the log's

    The route of a caller who has a log and a design:

        naive = of_posterior(fit(logs, features_nd, config, design.without_terms()))
        covariate = of_posterior(fit(logs, features_nd, config, design.without_instruments()))

    Raises:
      ValueError: f is a head.
    """
    if any(name.startswith("head.") for name in posterior.draws):
        raise ValueError("posterior: expected a linear f, got a head; use causal.reward.model_form")
    coefficient_d = float(posterior.scaling["outcome.sd"]) * text_coefficients(posterior).mean(0)
    return linear_model(posterior.scaling["features.mean"], posterior.scaling["features.sd"], coefficient_d)


def naive(data: RewardData, config: Causal | None = None, key=None) -> RewardModel:
    """The outcome on the text alone.

        y = f(x) + noise,   r = f

    Args:
      data: rows; counts enter as empirical logits, weighted by their precision.
      config: priors and fit; its design and family are not read.
      key: not used: the fit draws by `config.seed`.
    """
    return of_posterior(_fitted(checked(data), data.features_nd, False, config)[0])


def covariate(data: RewardData, config: Causal | None = None, key=None) -> RewardModel:
    """The confounders as inputs whose effect is dropped at use.

        y = f(x) + g'c + levels + noise,   r = f

    Biased where c shares an unseen cause with y (docs/method.md, section 1: rho).

    Raises:
      NotDefined: no confounder.
    """
    confounders(checked(data), "covariate")
    return of_posterior(_fitted(data, data.features_nd, True, config)[0])


def residual(data: RewardData, config: Causal | None = None, key=None) -> RewardModel:
    """What a regression on the confounders alone leaves, on the text.

        y = g'c + levels + noise;   y - E[y | c] = f(x) + noise,   r = f

    Raises:
      NotDefined: no confounder.
    """
    confounders(checked(data), "residual")
    posterior, prepared = _fitted(data, np.zeros((len(data.features_nd), 0)), True, config)
    reward, precision_m = residual_form(posterior, prepared)
    used_n = rows_used(data)
    target_n, weight_n = np.zeros(len(used_n)), np.zeros(len(used_n))
    target_n[used_n] = reward.mean
    weight_n[used_n] = weights(data)[used_n] * (precision_m / precision_m.mean())
    rest = RewardData(data.features_nd, target_n, weight_n=weight_n)
    return of_posterior(_fitted(rest, rest.features_nd, False, config)[0])


def projection(data: RewardData, config: Causal | None = None, key=None) -> RewardModel:
    """The naive reward less every direction that covaries with a confounder: a closed-form relative of ODIN.

        w = b - Q Q'b,   Q an orthonormal basis of Cov(z, c),   so Cov(z'w, c) = 0

    Raises:
      NotDefined: no confounder, or so many that Cov(z, c) spans all features and no direction is left.
    """
    control_nk, weight_n = confounders(checked(data), "projection"), weights(data)
    model = naive(data, config)
    z_nd = (data.features_nd - model.mean_d[None, :]) / model.sd_d[None, :]
    left_dd, size_d, _ = np.linalg.svd((weight_n[:, None] * z_nd).T @ control_nk / weight_n.sum(), full_matrices=False)
    basis_dq = left_dd[:, size_d > 1e-9]
    if basis_dq.shape[1] >= z_nd.shape[1]:
        raise NotDefined(
            "projection", f"{control_nk.shape[1]} columns of confounders span all {z_nd.shape[1]} features"
        )
    return model._replace(linear_d=model.linear_d - basis_dq @ (basis_dq.T @ model.linear_d))


def on_target(features_nd, target_n, weight_n, config: Causal | None = None) -> RewardModel:
    """The same f(x) fitted to a target: how a score that was changed row by row becomes a reward of any text."""
    data = RewardData(features_nd, target_n, weight_n=weight_n)
    if np.ptp(target_n[weight_n > 0]) <= 1e-9:  # nothing is left to learn
        return linear_model(*standardisation(features_nd, weight_n), np.zeros(np.shape(features_nd)[1]))
    return naive(data, config)


def _fitted(data: RewardData, features_nd, with_terms: bool, config: Causal | None) -> tuple[Posterior, Prepared]:
    """Posterior of the used rows under linear terms for numbers and category terms for levels."""
    config = dataclasses.replace(config or Causal(), verdict=False)
    used_n = rows_used(data)
    columns = {"words": np.arange(used_n.sum()).astype(str).astype(object), "y": data.outcome_n[used_n]}
    roles, terms = {"text": "words", "outcome": "y"}, []
    if data.exposure_n is not None:
        columns["shown"], roles["exposure"] = np.asarray(data.exposure_n, np.float64)[used_n], "shown"
    if data.weight_n is not None:
        columns["rows"], roles["weight"] = np.asarray(data.weight_n, np.float64)[used_n], "rows"
    if with_terms:
        for k, values_n in enumerate(() if data.numbers_nk is None else data.numbers_nk.T):
            columns[f"number{k}"] = np.asarray(values_n, np.float64)[used_n]
            terms.append(Term("linear", f"number{k}"))
        for k, codes_n in enumerate(() if data.levels_nc is None else data.levels_nc.T):
            columns[f"level{k}"] = codes_n[used_n].astype(str).astype(object)
            # Without a text there are no means of it for a category to set beside its levels.
            terms.append(Term("category" if np.shape(features_nd)[1] else "intercept", f"level{k}"))
    response = "identity" if data.exposure_n is None else "empirical_logit"
    design = Design("normal", tuple(terms), response)
    logs = Logs.of(columns, Roles(**roles))
    prepared = prepare(logs, np.asarray(features_nd, np.float64)[used_n], design, config)
    return fit_prepared(prepared, design, config), prepared
