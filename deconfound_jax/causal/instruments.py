"""What the data say about instruments: strength, the set of gamma that they allow, and whether they agree.

Everything is computed from the reduced form, which is well behaved however weak the instruments are:

    p = x'a + z'pi + v           y~ = x'b + z'delta + v'lambda + noise,     delta = pi gamma under exclusion

With rows of unequal information y~ is regressed on (x, z, p) and delta = theta + pi lambda (Magnusson 2010): the same
numbers in the linear model, valid for a working response, too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.stats

from deconfound_jax.causal.working import Raw, covariance, least_squares, sweep

_GRID = 721  # angles at which the Anderson-Rubin statistic is looked at; crossings are then solved for


class Reduced(NamedTuple):
    """Reduced form of k instruments and m endogenous variables, instruments orthonormal given x."""

    delta_k: np.ndarray
    pi_km: np.ndarray
    covariance_jj: np.ndarray  # of (delta, pi column by column), k (1 + m), robust
    exogeneity_k: np.ndarray  # theta: coefficient of z given p; zero where p needs no instrument and exclusion holds
    exogeneity_kk: np.ndarray
    cross_kk: np.ndarray  # (y, p)'P(y, p) and their error covariance, robust on average: (1 + m, 1 + m)
    sigma_kk: np.ndarray
    turn_jk: np.ndarray  # orthonormal instruments = instruments as declared (j) times this
    df: float

    @property
    def instruments(self) -> int:
        return len(self.delta_k)

    @property
    def variables(self) -> int:
        return self.pi_km.shape[1]


class GammaSet(NamedTuple):
    """The Anderson-Rubin confidence set of gamma.

    pieces: intervals of gamma, one endogenous variable; several: one interval each, the projections of the joint set.
    kind: interval, union (bounded, in pieces), unbounded (a ray or two), line, or empty.
    """

    kind: str
    pieces: tuple[tuple[float, float], ...]
    level: float

    @property
    def bounded(self) -> bool:
        return self.kind in ("interval", "union", "empty")


def reduced_form(found: Raw) -> Reduced:
    """The reduced form given text, terms and levels.

    Raises:
      ValueError: a design without an endogenous term.
    """
    if not found.instruments_nk.shape[1]:
        raise ValueError("instruments: expected a design with an endogenous term, got none")
    first = sweep(found, found.frequency_n)
    plain = np.array_equal(found.precision_n, np.ones_like(found.precision_n))
    second = first if plain else sweep(found, found.frequency_n * found.precision_n)
    x, w = first.text_nd, first.weight_n
    z_nk, p_nm = (part - x @ least_squares(x, part, w)[0] for part in (first.instruments_nk, first.endogenous_nm))
    turn_kk = _orthonormal(z_nk, w)
    z_nk = z_nk @ turn_kk
    (k, m), d = (z_nk.shape[1], p_nm.shape[1]), x.shape[1]
    pi_km, lever_nk = least_squares(z_nk, p_nm, w)
    v_nm = p_nm - z_nk @ pi_km

    right = np.concatenate([second.instruments_nk @ turn_kk, second.endogenous_nm, second.text_nd], 1)
    outcome, lever_nq = least_squares(right, second.response_n[:, None], second.weight_n)
    theta_k, lambda_m = outcome[:k, 0], outcome[k : k + m, 0]
    own_nq = lever_nq * (second.response_n - right @ outcome[:, 0])[:, None]
    theta_nk, lambda_nm = own_nq[:, :k], own_nq[:, k : k + m]
    delta_nk = theta_nk + lambda_nm @ pi_km.T + lever_nk * (v_nm @ lambda_m)[:, None]
    influence = np.concatenate([delta_nk, *[lever_nk * v_nm[:, [j]] for j in range(m)]], 1)
    robust, df = covariance(influence, first, d + k)
    both = np.concatenate([(theta_k + pi_km @ lambda_m)[:, None], pi_km], 1)
    # One instrument's (delta, pi): their robust covariance, on average over the instruments, so clusters count.
    sigma = np.einsum("aibi->ab", robust.reshape(1 + m, k, 1 + m, k)) / k
    theta_kk, _ = covariance(theta_nk, second, d + k + m)
    return Reduced(both[:, 0], pi_km, robust, theta_k, theta_kk, both.T @ both, sigma, turn_kk, df)


def effective_f(found: Reduced) -> np.ndarray:
    """Strength of the instruments for each endogenous variable, (m,), robust.

        F_eff = pi'pi / tr(V_pi)        instruments orthonormal (Montiel Olea and Pflueger 2013)

    With several variables each is first cleared of what the instruments give the others, pi_j - Pi_-j kappa, and k
    becomes k - m + 1 (the conditional F of Sanderson and Windmeijer 2016, robust form): two variables driven by one
    instrument have a large F each, and no strength together.
    """
    k, m = found.pi_km.shape
    strength = []
    for j in range(m):
        others = [i for i in range(m) if i != j]
        kappa = np.linalg.lstsq(found.pi_km[:, others], found.pi_km[:, j], rcond=None)[0] if others else np.zeros(0)
        weights = np.zeros(m)
        weights[j], weights[others] = 1.0, -kappa
        left_k = found.pi_km @ weights
        map_kj = np.concatenate([np.zeros((k, k)), np.kron(weights[None, :], np.eye(k))], 1)
        variance = np.trace(map_kj @ found.covariance_jj @ map_kj.T) * (k - m + 1) / k
        strength.append(float(left_k @ left_k / max(variance, 1e-300)))
    return np.asarray(strength)


def cragg_donald(found: Reduced) -> float:
    """Smallest eigenvalue of the first stage's concentration per instrument (Cragg and Donald 1993)."""
    sigma = found.sigma_kk[1:, 1:]
    return float(np.min(_eigenvalues(found.cross_kk[1:, 1:], sigma))) / found.instruments


