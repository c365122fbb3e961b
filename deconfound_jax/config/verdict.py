"""The verdict's knobs: one value each for every log and design, with its source."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Checks:
    """Limits of the checks that a verdict rests on."""

    # Family-wise error of all tests that have a p-value (Holm): a sound design is blamed once in a hundred logs.
    family_level: float = 0.01
    set_level: float = 0.95  # of the Anderson-Rubin set
    # Widest Anderson-Rubin set that is still a point: how far the reward of a typical text moves over it, in sd of the
    # reward over the log. One sd reorders about one pair in five.
    tolerance: float = 1.0
    effective_f: float = 23.1  # Montiel Olea and Pflueger 2013: bias of at most 10% of the worst case, one instrument
    overlap_share: float = 0.05  # effective rows of the weights as a share of all, and
    overlap_rows: float = 50.0  # their number: less, and the answer is an extrapolation
    groups: float = 20.0  # effective groups; Cameron and Miller 2015: fewer are few, and cluster-robust errors fail
    prior_share: float = 0.5  # of gamma's posterior sd in its prior's: more, and the answer moves with the prior
    influence: float = 0.8  # correlation of the rewards with and without a group; 0.87 when one of four groups is noise
    pareto_k: float = 0.7  # of importance weights (Vehtari et al. 2024)
    rhat: float = 1.05  # split, rank-normalised; Vehtari et al. 2021 ask 1.01 of a final run
    ess: float = 50.0  # effective draws of the slowest site of NUTS: a 5% quantile needs a few draws below it
    divergent: float = 0.01  # share of NUTS transitions that diverged
