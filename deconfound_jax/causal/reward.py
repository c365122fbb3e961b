"""The reward that is left when the confounders' effect is out.

Forms as joint draws, so that the shared error of gamma cancels in differences:
`model_form` for any text, `guarded_form` less what the text does to a second outcome,
`text_form` for logged texts, `residual_form` as a regression target. All are on the link
scale in units of the outcome (logits for counts), centred on the log. Elsewhere:
`orthogonal` (partially linear) and `response` (the outcome's own scale).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from deconfound_jax.causal import head as heads
from deconfound_jax.causal.builders import site_of
from deconfound_jax.causal.families import FAMILIES
from deconfound_jax.causal.parts import contributions, removed, text_intercept
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.predict import doubled_draws, eta_of, linear_predictor
from deconfound_jax.causal.spec import Head, Prepared, Rows, Spec, doubled

if TYPE_CHECKING:
    from deconfound_jax.causal.verdict import Verdict

__all__ = [
    "Reward", "contributions", "guarded_form", "linear_predictor", "model_form", "precision_weight", "prefer",
    "removed", "residual_form", "standard_features", "text_coefficients", "text_form", "working_response",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Reward:
    """Posterior of the reward of n texts: joint draws (s, n)."""

    draws_sn: np.ndarray
    form: str
    converged: bool = True
    verdict: Verdict | None = None  # what the design can answer; None: nobody asked
    scale: str = "link"  # "response": outcome units per exposure, averaged over the log's confounders

    @property
    def mean(self) -> np.ndarray:
        return self.draws_sn.mean(0)

    @property
    def sd(self) -> np.ndarray:
        return self.draws_sn.std(0)

    def lower(self, quantile: float = 0.05, over: np.ndarray | None = None) -> np.ndarray:
        """Lower bound: the posterior quantile, (n,).

        Args:
          over: (n,) for each text the one it would replace: the bound is then that of the
            improvement r_i - r_over[i], in which errors that both share cancel (safe policy
            improvement, Laroche, Trichelair and Tachet des Combes 2019). A text over itself: 0.
        """
        draws_sn = self.draws_sn if over is None else self.draws_sn - self.draws_sn[:, over]
        return np.quantile(draws_sn, quantile, axis=0)

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


def model_form(
    posterior: Posterior, features_nd: np.ndarray, head: Head | None = None, at: Mapping[str, float] | None = None
) -> Reward:
    """f(x) for any texts: r = phi(x)' beta in units of the outcome, link scale.

    Where the text's effect differs with a column c (interaction(text * c)), the reward is
    averaged over the log's c, or taken `at` a value of it: phi(x)' (beta + beta_c c).

    Args:
      posterior: of a fit.
      features_nd: phi(x) of n texts, in the features' own units.
      head: the (init, apply) that the fit had, if it had one.
      at: value of each interacting column, in its own units.

    Raises:
      ValueError: features of another width than the posterior's; a head where the fit
        had none, or none where it had one; `at` a column that the text does not interact with.
    """
    return Reward(
        _effect_of_text(posterior, features_nd, "", head, at or {}), "model", posterior.converged, posterior.verdict
    )


def guarded_form(posterior: Posterior, features_nd: np.ndarray, penalty: float, head: Head | None = None) -> Reward:
    """y1 - penalty y2: the reward less what the text does to the guardrail, joint draws.

    Args:
      penalty: lambda, units of the outcome that one unit of the guardrail is worth.
      head: the (init, apply) that the fit had, if it had one; the guardrail's own f is linear.

    Raises:
      ValueError: the design has no guardrail term.
    """
    guardrail = posterior.design.guardrail
    if guardrail is None:
        raise ValueError(f"guarded_form: add guardrail(column) to the design {str(posterior.design)!r}")
    standard_nd = standard_features(posterior, features_nd)
    harm_sn = text_coefficients(posterior, "guardrail.") @ standard_nd.T
    unit = float(np.ravel(posterior.scaling[f"{site_of(guardrail.column)}.sd"])[0])
    draws_sn = model_form(posterior, features_nd, head).draws_sn - penalty * unit * harm_sn
    return Reward(draws_sn, "guarded", posterior.converged, posterior.verdict)


def text_form(posterior: Posterior, prepared: Prepared, features_nd: np.ndarray, head: Head | None = None) -> Reward:
    """f(x) + kappa (residual - f) for the log's texts: what the words share, and what this text did.

    A text's own deviation is d ~ N(0, tau^2), seen with sampling variance v, so
    d | draw ~ N(kappa (y - eta), tau^2 (1 - kappa)), kappa = tau^2 / (tau^2 + v).
    Counts under `empirical_logit` know v, and tau^2 is what sigma^2 has beyond it
    (below about five clicks a row the empirical logit is biased: use the binomial
    family). Elsewhere the design must hold intercept(text column), whose effects are
    the deviations.

    Args:
      features_nd: of the log's rows, in the log's order.
      head: the (init, apply) that the fit had, if it had one.

    Raises:
      ValueError: where neither holds: the deviation cannot be told from noise.
    """
    model_sn = model_form(posterior, features_nd, head).draws_sn
    sd = float(posterior.scaling["outcome.sd"])
    site = text_intercept(posterior, prepared)
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
    return Reward(model_sn + sd * deviation_sn, "text", posterior.converged, posterior.verdict)


def residual_form(posterior: Posterior, prepared: Prepared) -> tuple[Reward, np.ndarray]:
    """y~ - sum_k [g_k - mean] - gamma (p - mean p) - c0 e, a target for regression, and its weight.

    y~ is the working response (`working_response`): the outcome itself in the normal families.

    Returns:
      The target (s, n) in units of the outcome, and weights (n,) = 1 / (v + var of the removed part).

    Raises:
      ValueError: a selection design, where a seen outcome's noise has not mean zero.
    """
    sd = float(posterior.scaling["outcome.sd"])
    response_su, sampling_su = working_response(posterior, prepared)
    removed_su = removed(posterior, prepared)
    draws = (sd * (response_su - removed_su))[:, prepared.row_of_log_n]
    weight = 1 / (sd**2 * (sampling_su.mean(0) + removed_su.var(0)))
    sharing_n = np.bincount(prepared.row_of_log_n)[prepared.row_of_log_n]  # log rows of one summed row
    reward = Reward(draws, "residual", posterior.converged, posterior.verdict)
    return reward, weight[prepared.row_of_log_n] / sharing_n


def working_response(posterior: Posterior, prepared: Prepared) -> tuple[np.ndarray, np.ndarray]:
    """y~ = eta + (y - mu) d eta / d mu and its sampling variance, (s, u) each, standardised or link units.

    An observed 0 or n clicks is finite here. Source: McCullagh and Nelder (1989), section 2.5.
    """
    if prepared.spec.selection:
        raise ValueError(f"design {str(posterior.design)!r}: a seen outcome is selected; expected the model form")
    with jax.enable_x64(True):
        found = _working(prepared.spec, doubled(prepared.rows), doubled_draws(posterior))
        return tuple(np.asarray(value) for value in found)


@partial(jax.jit, static_argnames="spec")
def _working(spec: Spec, rows: Rows, draws):
    family = FAMILIES[spec.family]
    size_n = rows.exposure_n if family.counts else jnp.ones_like(rows.exposure_n)

    def one(found):
        eta_n = eta_of(spec, rows, found)
        mean_n, slope_n = jax.jvp(
            lambda eta_n: size_n * family.mean(eta_n, rows, found), (eta_n,), (jnp.ones_like(eta_n),)
        )
        variance_n = family.variance(eta_n, rows, found)
        return eta_n + (rows.outcome_n - mean_n) / slope_n, variance_n / slope_n**2

    return jax.lax.map(one, draws)


def text_coefficients(posterior: Posterior, prefix: str = "", at: Mapping[str, float] | None = None) -> np.ndarray:
    """Draws (s, d) of the text's effect on standardised units, of the equation with this prefix.

    With the text's share in what a treatment is expected to be, and the interactions' part
    at a value of their columns.
    """
    found = posterior[f"{prefix}text"]
    for name in posterior.scaling:
        if name.endswith(".expected.text"):
            found = found + posterior[prefix + name.removesuffix(".text")][:, :1] * posterior.scaling[name][None, :]
    for column, value in (at or {}).items():
        block, site = f"{prefix}text:{column}", site_of(column)
        if block not in posterior.draws:
            known = [n.removeprefix("text:") for n in posterior.draws if n.startswith("text:") and "." not in n]
            raise ValueError(f"at: the text interacts with {known}, got {column!r}")
        mean, sd = (float(np.ravel(posterior.scaling[f"{site}.{part}"])[0]) for part in ("mean", "sd"))
        found = found + posterior[block] * (value - mean) / sd
    return found


def standard_features(posterior: Posterior, features_nd: np.ndarray) -> np.ndarray:
    """Features as the fit saw them; ValueError for another width."""
    mean_d, sd_d = posterior.scaling["features.mean"], posterior.scaling["features.sd"]
    features_nd = np.asarray(features_nd, np.float64)
    if features_nd.ndim != 2 or features_nd.shape[1] != len(mean_d):
        raise ValueError(f"features: expected (n, {len(mean_d)}) as in the fit, got {features_nd.shape}")
    return (features_nd - mean_d[None, :]) / sd_d[None, :]


def _effect_of_text(posterior: Posterior, features_nd: np.ndarray, prefix: str, head: Head | None, at) -> np.ndarray:
    standard_nd, sd = standard_features(posterior, features_nd), float(posterior.scaling["outcome.sd"])
    sites = {name: jnp.asarray(v) for name, v in posterior.draws.items() if name.startswith(heads.PREFIX)}
    if bool(sites) != (head is not None):
        wanted = "the head of the fit" if sites else "no head: f is linear"
        raise ValueError(f"head: expected {wanted}, got {head!r}")
    if head is None:
        return sd * (text_coefficients(posterior, prefix, at) @ standard_nd.T)
    standard_nd = jnp.asarray(standard_nd, jnp.float32)
    return sd * np.asarray(jax.lax.map(lambda found: heads.evaluate(head, found, standard_nd), sites), np.float64)


def _sampling_variance(posterior: Posterior, prepared: Prepared) -> np.ndarray:
    """Of each row's empirical logit, (u,), standardised, at the fitted rate.

    1 / (n rate (1 - rate)). At the row's own rate a row with few clicks by chance
    would look noisier than it is, and tau too small.
    """
    sd, mean = float(posterior.scaling["outcome.sd"]), float(posterior.scaling["outcome.mean"])
    eta_u = mean + sd * linear_predictor(posterior, prepared).mean(0)
    return (2 + np.exp(eta_u) + np.exp(-eta_u)) / (prepared.rows.exposure_n * sd**2)
