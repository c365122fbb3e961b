"""Outcome families: how a linear predictor becomes an outcome.

A family states its own scalars with their priors, its NumPyro distribution, its
mean on the response scale, and a lower bound of its information (for Newton
steps); derivatives come from the distribution itself. To add one, write a class
with these methods and name it in `FAMILIES` and in `design.FAMILIES`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.special import log_ndtr, ndtr

from deconfound_jax.causal.polygamma import polygammas
from deconfound_jax.causal.spec import Scalar, Spec

_CUT_GAP = 0.5  # prior median of a gap between neighbouring cut points is exp of this less one half, in logits


class Family:
    """What the families share. eta is the linear predictor without the rows' offset."""

    conjugate = False  # True: the conditional posterior of linear effects is closed form
    counts = False  # the outcome is a count of an exposure, rows equal in everything may be summed

    @staticmethod
    def scalars(spec: Spec) -> tuple[Scalar, ...]:
        """The family's own scalars."""
        return ()

    @classmethod
    def distribution(cls, eta_n, rows, psi) -> dist.Distribution:
        """NumPyro distribution of the outcome given eta (n,) and the scalars by name."""
        raise NotImplementedError

    @classmethod
    def mean(cls, eta_n, rows, psi):
        """E[y | eta] per unit of exposure: a rate, a probability, a mean, an expected grade."""
        raise NotImplementedError

    @classmethod
    def variance(cls, eta_n, rows, psi):
        """Var[y | eta] of the row's outcome, on its own scale."""
        return cls.distribution(eta_n, rows, psi).variance

    @classmethod
    def floor(cls, eta_n, rows, psi):
        """Information that a row is granted at least: a tenth of a cheap expected information."""
        return jnp.full_like(eta_n, 1e-6)

    @classmethod
    def curvature(cls, eta_n, rows, psi):
        """First and negated second derivative of the log-likelihood in eta, (n,) each; the second floored."""

        def total(eta_n):
            return cls.distribution(eta_n, rows, psi).log_prob(rows.outcome_n).sum()

        first_n, second_n = jax.jvp(jax.grad(total), (eta_n,), (jnp.ones_like(eta_n),))
        return first_n, jnp.maximum(-second_n, cls.floor(eta_n, rows, psi))

    @classmethod
    def ascent(cls, eta_n, rows, psi, information_n):
        """In place of the information, for steps from afar: so much of it that they do not overshoot."""
        return information_n


class Normal(Family):
    """y ~ N(eta, sigma^2 / precision), on the standardised scale of y."""

    conjugate = True

    @staticmethod
    def scalars(spec: Spec) -> tuple[Scalar, ...]:
        return (Scalar("sigma", dist.HalfNormal(1.0), True),)

    @classmethod
    def distribution(cls, eta_n, rows, psi):
        return dist.Normal(eta_n, psi["sigma"] / jnp.sqrt(rows.precision_n))

    @classmethod
    def mean(cls, eta_n, rows, psi):
        return eta_n


class StudentT(Normal):
    """y ~ t_nu(eta, sigma / sqrt(precision)), nu = 2 + 1 / tail^2: heavy tails, finite variance."""

    conjugate = False

    @staticmethod
    def scalars(spec: Spec) -> tuple[Scalar, ...]:
        return (*Normal.scalars(spec), Scalar("tail", dist.HalfNormal(1.0), True))

    @staticmethod
    def degrees(psi):
        """nu, at most 10^4: that is a normal, and above it the density's log gammas cancel."""
        return 2 + 1 / (psi["tail"] ** 2 + 1e-4)

    @classmethod
    def distribution(cls, eta_n, rows, psi):
        df = cls.degrees(psi)
        return dist.StudentT(df, eta_n, psi["sigma"] / jnp.sqrt(rows.precision_n))

    @classmethod
    def floor(cls, eta_n, rows, psi):
        df = cls.degrees(psi)
        return 0.1 * (df + 1) / (df + 3) * rows.precision_n / psi["sigma"] ** 2

    @classmethod
    def ascent(cls, eta_n, rows, psi, information_n):
        # Iteratively reweighted least squares: a quadratic that lies below the log-likelihood (Lange et al. 1989).
        df = cls.degrees(psi)
        return (df + 1) / (df * psi["sigma"] ** 2 / rows.precision_n + (rows.outcome_n - eta_n) ** 2)


