"""How strong must a violation of an untestable assumption be to overturn a comparison of texts?

An unseen cause of wording and outcome (A5): for a contrast v = phi(a) - phi(b), theta = v'beta has the Riesz
representer alpha = n v'G^-1 phi~ (phi given the terms, G its cross products), and

    |bias| <= S C_Y C_D,   S^2 = E[u^2] E[alpha^2],   C_Y^2 = R^2(y ~ h | phi, terms),
    C_D^2 = r / (1 - r),   r = share of the long representer's variance that h explains

(Chernozhukov, Cinelli, Newey, Sharma and Syrgkanis 2022). For a scalar text this is the bound of Cinelli and Hazlett
(2020), with r the partial R^2 of h with the text. An instrument with an effect of its own (A1): theta is linear in it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.stats

from deconfound_jax.causal.builders import site_of
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.reward import model_form
from deconfound_jax.causal.spec import Prepared
from deconfound_jax.causal.working import Raw, Working, covariance, least_squares, raw, sweep


class Contrast(NamedTuple):
    """A comparison of two (mean) texts and how far an unseen cause can move it, in units of the outcome."""

    estimate: float
    error: float  # standard error, robust
    scale: float  # S

    @property
    def robustness(self) -> float:
        """Strength at which the sign may flip: R^2 of an unseen cause with wording and with outcome, both alike."""
        return robustness_value(self.estimate, self.scale)

    def bias(self, r2_outcome: float, r2_text: float) -> float:
        """Largest |bias| of an unseen cause with these partial R^2."""
        return self.scale * float(np.sqrt(r2_outcome * r2_text / (1 - r2_text)))

    def interval(self, r2_outcome: float, r2_text: float, level: float = 0.95) -> tuple[float, float]:
        """Where the truth lies if no unseen cause is stronger: bias bound and sampling error together."""
        half = self.bias(r2_outcome, r2_text) + float(scipy.stats.norm.ppf(0.5 + level / 2)) * self.error
        return self.estimate - half, self.estimate + half


class Exclusion(NamedTuple):
    """A contrast as a function of an instrument's own effect on the outcome: estimate + slope delta."""

    instrument: str
    estimate: float
    slope: float  # per unit of delta
    unit: float  # delta is in units of y per unit of z; one sd of z is this many units

    @property
    def flip(self) -> float:
        """|delta| at which the sign flips, in units of y per unit of z."""
        return abs(self.estimate / self.slope) if self.slope else np.inf

    def at(self, delta: float) -> float:
        return self.estimate + self.slope * delta

    def under_prior(self, sd: float, error: float) -> tuple[float, float]:
        """Mean and sd of the contrast under delta ~ N(0, sd^2), `error` its sd at delta = 0."""
        return self.estimate, float(np.hypot(error, self.slope * sd))


def robustness_value(estimate: float, scale: float) -> float:
    """RV in [0, 1]: the R^2 = r^2 at which S C_Y C_D reaches the estimate (Cinelli and Hazlett 2020, section 4.2).

    RV = (sqrt(f^4 + 4 f^2) - f^2) / 2,  f = |estimate| / S.
    """
    f = abs(estimate) / max(scale, 1e-300)
    return float(2 * f / (np.sqrt(f**2 + 4) + f))


def e_value(risk_ratio: float) -> float:
    """Risk ratio with treatment and with outcome that an unseen cause needs to explain `risk_ratio` away.

    For a declared binary treatment only. E = RR + sqrt(RR (RR - 1)), RR < 1 inverted (VanderWeele and Ding 2017). At
    a confidence limit that has crossed 1 the answer is 1.
    """
    ratio = max(risk_ratio, 1 / risk_ratio)
    return float(ratio + np.sqrt(ratio * (ratio - 1)))


