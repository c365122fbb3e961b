"""Several processes as one run: `jax.distributed`, and arrays whose parts lie on different hosts.

    python -m deconfound_jax.train.hosts experiments.align --preset newsroom

joins the processes that its environment names, then runs the module or the .py file: a script needs to know nothing
of hosts. `experiments/run_tpu.sh` starts it on all workers of a TPU slice, or N times here.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID    given, as for CPU and GPU machines
    DECONFOUND_HOSTS=auto                                         found by JAX: a TPU slice, Slurm, Open MPI
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

_GIVEN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start(coordinator: str = "", processes: int = 0, index: int = -1, environment: Mapping[str, str] | None = None):
    """Joins the run's other processes, before anything touches a device; returns a sentence on what it did.

    Args:
      coordinator: host:port of process 0; with `processes` and `index` in place of the environment's.
      environment: default: the process's own.
    Raises:
      ValueError: some of the three, but not all, or a number that is none.
    """
    if jax.distributed.is_initialized():
        return f"process {jax.process_index()} of {jax.process_count()}, joined before"
    environment = os.environ if environment is None else environment
    given = {"coordinator": coordinator, "processes": processes or "", "index": "" if index < 0 else index}
    if not any(map(str, given.values())):
        given = dict(zip(given, (environment.get(name, "") for name in _GIVEN), strict=True))
    if any(map(str, given.values())):
        address, count, number = str(given["coordinator"]), _number(given, "processes"), _number(given, "index")
        if not address or not 0 <= number < count:
            raise ValueError(f"hosts: expected coordinator, processes and 0 <= index < processes, got {given}")
        if count == 1:
            return "one process"
        asked = {"coordinator_address": address, "num_processes": count, "process_id": number}
        _join(**asked, cluster_detection_method="deactivate")
        return f"process {number} of {count}, coordinator {address}"
    if environment.get("DECONFOUND_HOSTS") == "auto":
        _join()
        return f"process {jax.process_index()} of {jax.process_count()}, found by JAX"
    return "one process"


def part(sharding: Sharding, shares: int) -> tuple[int, int]:
    """(i, n): this process holds part i of n of the rows that the sharding divides into `shares`.

    Raises:
      ValueError: processes whose rows overlap, but are not the same.
    """
    held: dict[int, set[int]] = {}
    for device, (rows, *_) in sharding.devices_indices_map((shares,)).items():
        held.setdefault(device.process_index, set()).add(rows.indices(shares)[0])
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, parts)) != shares or len(set(map(len, parts))) > 1:
        raise ValueError(f"mesh: expected processes to hold equal parts of a batch's {shares} shares, got {held}")
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def place(leaf: Any, sharding: Sharding) -> jax.Array:
    """The array as the sharding says; every process gives the whole of it, and the same."""
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.jit(lambda a: a, out_shardings=sharding)(leaf)
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(place(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    value = np.asarray(leaf)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def place_rows(rows: Any, sharding: Sharding, parts: int) -> jax.Array:
    """The array of `parts` processes' rows, from this one's; `part` says which they are."""
    if sharding.is_fully_addressable:
        return jax.device_put(rows, sharding)
    shape = (np.shape(rows)[0] * parts, *np.shape(rows)[1:])
    return jax.make_array_from_process_local_data(sharding, np.asarray(rows), shape)


def fetch(tree: Any) -> Any:
    """Whole arrays on the host, wherever their parts lie. Every process calls it, and gets them."""

    def one(leaf):
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(one, tree)


def main(argv: Sequence[str] | None = None) -> None:
    """Joins, says so on standard error, and runs a module (or a .py file) with its arguments as `python -m` would.

    Where there are others, a process that fails ends at once: its orderly end would wait for them, and they for it.
    """
    target, *arguments = sys.argv[1:] if argv is None else argv
    print(f"hosts: {start()}", file=sys.stderr, flush=True)
    sys.argv = [target, *arguments]
    try:
        if target.endswith(".py"):
            runpy.run_path(target, run_name="__main__")
        else:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if not code or not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _join(**arguments) -> None:
    # What carries sums between processes on CPU; TPUs and GPUs have their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(**arguments)


def _number(given: Mapping[str, Any], name: str) -> int:
    try:
        return int(given[name])
    except ValueError:
        raise ValueError(f"hosts.{name}: expected a number, got {given[name]!r}") from None


if __name__ == "__main__":
    main()