class Binomial(Family):
    """y ~ Binomial(n, sigmoid(offset + eta)); the offset is the log's overall logit."""

    counts = True

    @classmethod
    def distribution(cls, eta_n, rows, psi):
        trials_n = jnp.asarray(rows.exposure_n).astype(int)  # its sampler indexes by them
        return dist.Binomial(total_count=trials_n, logits=rows.offset + eta_n)

    @classmethod
    def mean(cls, eta_n, rows, psi):
        return jax.nn.sigmoid(rows.offset + eta_n)

    @classmethod
    def curvature(cls, eta_n, rows, psi):
        rate_n = cls.mean(eta_n, rows, psi)
        first_n = rows.outcome_n - rows.exposure_n * rate_n
        return first_n, jnp.maximum(rows.exposure_n * rate_n * (1 - rate_n), 1e-9)


class Bernoulli(Binomial):
    """y ~ Bernoulli(sigmoid(offset + eta)): binomial with one trial a row; equal rows are summed."""


class Probit(Family):
    """y ~ Bernoulli(Phi(offset + eta)): of a Bernoulli outcome under selection, whose errors are normal."""

    @classmethod
    def distribution(cls, eta_n, rows, psi):
        index_n = rows.offset + eta_n
        return dist.Bernoulli(logits=log_ndtr(index_n) - log_ndtr(-index_n))

    @classmethod
    def mean(cls, eta_n, rows, psi):
        return ndtr(rows.offset + eta_n)

    @classmethod
    def floor(cls, eta_n, rows, psi):
        return jnp.full_like(eta_n, 1e-9)


class BetaBinomial(Binomial):
    """y ~ BetaBinomial(n, mu k, (1 - mu) k), mu = sigmoid(offset + eta), k = 1 / dispersion^2."""

    @staticmethod
    def scalars(spec: Spec) -> tuple[Scalar, ...]:
        return (Scalar("dispersion", dist.HalfNormal(1.0), True),)

    @classmethod
    def distribution(cls, eta_n, rows, psi):
        concentration = psi["dispersion"] ** -2
        rate_n = cls.mean(eta_n, rows, psi)
        trials_n = jnp.asarray(rows.exposure_n).astype(int)
        return dist.BetaBinomial(rate_n * concentration, (1 - rate_n) * concentration, trials_n)

    @classmethod
    def floor(cls, eta_n, rows, psi):
        rate_n, share = cls.mean(eta_n, rows, psi), 1 / (psi["dispersion"] ** -2 + 1)
        return 0.1 * rows.exposure_n * rate_n * (1 - rate_n) / (1 + (rows.exposure_n - 1) * share) + 1e-9

    @classmethod
    def curvature(cls, eta_n, rows, psi):
        # In closed form: autodiff's trigamma costs five times as much.
        k, rate_n = psi["dispersion"] ** -2, cls.mean(eta_n, rows, psi)
        shape = jnp.stack([rate_n * k, (1 - rate_n) * k])  # of hits and of misses
        counts = jnp.stack([rows.outcome_n, rows.exposure_n - rows.outcome_n])
        (first, second), (first0, second0) = polygammas(shape + counts), polygammas(shape)
        slope_n = k * ((first - first0)[0] - (first - first0)[1])
        bend_n = k**2 * (second - second0).sum(0)
        spread_n = rate_n * (1 - rate_n)
        second_n = bend_n * spread_n**2 + slope_n * spread_n * (1 - 2 * rate_n)
        return slope_n * spread_n, jnp.maximum(-second_n, cls.floor(eta_n, rows, psi))

    @classmethod
    def ascent(cls, eta_n, rows, psi, information_n):
        return jnp.maximum(information_n, 10 * cls.floor(eta_n, rows, psi))  # the expected information


