"""What the recipes share: a compiled step with its optimizer, where it runs and keeps its record, and the run itself.

    stage = dpo_stage(decoder, config, accumulate=2).dispatched(8).on(make_mesh(fsdp=4))

A stage is made before anything is trained, so what does not divide is refused there, by the knob's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deconfound_jax.config import Dpo, Grpo, Lora
from deconfound_jax.models.lora import init_lora
from deconfound_jax.models.rows import ROWS
from deconfound_jax.train.dispatch import scan_steps
from deconfound_jax.train.hosts import place
from deconfound_jax.train.loop import run_stage
from deconfound_jax.train.mesh import check_rows, shard_state
from deconfound_jax.train.metrics import Writer
from deconfound_jax.train.step import TrainState, init_state


class Stage(NamedTuple):
    """A compiled training step. `traces()` counts its compilations."""

    step: Callable
    optimizer: Any  # an optax.GradientTransformation
    steps: int
    dispatch: int = 1  # steps of one call of `step`
    batch: tuple[str, int] = ("", 0)  # the knob that says how many rows a batch has, and how many it says
    accumulate: int = 1  # microbatches in which `step` reads them
    mesh: Mesh | None = None  # None: the first device
    tokens: int | None = None  # that a step reads, for the rate; None: as its batch's shapes say

    def dispatched(self, dispatch: int) -> Stage:
        """The same stage, `dispatch` steps a call; see `train.dispatch.scan_steps`.

        Raises:
          ValueError: the stage's steps are no multiple of it.
        """
        if dispatch < 1 or self.steps % dispatch:
            raise ValueError(f"align.dispatch: expected a divisor of the stage's {self.steps} steps, got {dispatch}")
        return self._replace(step=scan_steps(self.step, dispatch), dispatch=dispatch)

    def on(self, mesh: Mesh | None) -> Stage:
        """The same stage on a mesh of devices (None: the first one): state, frozen arrays and batches are laid there.

        Raises:
          ValueError naming the knob: a batch that the mesh, times `accumulate`, does not divide.
        """
        name, rows = self.batch
        if mesh is not None:
            check_rows(name, rows, mesh, self.accumulate)
        elif rows % self.accumulate:
            raise ValueError(f"{name}: expected a multiple of align.accumulate = {self.accumulate}, got {rows}")
        return self._replace(mesh=mesh)

    def traces(self) -> int:
        return self.step._cache_size()


class Record(NamedTuple):
    """Where a stage writes and under which name; `on_step` drives a progress bar."""

    workdir: Any
    name: str
    checkpoint_every: int
    on_step: Callable | None = None
    writers: Sequence[Writer] = ()  # get every row of metrics.jsonl, see `train.writers`


def batch_of(config: Any) -> tuple[str, int]:
    """The knob that says how many rows a batch has, `groups` or `batch`, by its name on the command line."""
    field = "groups" if isinstance(config, Dpo | Grpo) else "batch"
    return f"{re.sub('(?<!^)(?=[A-Z])', '_', type(config).__name__).lower()}.{field}", vars(config)[field]


def trained_part(reference: Any, lora: Lora, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an optimizer sees of a policy that starts at the reference, and what stays frozen beside it.

    Returns:
      (params, frozen): the reference's own parameters and {}, or new adapters and {"base": reference}; see
      `align.policy.variables_of`.
    """
    if not lora.rank:
        return dict(reference), {}
    key = jax.random.fold_in(jax.random.key(seed), 3)
    return {"lora": init_lora(key, reference, lora.pattern, lora.rank, lora.alpha)}, {"base": reference}


def train(stage: Stage, params: Any, frozen: dict[str, Any], batch: Callable[[int], Any], seed: int, record: Record,
          evaluators: Sequence = (), causal: Any = (), keys: Callable[[int], Any] | None = None,
          stream: int = 2) -> TrainState:  # fmt: skip
    """Runs a stage from `params`; returns its final state, which lies where the stage runs.

    Args:
      batch: i -> the whole batch of step i on the host, the same on every process; of it each process hands its
        devices their rows. A joint batch's rows of the log are the exception: every device gets them all. They are
        few, and their cross products then need no sum between devices and are those of one device.
      keys: i -> names of the rows in batch i, see `run_stage`.
      stream: numbers the run's key among those of the seed.
    """
    key, step, frozen = jax.random.fold_in(jax.random.key(seed), stream), stage.step, scalars(frozen)
    if stage.mesh is not None and stage.mesh.size > 1:
        step, (frozen, key) = _fed(stage), shard_state((frozen, key), stage.mesh)
    return run_stage(
        record.name, init_state(params, stage.optimizer, causal, stage.mesh), step, frozen, batch, stage.steps,
        record.workdir, checkpoint_every=record.checkpoint_every, evaluators=evaluators, on_step=record.on_step,
        key=key, dispatch=stage.dispatch, tokens=stage.tokens, writers=record.writers, keys=keys,
    )  # fmt: skip


def scalars(frozen: dict[str, Any]) -> dict[str, Any]:
    """Python numbers as float32 scalars: traced, so that no knob compiles anew."""
    return {k: jnp.float32(v) if isinstance(v, int | float) else v for k, v in frozen.items()}


def mesh_under(params: Any) -> Mesh | None:
    """The mesh of several devices that parameters lie on; None on one device, or on the host."""
    found = (leaf.sharding for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array))
    return next((s.mesh for s in found if isinstance(s, NamedSharding) and s.mesh.size > 1), None)


def _fed(stage: Stage) -> Callable:
    """The stage's step on batches of the host, stacked where several steps are one call."""
    stacked, mesh = int(stage.dispatch > 1), stage.mesh

    def lay(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.startswith("rows/") or np.ndim(leaf) == stacked:
            return place(leaf, NamedSharding(mesh, PartitionSpec()))
        check_rows(f"batch.{name}", np.shape(leaf)[stacked], mesh)
        return place(leaf, NamedSharding(mesh, PartitionSpec(*[None] * stacked, *ROWS)))

    def step(state, frozen, batch, key):
        return stage.step(state, frozen, jax.tree_util.tree_map_with_path(lay, batch), key)

    return step
