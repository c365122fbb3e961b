"""Who gives feedback at all: an outcome that is seen only where a second equation says so.

    s = 1[w + u > 0],   corr(u, error of y) = rho,   y seen where s = 1

w is a probit on every exogenous term and on exclusions: columns that move whether the
outcome is seen, and the outcome not at all. Where y is unseen it is integrated out:

    log p = log p(y) + log P(s = 1 | y)   seen        log Phi(-w)   unseen

Sources: Heckman (1979), the likelihood for a normal outcome; Van de Ven and Van Praag
(1981), the bivariate probit with sample selection; Drezner and Wesolowsky (1990), the
bivariate normal distribution function by Gauss-Legendre.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import log_ndtr, ndtr

PREFIX = "selection."  # of the equation's sites
RHO_MAX = 0.999  # 1 - rho^2 stays a number in single precision
_NODES, _WEIGHTS = (0.5 * v for v in np.polynomial.legendre.leggauss(24))
_NODES = _NODES + 0.5  # of the unit interval


class Seen(dist.Distribution):
    """1 where the outcome was seen: P(1 | y) for a row whose y is known, Phi(-w) for one whose y is not.

    Drawn given y, so that outcome and `observed` together follow the joint law.
    """

    support = dist.constraints.boolean

    def __init__(self, index_n, log_seen_n, *, validate_args=None):
        self.index_n, self.log_seen_n = index_n, log_seen_n
        super().__init__(jnp.shape(index_n), validate_args=validate_args)

    def sample(self, key, sample_shape=()):
        shape = sample_shape + self.batch_shape
        return (jnp.log(jax.random.uniform(key, shape)) < self.log_seen_n).astype(self.index_n.dtype)

    def log_prob(self, value):
        return jnp.where(value > 0, self.log_seen_n, log_ndtr(-self.index_n))


def correlation(psi):
    """rho from its unconstrained scalar, whose logistic prior makes it uniform."""
    return RHO_MAX * jnp.tanh(psi["rho.atanh"])


def log_seen(family: str, eta_n, outcome_n, index_n, rho, psi, rows):
    """log P(s = 1 | y), (n,), for a `normal` or a `probit` outcome."""
    if family == "normal":
        error_n = (outcome_n - eta_n) * jnp.sqrt(rows.precision_n) / psi["sigma"]
        return log_ndtr((index_n + rho * error_n) / jnp.sqrt(1 - rho**2))
    sign_n = 2 * outcome_n - 1.0
    side_n = sign_n * (eta_n + rows.offset)
    return log_bvn(index_n, side_n, rho, sign_n) - log_ndtr(side_n)


@jax.custom_jvp
def log_bvn(h, k, rho, sign):
    """log P(U <= h, V <= k) of standard normals with correlation sign rho, broadcast; sign is -1 or 1.

        P(r) = P(r0) + int_{r0}^{r} phi2(h, k; t) dt,   t = sin(angle)

    from r0 = 0 where r >= 0 and from r0 = -1 below: both terms are then positive, so
    nothing cancels and single precision keeps the logarithm. Within 1e-3 of it for
    |rho| <= 0.999, mostly 1e-6; derivatives are in closed form. A scalar rho costs one
    exponential a node and row: sines belong to rho.
    """
    h, k, sign, rho_row = jnp.broadcast_arrays(h, k, sign, rho)
    rising, product = sign * rho_row >= 0, h * k
    up, up_reach = _geometry(jnp.abs(rho), True)
    down, down_reach = _geometry(jnp.abs(rho), False)
    first, second, log_weight = (
        jnp.where(rising[..., None], _align(a, rising), _align(b, rising)) for a, b in zip(up, down, strict=True)
    )
    spread = jnp.where(rising, h * h + k * k, (h + k) ** 2)
    total = jax.nn.logsumexp(product[..., None] * first - spread[..., None] * second + log_weight, axis=-1)
    total = total + jnp.where(rising, up_reach, down_reach)
    corner = ndtr(jnp.minimum(h, k)) - ndtr(-jnp.maximum(h, k))  # P(-1), where it is positive
    start = jnp.where(rising, log_ndtr(h) + log_ndtr(k), jnp.log(jnp.maximum(corner, 1e-37)))
    return jnp.logaddexp(start, total)


@log_bvn.defjvp
def _log_bvn_jvp(primals, tangents):
    h, k, rho, sign = primals
    dh, dk, drho, _ = tangents
    value, rest, r = log_bvn(h, k, rho, sign), 1 - rho**2, sign * rho
    by_h = dist.Normal().log_prob(h) + log_ndtr((k - r * h) / jnp.sqrt(rest))
    by_k = dist.Normal().log_prob(k) + log_ndtr((h - r * k) / jnp.sqrt(rest))
    by_r = -(h * h - 2 * r * h * k + k * k) / (2 * rest) - 0.5 * jnp.log(rest) - jnp.log(2 * jnp.pi)
    return value, jnp.exp(by_h - value) * dh + jnp.exp(by_k - value) * dk + jnp.exp(by_r - value) * sign * drho


def _geometry(size, rising: bool):
    """Exponents' factors of h k and of the spread, log weights, each (..., nodes), and the log of the interval.

    Rising, the angle runs from 0: phi2 ~ exp(h k sin / cos^2 - (h^2 + k^2) / 2 cos^2).
    Falling, it is measured from -1, where phi2 ~ exp(h k / (1 + cos) - (h + k)^2 / 2 sin^2)
    sets in at once when h is near -k: the nodes crowd there.
    """
    nodes, weights = (jnp.asarray(v, size.dtype).reshape((1,) * size.ndim + (-1,)) for v in (_NODES, _WEIGHTS))
    reach = jnp.arcsin(size) if rising else jnp.pi / 2 - jnp.arcsin(size)
    log_reach = jnp.log(jnp.maximum(reach, 1e-30)) - jnp.log(2 * jnp.pi)
    if rising:
        angle = reach[..., None] * nodes
        inverse = 1 / jnp.cos(angle) ** 2
        return (jnp.sin(angle) * inverse, 0.5 * inverse, jnp.log(weights) + 0 * angle), log_reach
    angle = reach[..., None] * nodes**2
    factors = 1 / (1 + jnp.cos(angle)), 0.5 / jnp.sin(angle) ** 2
    return (*factors, jnp.log(2 * weights * nodes) + 0 * angle), log_reach


def _align(nodes, rows):
    """Leading axes of ones, so that (..., nodes) meets (rows..., nodes)."""
    return nodes.reshape((1,) * (rows.ndim + 1 - nodes.ndim) + nodes.shape)
