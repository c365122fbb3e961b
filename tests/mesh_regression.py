"""A regression on rows of unequal weights, small enough to compile in no time: on a device, a mesh, processes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deconfound_jax.train.mesh import rows_of, shard_batch, shard_state
from deconfound_jax.train.step import init_state, make_step


def objective(params, frozen, batch, key):
    error_b = batch["x_bd"] @ params["w"] - batch["y_b"]
    return frozen["scale"] * error_b**2, batch["weight_b"], 0.01 * (params["w"] ** 2).sum(), {"n": jnp.size(error_b)}


def batch_of(i):
    rng = np.random.default_rng(i)
    x_bd = rng.normal(size=(16, 3)).astype(np.float32)
    y_b = x_bd @ np.array([1, -2, 0.5], np.float32)
    return {"x_bd": x_bd, "y_b": y_b, "weight_b": rng.integers(0, 4, 16).astype(np.float32)}


def train(mesh=None, accumulate=1):
    """Three steps -> the parameters, the last loss and gradient norm."""
    optimizer, frozen = optax.adam(0.1), {"scale": np.float32(2)}
    step, key = make_step(objective, optimizer, accumulate=accumulate), jax.random.key(0)
    state = init_state({"w": np.zeros(3, np.float32)}, optimizer, causal={"seen": 1.0}, mesh=mesh)
    for i in range(3):
        batch = batch_of(i)
        if mesh is not None:
            part, parts = rows_of(mesh)
            batch = shard_batch({name: np.split(rows, parts)[part] for name, rows in batch.items()}, mesh)
            frozen = shard_state(frozen, mesh)
        state, metrics = step(state, frozen, batch, key)
    assert step._cache_size() == 1, "the new state lies otherwise than the old one"
    return [*map(float, np.asarray(state.params["w"])), float(metrics["loss"]), float(metrics["grad_norm"])]
