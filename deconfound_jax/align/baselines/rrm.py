"""RRM: pairs with texts of other prompts, so that what is good whatever the prompt stops counting (2409.13156)."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from deconfound_jax.align.baselines.data import (
    NotDefined,
    RewardData,
    RewardModel,
    checked,
    linear_model,
    standardisation,
    weights,
)
from deconfound_jax.align.baselines.pairs import PairRows, form_pairs
from deconfound_jax.align.baselines.training import Batch, Texts, starts, train
from deconfound_jax.align.losses.reward_model import bradley_terry
from deconfound_jax.config import Rrm


class PromptPairs(NamedTuple):
    """p comparisons of two texts as answers to one prompt."""

    rows_p3: np.ndarray  # rows of the first text, of the second, and of one whose prompt both are put to
    label_p: np.ndarray
    weight_p: np.ndarray


def rrm(data: RewardData, config: Rrm | None = None, key=None) -> RewardModel:
    """A Bradley-Terry reward of (prompt, text), trained on the log's pairs and on fourteen more for each.

        r(q, x) = w'phi(x) + v'(phi(x) psi(q)),   loss = E[BT] over `augmented` pairs

    Score texts with `joint_features(features_nd, prompt_features_nd)`: a reward of the text alone could not tell an
    answer from a text that answers something else.

    Args:
      data: rows with `prompt_n` and `prompt_features_nd` as wide as the features; pairs are formed inside prompts.
      config: training.
      key: of the start and batches; default `jax.random.key(0)`.

    Raises:
      NotDefined: no prompts, a single one, no prompt features, or no pairs inside a prompt.

    Source: Liu et al. 2024 (2409.13156), section 3; without its filter on a first model's certainty.
    """
    config = config or Rrm()
    if checked(data).prompt_n is None:
        raise NotDefined("rrm", "the data have no prompts (prompt_n)")
    if data.prompt_features_nd is None or np.shape(data.prompt_features_nd) != np.shape(data.features_nd):
        found = None if data.prompt_features_nd is None else np.shape(data.prompt_features_nd)
        raise NotDefined("rrm", f"prompt_features_nd of shape {np.shape(data.features_nd)} are needed, got {found}")
    base = form_pairs(data._replace(pair_within_n=data.prompt_n), config.adam, "rrm")
    pairs = augmented(base, data.prompt_n, config.adam.seed)
    joint_nd = joint_features(data.features_nd, data.prompt_features_nd)
    mean_d, sd_d = standardisation(joint_nd, weights(data))
    texts = Texts(np.asarray(data.features_nd, np.float32), np.asarray(data.prompt_features_nd, np.float32))
    params_r, key = starts(key, 1, {"w_d": ((len(mean_d),), 0.1 * len(mean_d) ** -0.5)})
    params, _ = train(objective, params_r, texts, pairs, {"sd_d": sd_d}, config.adam, key)
    return linear_model(mean_d, sd_d, params["w_d"])


def joint_features(features_nd, prompt_features_nd):
    """[phi(x), phi(x) psi(q)] of n texts as answers to n prompts, (n, 2 d)."""
    return np.concatenate([features_nd, np.asarray(features_nd) * np.asarray(prompt_features_nd)], 1)


def augmented(pairs: PairRows, prompt_n, seed: int = 0) -> PromptPairs:
    """Each pair, and fourteen comparisons of its texts and four of other prompts' as answers to its prompt.

        (a_i, b_i)                             the label
        (a_i | b_i, a_j | b_j | a_k | b_k)     1: a text of the prompt beats one of another          8
        (two of a_j, b_j, a_k, b_k)            1/2: away from their prompts none is better           6

    Args:
      pairs: p pairs, both texts of one prompt.
      prompt_n: code of each row's prompt.
      seed: of the draw of j and k, pairs of positive weight with another prompt than i's.

    Returns:
      15 p pairs, those of pair i at i * 15 and after; each weighs as much as pair i.

    Raises:
      NotDefined: all pairs have one prompt.
      ValueError: a pair whose texts answer different prompts.
    """
    prompt_p2 = np.asarray(prompt_n)[pairs.rows_p2]
    if (prompt_p2[:, 0] != prompt_p2[:, 1]).any():
        raise ValueError(f"pairs: expected texts of one prompt, got prompts {prompt_p2[np.ptp(prompt_p2, 1) > 0][0]}")
    rng, kept = np.random.default_rng(seed), np.flatnonzero(pairs.weight_p > 0)
    others_p4 = np.concatenate([pairs.rows_p2[_elsewhere(prompt_p2[:, 0], kept, rng)] for _ in range(2)], 1)
    own_p2, own_p1 = pairs.rows_p2, pairs.rows_p2[:, :1]
    against = [np.concatenate([own_p2[:, i : i + 1], others_p4[:, j : j + 1], own_p1], 1)
               for i in range(2) for j in range(4)]  # fmt: skip
    neutral = [np.concatenate([others_p4[:, i : i + 1], others_p4[:, j : j + 1], own_p1], 1)
               for i in range(4) for j in range(i + 1, 4)]  # fmt: skip
    rows_pm3 = np.stack([np.concatenate([own_p2, own_p1], 1), *against, *neutral], 1)
    label_pm = np.repeat(np.array([[0.0] + [1.0] * 8 + [0.5] * 6]), len(own_p2), 0)
    label_pm[:, 0] = pairs.label_p
    return PromptPairs(rearrange(rows_pm3, "p m three -> (p m) three"), label_pm.reshape(-1),
                       np.repeat(pairs.weight_p, label_pm.shape[1]))  # fmt: skip


def objective(params, frozen, batch: Batch, key):
    """Bradley-Terry of two texts put to one prompt; `frozen` holds the joint features' sd."""
    text_b2d, prompt_bd = batch.texts.features_nd[:, :2], batch.texts.controls_nk[:, 2]
    weight_d = params["w_d"] / frozen["sd_d"]
    plain_d, crossed_d = jnp.split(weight_d, 2)
    reward_b2 = jnp.einsum("btd,bd->bt", text_b2d, plain_d[None, :] + prompt_bd * crossed_d[None, :])
    per_pair = bradley_terry(reward_b2[:, 0], reward_b2[:, 1], batch.examples.label_p)
    return per_pair, batch.examples.weight_p, 0.0, {}


def _elsewhere(prompt_p, kept_q, rng) -> np.ndarray:
    """For each pair one of `kept_q` with another prompt, uniformly."""
    order_q = kept_q[np.argsort(prompt_p[kept_q], kind="stable")]
    sorted_q = prompt_p[order_q]
    first_p, stop_p = np.searchsorted(sorted_q, prompt_p, "left"), np.searchsorted(sorted_q, prompt_p, "right")
    free_p = len(order_q) - (stop_p - first_p)
    if not free_p.all():
        raise NotDefined("rrm", "all pairs have one prompt")
    return order_q[(stop_p + rng.integers(0, free_p)) % len(order_q)]