def risk_ratio(posterior: Posterior, prepared: Prepared, column: str, effect: float) -> float | None:
    """The risk ratio that an effect of a binary treatment amounts to; None for a treatment of more values.

    Normal families: exp(0.91 d), d the effect in sd of the outcome (Chinn 2000). Counts: exp(effect). Rates: from the
    odds ratio at the log's mean rate mu, OR / (1 - mu + mu OR) (Zhang and Yu 1998).
    """
    block = next(b for b in prepared.spec.blocks if b.name == site_of(column))
    values = np.unique(np.asarray(prepared.rows.columns_nq)[:, block.start])
    if len(values) != 2:
        return None
    family, logit = prepared.spec.family, posterior.design.response == "empirical_logit"
    name = f"{site_of(column)}.sd"
    effect = effect * float((values[1] - values[0]) * np.ravel(posterior.scaling[name])[0])  # of the contrast
    if family in ("poisson", "negative_binomial"):
        return float(np.exp(effect))
    if logit or family in ("bernoulli", "binomial", "beta_binomial"):
        mean = posterior.scaling["outcome.mean"] if logit else prepared.rows.offset
        mu, odds = 1 / (1 + np.exp(-float(mean))), np.exp(effect)
        return float(odds / (1 - mu + mu * odds))
    return float(np.exp(0.91 * effect / float(posterior.scaling["outcome.sd"])))


def contrast(posterior: Posterior, prepared: Prepared, difference_d, groups_n=None) -> Contrast:
    """Estimate, error and S of the contrast v of two texts.

    An endogenous confounder's part, gamma p at the posterior mean, is taken off the response first: what is bounded is
    an unseen cause beside those that the instruments take care of. The estimate is not shrunk: the bound is about
    least squares. Features too many for that (over a quarter of the rows) are shrunk as in the posterior.

    Args:
      difference_d: phi(a) - phi(b), in the features' own units.
      groups_n: groups of the log's rows, for the error.
    """
    work, ridge = _unshrunk(*outcome_equation(posterior, prepared, raw(posterior, prepared, groups_n)))
    return _contrast(posterior, work, ridge, np.asarray(difference_d, np.float64) / posterior.scaling["features.sd"])


def treatment_contrast(posterior: Posterior, prepared: Prepared, column: str, groups_n=None) -> Contrast:
    """The same for a declared treatment's effect, in units of the outcome per unit of the treatment."""
    name = site_of(column)
    work, _ = outcome_equation(posterior, prepared, raw(posterior, prepared, groups_n, keep=(name,)))
    v_d = np.zeros(work.text_nd.shape[1])
    v_d[-1] = 1 / float(np.ravel(posterior.scaling[f"{name}.sd"])[0])
    return _contrast(posterior, work, 0.0, v_d)


def ranking_contrast(posterior: Posterior, prepared: Prepared, features_nd: np.ndarray) -> np.ndarray:
    """Mean features of the texts in the upper half of the reward less those in the lower half, (d,).

    Where its sign flips, the better half of the texts is the worse one.
    """
    reward_n = model_form(posterior, features_nd).mean
    upper_n = reward_n > np.median(reward_n)
    if not upper_n.any() or upper_n.all():
        return np.zeros(features_nd.shape[1])
    return features_nd[upper_n].mean(0) - features_nd[~upper_n].mean(0)


def strength_of(posterior: Posterior, prepared: Prepared, hidden_n, difference_d) -> tuple[float, float]:
    """(R^2 with the outcome, r with the representer) of a column (n,) that the design leaves out.

    The true strength of a simulated unseen cause, or a benchmark: how strong is a column one has seen.
    """
    found = raw(posterior, prepared)
    hidden_u = np.bincount(prepared.row_of_log_n, hidden_n) / np.bincount(prepared.row_of_log_n)
    short, ridge = _unshrunk(*outcome_equation(posterior, prepared, found))
    long_raw = found._replace(controls_nq=np.concatenate([found.controls_nq, hidden_u[found.seen_n, None]], 1))
    long, _ = outcome_equation(posterior, prepared, long_raw)
    v_d = np.asarray(difference_d) / posterior.scaling["features.sd"]
    variances = [_residual_variance(work, ridge) for work in (short, long)]
    alphas = [_representer_size(work, ridge, v_d) for work in (short, long)]
    return float(1 - variances[1] / variances[0]), float(max(1 - alphas[0] / alphas[1], 0.0))


