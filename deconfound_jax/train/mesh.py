"""Devices as a named mesh: one device is the mesh of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA = "data"


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the one axis `data` over these devices, by default all there are.

    jit splits the work by where its arguments lie, and sums the gradients:

        state, metrics = step(replicate(state, mesh), frozen, shard_batch(batch, mesh), key)
    """
    return Mesh(np.asarray(jax.devices() if devices is None else devices), (DATA,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The tree with a whole copy of every leaf on each device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """The batch with the first axis of every leaf divided over `data`; scalars are replicated.

    Raises ValueError naming the leaf whose first axis the devices do not divide: fill it up with rows of weight 0.
    """

    def put(path, leaf):
        if np.ndim(leaf) == 0:
            return replicate(leaf, mesh)
        devices, rows = mesh.shape[DATA], np.shape(leaf)[0]
        if rows % devices:
            name = f"batch{jax.tree_util.keystr(path)}"
            raise ValueError(f"{name}: expected a multiple of {devices} rows, one share a device, got {rows}")
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(DATA)))

    return jax.tree_util.tree_map_with_path(put, batch)
