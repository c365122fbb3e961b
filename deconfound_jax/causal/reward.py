"""The reward that is left when the confounders' effect is out.

Three forms, all as joint draws, so that the shared error of gamma cancels in
differences: `model_form` for any text, `text_form` for logged texts, and
`residual_form` as a regression target. All are on the link scale in units of the
outcome (logits for counts), centred on the log.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.terms import Prepared, site_of


@dataclasses.dataclass(frozen=True)
class Reward:
    """Posterior of the reward of n texts: joint draws (s, n)."""

    draws_sn: np.ndarray
    form: str
    converged: bool = True

    @property
    def mean(self) -> np.ndarray:
        return self.draws_sn.mean(0)

    @property
    def sd(self) -> np.ndarray:
        return self.draws_sn.std(0)

    def lower(self, quantile: float = 0.05) -> np.ndarray:
        """Lower bound: the posterior quantile, (n,)."""
        return np.quantile(self.draws_sn, quantile, axis=0)

    def prefer(self, a, b, tau: float) -> np.ndarray:
        """P(text a is better than text b), see `prefer`. The residual form has no probabilities.

        Raises:
          ValueError: for the residual form, whose draws lack y's own noise.
        """
        if self.form == "residual":
            raise ValueError("prefer: draws of the residual form lack y's own noise; expected form text or model")
        return np.asarray(prefer(self.draws_sn[:, a], self.draws_sn[:, b], tau))


def prefer(first_s, second_s, tau):
    """Soft preference, mean over draws of sigmoid((r_a - r_b) / tau).

    Args:
      first_s, second_s: (s, ...) joint draws of two texts' rewards.
      tau: temperature in reward units; 0 gives the posterior P(a better than b).

    Returns:
      (...) in [0, 1]. A tie at tau = 0 counts one half.
    """
    gap = jnp.asarray(first_s) - jnp.asarray(second_s)
    tau = jnp.asarray(tau, gap.dtype)
    soft = jax.nn.sigmoid(gap / jnp.where(tau > 0, tau, 1.0))
    return jnp.where(tau > 0, soft, 0.5 * (jnp.sign(gap) + 1.0)).mean(0)


def precision_weight(first_s, second_s, tau):
    """tau^2 / (tau^2 + var(r_a - r_b)): how much a pair's label can teach, (...) in (0, 1]."""
    variance = jnp.var(jnp.asarray(first_s) - jnp.asarray(second_s), axis=0)
    return tau**2 / (tau**2 + variance)


def model_form(posterior: Posterior, features_nd: np.ndarray) -> Reward:
    """f(x) for any texts: r = phi(x)' beta in units of the outcome.

    Raises:
      ValueError: features of another width than the posterior's.
    """
    return Reward(_effect_of_text(posterior, features_nd), "model", posterior.converged)


def text_form(posterior: Posterior, prepared: Prepared, features_nd: np.ndarray) -> Reward:
    """f(x) + kappa (residual - f) for the log's texts: what the words share, and what this text did.

    A text's own deviation is d ~ N(0, tau^2), seen with sampling variance v, so
    d | draw ~ N(kappa (y - eta), tau^2 (1 - kappa)), kappa = tau^2 / (tau^2 + v).
    Counts under `empirical_logit` know v, and tau^2 is what sigma^2 has beyond it
    (below about five clicks a row the empirical logit is biased: use the binomial
    family). Elsewhere the design must hold intercept(text column), whose effects are
    the deviations.

    Args:
      features_nd: of the log's rows, in the log's order.

    Raises:
      ValueError: where neither holds: the deviation cannot be told from noise.
    """
    model_sn = _effect_of_text(posterior, features_nd)
    sd = float(posterior.scaling["outcome.sd"])
    site = _text_intercept(posterior, prepared)
    if site is not None:
        level = next(level for level in prepared.spec.levels if level.name == site)
        codes_n = prepared.rows.levels_nc[prepared.row_of_log_n, level.column]
        deviation_sn = posterior[site][:, codes_n]
    elif posterior.design.response == "empirical_logit":
        residual_su = prepared.rows.outcome_n[None, :] - linear_predictor(posterior, prepared)
        precision_u, sampling_u = prepared.rows.precision_n, _sampling_variance(posterior, prepared)
        # sigma^2 is the mean of precision (tau^2 + v) over rows.
        tau2_s = (posterior["sigma"] ** 2 - np.mean(precision_u * sampling_u)) / np.mean(precision_u)
        tau2_s1 = np.maximum(tau2_s, 1e-9)[:, None]
        kappa_su = tau2_s1 / (tau2_s1 + sampling_u[None, :])
        noise_su = np.random.default_rng(0).standard_normal(kappa_su.shape)
        deviation_su = kappa_su * residual_su + np.sqrt(tau2_s1 * (1 - kappa_su)) * noise_su
        deviation_sn = deviation_su[:, prepared.row_of_log_n]
    else:
        raise ValueError(
            f"text_form: add intercept({prepared.scaling['text.column']}) to the design {str(posterior.design)!r}; "
            "without it a text's deviation cannot be told from noise"
        )
    return Reward(model_sn + sd * deviation_sn, "text", posterior.converged)


