"""One seed of `over_optimisation`: a reference's samples, rewards from logs of several sizes, best-of-n by each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deconfound_jax.align.scoring import TextReward, scored, text_reward
from deconfound_jax.causal.fit import fit_prepared
from deconfound_jax.causal.terms import prepare
from deconfound_jax.causal.verdict import judged
from deconfound_jax.config import BestOfN, Causal, Run
from deconfound_jax.evaluate import truth
from deconfound_jax.models import tokenizer
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.sample import sample
from deconfound_jax.recipes.best_of_n import best_of_curve
from deconfound_jax.recipes.reference import decoder_features, sft_stage, train_reference
from deconfound_jax.recipes.stage import Record
from deconfound_jax.simulate import newsroom
from deconfound_jax.structs import Design
from deconfound_jax.train.hosts import fetch
from experiments import rundir
from experiments.newsroom_study import designs
from experiments.presets.newsroom import newsroom as preset

SCORES = ("mean", "lower")  # posterior mean; mean - kappa sd, kappa = 1
WIDE_SD = 1.0  # of the text's coefficients, sd of y per sd of a feature: nearly flat


def base() -> Run:
    """The newsroom preset at 64 features."""
    return dataclasses.replace(
        preset(),
        methods=("naive", "deconfounded"),
        decoder=dataclasses.replace(preset().decoder, width=63, heads=3),
        best_of_n=BestOfN(sizes=(1, 2, 4, 8, 16, 32, 64, 128), kappa=1.0),
    )


@dataclasses.dataclass(frozen=True)
class OverOptimisation:
    """Logs of which sizes, and what is drawn from the reference."""

    name: str = "over_optimisation"
    workdir: str = "runs/over_optimisation"
    seeds: tuple[int, ...] = tuple(range(24))
    rows: tuple[int, ...] = (100, 150, 200, 300, 600, 1200, 4000)  # of a log; a seed's small logs begin its large one
    rewards: tuple[str, ...] = ("naive", "wide", "deconfounded")  # wide: deconfounded under a prior that hardly shrinks
    samples: int = 4096  # of a pool
    temperatures: tuple[float, ...] = (1.0, 1.5)  # of the pools
    reference_seed: int = 1000  # of the log that the reference learns from
    run: Run = dataclasses.field(default_factory=base)


class Reference(NamedTuple):
    """The reference policy and its words."""

    decoder: Decoder
    words: tokenizer.Tokenizer
    params: Any


class Pool(NamedTuple):
    """Samples of the reference, with their truth."""

    features_nd: np.ndarray
    true_n: np.ndarray
    off_n: np.ndarray  # 1 off the grammar


class Curves(NamedTuple):
    """One seed, log, reward and score: expectations over the best of n, one value a size n."""

    share: np.ndarray
    proxy: np.ndarray  # gain of the score that chose, in the units of `share`
    off: np.ndarray


def reference_of(config: OverOptimisation, record: Record) -> Reference:
    """The policy that everything is drawn from, trained on texts of a log of its own."""
    run = config.run
    words = tokenizer.closed(newsroom.vocabulary(run.simulation))
    decoder = Decoder(run.decoder, words.size)
    tokens_nl = words.encode(newsroom.simulate(run.simulation, config.reference_seed)[0].text, run.decoder.length)
    stage = sft_stage(decoder, run.sft, run.align.accumulate).on(rundir.mesh_of(run))
    params = train_reference(decoder, stage, tokens_nl, run.sft, config.reference_seed, record)
    return Reference(decoder, words, params)


def sampler(config: OverOptimisation, reference: Reference) -> Callable:
    """Compiled (key, temperature) -> tokens (samples, l) of the reference."""
    decoder, length = reference.decoder, config.run.decoder.length

    @jax.jit
    def draw(params, key, temperature):
        return sample(decoder, params, key, config.samples, length, temperature=temperature)[0]

    return lambda key, temperature: fetch(draw(reference.params, key, jnp.float32(temperature)))


def pool_of(reference: Reference, tokens_nl: np.ndarray, run: Run) -> Pool:
    """Features and truth of sampled texts."""
    texts = reference.words.decode(tokens_nl)
    features_nd = decoder_features(reference.decoder, reference.params, tokens_nl, run.features)
    off_n = np.asarray([newsroom.parse(text) is None for text in texts], float)
    return Pool(features_nd, newsroom.true_reward(texts), off_n)


def rewards(config: OverOptimisation, reference: Reference, seed: int) -> dict[tuple[int, str], tuple[TextReward, str]]:
    """(rows, reward) -> the reward of any text and its verdict's status, from the first rows of one seed's log."""
    run, headlines = config.run, config.run.simulation.headlines
    if wrong := [rows for rows in config.rows if rows % headlines]:
        raise ValueError(f"rows: expected whole articles of {headlines} headlines, got {wrong}")
    logs, _ = newsroom.simulate(dataclasses.replace(run.simulation, articles=max(config.rows) // headlines), seed)
    tokens_nl = reference.words.encode(logs.text, run.decoder.length)
    features_nd = decoder_features(reference.decoder, reference.params, tokens_nl, run.features)
    found = {}
    for rows in config.rows:
        log = logs.take(np.arange(rows))
        for name in config.rewards:
            design, causal = model_of(run, name, seed)
            prepared = prepare(log, features_nd[:rows], design, causal)
            posterior = judged(fit_prepared(prepared, design, causal), prepared, groups_n=log.codes(log.roles.group))
            found[rows, name] = text_reward(posterior), posterior.verdict.status
    return found


def model_of(run: Run, reward: str, seed: int) -> tuple[Design, Causal]:
    """The design and priors that a reward is fitted under; ValueError for an unknown one."""
    design = designs(run).get("deconfounded" if reward == "wide" else reward)
    if design is None:
        raise ValueError(f"rewards: expected some of naive, wide, deconfounded, got {reward!r}")
    text_sd = WIDE_SD if reward == "wide" else run.causal.text_sd
    return design, dataclasses.replace(run.causal, seed=seed, text_sd=text_sd)


def curves_of(reward: TextReward, pool: Pool, config: BestOfN) -> dict[str, Curves]:
    """Best-of-n of one pool under the posterior mean and under mean - kappa sd."""
    draws_sn = reward.draws(jnp.asarray(pool.features_nd))
    gain = truth.expected_best(pool.true_n, max(config.sizes)) - pool.true_n.mean()
    found = {}
    for score, kappa in zip(SCORES, (0.0, config.kappa), strict=True):
        score_n = np.asarray(scored(draws_sn, kappa))
        points = best_of_curve(score_n, config.sizes, pool.true_n)
        share = np.array([point.truth - pool.true_n.mean() for point in points]) / gain
        proxy = np.array([point.proxy - score_n.mean() for point in points]) / gain
        off = np.array([point.truth for point in best_of_curve(score_n, config.sizes, pool.off_n)])
        found[score] = Curves(share, proxy, off)
    return found
