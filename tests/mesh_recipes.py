"""DPO and joint DPO on a tiny newsroom through the recipes, as a script: losses, KL and traces as a line of JSON.

    python mesh_recipes.py WORKDIR 1x2 dpo joint      # data x fsdp, stages

On a mesh several steps are one call, and batches are read in microbatches.
"""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from deconfound_jax.causal.reward import Reward
from deconfound_jax.causal.terms import prepare
from deconfound_jax.config import Align, Dpo, Joint, Newsroom
from deconfound_jax.config import Decoder as DecoderConfig
from deconfound_jax.models import tokenizer
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.recipes.curve import policy_sampler, policy_watch
from deconfound_jax.recipes.joint import align_jointly, joint_stage
from deconfound_jax.recipes.preference import align_dpo, dpo_stage
from deconfound_jax.recipes.stage import Record
from deconfound_jax.recipes.texts import Texts
from deconfound_jax.simulate import newsroom
from deconfound_jax.structs import Design
from deconfound_jax.train.hosts import fetch
from deconfound_jax.train.loop import read_metrics
from deconfound_jax.train.mesh import make_mesh, shard_state

SIMULATION = Newsroom(articles=40, weeks=5, topics=8)
DPO, JOINT = Dpo(steps=4, groups=8, learning_rate=1e-2), Joint(rows=64, warm_rows=128, draws=4)
ALIGN = Align(accept_risk=True, equal_texts="drop")


def losses(workdir, mesh=None, stages=("dpo", "joint")) -> dict[str, list[float]]:
    """Stage -> the loss of every step, and among them the KL of every evaluation, of joint DPO alone."""
    logs, _ = newsroom.simulate(SIMULATION, 0)
    features_nd = np.array([newsroom.parse(text) for text in logs.text], float)
    prepared = prepare(logs, features_nd, Design.parse("endogenous(popularity ~ z) + category(week)"))
    words = tokenizer.closed(newsroom.vocabulary(SIMULATION))
    decoder = Decoder(DecoderConfig(width=8, layers=1, heads=2, length=24), words.size)
    texts = Texts(words.encode(logs.text, 24), logs.codes("article"))
    reference = jax.jit(decoder.init)(jax.random.key(0), jnp.asarray(texts.tokens_nl[:1]))
    draws_sd = np.random.default_rng(0).normal([0.5, -0.3, 0.3], 0.1, (8, 3))
    reward = Reward((draws_sd @ features_nd.T).astype(np.float32), "model")
    plain, dispatch, accumulate = dpo_stage(decoder, DPO), 1, 1
    if mesh is not None:
        reference, dispatch, accumulate = shard_state(reference, mesh), 2, 2
        plain = dpo_stage(decoder, DPO, accumulate).dispatched(dispatch).on(mesh)
    joint = joint_stage(decoder, prepared.spec, DPO, JOINT, None, dispatch, accumulate).on(mesh)
    watch = [(4, policy_watch(policy_sampler(decoder, 16), reference, jax.random.key(1)))]
    record = Record(workdir, "dpo", 2)
    params = align_dpo(decoder, plain, reference, texts, reward, DPO, ALIGN, 0, record)
    again = align_dpo(decoder, plain, reference, texts, reward, DPO, ALIGN, 0, record)
    same = jax.tree.map(lambda a, b: (a == b).all(), *map(fetch, (params, again)))
    assert all(jax.tree.leaves(same)), "a finished stage is restored"
    assert plain.traces() == 1
    if "joint" in stages:
        record = Record(workdir, "joint", 2)
        align_jointly(decoder, joint, reference, texts, prepared, DPO, ALIGN, JOINT, 0, record, watch)
        assert joint.traces() == 1
    rows = read_metrics(workdir)
    return {name: [row.get("loss", row.get("kl")) for row in rows if row["name"] == name] for name in stages}


if __name__ == "__main__":
    data, fsdp = map(int, sys.argv[2].split("x"))
    print(json.dumps(losses(sys.argv[1], make_mesh(data=data, fsdp=fsdp), sys.argv[3:])))
