"""Knobs of the baselines' reward models (`align/baselines`); defaults are the papers' where they have one."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Adam:
    """How a baseline without a closed form is trained on cached features."""

    steps: int = 500
    batch: int = 256  # pairs (or rows) a step; correlations and distances are taken over their texts; 0: all of them
    learning_rate: float = 0.03  # peak; cosine to zero, so that the last batches' noise is averaged out
    group_size: int = 5  # texts of a group, every pair inside it is used; larger groups are cut into several
    seed: int = 0  # of the groups


@dataclasses.dataclass(frozen=True)
class Odin:
    """Two heads, one to hold what moves with the confounder (2402.07319; both strengths 1 there)."""

    orthogonality: float = 1.0  # strength of |<w_Q, w_L>|
    correlation: float = 1.0  # strength of the three correlation terms
    restarts: int = 5  # the loss has poor local minima: which head takes which part is set early
    adam: Adam = Adam()


@dataclasses.dataclass(frozen=True)
class CausalRewards:
    """Rewards distributed alike in every bin of the confounder (2501.09620)."""

    strength: float = 1.0  # lambda; the paper sweeps it and reports each
    bins: int = 5  # quantile bins of a number; a category's levels are its bins
    adam: Adam = Adam()


@dataclasses.dataclass(frozen=True)
class InfoRm:
    """An information bottleneck between features and reward (2402.09345)."""

    beta: float = 0.1  # strength of the KL term, the paper's best
    latent: int = 32  # dimensions of the bottleneck; the paper's 128 stand behind states of 4,096
    adam: Adam = Adam()


@dataclasses.dataclass(frozen=True)
class Rrm:
    """Pairs with texts of other prompts (2409.13156)."""

    adam: Adam = Adam()


@dataclasses.dataclass(frozen=True)
class Lowess:
    """Post-hoc calibration of a fitted reward (2409.17407)."""

    fraction: float = 2 / 3  # share of the rows in a neighbourhood; Cleveland's default
    points: int = 200  # places where the curve is computed, straight lines between; exact for fewer distinct values
    sweeps: int = 5  # of backfitting, where there are several confounders; entangled ones settle slowly


@dataclasses.dataclass(frozen=True)
class CausalRm:
    """Feedback that is noisy and seen for some rows only (2603.18736)."""

    q01: float = 0.0  # P(no click | the user liked the text); has to be known
    q10: float = 0.0  # P(click | the user did not like it)
    clip: float = 0.1  # smallest propensity of being seen
    folds: int = 5  # of the cross-fitted propensity and imputation
    penalty: float = 1.0  # ridge of both, in rows
    adam: Adam = Adam()