def exclusion(posterior: Posterior, prepared: Prepared, difference_d) -> list[Exclusion]:
    """How the contrast moves when an instrument has an effect delta of its own on the outcome (A1 broken).

        beta(delta) = beta(y) - delta beta(z),   beta(.) = text coefficients of two-stage least squares of .

    Exact in the linear model; with a nonlinear link for the working response.
    """
    found = raw(posterior, prepared)
    work = sweep(found, found.frequency_n * found.precision_n)
    right = np.concatenate([work.text_nd, work.instruments_nk], 1)
    p_hat = right @ least_squares(right, work.endogenous_nm, work.weight_n)[0]
    second = np.concatenate([work.text_nd, p_hat], 1)
    left = np.concatenate([work.response_n[:, None], work.instruments_nk], 1)
    d = work.text_nd.shape[1]
    coefficients = least_squares(second, left, work.weight_n)[0][:d]
    sd = float(posterior.scaling["outcome.sd"])
    v_d = np.asarray(difference_d) / posterior.scaling["features.sd"]
    estimate, *slopes = v_d @ coefficients
    names = tuple(dict.fromkeys(z for t in posterior.design.terms if t.kind == "endogenous" for z in t.instruments))
    units = [float(np.ravel(posterior.scaling[f"{site_of(z)}.sd"])[0]) for z in names]
    return [
        Exclusion(z, float(sd * estimate), float(-slope * unit), unit)
        for z, slope, unit in zip(names, slopes, units, strict=True)
    ]


def outcome_equation(posterior: Posterior, prepared: Prepared, found: Raw) -> tuple[Working, float]:
    """The working model with gamma p taken off at the posterior mean, and the ridge of its text coefficients."""
    gamma_m = np.asarray(gamma_means(posterior, prepared))
    found = found._replace(response_n=found.response_n - found.endogenous_nm @ gamma_m)
    return sweep(found, found.frequency_n * found.precision_n), ridge_of(posterior, prepared)


def gamma_means(posterior: Posterior, prepared: Prepared) -> list[float]:
    """Posterior mean of each endogenous coefficient, standardised, in the order of the design."""
    suffixes = [prepared.spec.equations[j].suffix for j in prepared.spec.structural(None)]
    return [float(posterior[f"gamma{suffix}"].mean()) for suffix in suffixes]


def ridge_of(posterior: Posterior, prepared: Prepared) -> float:
    """sigma^2 / scale^2: the posterior's precision of a text coefficient, in units of the working weights."""
    noise = float(np.mean(posterior["sigma"] ** 2)) if prepared.spec.family in ("normal", "student_t") else 1.0
    sd = prepared.spec.blocks[0].sd
    scale = float(np.mean(posterior["text.scale"])) if sd is None else float(sd)
    return noise / max(scale, 1e-9) ** 2


def _unshrunk(work: Working, ridge: float) -> tuple[Working, float]:
    return work, ridge if 4 * work.text_nd.shape[1] > work.rows - work.lost else 0.0


def _solve(work: Working, ridge: float, right: np.ndarray) -> np.ndarray:
    gram = work.text_nd.T @ (work.text_nd * work.weight_n[:, None])
    return np.linalg.solve(gram + max(ridge, 1e-9 * work.rows) * np.eye(len(gram)), right)


def _residual(work: Working, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    beta_d = _solve(work, ridge, work.text_nd.T @ (work.weight_n * work.response_n))
    return beta_d, work.response_n - work.text_nd @ beta_d


def _residual_variance(work: Working, ridge: float) -> float:
    return float(work.weight_n @ _residual(work, ridge)[1] ** 2 / work.weight_n.sum())


def _representer_size(work: Working, ridge: float, v_d) -> float:
    """E[alpha^2] under the weights."""
    lever_d = _solve(work, ridge, v_d)
    alpha_n = work.text_nd @ lever_d * work.weight_n.sum()
    return float(work.weight_n @ alpha_n**2 / work.weight_n.sum())


def _contrast(posterior: Posterior, work: Working, ridge: float, v_d: np.ndarray) -> Contrast:
    sd = float(posterior.scaling["outcome.sd"])
    beta_d, residual_n = _residual(work, ridge)
    influence_n = (work.text_nd @ _solve(work, ridge, v_d)) * work.weight_n * residual_n
    variance, _ = covariance(influence_n[:, None], work, len(beta_d))
    scale = np.sqrt(_residual_variance(work, ridge) * _representer_size(work, ridge, v_d))
    return Contrast(sd * float(v_d @ beta_d), sd * float(np.sqrt(variance[0, 0])), sd * float(scale))
