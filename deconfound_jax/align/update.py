"""One optimizer update of a policy on an objective: what the plain and the joint step have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deconfound_jax.align.losses import weighted_mean


def update_policy(
    objective: Callable, optimizer: optax.GradientTransformation, params: Any, opt_state: Any, frozen, batch, key,
    accumulate: int = 1,
):  # fmt: skip
    """Gradient of the objective's weighted mean plus penalty, then the optimizer's update.

        loss = sum_i w_i l_i / sum_i w_i + penalty

    Args:
      accumulate: microbatches that the batch is read in, one after the other, for the memory of one. Microbatch j has
        rows j, j + accumulate, ... (so each device keeps its rows) and the key fold_in(key, j). The gradient is the
        whole batch's, whatever weights fall where:

            W_j = sum_i w_ij,   loss = sum_j W_j loss_j / sum_j W_j

        What an objective computes over its batch (KTO's z0, a penalty on the batch) is then a microbatch's, and
        metrics are means over microbatches with the same weights. A batch without weight has no gradient at all.
    Returns:
      new parameters, new optimizer state, and the objective's metrics with `loss` and
      `grad_norm` (before clipping).
    Raises:
      ValueError: a leaf of the batch whose first axis `accumulate` does not divide.
    """
    if accumulate == 1:
        _, loss, metrics, grads = _gradient(objective, params, frozen, batch, key)
    else:
        loss, metrics, grads = _accumulated(objective, params, frozen, split(batch, accumulate), key)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    metrics = {**metrics, "loss": loss, "grad_norm": _norm(grads)}
    return optax.apply_updates(params, updates), opt_state, metrics


def split(batch: Any, accumulate: int) -> Any:
    """Microbatches along a new first axis, row i of the batch in microbatch i mod `accumulate`."""

    def one(path, leaf):
        if not np.ndim(leaf) or leaf.shape[0] % accumulate:
            name = f"batch{jax.tree_util.keystr(path)}"
            raise ValueError(f"{name}: expected a first axis that accumulate = {accumulate} divides, got {leaf.shape}")
        return jnp.moveaxis(leaf.reshape(-1, accumulate, *leaf.shape[1:]), 1, 0)

    return jax.tree_util.tree_map_with_path(one, batch)


def _gradient(objective, params, frozen, batch, key):
    """Sum of weights, loss, metrics, gradients."""

    def loss_of(params):
        per_example, weight, penalty, metrics = objective(params, frozen, batch, key)
        return weighted_mean(per_example, weight) + penalty, (jnp.sum(weight), metrics)

    (loss, (total, metrics)), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    return total, loss, metrics, grads


def _accumulated(objective, params, frozen, microbatches, key):
    """Loss, metrics, gradients: the microbatches' means, weighted by their sums of weights."""
    count = jax.tree.leaves(microbatches)[0].shape[0]

    def weighted(i, microbatch):
        total, *values = _gradient(objective, params, frozen, microbatch, jax.random.fold_in(key, i))
        # What a microbatch of weight 0 gives is never read, whatever it is.
        return total, jax.tree.map(lambda a: jnp.where(total > 0, total * a, 0.0), values)

    def add(sums, numbered):
        return jax.tree.map(jnp.add, sums, weighted(*numbered)), None

    like = jax.eval_shape(weighted, 0, jax.tree.map(lambda a: a[0], microbatches))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
    (total, values), _ = jax.lax.scan(add, zeros, (jnp.arange(count), microbatches))
    return jax.tree.map(lambda a: a / jnp.where(total > 0, total, 1.0), values)


def _norm(tree: Any) -> jax.Array:
    # optax's own has two names in the versions supported, the older one with a warning.
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))
