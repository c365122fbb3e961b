"""Outcome families: how a linear predictor becomes an outcome.

A family states three things about a row with predictor eta, outcome y and
exposure n: its NumPyro distribution, its log-likelihood's first two derivatives
in eta (for Newton steps), and the sampling variance of its working response.
To add one, write a class with these methods and name it in `FAMILIES`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpyro.distributions as dist


class Normal:
    """y ~ N(eta, sigma^2 / precision), on the standardised scale of y."""

    has_sigma = True  # one learned residual scale
    conjugate = True  # the conditional posterior of linear effects is closed form

    @staticmethod
    def distribution(eta_n, rows, sigma):
        return dist.Normal(eta_n, sigma / jnp.sqrt(rows.precision_n))


class Binomial:
    """y ~ Binomial(n, sigmoid(offset + eta)); the offset is the log's overall logit."""

    has_sigma = False
    conjugate = False

    @staticmethod
    def distribution(eta_n, rows, sigma=None):
        trials_n = jnp.asarray(rows.exposure_n).astype(int)  # its sampler indexes by them
        return dist.Binomial(total_count=trials_n, logits=rows.offset + eta_n)

    @staticmethod
    def curvature(eta_n, rows):
        """First and negated second derivative of the log-likelihood in eta, (n,) each."""
        rate_n = jax.nn.sigmoid(rows.offset + eta_n)
        first_n = rows.outcome_n - rows.exposure_n * rate_n
        return first_n, jnp.maximum(rows.exposure_n * rate_n * (1 - rate_n), 1e-9)


FAMILIES = {"normal": Normal, "binomial": Binomial}
