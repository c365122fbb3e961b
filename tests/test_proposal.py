"""The scalars' importance proposal: right densities, and few draws wasted on skewed targets."""

from __future__ import annotations

import numpy as np
from scipy import integrate

from deconfound_jax.causal import proposal
from deconfound_jax.causal.diagnostics import pareto_k

SKEWED = proposal.SplitT(np.array([1.0]), np.array([[0.5]]), np.array([2.0]), np.array([0.7]))


def log_scale_density(x_md):
    """log |N(0, 1)| in each coordinate: what a scale that nothing is known about looks like."""
    return (x_md - 0.5 * np.exp(2 * x_md)).sum(1)


def test_stated_densities_are_those_of_the_draws():
    points, log_density = proposal.draw(SKEWED, 200_000, np.random.default_rng(0))

    def density(x):
        t = (x - 1.0) / (0.5 * (2.0 if x < 1.0 else 0.7))
        return (1 + t**2 / proposal.DEGREES) ** (-0.5 * (proposal.DEGREES + 1))

    total = integrate.quad(density, -np.inf, 1.0)[0] + integrate.quad(density, 1.0, np.inf)[0]
    below = integrate.quad(density, -np.inf, 0.0)[0] / total
    np.testing.assert_allclose((points[:, 0] < 0).mean(), below, atol=0.005)
    np.testing.assert_allclose(np.exp(log_density[:5]), [density(x) for x in points[:5, 0]], rtol=1e-10)


def test_weights_recover_a_skewed_targets_mean_with_little_waste():
    d = 8
    around = proposal.at_mode(np.zeros(d), np.eye(d) / 2)  # the mode and curvature of the density above
    effective = {}
    for name, q in (("symmetric", around), ("two-sided", proposal.widened(around, log_scale_density))):
        points, log_q = proposal.draw(q, 4000, np.random.default_rng(1))
        log_weight = log_scale_density(points) - log_q
        weight = np.exp(log_weight - log_weight.max())
        weight /= weight.sum()
        effective[name] = 1 / np.sum(weight**2)
    assert effective["two-sided"] > 1.5 * effective["symmetric"]
    expected = -0.5 * (np.euler_gamma + np.log(2))  # E log |N(0, 1)|
    np.testing.assert_allclose(weight @ points, expected, atol=0.12)
    assert pareto_k(log_weight) < 0.7
