"""What every baseline takes and gives: a log's rows as arrays, and a reward model on cached features."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from deconfound_jax.causal.reward import Reward
from deconfound_jax.causal.terms import empirical_logit, with_missing_indicators
from deconfound_jax.structs import Design, Logs

COUNTS = ("binomial", "beta_binomial")  # families whose outcome counts an exposure
NUMBERS = ("linear", "smooth", "endogenous", "treatment")  # terms of one numeric column
LEVELS = ("category", "intercept")


class NotDefined(ValueError):
    """The data lack what a baseline is made of; the message names both."""

    def __init__(self, baseline: str, missing: str):
        super().__init__(f"{baseline} is not defined here: {missing}")
        self.baseline, self.missing = baseline, missing


class RewardData(NamedTuple):
    """n rows of a log, as the baselines see them. None: the log has no such thing."""

    features_nd: np.ndarray  # phi(x), any scale
    outcome_n: np.ndarray  # a number, or how many of `exposure_n`; anything where `observed_n` is 0
    exposure_n: np.ndarray | None = None
    weight_n: np.ndarray | None = None  # a row counts as so many rows; 0 leaves it out
    numbers_nk: np.ndarray | None = None  # numeric confounders
    levels_nc: np.ndarray | None = None  # categorical confounders, integer codes
    pair_within_n: np.ndarray | None = None  # codes inside which pairs are formed; None: across rows
    group_n: np.ndarray | None = None  # codes of what is split: a test
    prompt_n: np.ndarray | None = None  # codes of what the text answers
    prompt_features_nd: np.ndarray | None = None  # of the prompt, by the encoder of `features_nd`
    observed_n: np.ndarray | None = None  # 1 where the outcome was seen
    propensity_n: np.ndarray | None = None  # P(observed = 1 | row), where it is known


class RewardModel(NamedTuple):
    """A reward on cached features; plain arrays, so it may enter a compiled step.

    r(x) = z'w + tanh(z'V + a)'u,   z = (phi(x) - mean) / sd;  the second part only where h > 0
    """

    mean_d: Any
    sd_d: Any
    linear_d: Any
    hidden_dh: Any
    bias_h: Any
    out_h: Any

    def score(self, features_nd):
        """Rewards (n,) of n texts; only their differences count. ValueError for another width."""
        if np.ndim(features_nd) != 2 or np.shape(features_nd)[1] != len(self.mean_d):
            raise ValueError(f"features: expected (n, {len(self.mean_d)}) as in training, got {np.shape(features_nd)}")
        z_nd = (features_nd - self.mean_d[None, :]) / self.sd_d[None, :]
        if not len(self.out_h):
            return z_nd @ self.linear_d
        return z_nd @ self.linear_d + jnp.tanh(z_nd @ self.hidden_dh + self.bias_h[None, :]) @ self.out_h

    def reward(self, features_nd) -> Reward:
        """The same as a `Reward` of one draw, centred, without a verdict: what recipes take at the caller's risk."""
        score_n = np.asarray(self.score(features_nd), np.float64)
        return Reward((score_n - score_n.mean())[None, :], "model")


def linear_model(mean_d, sd_d, coefficient_d) -> RewardModel:
    """r(x) = w'(phi(x) - mean) / sd."""
    mean_d, sd_d, coefficient_d = (np.asarray(a, np.float64) for a in (mean_d, sd_d, coefficient_d))
    return RewardModel(mean_d, sd_d, coefficient_d, np.zeros((len(mean_d), 0)), np.zeros(0), np.zeros(0))


