"""ODIN with the confounder in place of length: one head is made to hold what moves with it and is dropped at use."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np

from deconfound_jax.align.baselines.data import NotDefined, RewardData, RewardModel, checked, confounders, linear_model
from deconfound_jax.align.baselines.pairs import form_pairs
from deconfound_jax.align.baselines.training import Batch, starts, texts_of, train
from deconfound_jax.align.losses.reward_model import bradley_terry
from deconfound_jax.config import Odin

CENTRED_FROM = 64  # width from which heads are centred over their entries before they are normalised
RIDGE = 1e-6  # of the controls' correlation matrix: levels that a batch lacks leave zero columns


def odin(data: RewardData, config: Odin | None = None, key=None) -> RewardModel:
    """The quality head of a reward model whose other head holds the confounder.

        r = e^t (r_Q + r_L),   r_Q = u_Q'z,   r_L = u_L'z,   u = w / |w|
        loss = -E[s log sigmoid(r_1 - r_2) + (1 - s) log sigmoid(r_2 - r_1)]
               + |u_Q'u_L| + (1 - R(r_L, c)) + R(r_Q, c) + R(r_Q + r_L, c)

    R is the absolute correlation over the batch's texts, the multiple one for several or categorical c. In width 64
    and more a head is centred over its entries before it is normalised, as in the authors' code. Features are frozen
    here, so a scale e^t is learned in their place. At use r_Q alone. The multiple correlation of k columns over m
    unrelated texts is about sqrt(k / m): with many levels take a large batch.

    Args:
      data: rows with confounders; pairs are formed inside `pair_within_n`, or across rows.
      config: strengths and restarts, of which the lowest *training* loss is taken: the truth has no say.
      key: of the starts and batches; default `jax.random.key(0)`.

    Raises:
      NotDefined: no confounder, more columns of it than half a batch's texts, or no pairs.

        model = odin(reward_data(logs, features_nd, design), Odin(), jax.random.key(0))

    Source: Chen et al. 2024 (2402.07319), equations 3 to 6.
    """
    config = config or Odin()
    control_nk, pairs = confounders(checked(data), "odin"), form_pairs(data, config.adam, "odin")
    texts_in_batch = 2 * min(config.adam.batch or len(pairs.label_p), len(pairs.label_p))
    if 2 * control_nk.shape[1] > texts_in_batch:
        raise NotDefined(
            "odin", f"a correlation with {control_nk.shape[1]} columns over {texts_in_batch} texts of a batch"
        )
    texts, mean_d, sd_d = texts_of(data, control_nk)
    knobs = {"orthogonality": config.orthogonality, "correlation": config.correlation}
    width = texts.features_nd.shape[1]
    params_r, key = starts(key, config.restarts, {"heads_2d": ((2, width), width**-0.5), "log_scale": ((), 0.0)})
    params, _ = train(objective, params_r, texts, pairs, knobs, config.adam, key)
    quality_d = np.asarray(unit(params["heads_2d"]))[0]
    return linear_model(mean_d, sd_d, np.exp(params["log_scale"]) * quality_d)


def objective(params, frozen, batch: Batch, key):
    """ODIN's loss as an objective; `frozen` holds the two strengths."""
    texts, pairs = batch
    heads_2d = unit(params["heads_2d"])
    reward_b2h = jnp.einsum("btd,hd->bth", texts.features_nd, heads_2d)
    total_b2 = reward_b2h.sum(-1)
    per_pair = bradley_terry(*(jnp.exp(params["log_scale"]) * total_b2).T, pairs.label_p)

    def r(reward_b2):
        weight_m = jnp.repeat(pairs.weight_p, 2)
        return correlation(reward_b2.reshape(-1), texts.controls_nk.reshape(-1, texts.controls_nk.shape[-1]), weight_m)

    quality, other, both = (r(v) for v in (reward_b2h[..., 0], reward_b2h[..., 1], total_b2))
    penalty = frozen["orthogonality"] * jnp.abs(heads_2d[0] @ heads_2d[1])
    penalty = penalty + frozen["correlation"] * ((1 - other) + quality + both)
    return per_pair, pairs.weight_p, penalty, {"quality": quality, "other": other}


def unit(heads_hd):
    """Each head on the unit sphere; in width `CENTRED_FROM` and more centred over its entries first."""
    heads_hd = jnp.asarray(heads_hd)
    if heads_hd.shape[1] >= CENTRED_FROM:
        heads_hd = heads_hd - heads_hd.mean(1, keepdims=True)
    return heads_hd / jnp.sqrt(jnp.sum(heads_hd**2, 1, keepdims=True) + 1e-16)


def correlation(reward_m, control_mk, weight_m):
    """Multiple correlation of a reward with the columns of c over m texts, in [0, 1]; for one column |corr|.

        R^2 = S_rc S_cc^-1 S_cr / S_rr,   S the weighted covariances

    Args:
      reward_m: (m,).
      control_mk: (m, k), about standardised; columns that others determine are harmless.
      weight_m: (m,) >= 0, not all zero.
    """
    chex.assert_rank([reward_m, control_mk, weight_m], [1, 2, 1])
    share_m = weight_m / jnp.maximum(weight_m.sum(), 1e-9)
    reward_m = reward_m - share_m @ reward_m
    control_mk = control_mk - (share_m @ control_mk)[None, :]
    weighted_mk = share_m[:, None] * control_mk
    cross_k, gram_kk = weighted_mk.T @ reward_m, weighted_mk.T @ control_mk
    solved_k = jax.scipy.linalg.solve(gram_kk + RIDGE * jnp.eye(gram_kk.shape[0]), cross_k, assume_a="pos")
    square = cross_k @ solved_k / (share_m @ reward_m**2 + 1e-12)
    return jnp.sqrt(jnp.clip(square, 0.0, 1.0) + 1e-12)