class Poisson(Family):
    """y ~ Poisson(exposure exp(offset + eta)); the offset is the log's overall log rate."""

    counts = True

    @classmethod
    def distribution(cls, eta_n, rows, psi):
        return dist.Poisson(rows.exposure_n * cls.mean(eta_n, rows, psi))

    @classmethod
    def mean(cls, eta_n, rows, psi):
        return jnp.exp(rows.offset + eta_n)

    @classmethod
    def floor(cls, eta_n, rows, psi):
        return jnp.full_like(eta_n, 1e-9)


class NegativeBinomial(Poisson):
    """y ~ NB(mean m = exposure exp(offset + eta), variance m + m^2 dispersion^2)."""

    @staticmethod
    def scalars(spec: Spec) -> tuple[Scalar, ...]:
        return (Scalar("dispersion", dist.HalfNormal(1.0), True),)

    @classmethod
    def distribution(cls, eta_n, rows, psi):
        return dist.NegativeBinomial2(rows.exposure_n * cls.mean(eta_n, rows, psi), psi["dispersion"] ** -2)


class Graded(dist.OrderedLogistic):
    """Proportional odds of grades that are stored as floats, with a log probability that never underflows."""

    def log_prob(self, value):
        # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b))
        grade_n = jnp.asarray(value).astype(int)
        top = self.cutpoints.shape[-1]
        cuts_nk = jnp.broadcast_to(self.cutpoints, (*grade_n.shape, top))
        upper_n, lower_n = (
            jnp.take_along_axis(cuts_nk, jnp.clip(grade_n - back, 0, top - 1)[..., None], -1)[..., 0] - self.predictor
            for back in (0, 1)
        )
        first_n, last_n = grade_n == 0, grade_n == top
        gap_n = jnp.where(first_n | last_n, 1.0, upper_n - lower_n)
        inside_n = jax.nn.log_sigmoid(upper_n) + jax.nn.log_sigmoid(-lower_n) + jnp.log(-jnp.expm1(-gap_n))
        inside_n = jnp.where(first_n, jax.nn.log_sigmoid(upper_n), inside_n)
        return jnp.where(last_n, jax.nn.log_sigmoid(-lower_n), inside_n)


class Ordinal(Family):
    """P(y <= k) = sigmoid(cut_k - eta): proportional odds; cut_0 and the gaps are learned."""

    @staticmethod
    def scalars(spec: Spec) -> tuple[Scalar, ...]:
        gaps = [Scalar(f"cut.gap{k}", dist.LogNormal(_CUT_GAP - 0.5, 0.7), True) for k in range(1, spec.categories - 1)]
        return (*gaps, Scalar("cut.first", dist.Normal(-1.0, 1.5), False))

    @classmethod
    def cuts(cls, psi):
        """Cut points (categories - 1,), increasing."""
        gaps = [psi[f"cut.gap{k}"] for k in range(1, len([n for n in psi if n.startswith("cut.")]))]
        return psi["cut.first"] + jnp.cumsum(jnp.stack([jnp.zeros_like(psi["cut.first"]), *gaps]))

    @classmethod
    def distribution(cls, eta_n, rows, psi):
        return Graded(eta_n, cls.cuts(psi))

    @classmethod
    def mean(cls, eta_n, rows, psi):
        return cls.above(eta_n, psi).sum(-1)

    @classmethod
    def variance(cls, eta_n, rows, psi):
        # E[y^2] = sum_k (2 k + 1) P(y > k)
        above = cls.above(eta_n, psi)
        odd = 2 * jnp.arange(above.shape[-1]) + 1.0
        return above @ odd - above.sum(-1) ** 2

    @classmethod
    def above(cls, eta_n, psi):
        """P(y > k), (..., categories - 1)."""
        return jax.nn.sigmoid(eta_n[..., None] - jnp.expand_dims(cls.cuts(psi), tuple(range(jnp.ndim(eta_n)))))


FAMILIES = {
    "normal": Normal,
    "student_t": StudentT,
    "bernoulli": Bernoulli,
    "probit": Probit,
    "binomial": Binomial,
    "beta_binomial": BetaBinomial,
    "poisson": Poisson,
    "negative_binomial": NegativeBinomial,
    "ordinal": Ordinal,
}
