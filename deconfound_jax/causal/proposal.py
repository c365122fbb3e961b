"""Importance proposals for a few unconstrained scalars: Student-t, with its own width on each side.

The collapsed posterior of log scales is skewed: a scale that the data hardly need
has a long left tail and a short right one. A symmetric proposal wastes a third of
its draws in every such direction; one width a side wastes little (the skewness
correction of Rue, Martino and Chopin 2009, section 6.5).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

DEGREES = 4.0  # of the t: tails heavier than the posterior's


class SplitT(NamedTuple):
    """x = centre + axes (w * t), w the side's width, t iid Student-t: d coordinates."""

    centre_d: np.ndarray
    axes_dd: np.ndarray  # columns
    left_d: np.ndarray  # widths below and above the centre
    right_d: np.ndarray


def at_mode(mode_d: np.ndarray, covariance_dd: np.ndarray) -> SplitT:
    """The proposal of a Laplace approximation, both sides alike."""
    values, vectors = np.linalg.eigh(covariance_dd)
    axes = _oriented(vectors * np.sqrt(np.maximum(values, 1e-12))[None, :])
    ones = np.ones(len(mode_d))
    return SplitT(mode_d, axes, ones, ones)


def widened(proposal: SplitT, log_density: Callable[[np.ndarray], np.ndarray]) -> SplitT:
    """Sets each side's width from how the log density falls along it.

    A normal of width w falls by (step / w)^2 / 2; the widest answer over the steps is
    taken, since a tail that the proposal misses costs more than one it overstates.

    Args:
      log_density: (m, d) points -> (m,).
    """
    d, steps = len(proposal.centre_d), np.array([1.5, 3.0, 5.0, 9.0])
    offsets = (steps[:, None, None] * proposal.axes_dd.T[None]).reshape(-1, d)
    points = np.concatenate([proposal.centre_d[None, :], proposal.centre_d - offsets, proposal.centre_d + offsets])
    value = log_density(points)
    fall = np.maximum(value[0] - value[1:], 1e-3).reshape(2, len(steps), d)
    width = (steps[None, :, None] / np.sqrt(2 * fall)).max(1).clip(0.5, 5.0)
    return proposal._replace(left_d=width[0], right_d=width[1])


def draw(proposal: SplitT, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws (size, d) and their log densities (size,), up to one constant."""
    d = len(proposal.centre_d)
    share_d = proposal.left_d / (proposal.left_d + proposal.right_d)  # continuous density at the centre
    below = rng.uniform(size=(size, d)) < share_d[None, :]
    t = np.abs(rng.standard_t(DEGREES, (size, d)))
    signed = np.where(below, -t * proposal.left_d[None, :], t * proposal.right_d[None, :])
    points = proposal.centre_d[None, :] + signed @ proposal.axes_dd.T
    return points, -0.5 * (DEGREES + 1) * np.log1p(t**2 / DEGREES).sum(1)


def _oriented(axes: np.ndarray) -> np.ndarray:
    """Signs such that the largest entry of each axis is positive: left then means smaller scales."""
    largest = axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])]
    return axes * np.sign(largest)[None, :]