def residual_form(posterior: Posterior, prepared: Prepared) -> tuple[Reward, np.ndarray]:
    """y~ - sum_k [g_k - mean] - gamma (p - mean p) - c0 e, a target for regression, and its weight.

    For the binomial family y~ is the empirical logit.

    Returns:
      The target (s, n) in units of the outcome, and weights (n,) = 1 / (v + var of the removed part).
    """
    rows, sd = prepared.rows, float(posterior.scaling["outcome.sd"])
    target_u = rows.outcome_n
    if posterior.design.family == "binomial":
        hit, miss = rows.outcome_n + 0.5, rows.exposure_n - rows.outcome_n + 0.5
        target_u, sampling_u = np.log(hit / miss) - rows.offset, 1 / hit + 1 / miss
    else:
        sampling_u = np.mean(posterior["sigma"] ** 2) / rows.precision_n
    removed_su = removed(posterior, prepared)
    draws = (sd * (target_u[None, :] - removed_su))[:, prepared.row_of_log_n]
    weight = 1 / (sd**2 * (sampling_u + removed_su.var(0)))
    return Reward(draws, "residual", posterior.converged), weight[prepared.row_of_log_n]


def contributions(posterior: Posterior, prepared: Prepared) -> dict[str, np.ndarray]:
    """Each confounder's part of eta by row, (s, u), centred over rows, standardised units of y.

    A category's part is its levels and their means; an endogenous confounder's is
    gamma p and the control function together.
    """
    rows, spec, parts = prepared.rows, prepared.spec, {}
    for block in spec.blocks[1:]:
        part_su = posterior[block.name] @ rows.columns_nq[:, block.start : block.stop].T
        _add(parts, block.name.removesuffix(".means"), part_su)
    for level in spec.levels:
        _add(parts, level.name, posterior[level.name][:, rows.levels_nc[:, level.column]])
    if spec.endogenous:
        _add(parts, site_of(posterior.design.endogenous.column), _endogenous_part(posterior, prepared))
    return {name: part - part.mean(1, keepdims=True) for name, part in parts.items()}


def removed(posterior: Posterior, prepared: Prepared) -> np.ndarray:
    """The sum of all confounders' parts (s, u); a text's own deviation stays in the reward."""
    text = _text_intercept(posterior, prepared)
    parts = [part for name, part in contributions(posterior, prepared).items() if name != text]
    return sum(parts, np.zeros((len(posterior["intercept"]), len(prepared.rows.outcome_n))))


def linear_predictor(posterior: Posterior, prepared: Prepared) -> np.ndarray:
    """eta (s, u) on the standardised scale, offset aside."""
    spec = prepared.spec
    eta_su = posterior["intercept"][:, None] + _exogenous(posterior, prepared, spec.blocks, "")
    return eta_su + _endogenous_part(posterior, prepared) if spec.endogenous else eta_su


def _effect_of_text(posterior: Posterior, features_nd: np.ndarray) -> np.ndarray:
    mean_d, sd_d = posterior.scaling["features.mean"], posterior.scaling["features.sd"]
    features_nd = np.asarray(features_nd, np.float64)
    if features_nd.ndim != 2 or features_nd.shape[1] != len(mean_d):
        raise ValueError(f"features: expected (n, {len(mean_d)}) as in the fit, got {features_nd.shape}")
    standard_nd = (features_nd - mean_d[None, :]) / sd_d[None, :]
    return float(posterior.scaling["outcome.sd"]) * (posterior["text"] @ standard_nd.T)


def _endogenous_part(posterior: Posterior, prepared: Prepared) -> np.ndarray:
    rows, spec = prepared.rows, prepared.spec
    first_su = posterior["first.intercept"][:, None] + _exogenous(posterior, prepared, spec.first_blocks, "first.")
    error_su = (rows.endogenous_nm[None, :, 0] - first_su) / posterior["first.sigma"][:, None]
    return posterior["gamma"][:, None] * rows.endogenous_nm[None, :, 0] + posterior["control"][:, None] * error_su


def _exogenous(posterior: Posterior, prepared: Prepared, blocks, prefix: str) -> np.ndarray:
    rows = prepared.rows
    parts = [posterior[prefix + b.name] @ rows.columns_nq[:, b.start : b.stop].T for b in blocks]
    parts += [posterior[prefix + v.name][:, rows.levels_nc[:, v.column]] for v in prepared.spec.levels]
    return sum(parts)


def _sampling_variance(posterior: Posterior, prepared: Prepared) -> np.ndarray:
    """Of each row's empirical logit, (u,), standardised, at the fitted rate.

    1 / (n rate (1 - rate)). At the row's own rate a row with few clicks by chance
    would look noisier than it is, and tau too small.
    """
    sd, mean = float(posterior.scaling["outcome.sd"]), float(posterior.scaling["outcome.mean"])
    eta_u = mean + sd * linear_predictor(posterior, prepared).mean(0)
    return (2 + np.exp(eta_u) + np.exp(-eta_u)) / (prepared.rows.exposure_n * sd**2)


def _text_intercept(posterior: Posterior, prepared: Prepared) -> str | None:
    """The level term on the text column itself, if the design has one (a text is its own level)."""
    texts = prepared.scaling["text.column"]
    found = any(term.kind == "intercept" and term.column == texts for term in posterior.design.terms)
    return site_of(texts) if found else None


def _add(parts: dict, name: str, part: np.ndarray) -> None:
    parts[name] = parts[name] + part if name in parts else part
