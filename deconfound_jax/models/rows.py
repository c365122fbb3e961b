"""Where a batch's rows lie while a model reads them, on a mesh with the axes `data`, `fsdp` and `tensor`.

A compiler that sees parameters divided over `fsdp` may divide the stream's width alike, and sum over devices in every
product. What is meant: rows stay where they are, and parameters come to them. One constraint a layer says so.
"""

from __future__ import annotations

import math

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

ROWS = PartitionSpec(("data", "fsdp"))  # a batch's first axis


def mesh_of(x) -> AbstractMesh | None:
    """The mesh of several devices that an array lies on; inside a compiled function it is part of the array's type."""
    mesh = jax.typeof(x).sharding.mesh
    return mesh if "fsdp" in mesh.axis_names and mesh.size > 1 else None


def keep_rows(x):
    """x (b, ...) with its rows divided over data and fsdp, and nothing else; as it is where there is no mesh."""
    mesh = mesh_of(x)
    if mesh is None or x.shape[0] % math.prod(mesh.shape[name] for name in ROWS[0]):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, ROWS))


def gather_table(table_vd):
    """An embedding (v, d) with its width whole and its ids divided over tensor: rows then find their ids in it."""
    mesh = mesh_of(table_vd)
    if mesh is None:
        return table_vd
    ids = "tensor" if table_vd.shape[0] % mesh.shape["tensor"] == 0 else None
    return jax.lax.with_sharding_constraint(table_vd, NamedSharding(mesh, PartitionSpec(ids, None)))
