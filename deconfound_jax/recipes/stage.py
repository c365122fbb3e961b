"""What the recipes share: a compiled step with its optimizer, where a run keeps its record, and the run itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deconfound_jax.config import Lora
from deconfound_jax.models.lora import init_lora
from deconfound_jax.train.dispatch import scan_steps
from deconfound_jax.train.loop import run_stage
from deconfound_jax.train.metrics import Writer
from deconfound_jax.train.step import init_state


class Stage(NamedTuple):
    """A compiled training step. `traces()` counts its compilations."""

    step: Callable
    optimizer: Any  # an optax.GradientTransformation
    steps: int
    dispatch: int = 1  # steps of one call of `step`

    def dispatched(self, dispatch: int) -> Stage:
        """The same stage, `dispatch` steps a call; see `train.dispatch.scan_steps`."""
        return self._replace(step=scan_steps(self.step, dispatch), dispatch=dispatch)

    def traces(self) -> int:
        return self.step._cache_size()


class Record(NamedTuple):
    """Where a stage writes and under which name; `on_step` drives a progress bar."""

    workdir: Any
    name: str
    checkpoint_every: int
    on_step: Callable | None = None
    writers: Sequence[Writer] = ()  # get every row of metrics.jsonl, see `train.writers`


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
          evaluators: Sequence = (), causal: Any = (), keys: Callable[[int], Any] | None = None):  # fmt: skip
    """Runs a stage from `params`; returns its final state. `keys` names the rows of batch i, see `run_stage`."""
    return run_stage(
        record.name, init_state(params, stage.optimizer, causal), stage.step, scalars(frozen), batch, stage.steps,
        record.workdir, checkpoint_every=record.checkpoint_every, evaluators=evaluators, on_step=record.on_step,
        key=jax.random.fold_in(jax.random.key(seed), 2), dispatch=stage.dispatch, writers=record.writers, keys=keys,
    )  # fmt: skip


def scalars(frozen: dict[str, Any]) -> dict[str, Any]:
    """Python numbers as float32 scalars: traced, so that no knob compiles anew."""
    return {k: jnp.float32(v) if isinstance(v, int | float) else v for k, v in frozen.items()}
