"""Devices as a named mesh (data, fsdp, tensor): one device is the mesh of one.

    mesh = make_mesh(fsdp=4)                                     # the rest of the devices is `data`
    step = make_step(objective, optimizer)                       # knows no mesh: its arguments do
    state = init_state(params, optimizer, mesh=mesh)
    state, metrics = step(state, shard_state(frozen, mesh), shard_batch(batch, mesh), key)

    data     a batch's rows are divided; parameters are whole on each device
    fsdp     rows are divided, and parameters: gathered where they are used (Rajbhandari et al. 1910.02054)
    tensor   each kernel's heads or inner width are divided (Shoeybi et al. 1909.08053)

Where arrays lie is all that a mesh changes: `jit` divides the work by it, and writes the sums between devices.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from deconfound_jax.models.rows import ROWS, mesh_of
from deconfound_jax.train import hosts

AXES = ("data", "fsdp", "tensor")

Rules = tuple[tuple[str, PartitionSpec], ...]

# (regular expression over "params/layers/q_proj/kernel", spec): the first that is found and has as many axes as the
# leaf says how it lies, PartitionSpec() whatever its axes; none does: a whole copy on each device. Optimizer states
# end in their parameter's path, so they lie as it does. Leaves under "layers" have the layers first, which are
# scanned one after the other and never divided. What reads the stream is divided by its outputs and what writes it by
# its inputs: heads and inner width stay on their device between the two, and one sum over `tensor` ends the branch.
RULES: Rules = (
    (r"^causal/", PartitionSpec()),  # cross products and scalars: small, and each step reads them whole
    (r"embed_tokens/embedding$", PartitionSpec("tensor", "fsdp")),  # (v, d)
    (r"lm_head$", PartitionSpec("fsdp", "tensor")),  # (d, v)
    (r"positions$", PartitionSpec(None, "fsdp")),  # (l, d)
    (r"(q|k|v|gate|up)_proj/kernel$", PartitionSpec(None, "fsdp", "tensor")),
    (r"(o|down)_proj/kernel$", PartitionSpec(None, "tensor", "fsdp")),
    (r"(q|k|v|gate|up)_proj/bias$", PartitionSpec(None, "tensor")),
    # Adapters, as their kernels; their rank is too small to divide.
    (r"(q|k|v|gate|up)_proj/a$", PartitionSpec(None, "fsdp", None)),
    (r"(q|k|v|gate|up)_proj/b$", PartitionSpec(None, None, "tensor")),
    (r"(o|down)_proj/a$", PartitionSpec(None, "tensor", None)),
    (r"(o|down)_proj/b$", PartitionSpec(None, None, "fsdp")),
)


def make_mesh(devices: Sequence[jax.Device] | None = None, *, data: int = 0, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of data x fsdp x tensor over these devices, by default all there are, in an order that suits the machine.

    Args:
      data: 0: as many as the devices allow.
    Raises:
      ValueError: the product is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    for name, size, least in (("data", data, 0), ("fsdp", fsdp, 1), ("tensor", tensor, 1)):
        if size < least:
            raise ValueError(f"mesh.{name}: expected at least {least}, got {size}")
    shape = (data or len(devices) // (fsdp * tensor), fsdp, tensor)
    if math.prod(shape) != len(devices):
        asked = f"{data or '*'}x{fsdp}x{tensor}"
        raise ValueError(f"mesh: expected data x fsdp x tensor to be the {len(devices)} devices there are, got {asked}")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def shard_state(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """A tree of parameters (a state; `frozen` with its base) on the mesh, each leaf as the rules say.

    Every process gives the same values. An axis that its mesh axis does not divide stays whole, and is logged.
    """
    return jax.tree.map(hosts.place, tree, shardings(tree, mesh, rules, log=logging.getLogger(__name__)))


def hold(tree: Any, rules: Rules = RULES) -> Any:
    """The tree as `shard_state` lays it, inside a compiled function: what a step gives back lies as what it took.

    The mesh is the one that the tree's leaves are on; on one device this does nothing.
    """
    mesh = next(filter(None, map(mesh_of, jax.tree.leaves(tree))), None)
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, shardings(tree, mesh, rules))


def shardings(tree: Any, mesh: Mesh | AbstractMesh, rules: Rules = RULES, log: logging.Logger | None = None) -> Any:
    """How each leaf lies on the mesh; leaves are arrays or shapes (`jax.eval_shape`)."""
    whole: list[str] = []

    def one(path, leaf):
        name, shape = jax.tree_util.keystr(path, simple=True, separator="/"), np.shape(leaf)
        wanted = next((spec for rule, spec in rules if _fits(rule, spec, name, shape)), PartitionSpec())
        spec = []
        for axis, (size, over) in enumerate(zip(shape, wanted, strict=False)):
            parts = _parts(mesh, over)
            if size % parts:
                whole.append(f"{name}: axis {axis} of {size} over {over}={parts}")
            spec.append(over if parts > 1 and size % parts == 0 else None)
        while spec and spec[-1] is None:
            spec.pop()
        return NamedSharding(mesh, PartitionSpec(*spec))

    found = jax.tree_util.tree_map_with_path(one, tree)
    if log is not None and whole:
        log.warning("not divided, as the mesh does not divide them: %s", "; ".join(whole))
    return found


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The tree with a whole copy of every leaf on each device; every process gives the same values."""
    return jax.tree.map(lambda leaf: hosts.place(leaf, NamedSharding(mesh, PartitionSpec())), tree)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """The batch with the first axis of every leaf divided over data and fsdp; scalars are replicated.

    With several processes, `batch` is this process's part of the rows, `rows_of(mesh)`.

    Raises ValueError naming the leaf whose first axis the mesh does not divide: fill it up with rows of weight 0.
    """
    sharding, (_, parts) = NamedSharding(mesh, ROWS), rows_of(mesh)

    def put(path, leaf):
        if np.ndim(leaf) == 0:
            return replicate(leaf, mesh)
        check_rows(f"batch{jax.tree_util.keystr(path)}", np.shape(leaf)[0] * parts, mesh)
        return hosts.place_rows(leaf, sharding, parts)

    return jax.tree_util.tree_map_with_path(put, batch)


def check_rows(name: str, rows: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Refuses a batch by its size, before anything is compiled: ValueError unless data x fsdp x accumulate divides it.

    check_rows("dpo.groups", config.dpo.groups, mesh)
    """
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % (shares * accumulate):
        mesh_text = f"{mesh.shape['data']} data x {mesh.shape['fsdp']} fsdp"
        again = f" x {accumulate} accumulated" if accumulate > 1 else ""
        raise ValueError(f"{name}: expected a multiple of {shares * accumulate} rows ({mesh_text}{again}), got {rows}")


@functools.lru_cache
def rows_of(mesh: Mesh) -> tuple[int, int]:
    """(i, n): this process reads part i of the n equal parts of every batch. Processes between which a kernel is
    divided read the same part."""
    return hosts.part(NamedSharding(mesh, ROWS), mesh.shape["data"] * mesh.shape["fsdp"])


def _fits(rule: str, spec: PartitionSpec, name: str, shape: tuple[int, ...]) -> bool:
    return bool(re.search(rule, name)) and (not len(spec) or len(spec) == len(shape))


def _parts(mesh: Mesh | AbstractMesh, over: str | tuple[str, ...] | None) -> int:
    names = () if over is None else (over,) if isinstance(over, str) else over
    return math.prod(mesh.shape[name] for name in names)
