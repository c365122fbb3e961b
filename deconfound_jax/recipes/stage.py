"""What the recipes share: a compiled step with its optimizer, and where a run keeps its record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Stage(NamedTuple):
    """A compiled training step. `traces()` counts its compilations."""

    step: Callable
    optimizer: Any  # an optax.GradientTransformation
    steps: int

    def traces(self) -> int:
        return self.step._cache_size()


class Record(NamedTuple):
    """Where a stage writes and under which name; `on_step` drives a progress bar."""

    workdir: Any
    name: str
    checkpoint_every: int
    on_step: Callable | None = None