def reward_data(logs: Logs, features_nd: np.ndarray, design: Design, prompt_features_nd=None) -> RewardData:
    """The rows of a log as baselines see them; its confounders are the columns of the design's terms.

    Numbers are those of linear, smooth, endogenous and treatment terms and the columns of embeddings; levels those of
    category and intercept terms. The rest (interactions, instruments, guardrails, selection) no baseline knows of.

    Args:
      logs: n validated rows.
      features_nd: phi(x) of each row.
      design: its response and family say whether the outcome counts an exposure.
      prompt_features_nd: of each row's prompt, for RRM.

        data = reward_data(logs, features_nd, Design.parse("category(week) + endogenous(popularity ~ z)"))
    """
    roles, columns = logs.roles, logs.columns
    design = with_missing_indicators(design, logs)
    numbers = [np.asarray(columns[t.column], np.float64)[:, None] for t in design.terms if t.kind in NUMBERS]
    numbers += [np.asarray(columns[t.column], np.float64) for t in design.terms if t.kind == "embedding"]
    # intercept(text) is a text's own deviation: nothing that was settled before the text.
    levels = [logs.codes(t.column) for t in design.terms if t.kind in LEVELS and t.column != roles.text]
    counts = design.response == "empirical_logit" or design.family in COUNTS
    within = roles.pair_within or roles.prompt
    data = RewardData(
        np.asarray(features_nd, np.float64),
        logs.outcome_n,
        logs.exposure_n if counts and roles.exposure else None,
        np.asarray(columns[roles.weight], np.float64) if roles.weight else None,
        np.concatenate(numbers, 1) if numbers else None,
        np.stack(levels, 1) if levels else None,
        logs.codes(within) if within else None,
        logs.codes(roles.group) if roles.group else None,
        logs.codes(roles.prompt) if roles.prompt else None,
        prompt_features_nd,
        np.asarray(columns[roles.observed], np.float64) if roles.observed else None,
    )
    return checked(data)


def checked(data: RewardData) -> RewardData:
    """The same data; ValueError names a field of the wrong length or rank, or one that is not finite."""
    n = len(data.features_nd)
    for name, value in data._asdict().items():
        if value is None:
            continue
        rank = 2 if name.endswith(("_nd", "_nk", "_nc")) else 1
        if np.ndim(value) != rank or len(value) != n:
            raise ValueError(f"data.{name}: expected {n} rows and rank {rank}, got shape {np.shape(value)}")
        seen = np.asarray(value)[rows_used(data)] if name == "outcome_n" else np.asarray(value)
        if not np.isfinite(seen).all():
            raise ValueError(f"data.{name}: expected finite numbers, got NaN or infinity")
    if not rows_used(data).any():
        raise ValueError("data.weight_n: expected a row of positive weight with a seen outcome, got none")
    return data


def rows_used(data: RewardData) -> np.ndarray:
    """Rows of positive weight whose outcome was seen, (n,) bool."""
    used_n = np.ones(len(data.features_nd), bool)
    for mask_n in (data.weight_n, data.observed_n):
        used_n &= True if mask_n is None else np.asarray(mask_n) > 0
    return used_n


def weights(data: RewardData) -> np.ndarray:
    """Weight of each row, 0 where it has none or its outcome was not seen, (n,)."""
    weight_n = np.ones(len(data.features_nd)) if data.weight_n is None else np.asarray(data.weight_n, np.float64)
    return weight_n * rows_used(data)


def response(data: RewardData) -> tuple[np.ndarray, np.ndarray | None]:
    """The outcome (n,), counts as empirical logits, and its sampling variance (n,) where counts say it."""
    outcome_n = np.where(rows_used(data), data.outcome_n, 0.0)
    if data.exposure_n is None:
        return outcome_n, None
    return empirical_logit(outcome_n, np.asarray(data.exposure_n, np.float64))


def standardisation(features_nd, weight_n) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean and standard deviation (d,) of the columns; 1 for a column that never varies."""
    features_nd, share_n = np.asarray(features_nd, np.float64), weight_n / weight_n.sum()
    mean_d = share_n @ features_nd
    sd_d = np.sqrt(share_n @ (features_nd - mean_d[None, :]) ** 2)
    return mean_d, np.where(sd_d > 1e-9 * np.maximum(1, np.abs(mean_d)), sd_d, 1.0)


def confounders(data: RewardData, baseline: str) -> np.ndarray:
    """Standardised numbers and level indicators (n, k), one level of each category left out.

    Raises:
      NotDefined: the data name no confounder.
    """
    parts = [] if data.numbers_nk is None else [np.asarray(data.numbers_nk, np.float64)]
    for codes_n in () if data.levels_nc is None else np.asarray(data.levels_nc).T:
        parts.append((codes_n[:, None] == np.unique(codes_n)[None, 1:]).astype(np.float64))
    both_nk = np.concatenate(parts, 1) if parts else np.zeros((len(data.features_nd), 0))
    if not both_nk.shape[1]:
        raise NotDefined(baseline, "the data name no confounder (numbers_nk, levels_nc)")
    mean_k, sd_k = standardisation(both_nk, weights(data))
    return (both_nk - mean_k[None, :]) / sd_k[None, :]
