"""A decoder of ten ids and a log whose reward is known: how many more good words than bad ones a text holds."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deconfound_jax.align.scoring import TextReward
from deconfound_jax.causal.reward import Reward
from deconfound_jax.config import Decoder as DecoderConfig
from deconfound_jax.config import Features
from deconfound_jax.models import tokenizer
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.recipes.reference import decoder_features
from deconfound_jax.recipes.texts import Texts
from deconfound_jax.structs import Logs, Roles

WORDS = tokenizer.closed("good bad sea ship tide dock".split())
GOOD, BAD = WORDS.split(["good bad"])[0]
LENGTH = 8
FEATURES = Features(states="embeddings", pooling="sum+length")  # exact counts of words
ROWS, GROUP = 64, 4  # of the log; of rows that are compared


class Tiny(NamedTuple):
    decoder: Decoder
    reference: Any  # at random: all words are nearly as likely


def count(tokens_nl) -> np.ndarray:
    """The true reward of texts, (n,)."""
    tokens_nl = np.asarray(tokens_nl)
    return ((tokens_nl == GOOD).sum(1) - (tokens_nl == BAD).sum(1)).astype(float)


def _texts() -> Texts:
    rng, found = np.random.default_rng(0), {}
    while len(found) < ROWS:  # no two are equal
        found[" ".join(rng.choice(WORDS.record["words"], rng.integers(2, LENGTH - 1)))] = None
    keys_n = np.array([f"k{row}" for row in range(ROWS)])
    return Texts(WORDS.encode(list(found), LENGTH), np.arange(ROWS) // GROUP, keys_n=keys_n)


TEXTS = _texts()


@functools.cache
def tiny() -> Tiny:
    """Built once a process."""
    decoder = Decoder(DecoderConfig(width=24, layers=1, heads=2, length=LENGTH), WORDS.size)
    return Tiny(decoder, jax.jit(decoder.init)(jax.random.key(0), jnp.asarray(TEXTS.tokens_nl[:1])))


def reward_of(tokens_nl, sign: float) -> Reward:
    """`sign` times the true reward, with a little doubt."""
    draws_sn = sign * count(tokens_nl) + 0.3 * np.random.default_rng(1).normal(size=(16, len(tokens_nl)))
    return Reward(draws_sn.astype(np.float32), "model")


def log_of(tokens_nl, sign: float) -> Logs:
    """A log whose outcome is that reward, its week's effect and noise."""
    week_n = np.arange(len(tokens_nl)) % 4
    outcome_n = sign * count(tokens_nl) + week_n + 0.3 * np.random.default_rng(2).normal(size=len(tokens_nl))
    columns = {"text": WORDS.decode(tokens_nl), "week": [f"w{week}" for week in week_n]}
    columns = {name: np.asarray(values, object) for name, values in columns.items()}
    return Logs.of(columns | {"outcome": outcome_n}, Roles())


def reward_anywhere(sign: float) -> TextReward:
    """The same of any text: the direction in summed embeddings that good words add to, bad ones take from, and no
    other word or position moves."""
    params = tiny().reference["params"]
    rows_rd = np.concatenate([params["embed_tokens"]["embedding"], params["positions"]]).astype(np.float64)
    wanted_r = np.zeros(len(rows_rd))
    wanted_r[[GOOD, BAD]] = sign, -sign
    beta_d = np.append(np.linalg.lstsq(rows_rd, wanted_r)[0], 0.0)  # the length does not count
    features_nd = decoder_features(tiny().decoder, tiny().reference, TEXTS.tokens_nl, FEATURES)
    mean_d, scale_d = features_nd.mean(0), features_nd.std(0)
    coefficients_sd = np.tile(beta_d * scale_d, (16, 1))
    return TextReward(*(jnp.asarray(a, jnp.float32) for a in (coefficients_sd, mean_d, scale_d)))
