"""Knobs of reward models: a decoder and a head, trained on the posterior or on outcomes."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A language model that reads off a text's reward."""

    # pairwise: Bradley-Terry on the posterior's preferences; else the likelihood of single texts
    loss: Literal["pairwise", "normal", "binomial", "ordinal"] = "pairwise"
    # reward: the posterior's; outcome: the log's own, confounders' part and all, a baseline (normal, binomial, ordinal)
    target: Literal["reward", "outcome"] = "reward"
    steps: int = 300
    groups: int = 16  # groups of texts a step, every pair inside a group; pointwise: groups x group_size single texts
    group_size: int = 4  # texts of a group; larger groups are cut into several
    learning_rate: float = 5e-4
    label: Literal["soft", "hard"] = "soft"  # P(a better than b) at temperature sd(reward), or 1[mean a > mean b]
    # precision: tau^2 / (tau^2 + var(r_a - r_b)), single texts spread^2 / (spread^2 + var(r))
    weight: Literal["one", "precision"] = "precision"
    margin: float = 0.0  # by which the better text must lead, sd of the mean reward
    centering: float = 0.01  # pull of a pair's rewards to mean zero: their constant is otherwise free
    pooling: Literal["last", "mean", "sum+length"] = "last"  # of hidden states; an export can only be "last"
