"""Reward models: a decoder with a head, trained on the posterior of a reward, or on outcomes as a baseline.

    stage = reward_model_stage(decoder, config)                      # one compilation for all seeds and rewards
    model = train_reward_model(decoder, stage, reference, texts, reward, config, align, seed, record)
    reward_n = model_rewards(decoder, model, tokens_nl)              # of any texts

The causal layer's f(x) is linear in features that were fixed beforehand; here the states themselves are trained.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deconfound_jax.align.groups import epochs, form_groups
from deconfound_jax.align.losses.dro import reward_precision
from deconfound_jax.align.policy import variables_of
from deconfound_jax.align.reward_model import Outcomes, pairwise_objective, pointwise_objective, read_rewards
from deconfound_jax.causal.reward import Reward
from deconfound_jax.config import Align, RewardModel
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.heads import RewardHead
from deconfound_jax.recipes.preference import labels
from deconfound_jax.recipes.reference import in_chunks
from deconfound_jax.recipes.stage import Record, Stage, train, trained_part
from deconfound_jax.recipes.texts import Texts, check_texts, different_texts, require
from deconfound_jax.structs import Logs, Pairs
from deconfound_jax.train.step import adamw, make_step


class Trained(NamedTuple):
    """A reward model. `variables` are the decoder's, of adapters the base among them."""

    variables: Any
    kernel_d: Any  # of the head
    unit: float  # units of the reward it was trained on, a unit of w . h
    pooling: str


class Target(NamedTuple):
    """What one training run learns from."""

    batch: Callable[[int], Any]  # step -> Pairs or Outcomes
    rows: Callable[[int], np.ndarray]  # step -> the rows in it
    extra: dict[str, Any]  # parameters beside the head's kernel, at their start
    unit: float


def reward_model_stage(decoder: Decoder, config: RewardModel, accumulate: int = 1) -> Stage:
    """The compiled step; targets, labels and weights are arguments, so every reward and seed shares it."""
    check_reward_model(config)
    optimizer = adamw(config.learning_rate, config.steps)
    batch = "reward_model.groups", config.groups
    if config.loss == "pairwise":
        objective = pairwise_objective(decoder, config.pooling)
    else:
        objective = pointwise_objective(decoder, config.loss, config.pooling)
    step = make_step(objective, optimizer, accumulate=accumulate)
    return Stage(step, optimizer, config.steps, batch=batch, accumulate=accumulate).on(None)


def check_reward_model(config: RewardModel) -> None:
    """ValueError for a loss that does not fit its target."""
    fits = {"reward": ("pairwise", "normal"), "outcome": ("normal", "binomial", "ordinal")}[config.target]
    if config.loss not in fits:
        raise ValueError(f"reward_model.loss: expected one of {', '.join(fits)} for target={config.target}, "
                         f"got {config.loss!r}")  # fmt: skip


def train_reward_model(
    decoder: Decoder, stage: Stage, reference: Any, texts: Texts, learned: Reward | Logs, config: RewardModel,
    align: Align, seed: int, record: Record, evaluators=(),
) -> Trained:  # fmt: skip
    """Trains a head on `reference`'s states, and the states, whole or by adapters (`align.lora`).

        pairwise   the posterior's preferences, P(a better than b) at tau = sd of the mean reward over the log
        normal     the posterior's means, at precision 1 / (1 + sd^2), or outcomes
        binomial   hits among exposures;   ordinal   grades in whole numbers

    Args:
      learned: for `target=reward` the posterior's reward of the texts; for `target=outcome` the log they are of.

    Raises:
      ValueError: a reward whose verdict does not allow to train, or outcomes, unless `align.accept_risk`: they carry
        the confounders' part; texts or pairs that teach nothing (`texts`); outcomes that the likelihood does not know.
    """
    check_reward_model(config)
    check_texts(texts, decoder, reference, learned if config.target == "reward" else None)
    if config.target == "outcome":
        target = _of_outcomes(texts, learned, config, align, seed)
    else:
        require(learned, align.accept_risk)
        of = _of_pairs if config.loss == "pairwise" else _of_means
        target = of(texts, learned, config, align, seed)
    params, frozen = trained_part(reference, align.lora, seed)
    key = jax.random.fold_in(jax.random.key(seed), 4)
    blank_bld = jnp.zeros((1, 1, decoder.config.width))
    head = RewardHead(config.pooling).init(key, blank_bld, jnp.ones((1, 1), bool))["params"]
    knobs = {"margin": config.margin, "centering": config.centering}
    state = train(stage, {**params, "reward": {**head, **target.extra}}, frozen | knobs, target.batch, seed, record,
                  evaluators, keys=lambda i: texts.keys(target.rows(i)))  # fmt: skip
    return model_of(state.params, reference if align.lora.rank else None, target.unit, config.pooling)


def model_of(params: Any, base: Any, unit: float, pooling: str) -> Trained:
    """A stage's parameters as a model; `base` where adapters were trained. Evaluators read a state by it."""
    policy = {name: leaf for name, leaf in params.items() if name != "reward"}
    variables = variables_of(policy, {} if base is None else {"base": base})
    return Trained(variables, params["reward"]["kernel"], unit, pooling)


def model_rewards(
    decoder: Decoder, model: Trained, tokens_nl: np.ndarray, prompt_nq: np.ndarray | None = None
) -> np.ndarray:
    """Rewards (n,) of any texts, in units of what the model was trained on; only differences count."""
    arrays = (tokens_nl,) if prompt_nq is None else (tokens_nl, prompt_nq)
    reward_n = in_chunks(_read, decoder, (model.variables, model.kernel_d), arrays, model.pooling)
    return model.unit * reward_n.astype(np.float64)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _read(decoder, params, pooling, tokens_bl, prompt_bq=None):
    return read_rewards(decoder, pooling, *params, tokens_bl[:, None], prompt_bq)[:, 0]