def anderson_rubin(found: Reduced, level: float = 0.95) -> GammaSet:
    """All gamma at which the instruments have no effect of their own on y~ - gamma p.

        AR(g) = h'Omega(g)^-1 h,   h = delta - pi g,    {g : AR(g) <= k F_k,df(level)}

    One variable: Omega is the robust covariance of h; the set is found over the whole projective line, so that an
    infinite g is a point like others. Several: with errors robust on average (one covariance of y and p for all
    instruments, so clusters count) the set is a quadric, and its projections on each gamma (k degrees of freedom) are
    closed form (Dufour and Taamouti 2005): valid together, and wider than the best
    one by one.

    Source: Anderson and Rubin (1949); Andrews, Stock and Sun (2019).
    """
    k = found.instruments
    critical = k * scipy.stats.f.ppf(level, k, found.df)
    if found.variables > 1:
        return _quadric(found, critical, level)
    return _line(found, critical, level)


def single_instrument_sets(found: Reduced, level: float = 0.95) -> list[GammaSet]:
    """The set by each declared instrument, the others taken as controls: what a rejected overidentification leaves.

    Right for the instruments that are valid, whatever the others do to the outcome.
    """
    sets = []
    for row_k in found.turn_jk:
        map_2k = np.kron(np.eye(2), row_k[None, :])
        pair = map_2k @ found.covariance_jj @ map_2k.T
        one = found._replace(delta_k=row_k[None] @ found.delta_k, pi_km=row_k[None] @ found.pi_km, covariance_jj=pair)
        sets.append(anderson_rubin(one, level))
    return sets


def overidentification(found: Reduced) -> float:
    """p-value of the test that all instruments agree on one gamma; 1 where there are no more than variables.

        J = min over g of AR(g) ~ chi2(k - m)

    One variable: Hansen's J with continuous updating, robust; several: Sargan's test at LIML.
    """
    k, m = found.pi_km.shape
    if k <= m:
        return 1.0
    if m > 1:
        smallest = float(np.min(_eigenvalues(found.cross_kk, found.sigma_kk)))
    else:
        angles, centre, scale = _angles(found)
        values = _statistic(found, centre, scale, angles)
        near = angles[max(values.argmin() - 1, 0)], angles[min(values.argmin() + 1, len(angles) - 1)]
        best = scipy.optimize.minimize_scalar(
            lambda a: _statistic(found, centre, scale, a)[0], bounds=near, method="bounded"
        )
        smallest = min(float(best.fun), float(values.min()))
    return float(scipy.stats.chi2.sf(smallest, k - m))


def endogeneity(found: Reduced) -> float:
    """p-value of the Wu-Hausman test that p needs no instrument, in control-function form, robust.

    theta = pi (gamma - lambda);  the part of theta along pi is zero where p is exogenous ~ chi2(m)
    """
    inverse = np.linalg.pinv(found.exogeneity_kk, hermitian=True)
    along = found.pi_km.T @ inverse @ found.exogeneity_k
    statistic = along @ np.linalg.pinv(found.pi_km.T @ inverse @ found.pi_km, hermitian=True) @ along
    return float(scipy.stats.chi2.sf(statistic, found.variables))


