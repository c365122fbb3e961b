"""Causal rewards: distributed alike whatever the confounder, by a maximum mean discrepancy (2501.09620)."""

from __future__ import annotations

import chex
import jax.numpy as jnp
import numpy as np

from deconfound_jax.align.baselines.data import (
    NotDefined,
    RewardData,
    RewardModel,
    checked,
    linear_model,
    rows_used,
    weights,
)
from deconfound_jax.align.baselines.pairs import form_pairs
from deconfound_jax.align.baselines.training import Batch, starts, texts_of, train
from deconfound_jax.align.losses.reward_model import bradley_terry
from deconfound_jax.config import CausalRewards


def causal_rewards(data: RewardData, config: CausalRewards | None = None, key=None) -> RewardModel:
    """A Bradley-Terry reward whose distribution does not differ between bins of the confounder.

        r = w'z,   loss = E[BT] + lambda sum_c sum_{m < m'} MMD^2(r | c in m, r | c in m')
        MMD^2 = E k(r, r') + E k(q, q') - 2 E k(r, q),   k(a, b) = exp(-(a - b)^2 / (2 h^2))

    h is the sd of r over the batch: at a fixed h the distance shrinks with the reward, and a lambda of any size would
    be met by a reward of zero. The distance is then a matter of w's direction alone.
    Numbers are cut into quantile bins, a category's levels are its bins; several confounders add up.

    Args:
      data: rows with confounders; pairs are formed inside `pair_within_n`, or across rows.
      config: lambda and bins.
      key: of the start and batches; default `jax.random.key(0)`.

    Raises:
      NotDefined: no confounder with two bins, or no pairs.

    Source: Wang et al. 2025 (2501.09620); Gretton et al. (2012), JMLR 13, for the distance.
    """
    return _trained("causal_rewards", 0.0, data, config, key)


def conditional_causal_rewards(data: RewardData, config: CausalRewards | None = None, key=None) -> RewardModel:
    """The same with the distance taken separately among chosen and among rejected texts.

        loss = E[BT] + lambda sum_c sum_{m < m'} [MMD^2 among chosen + MMD^2 among rejected]

    A text is chosen with the weight of its label s and rejected with that of 1 - s. Where better texts really sit in
    other bins, this asks for less than the plain form.

    Arguments, errors and source as for `causal_rewards`.
    """
    return _trained("conditional_causal_rewards", 1.0, data, config, key)


def objective(params, frozen, batch: Batch, key):
    """Bradley-Terry, and the distance over all texts; `frozen["conditional"]` 1: among chosen and among rejected."""
    texts, (_, label_p, weight_p) = batch
    reward_b2 = texts.features_nd @ params["w_d"]
    per_pair = bradley_terry(reward_b2[:, 0], reward_b2[:, 1], label_p)
    label_b2 = jnp.stack([label_p, 1 - label_p], 1)
    # The plain form is that all texts are of the first kind and none of the second.
    first_b2 = weight_p[:, None] * jnp.where(frozen["conditional"] > 0, label_b2, 1.0)
    second_b2 = weight_p[:, None] * jnp.where(frozen["conditional"] > 0, 1 - label_b2, 0.0)
    kernel_mm = gaussian_kernel(reward_b2.reshape(-1))
    distance = sum(
        discrepancy(kernel_mm, _flat(weight_b2[..., None] * texts.controls_nk), frozen["alike_kk"])
        for weight_b2 in (first_b2, second_b2)
    )
    return per_pair, weight_p, frozen["strength"] * distance, {"mmd": distance}


def discrepancy(kernel_mm, member_mk, alike_kk):
    """Sum over pairs of bins of one confounder of MMD^2; a bin without weight takes no part.

    Args:
      kernel_mm: k(r_i, r_j) of m texts.
      member_mk: weight of each text in each bin, 0 outside it.
      alike_kk: 1 where two bins are of one confounder.

    Returns:
      a scalar >= 0: the biased estimate, whose sums hold i = j, too.
    """
    chex.assert_rank([kernel_mm, member_mk, alike_kk], 2)
    total_k = member_mk.sum(0)
    member_mk = member_mk / jnp.where(total_k > 0, total_k, 1.0)[None, :]
    mean_kk = member_mk.T @ kernel_mm @ member_mk
    own_k = jnp.diag(mean_kk)
    square_kk = own_k[:, None] + own_k[None, :] - 2 * mean_kk
    counts_kk = alike_kk * (total_k > 0)[:, None] * (total_k > 0)[None, :]
    return 0.5 * jnp.sum(counts_kk * square_kk)


def gaussian_kernel(reward_m):
    """exp(-(r_i - r_j)^2 / (2 h^2)), h the sd of r, (m, m)."""
    width = jnp.sqrt(jnp.var(reward_m) + 1e-8)
    return jnp.exp(-0.5 * ((reward_m[:, None] - reward_m[None, :]) / width) ** 2)


def bins_of(data: RewardData, count: int) -> np.ndarray:
    """Bin of each confounder (n, c): quantile bins of a number, counted by weight; codes of a category's levels."""
    weight_n, found = weights(data), []
    for values_n in () if data.numbers_nk is None else np.asarray(data.numbers_nk, np.float64).T:
        order = np.argsort(values_n, kind="stable")
        edges = np.searchsorted(np.cumsum(weight_n[order]) / weight_n.sum(), np.arange(1, count) / count)
        found.append(np.searchsorted(np.unique(values_n[order][edges]), values_n, side="left"))
    for codes_n in () if data.levels_nc is None else np.asarray(data.levels_nc).T:
        found.append(np.unique(codes_n, return_inverse=True)[1])
    return np.stack(found, 1) if found else np.zeros((len(weight_n), 0), int)


def _trained(name: str, conditional: float, data: RewardData, config: CausalRewards | None, key) -> RewardModel:
    config = config or CausalRewards()
    bins_nc = bins_of(checked(data), config.bins)
    used_n = rows_used(data)
    if not any(np.ptp(bins_n[used_n]) for bins_n in bins_nc.T):
        raise NotDefined(name, "the data name no confounder that varies (numbers_nk, levels_nc)")
    pairs = form_pairs(data, config.adam, name)
    member_nk = np.concatenate([np.eye(bins_n.max() + 1)[bins_n] for bins_n in bins_nc.T], 1)
    owner_k = np.repeat(np.arange(bins_nc.shape[1]), bins_nc.max(0) + 1)
    texts, mean_d, sd_d = texts_of(data, member_nk)
    alike_kk = owner_k[:, None] == owner_k[None, :]
    knobs = {"strength": config.strength, "conditional": conditional, "alike_kk": alike_kk}
    params_r, key = starts(key, 1, {"w_d": ((len(mean_d),), 0.1 * len(mean_d) ** -0.5)})
    params, _ = train(objective, params_r, texts, pairs, knobs, config.adam, key)
    return linear_model(mean_d, sd_d, params["w_d"])


def _flat(member_b2k):
    return member_b2k.reshape(-1, member_b2k.shape[-1])
