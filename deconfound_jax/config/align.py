"""Knobs of the training stages."""

from __future__ import annotations

import dataclasses
from typing import Literal

Recipe = Literal["dpo", "kto", "dro", "grpo", "top", "rejection", "rwr", "dr_cpo", "best_of_n"]


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters in place of the whole policy."""

    rank: int = 0  # 0: every parameter is trained
    alpha: float = 16.0  # the product counts alpha / rank
    pattern: str = "_proj$"  # of the kernels' paths


@dataclasses.dataclass(frozen=True)
class Align:
    """What every recipe shares: which one, what it refuses, and how its policy is watched."""

    recipe: Recipe = "dpo"
    lora: Lora = Lora()
    accept_risk: bool = False  # train on a reward whose verdict is not `consistent`
    equal_texts: Literal["refuse", "drop"] = "refuse"  # pairs of two equal texts teach nothing
    dispatch: int = 1  # steps of one call of the compiled graph; divides the steps between evaluations and checkpoints
    accumulate: int = 1  # microbatches a batch is read in, the reference's too: the memory of one, the gradient of all
    evaluate_every: int = 10  # steps between samplings of the policy (KL, reward and share along the way)
    samples: int = 1024  # texts sampled for each of them
    kl: float = 1.0  # nats a text: policies are compared here, by interpolation along their training


@dataclasses.dataclass(frozen=True)
class Sft:
    """Supervised warm-up on the log's texts: the reference policy."""

    steps: int = 300
    batch: int = 128
    learning_rate: float = 3e-3  # peak; linear warm-up over a tenth, cosine to zero


@dataclasses.dataclass(frozen=True)
class Dpo:
    """Direct preference optimisation on the posterior, and its relatives."""

    steps: int = 100
    groups: int = 32  # groups of texts a step; every pair inside a group is used
    group_size: int = 5  # texts of a group; larger groups are cut into several
    loss: Literal["sigmoid", "conservative", "robust", "hinge", "ipo", "simpo", "orpo"] = "sigmoid"
    beta: float = 0.3  # strength of the pull to the reference, per nat
    noise: float = 0.1  # conservative, robust: share of labels that are wrong
    margin: float = 0.5  # simpo: by which the better text must lead, after beta
    strength: float = 0.1  # orpo: weight of the odds ratio beside the likelihood
    normalise: bool = False  # log-ratios a token, so that long texts do not weigh more
    learning_rate: float = 5e-4
    label: Literal["soft", "hard"] = "soft"  # P(a better than b) at temperature sd(reward), or 1[mean a > mean b]
    weight: Literal["one", "precision"] = "one"  # precision: tau^2 / (tau^2 + var(r_a - r_b))


@dataclasses.dataclass(frozen=True)
class Top:
    """Supervised training on the log's best texts, each with the probability that it is one of them."""

    steps: int = 100
    batch: int = 160
    learning_rate: float = 5e-4
    share: float = 0.25  # of the log that counts as best


@dataclasses.dataclass(frozen=True)
class Kto:
    """Kahneman-Tversky optimisation: texts one by one, desirable with the probability of beating the median."""

    steps: int = 100
    batch: int = 160
    beta: float = 0.3
    learning_rate: float = 5e-4


@dataclasses.dataclass(frozen=True)
class Dro:
    """Direct reward optimisation: regression of the reward on the log-ratio, texts one by one."""

    steps: int = 100
    batch: int = 160
    tau: float = 0.3  # reward units (sd of the log's mean reward) of one nat of log-ratio
    learning_rate: float = 5e-4
    weight: Literal["one", "precision"] = "precision"  # precision: spread^2 / (spread^2 + var(r))


@dataclasses.dataclass(frozen=True)
class Grpo:
    """Policy gradient on texts that the policy samples: sample, score, update, in one graph a round."""

    rounds: int = 100
    groups: int = 16  # prompts a round
    group_size: int = 8  # texts of a prompt
    updates: int = 1  # optimizer updates on the texts of one round
    learning_rate: float = 2e-4
    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    kl: float = 0.2  # weight of the divergence from the reference, sd of the log's mean reward a nat
    kl_target: float = 0.0  # nats a text beyond which that weight grows steeply; 0: nowhere
    # of that divergence: k1 is taken from the reward; k3 as a term of the loss has the gradient of KL(ref || policy),
    # which lets a policy leave the reference's texts (Tang & Munos 2506.09477)
    estimator: Literal["k1", "k2", "k3"] = "k1"
    clip: float = 0.2  # the probability ratio stays in [1 - clip, 1 + clip]
    reward: Literal["draw", "mean", "lower"] = "draw"  # of a group: one joint draw, the mean, or the 5% quantile
    temperature: float = 1.0  # of the samples; ratios and divergence take them as drawn at 1, so 1 is unbiased


@dataclasses.dataclass(frozen=True)
class BestOfN:
    """No training: the best of n samples by mean - kappa sd."""

    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    kappa: float = 1.0  # chosen beforehand, not tuned


@dataclasses.dataclass(frozen=True)
class Joint:
    """The causal update inside the preference step."""

    rows: int = 256  # log rows a causal update sees
    warm_rows: int = 4000  # the policy's step size is zero until so many rows have been seen
    causal_updates: int = 4  # updates of the scales a preference update
    causal_learning_rate: float = 0.05  # of those updates (Adam on log scales)
    draws: int = 64  # draws behind a label