def point_estimate(found: Reduced) -> np.ndarray:
    """Two-stage least squares of gamma, (m,), standardised units."""
    return np.linalg.lstsq(found.pi_km, found.delta_k, rcond=None)[0]


def _orthonormal(z_nk, weight_n):
    """The rotation that makes instruments orthonormal under the weights; directions that vanish given x are dropped."""
    values, vectors = np.linalg.eigh(z_nk.T @ (z_nk * weight_n[:, None]))
    keep = values > 1e-9 * weight_n.sum()
    return vectors[:, keep] / np.sqrt(values[keep])[None, :]


def _eigenvalues(a, b):
    return scipy.linalg.eigh(a, b, eigvals_only=True)


def _angles(found: Reduced):
    """Grid over the projective line: g = centre + scale tan(angle), both ends are infinity."""
    centre = float(point_estimate(found)[0])
    h_variance = _omega(found, centre)
    size = float(found.pi_km[:, 0] @ found.pi_km[:, 0])
    scale = float(np.sqrt(max(found.pi_km[:, 0] @ h_variance @ found.pi_km[:, 0], 1e-300))) / max(size, 1e-12)
    return np.linspace(-np.pi / 2, np.pi / 2, _GRID), centre, max(scale, 1e-9)


def _omega(found: Reduced, g: float):
    """Covariance of delta - pi g."""
    k, v = found.instruments, found.covariance_jj
    cross = v[:k, k : 2 * k]
    return v[:k, :k] - g * (cross + cross.T) + g**2 * v[k : 2 * k, k : 2 * k]


def _statistic(found: Reduced, centre: float, scale: float, angle_g) -> np.ndarray:
    """AR at angles (g,): homogeneous in (cos, sin), so infinity is finite."""
    angle_g = np.atleast_1d(angle_g)
    a, b = np.cos(angle_g), centre * np.cos(angle_g) + scale * np.sin(angle_g)
    k, v = found.instruments, found.covariance_jj
    cross = v[:k, k : 2 * k] + v[k : 2 * k, :k]
    omega_gkk = np.einsum(
        "gc,ckl->gkl", np.stack([a * a, -a * b, b * b], 1), [v[:k, :k], cross, v[k : 2 * k, k : 2 * k]]
    )
    h_gk = a[:, None] * found.delta_k[None, :] - b[:, None] * found.pi_km[None, :, 0]
    return np.einsum("gk,gkl,gl->g", h_gk, np.linalg.pinv(omega_gkk, hermitian=True), h_gk)


def _line(found: Reduced, critical: float, level: float) -> GammaSet:
    angles, centre, scale = _angles(found)

    def excess(angle):
        return _statistic(found, centre, scale, angle)[0] - critical

    inside = _statistic(found, centre, scale, angles) <= critical
    if inside.all() or not inside.any():
        return GammaSet("line", ((-np.inf, np.inf),), level) if inside.all() else GammaSet("empty", (), level)
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    cuts = [centre + scale * np.tan(scipy.optimize.brentq(excess, angles[i], angles[i + 1])) for i in edges]
    if inside[0]:  # infinity is in the set: a ray each side
        cuts = [-np.inf, *cuts, np.inf]
    pieces = tuple((float(a), float(b)) for a, b in zip(cuts[::2], cuts[1::2], strict=True))
    kind = "unbounded" if inside[0] else "interval" if len(pieces) == 1 else "union"
    return GammaSet(kind, pieces, level)


def _quadric(found: Reduced, critical: float, level: float) -> GammaSet:
    matrix = found.cross_kk - critical * found.sigma_kk
    inner, linear = matrix[1:, 1:], matrix[0, 1:]
    m = len(linear)
    if np.linalg.eigvalsh(inner)[0] <= 0:
        return GammaSet("unbounded", ((-np.inf, np.inf),) * m, level)
    inverse = np.linalg.inv(inner)
    centre = inverse @ linear
    radius = linear @ centre - matrix[0, 0]
    if radius < 0:
        return GammaSet("empty", (), level)
    half = np.sqrt(radius * np.diag(inverse))
    return GammaSet("interval", tuple((float(c - h), float(c + h)) for c, h in zip(centre, half, strict=True)), level)
