"""Knobs of recipes that learn from the reference's texts, logged or drawn, by their weight or their rank."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Rejection:
    """Rejection-sampling SFT: maximum likelihood of the best of n samples of the reference."""

    steps: int = 100
    batch: int = 32  # best texts a step; batch x n are drawn for them, anew each step
    n: int = 8  # samples that the best is chosen of; the policy's KL tends to at most log n - (n - 1) / n
    kappa: float = 1.0  # by mean - kappa sd of the posterior; chosen beforehand, not tuned
    temperature: float = 1.0  # of the samples
    learning_rate: float = 5e-4


@dataclasses.dataclass(frozen=True)
class Rwr:
    """Outcome-weighted SFT (reward-weighted regression): all the log's texts, by exp(reward / tau)."""

    steps: int = 100
    batch: int = 160
    tau: float = 1.0  # sd of the log's mean reward; small picks few texts
    learning_rate: float = 5e-4


@dataclasses.dataclass(frozen=True)
class DrCpo:
    """Doubly robust causal preference optimisation: logged outcomes by importance, fresh texts by the posterior."""

    steps: int = 100
    batch: int = 64  # logged texts a step, and as many fresh ones of the reference
    ceiling: float = 3.0  # nats; a text's probability ratio counts at most exp(ceiling)
    learning_rate: float = 2e-4