def _of_pairs(texts: Texts, reward: Reward, config: RewardModel, align: Align, seed: int) -> Target:
    groups_mg = form_groups(texts.within_n, len(texts.tokens_nl), config.group_size, seed)
    label_mp, weight_mp = labels(reward, groups_mg, config)
    weight_mp = (weight_mp * different_texts(texts, groups_mg, align.equal_texts == "drop")).astype(np.float32)
    order = epochs(len(groups_mg), config.groups, seed)

    def batch(i: int) -> Pairs:
        pick = order(i)
        rows = groups_mg[pick]
        prompt_bq = None if texts.prompt_nq is None else texts.prompt_nq[rows[:, 0]]
        return Pairs(texts.tokens_nl[rows], None, label_mp[pick], weight_mp[pick], prompt_bq)

    return Target(batch, lambda i: groups_mg[order(i)], {}, float(reward.mean.std()))


def _of_means(texts: Texts, reward: Reward, config: RewardModel, align: Align, seed: int) -> Target:
    unit = float(reward.mean.std()) or 1.0
    mean_n, sd_n = (reward.mean - reward.mean.mean()) / unit, reward.sd / unit
    precision_n = reward_precision(sd_n, 1.0) if config.weight == "precision" else np.ones_like(sd_n)
    return _singles(texts, (mean_n, precision_n, np.ones_like(mean_n)), {"shift": 0.0}, unit, config, seed)


def _of_outcomes(texts: Texts, logs: Logs, config: RewardModel, align: Align, seed: int) -> Target:
    if not align.accept_risk:
        raise ValueError("reward_model.target: outcomes carry the confounders' part; expected 'reward', or "
                         "align.accept_risk=True for a baseline")  # fmt: skip
    if len(logs) != len(texts.tokens_nl):
        raise ValueError(f"outcomes: expected one a text ({len(texts.tokens_nl)}), got {len(logs)}")
    y_n = _seen(logs, texts)
    weight_n = np.asarray(logs.columns[logs.roles.weight], np.float64) if logs.roles.weight else np.ones(len(y_n))
    if config.loss == "binomial":
        return _singles(texts, *_hits(logs, y_n, weight_n, texts), 1.0, config, seed)
    if logs.roles.exposure:
        raise ValueError(f"reward_model.loss: expected binomial for counts of {logs.roles.exposure!r}, "
                         f"got {config.loss!r}")  # fmt: skip
    if config.loss == "ordinal":
        return _singles(texts, *_grades(y_n, weight_n), 1.0, config, seed)
    unit = float(y_n.std()) or 1.0
    columns = (y_n - y_n.mean()) / unit, np.ones_like(y_n), weight_n
    return _singles(texts, columns, {"shift": 0.0}, unit, config, seed)


def _seen(logs: Logs, texts: Texts) -> np.ndarray:
    y_n = logs.outcome_n
    seen_n = np.asarray(logs.columns[logs.roles.observed]) != 0 if logs.roles.observed else True
    if (missing := np.flatnonzero(~(np.isfinite(y_n) & seen_n))).size:  # an unseen outcome may be any number
        raise ValueError(f"roles.outcome: expected a number in every row, rows {texts.named(missing)} have none")
    return y_n


def _hits(logs: Logs, y_n: np.ndarray, weight_n: np.ndarray, texts: Texts):
    """Columns of `Outcomes`, and the log odds of the whole log as a start."""
    shown_n = logs.exposure_n if logs.roles.exposure else np.ones_like(y_n)
    if (wrong := np.flatnonzero(~((y_n >= 0) & (y_n <= shown_n)))).size:
        raise ValueError(f"roles.outcome: expected hits between 0 and the exposures for binomial, rows "
                         f"{texts.named(wrong)} have others")  # fmt: skip
    rate = (weight_n @ y_n + 0.5) / (weight_n @ shown_n + 1)
    # Exposures come in thousands: one on average, the gradient's clip means what it does elsewhere.
    scale = shown_n.mean()
    return (y_n / scale, shown_n / scale, weight_n), {"shift": np.log(rate / (1 - rate))}


def _grades(y_n: np.ndarray, weight_n: np.ndarray):
    """Columns of `Outcomes`, and the cuts that give each grade its share of the log."""
    grades, code_n = np.unique(y_n, return_inverse=True)
    if len(grades) < 2 or (grades != np.round(grades)).any():
        shown = ", ".join(f"{grade:g}" for grade in grades[:5])
        raise ValueError(f"roles.outcome: expected at least two grades in whole numbers for ordinal, got {shown}")
    label_nk = np.eye(len(grades))[code_n]
    below = np.cumsum(label_nk.mean(0))[:-1]
    cuts = np.log(below / (1 - below))
    raw = np.concatenate([cuts[:1], np.log(np.diff(cuts))])
    return (label_nk, np.ones_like(y_n), weight_n), {"cuts": raw}


def _singles(texts: Texts, columns, extra: dict[str, Any], unit: float, config: RewardModel, seed: int) -> Target:
    """`Outcomes` of outcome, size and weight, in the order of an epoch."""
    columns = [np.asarray(column, np.float32) for column in columns]
    order = epochs(len(texts.tokens_nl), config.groups * config.group_size, seed)

    def batch(i: int) -> Outcomes:
        pick = order(i)
        prompt_bq = None if texts.prompt_nq is None else texts.prompt_nq[pick]
        return Outcomes(texts.tokens_nl[pick], *(column[pick] for column in columns), prompt_bq)

    return Target(batch, order, {name: np.float32(value) for name, value in extra.items()}, unit)
