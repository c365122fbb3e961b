"""Objectives of reward models: a decoder's states, read by a head, trained on pairs or on single texts.

    objective = pairwise_objective(decoder, "last")
    per_pair, weight, penalty, metrics = objective(params, {"margin": 0.0, "centering": 0.01}, pairs, key)

`params` holds the decoder's collections, trained whole or as adapters over `frozen["base"]`, and "reward": the head's
`kernel` and, pointwise, what settles the outcome's level beside the reward: `shift`, or the ordinal `cuts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from deconfound_jax.align.groups import pair_index
from deconfound_jax.align.knobs import read_knobs
from deconfound_jax.align.losses import weighted_mean
from deconfound_jax.align.losses.reward_model import binomial_nll, bradley_terry, normal_nll, ordinal_nll, rising_cuts
from deconfound_jax.align.packed import pack
from deconfound_jax.align.policy import variables_of
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.heads import RewardHead
from deconfound_jax.models.tokenizer import PAD
from deconfound_jax.structs import Pairs

Likelihood = Literal["normal", "binomial", "ordinal"]


class Outcomes(NamedTuple):
    """Single texts with what happened, or with what the posterior says of it: what pointwise reward models eat."""

    tokens_bl: Any
    outcome_b: Any  # normal: the outcome or a posterior mean; binomial: hits; ordinal: (b, k) probabilities of grades
    size_b: Any  # normal: precision of the outcome given the reward; binomial: exposures; ordinal: not read
    weight_b: Any  # 0 masks a text
    prompt_bq: Any = None


def read_rewards(decoder: Decoder, pooling: str, variables: Mapping[str, Any], kernel_d, tokens_bgl, prompt_bq=None):
    """Rewards (b, g) of groups of texts as `structs` holds them: r(x) = w . pool(h(x)).

    Args:
      variables: of `Decoder.apply`.
      kernel_d: the head's.
      tokens_bgl, prompt_bq: as in `logprobs.group_scores`. Behind a prompt the states of the completion's own tokens
        are pooled, which have read the prompt.
    Raises:
      ValueError: a prompt and a text that are longer together than `Decoder.length`.
    """
    b, g, length = tokens_bgl.shape
    tokens_nl = rearrange(tokens_bgl, "b g l -> (b g) l")
    if prompt_bq is None:
        hidden_nld = decoder.apply(variables, tokens_nl, method="hidden")
    else:
        before, most = prompt_bq.shape[1], decoder.config.length
        if before + length > most:
            raise ValueError(f"prompt: expected at most Decoder.length = {most} positions with a text of {length}, got "
                             f"{before} of its own")  # fmt: skip
        hidden_bld = decoder.apply(variables, *pack(prompt_bq, tokens_bgl)[:3], method="hidden")
        hidden_nld = rearrange(hidden_bld[:, before:], "b (g l) d -> (b g) l d", g=g)
    reward_n = RewardHead(pooling).apply({"params": {"kernel": kernel_d}}, hidden_nld, tokens_nl != PAD)
    return rearrange(reward_n, "(b g) -> b g", b=b)


def pairwise_objective(decoder: Decoder, pooling: str = "last") -> Callable:
    """Bradley-Terry on `Pairs` with soft labels: one forward pass a group, every pair inside it.

        l_ij = bradley_terry(r_i, r_j, s_ij; margin, centering)

    The reference's log-probabilities are not read and may be None; `frozen` is {"margin": m, "centering": eta}.
    Metrics: `agreement`, the weighted share of pairs that the model and the label order alike.

    Raises:
      ValueError: a knob that `frozen` lacks.
    """

    def objective(params, frozen, batch: Pairs, key):
        margin, centering = read_knobs(frozen, ("margin", "centering"), "the reward model")
        reward_bg = _rewards(decoder, pooling, params, frozen, batch.tokens_bgl, batch.prompt_bq)
        first, second = pair_index(batch.tokens_bgl.shape[1])
        a_p, b_p = (rearrange(reward_bg[:, side], "b p -> (b p)") for side in (first, second))
        label_p, weight_p = (rearrange(a, "b p -> (b p)") for a in (batch.label_bp, batch.weight_bp))
        agrees_p = ((a_p > b_p) == (label_p > 0.5)).astype(jnp.float32)
        metrics = {"agreement": jax.lax.stop_gradient(weighted_mean(agrees_p, weight_p))}
        return bradley_terry(a_p, b_p, label_p, margin, centering), weight_p, 0.0, metrics

    return objective


def pointwise_objective(decoder: Decoder, likelihood: Likelihood = "normal", pooling: str = "last") -> Callable:
    """The outcome's own likelihood on `Outcomes`.

        normal    y ~ Normal(c + r(x), 1 / lambda)
        binomial  y ~ Binomial(n, sigmoid(c + r(x)))
        ordinal   P(grade <= j) = sigmoid(c_j - r(x)),   c = rising_cuts(cuts)

    c is trained beside the policy (`params["reward"]["shift"]` or `["cuts"]`): the reward itself has no constant.
    `frozen` may be {}.
    """

    def objective(params, frozen, batch: Outcomes, key):
        reward_b = _rewards(decoder, pooling, params, frozen, batch.tokens_bl[:, None], batch.prompt_bq)[:, 0]
        extra = params["reward"]
        if likelihood == "ordinal":
            loss_b = ordinal_nll(reward_b, batch.outcome_b, rising_cuts(extra["cuts"]))
        else:
            loss = normal_nll if likelihood == "normal" else binomial_nll
            loss_b = loss(extra["shift"] + reward_b, batch.outcome_b, batch.size_b)
        return loss_b, batch.weight_b, 0.0, {}

    return objective


def _rewards(decoder, pooling, params, frozen, tokens_bgl, prompt_bq):
    policy = {name: leaf for name, leaf in params.items() if name != "reward"}
    kernel_d = params["reward"]["kernel"]
    return read_rewards(decoder, pooling, variables_of(policy, frozen), kernel_d, tokens_bgl, prompt_bq)
