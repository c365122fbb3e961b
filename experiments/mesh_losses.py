"""Losses of a few training steps on one mesh after the other: what `bench_mesh` starts in processes of their own.

    python -m experiments.mesh_losses CASES.json FOUND.json

Each objective is trained from the same parameters on the same batches on every mesh, in every precision. The compiled
step's collectives (what devices send each other) are counted in its text.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from deconfound_jax.align.groups import epochs, form_groups, pair_index
from deconfound_jax.align.joint import JointBatch, fill_pairs, init_causal, joint_step
from deconfound_jax.align.preference import preference_objective
from deconfound_jax.causal.spec import Prepared
from deconfound_jax.causal.terms import prepare
from deconfound_jax.config import Decoder as DecoderConfig
from deconfound_jax.config import Joint, Newsroom
from deconfound_jax.models import tokenizer
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.simulate import newsroom
from deconfound_jax.structs import Design, Pairs
from deconfound_jax.train.mesh import make_mesh, rows_of, shard_batch, shard_state
from deconfound_jax.train.step import adamw, init_state, jit_step, make_step

DTYPES = {"fp64": "float64", "fp32": "float32"}
COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(?:-start)?\("
)
LENGTH = 24  # tokens of a text


@dataclasses.dataclass(frozen=True)
class Cases:
    """What is trained on which meshes."""

    meshes: tuple[str, ...] = ("1x1x1", "8x1x1", "2x4x1", "2x2x2")  # data x fsdp x tensor; 1x1x1: one device
    objectives: tuple[str, ...] = ("dpo", "joint")
    precisions: tuple[str, ...] = ("fp64", "fp32")
    steps: int = 20
    learning_rate: float = 1e-4
    groups: int = 8  # a step; every mesh divides them
    group_size: int = 4
    width: int = 32  # of the decoder
    layers: int = 2
    seed: int = 0


class Data(NamedTuple):
    """A small newsroom and a decoder for its texts."""

    tokens_nl: np.ndarray
    features_nd: np.ndarray  # standardised, as the causal part has them
    prepared: Prepared
    groups_mg: np.ndarray
    vocabulary: int


def run_cases(cases: Cases) -> dict[str, dict[str, Any]]:
    """`<mesh>.<objective>.<precision>` -> {"losses": a number a step, "collectives": how many of each}."""
    found, data = {}, small_newsroom(cases)
    for precision in cases.precisions:
        with jax.enable_x64(precision == "fp64"):
            for name in cases.meshes:
                for objective in cases.objectives:
                    found[f"{name}.{objective}.{precision}"] = train(cases, data, mesh_of(name), objective, precision)
    return found


def mesh_of(name: str):
    """ "2x2x2" -> the mesh; "1x1x1" -> the first device."""
    data, fsdp, tensor = map(int, name.split("x"))
    return make_mesh(jax.devices()[: data * fsdp * tensor], data=data, fsdp=fsdp, tensor=tensor)


def small_newsroom(cases: Cases) -> Data:
    """300 headlines with a confounded popularity; features are counts of word classes."""
    config = Newsroom(articles=60, weeks=5, topics=8)
    logs, _ = newsroom.simulate(config, cases.seed)
    counts_nd = np.array([newsroom.parse(text) for text in logs.text], float)
    prepared = prepare(logs, counts_nd, Design.parse("endogenous(popularity ~ z) + category(week)"))
    words, text = tokenizer.closed(newsroom.vocabulary(config)), prepared.spec.blocks[0]
    features_nd = np.asarray(prepared.rows.columns_nq[:, text.start : text.stop])
    groups_mg = form_groups(logs.codes("article"), len(logs), cases.group_size, cases.seed)
    whole_mg = groups_mg[(groups_mg >= 0).all(1)]
    return Data(words.encode(logs.text, LENGTH), features_nd, prepared, whole_mg, words.size)


def train(cases: Cases, data: Data, mesh, objective: str, precision: str) -> dict[str, Any]:
    """Trains one objective on one mesh; losses are read on every process alike."""
    shape = DecoderConfig(width=cases.width, layers=cases.layers, heads=4, length=LENGTH, dtype=DTYPES[precision])
    decoder, optimizer = Decoder(shape, data.vocabulary), adamw(cases.learning_rate, cases.steps)
    params = _typed(jax.jit(decoder.init)(jax.random.key(cases.seed), data.tokens_nl[:1]), precision)
    if objective == "dpo":
        step, causal, batch = make_step(preference_objective(decoder), optimizer), (), pair_batches(cases, data)
    else:
        joint = Joint(rows=8 * cases.groups, warm_rows=0, draws=16)
        batch = joint_batches(cases, data, joint)
        made = joint_step(data.prepared.spec, joint, preference_objective(decoder), optimizer, fill_pairs("precision"))
        step, causal = jit_step(made), init_causal(data.prepared.spec, _typed(batch(0).rows, precision), joint)
    state = init_state(params, optimizer, _typed(causal, precision), mesh)
    frozen = shard_state(_typed({"beta": np.float32(0.3)}, precision), mesh)
    key, part, losses = shard_state(jax.random.key(cases.seed), mesh), rows_of(mesh), []
    compiled = step.lower(state, frozen, shard_batch(_mine(_typed(batch(0), precision), *part), mesh), key).compile()
    for i in range(cases.steps):
        mine = _mine(_typed(batch(i), precision), *part)
        state, metrics = compiled(state, frozen, shard_batch(mine, mesh), key)
        losses.append(float(metrics["loss"]))
    return {"losses": losses, "collectives": collectives(compiled.as_text())}


def pair_batches(cases: Cases, data: Data) -> Callable[[int], Pairs]:
    """step -> groups labelled by a made-up reward of their features; the reference is made up, too."""
    rng = np.random.default_rng(cases.seed)
    reward_n, reference_n = data.features_nd @ [1.0, -0.5, 0.5], rng.normal(-60, 1, len(data.tokens_nl))
    order = epochs(len(data.groups_mg), cases.groups, cases.seed)
    first, second = pair_index(cases.group_size)
    weight_mp = rng.uniform(0.2, 2.0, (len(data.groups_mg), len(first)))

    def batch(i: int) -> Pairs:
        rows = data.groups_mg[order(i)]
        label_bp = 1 / (1 + np.exp(reward_n[rows[:, second]] - reward_n[rows[:, first]]))
        return Pairs(data.tokens_nl[rows], reference_n[rows], label_bp, weight_mp[order(i)])

    return batch


def joint_batches(cases: Cases, data: Data, joint: Joint) -> Callable[[int], JointBatch]:
    """step -> rows of the log, and the groups of `pair_batches`, whose labels come from the causal part."""
    order, pairs_at = epochs(len(data.groups_mg), cases.groups, cases.seed), pair_batches(cases, data)
    rows = data.prepared.rows

    def batch(i: int) -> JointBatch:
        members = data.groups_mg[order(i)]
        seen = np.arange(i * joint.rows, (i + 1) * joint.rows) % len(rows.outcome_n)
        return JointBatch(rows.take(seen), pairs_at(i), data.features_nd[members], np.ones(members.shape))

    return batch


def collectives(text: str) -> dict[str, int]:
    """How many of each there are in a compiled function's text."""
    return dict(sorted(collections.Counter(COLLECTIVE.findall(text)).items()))


def main(argv: Sequence[str] | None = None) -> None:
    source, target = sys.argv[1:] if argv is None else argv
    given = json.loads(epath.Path(source).read_text())
    found = run_cases(Cases(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}))
    if jax.process_index() == 0:
        epath.Path(target).write_text(json.dumps(found))


def _typed(tree: Any, precision: str) -> Any:
    """The tree with every real number in this precision."""

    def one(leaf):
        return leaf.astype(DTYPES[precision]) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf

    return jax.tree.map(lambda leaf: one(leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)), tree)


def _mine(batch: Any, part: int, parts: int) -> Any:
    """This process's rows; what is no row is every process's."""
    return jax.tree.map(lambda a: np.split(a, parts)[part] if np.ndim(a) else a, batch)


if __name__ == "__main__":
    main()
