"""InfoRM: a reward read through a noisy bottleneck, which drops what preferences do not need (2402.09345)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from deconfound_jax.align.baselines.data import RewardData, RewardModel, checked
from deconfound_jax.align.baselines.pairs import form_pairs
from deconfound_jax.align.baselines.training import Batch, starts, texts_of, train
from deconfound_jax.align.losses.reward_model import bradley_terry
from deconfound_jax.config import InfoRm


def inform(data: RewardData, config: InfoRm | None = None, key=None) -> RewardModel:
    """A Bradley-Terry reward of a Gaussian code of the features.

        q(h | x) = N(mu(z), diag sigma(z)^2),   mu and log sigma^2 linear in z;   r = u'tanh(V'h + a)
        loss = E[BT(r(h_1) - r(h_2))] + beta sum over both texts and latent dimensions of KL(q(h | x) || N(0, 1))

    At use h = mu(z). It knows of no confounder: it drops what does not help to predict preferences, and a confounder's
    shadow in the text does.

    Args:
      data: rows; pairs are formed inside `pair_within_n`, or across rows.
      config: beta and the code's width.
      key: of the start, the noise and the batches; default `jax.random.key(0)`.

    Raises:
      NotDefined: no pairs.

    Source: Miao et al. 2024 (2402.09345), equation 5 and algorithm 2.
    """
    config = config or InfoRm()
    pairs = form_pairs(checked(data), config.adam, "inform")
    texts, mean_d, sd_d = texts_of(data)
    width, h = len(mean_d), config.latent
    shapes = {
        "mean_dh": ((width, h), width**-0.5), "shift_h": ((h,), 0.0),
        "log_variance_dh": ((width, h), 0.0), "log_variance_h": ((h,), 0.0),
        "hidden_hj": ((h, h), h**-0.5), "bias_j": ((h,), 0.0), "out_j": ((h,), h**-0.5),
    }  # fmt: skip
    params_r, key = starts(key, 1, shapes)
    params, _ = train(objective, params_r, texts, pairs, {"beta": config.beta}, config.adam, key)
    return model_of(params, mean_d, sd_d)


def model_of(params, mean_d, sd_d) -> RewardModel:
    """The reward at the mean code, which is linear in z: the decoder's first layer absorbs it."""
    hidden_dj = params["mean_dh"] @ params["hidden_hj"]
    bias_j = params["shift_h"] @ params["hidden_hj"] + params["bias_j"]
    return RewardModel(mean_d, sd_d, np.zeros(len(mean_d)), hidden_dj, bias_j, params["out_j"])


def objective(params, frozen, batch: Batch, key):
    """Bradley-Terry of a sampled code, and the code's KL as part of each pair's loss."""
    z_b2d, pairs = batch.texts.features_nd, batch.examples
    mean_b2h = z_b2d @ params["mean_dh"] + params["shift_h"][None, None, :]
    log_variance_b2h = z_b2d @ params["log_variance_dh"] + params["log_variance_h"][None, None, :]
    code_b2h = mean_b2h + jnp.exp(0.5 * log_variance_b2h) * jax.random.normal(key, mean_b2h.shape)
    reward_b2 = jnp.tanh(code_b2h @ params["hidden_hj"] + params["bias_j"][None, None, :]) @ params["out_j"]
    kl_b = gaussian_kl(mean_b2h, log_variance_b2h).sum((1, 2))
    per_pair = bradley_terry(reward_b2[:, 0], reward_b2[:, 1], pairs.label_p) + frozen["beta"] * kl_b
    return per_pair, pairs.weight_p, 0.0, {"kl": kl_b.mean()}


def gaussian_kl(mean, log_variance):
    """KL(N(mean, variance) || N(0, 1)) of every entry, nats: (variance + mean^2 - 1 - log variance) / 2."""
    return 0.5 * (jnp.exp(log_variance) + mean**2 - 1 - log_variance)
