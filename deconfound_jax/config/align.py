"""Knobs of the training stages."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Sft:
    """Supervised warm-up on the log's texts: the reference policy."""

    steps: int = 300
    batch: int = 128
    learning_rate: float = 3e-3  # peak; linear warm-up over a tenth, cosine to zero


@dataclasses.dataclass(frozen=True)
class Dpo:
    """Direct preference optimisation on the posterior."""

    steps: int = 100
    groups: int = 32  # groups of texts a step; every pair inside a group is used
    group_size: int = 5  # texts of a group; larger groups are cut into several
    beta: float = 0.3  # strength of the pull to the reference
    learning_rate: float = 5e-4
    weight: Literal["one", "precision"] = "one"  # precision: tau^2 / (tau^2 + var(r_a - r_b))
    accept_risk: bool = False  # train on a reward whose verdict is not `consistent`
    evaluate_every: int = 10  # steps between samplings of the policy (share and KL along the way)
    samples: int = 1024  # texts sampled for each of them
    kl: float = 1.0  # nats a text: policies are compared here, by interpolation along their training


@dataclasses.dataclass(frozen=True)
class Joint:
    """The causal update inside the preference step."""

    rows: int = 256  # log rows a causal update sees
    warm_rows: int = 4000  # the policy's step size is zero until so many rows have been seen
    causal_updates: int = 4  # updates of the scales a preference update
    causal_learning_rate: float = 0.05  # of those updates (Adam on log scales)
    draws: int = 64  # draws behind a label
