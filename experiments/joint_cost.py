"""What the causal update costs beside the preference step it feeds: seconds and operations of both steps.

    python -m experiments.joint_cost '{"job": "cost", "shapes": "smollm2", "groups": 4, "length": 64, "steps": 10}'

Two-stage DPO and the joint step train the same decoder on the same pairs, whole and in fp32, reference read before.
The joint step adds a batch of the log's rows to its cross products, moves its scalars, draws from the posterior and
labels the pairs by the texts' cached features. Both are compiled in one process and timed in turn, so that a busy
machine slows both.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deconfound_jax.align.joint import JointBatch, init_causal
from deconfound_jax.causal.terms import prepare
from deconfound_jax.config import Causal, Dpo, Joint, Newsroom
from deconfound_jax.design import Design
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.recipes.joint import joint_stage, row_batches
from deconfound_jax.recipes.preference import dpo_stage, pair_knobs
from deconfound_jax.recipes.stage import scalars
from deconfound_jax.simulate import newsroom
from deconfound_jax.structs import Pairs
from deconfound_jax.train.step import init_state
from experiments.bench_jobs import WARM_STEPS
from experiments.lm_memory import SMOLLM2, TINY

WIDTH = 384  # of the texts' features, as MiniLM's
DESIGN = "endogenous(popularity ~ z) + category(week)"


def cost(shapes: str, groups: int, length: int, steps: int, rows: int = 256) -> dict[str, float]:
    """Median seconds of each step, and of their ratios step by step; operations as the compiler counts them.

    Args:
      shapes: `smollm2` or `tiny`.
      groups: pairs a batch. length: tokens of a text.
      rows: log rows a causal update sees.
    """
    c = dataclasses.replace({"smollm2": SMOLLM2, "tiny": TINY}[shapes], length=length)
    decoder, knobs = Decoder(c, c.vocabulary), Dpo(steps=1000, groups=groups, group_size=2, learning_rate=1e-6)
    joint, rng = Joint(rows=rows, warm_rows=0), np.random.default_rng(0)
    logs, _ = newsroom.simulate(Newsroom(articles=rows, headlines=5), 0)
    features_nd = rng.normal(size=(len(logs), WIDTH)).astype(np.float32)
    prepared = prepare(logs, features_nd, Design.parse(DESIGN), Causal(design=DESIGN))
    rows_at = row_batches(prepared.rows, rows, 0)

    params = jax.jit(decoder.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    blank = np.full((groups, 1), 0.5, np.float32)
    tokens_bgl = rng.integers(3, c.vocabulary, (groups, 2, length)).astype(np.int32)
    pairs = Pairs(tokens_bgl, np.full((groups, 2), -9.0 * length, np.float32), blank, np.ones_like(blank), None)
    batch = JointBatch(rows_at(0), pairs, features_nd[: 2 * groups].reshape(groups, 2, -1), np.ones((groups, 2), "f"))
    two_stage, one_graph = dpo_stage(decoder, knobs), joint_stage(decoder, prepared.spec, knobs, joint)
    frozen, key = scalars(pair_knobs(knobs)), jax.random.key(0)
    runs = {
        "dpo": _timer(two_stage.step, init_state(params, two_stage.optimizer), frozen, pairs, key),
        "joint": _timer(one_graph.step, init_state(params, one_graph.optimizer,
                                                   init_causal(prepared.spec, rows_at(0), joint)), frozen, batch, key),
    }  # fmt: skip
    del params
    return _measure({name: timed for name, (timed, _) in runs.items()}, steps) | {
        f"flops.{name}": flops for name, (_, flops) in runs.items()
    }


def _timer(step: Callable, state: Any, frozen: Any, batch: Any, key: Any) -> tuple[Callable[[], float], float]:
    """Seconds of the next step, which goes on from the last; operations of one."""
    compiled = step.lower(state, frozen, batch, key).compile()
    held, batch = [state], jax.device_put(batch)

    def timed() -> float:
        started = time.perf_counter()
        held[0], metrics = compiled(held[0], frozen, batch, key)
        jax.block_until_ready((held[0], metrics))
        return time.perf_counter() - started

    return timed, float(compiled.cost_analysis()["flops"])


def _measure(runs: dict[str, Callable[[], float]], steps: int) -> dict[str, float]:
    seconds = np.asarray([[timed() for timed in runs.values()] for _ in range(WARM_STEPS + steps)])[WARM_STEPS:]
    found = {f"seconds.{name}": float(np.median(seconds[:, i])) for i, name in enumerate(runs)}
    return found | {"time": float(np.median(seconds[:, 1] / seconds[:, 0]))}


def main(arguments: str) -> None:
    given = json.loads(arguments)
    print(json.dumps({"cost": cost}[given.pop("job")](**given)))


if __name__ == "__main__":
    main(sys.argv[1])
