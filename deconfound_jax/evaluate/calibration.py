"""Are stated probabilities right? Predictions in bins beside what was observed."""

from __future__ import annotations

from typing import NamedTuple

import chex
import numpy as np


class Calibration(NamedTuple):
    """A bin of predictions: its lower edge, mean prediction, share observed, count (b,)."""

    edge_b: np.ndarray
    predicted_b: np.ndarray
    observed_b: np.ndarray
    count_b: np.ndarray


def calibration(prefer_p: np.ndarray, observed_sign_p: np.ndarray, bins: int = 10) -> Calibration:
    """Predicted P(first better) against the share observed better, in bins of equal width.

    A sign of 0 counts half; empty bins are left out.
    """
    prefer_p, observed_p = np.asarray(prefer_p, np.float64), (1 + np.sign(observed_sign_p)) / 2
    chex.assert_equal_shape([prefer_p, observed_p])
    if prefer_p.size and not (prefer_p.min() >= 0 and prefer_p.max() <= 1):
        raise ValueError(f"prefer_p: expected probabilities, got {prefer_p.min()} to {prefer_p.max()}")
    bin_p = np.minimum((prefer_p * bins).astype(int), bins - 1)
    count_b = np.bincount(bin_p, minlength=bins)
    full_b = count_b > 0
    predicted_b, observed_b = (np.bincount(bin_p, weights=w, minlength=bins)[full_b] for w in (prefer_p, observed_p))
    count_b = count_b[full_b]
    return Calibration(np.flatnonzero(full_b) / bins, predicted_b / count_b, observed_b / count_b, count_b)
