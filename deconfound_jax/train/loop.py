"""The loop around a step: metrics, evaluations, checkpoints, resume.

A stage writes rows to `workdir/metrics.jsonl` and states to `workdir/checkpoints/<name>/`. Run again after a kill, it
leaves the same rows and the same state as an unbroken run, the field `clock` aside.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from deconfound_jax.train import checkpoint
from deconfound_jax.train.step import TrainState

Evaluator = tuple[int, Callable[[TrainState, int], Mapping[str, Any]]]


def run_stage(
    name: str,
    state: TrainState,
    step: Callable,
    frozen: Any,
    batches: Callable[[int], Any],
    steps: int,
    workdir,
    *,
    checkpoint_every: int,
    evaluators: Sequence[Evaluator] = (),
    key,
    on_step: Callable[[str, int, int, Mapping[str, Any]], None] | None = None,
) -> TrainState:
    """Trains from `state`, or from where a former run of this stage stopped, to `steps` updates.

    Args:
      state: the stage's start; given up to the step, which donates it.
      step: compiled `(state, frozen, batch, key) -> (state, metrics)`; metrics are scalars or short lists of them.
      batches: i -> the batch of update i, a pure function: resume carries no iterator.
      evaluators: (every, function (state, done) -> numbers) each; run at 0, at every `every` updates and at the end.
        Each reads the state and keeps nothing of it: the next step overwrites it.
      on_step: (name, done, steps, newest metrics on the host), for a progress bar; never waits for the device.
    Returns:
      the state after `steps` updates. A finished stage restores it and trains nothing.
    Raises:
      ValueError when `steps` is less than 1, or a checkpoint is further than it.
    """
    log, folder = _Log(epath.Path(workdir), name), epath.Path(workdir) / "checkpoints" / name
    state, done = _start(log, folder, state, steps, evaluators)
    while done < steps:
        state, metrics = step(state, frozen, batches(done), key)
        done += 1
        log.keep(done, metrics)
        saves = _due(checkpoint_every, done, steps)
        if saves or any(_due(every, done, steps) for every, _ in evaluators):
            # Only here does the host wait for the device; in between, steps are queued ahead.
            log.flush()
            log.evaluate(evaluators, state, done, steps)
        if saves:
            checkpoint.save(folder, done, state)
        if on_step:
            on_step(name, done, steps, log.newest)
    return state


def read_metrics(workdir, name: str | None = None) -> list[dict[str, Any]]:
    """The rows of `workdir/metrics.jsonl`, of one stage or of all; evaluations carry `"eval": true`.

    A last line torn by a kill is left out.
    """
    rows = [json.loads(line) for line in _whole_lines(epath.Path(workdir) / "metrics.jsonl")]
    return [row for row in rows if name in (None, row["name"])]


def _start(log: _Log, folder: epath.Path, state: TrainState, steps: int, evaluators: Sequence[Evaluator]):
    # Resume order: 1. the newest complete checkpoint, else the given state; 2. rows beyond it are cut, as they will
    # be written again; 3. a fresh state is evaluated; 4. batches and keys follow from the step number.
    restored = checkpoint.restore_latest(folder, state)
    state, done = restored or (state, 0)
    if not max(done, 1) <= steps:
        least = max(done, 1)
        raise ValueError(f"stage {log.name!r}: expected steps of at least {least} ({done} are done), got {steps}")
    log.cut(done if restored else -1, finished=done == steps)
    if not restored:
        log.evaluate(evaluators, state, done, steps)
    return state, done


class _Log:
    """The stage's rows: on the device until `flush`, then appended to metrics.jsonl by process 0."""

    def __init__(self, workdir: epath.Path, name: str):
        self.path, self.name = workdir / "metrics.jsonl", name
        self.newest: Mapping[str, Any] = {}
        self._waiting: list[tuple[int, Any, float]] = []
        self._began = time.monotonic()

    def cut(self, done: int, finished: bool) -> None:
        """Leaves what was written up to this stage's step `done`; a finished stage leaves later stages' rows."""
        lines = _whole_lines(self.path)
        if not finished:
            rows = [json.loads(line) for line in lines]
            beyond = (i for i, row in enumerate(rows) if row["name"] == self.name and row["step"] > done)
            mine = [i for i, row in enumerate(rows) if row["name"] == self.name and row["step"] <= done]
            # A stage that is not finished has no successors: rows behind its own are of a run that is undone.
            lines = lines[: mine[-1] + 1] if mine else lines[: next(beyond, len(lines))]
        if _writes():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            whole = self.path.parent / "metrics.jsonl.tmp"
            whole.write_text("".join(line + "\n" for line in lines))
            whole.replace(self.path)

    def keep(self, done: int, metrics: Mapping[str, Any]) -> None:
        self._waiting.append((done, metrics, time.monotonic() - self._began))

    def flush(self) -> None:
        waiting, self._waiting = jax.device_get(self._waiting), []
        if waiting:
            self.newest = waiting[-1][1]
            self._append([{"name": self.name, "step": i, **m, "clock": clock} for i, m, clock in waiting])

    def evaluate(self, evaluators: Sequence[Evaluator], state: TrainState, done: int, steps: int) -> None:
        for every, evaluator in evaluators:
            if done == 0 or _due(every, done, steps):
                found = jax.device_get(dict(evaluator(state, done)))
                clock = time.monotonic() - self._began
                self._append([{"name": self.name, "step": done, "eval": True, **found, "clock": clock}])

    def _append(self, rows: list[dict[str, Any]]) -> None:
        if not _writes():
            return
        text = "".join(json.dumps({k: _plain(v) for k, v in row.items()}, allow_nan=False) + "\n" for row in rows)
        if "://" in os.fspath(self.path):
            # Object stores have no append.
            self.path.write_text(self.path.read_text() + text)
            return
        with open(self.path, "a") as file:
            file.write(text)
            # On disk before the checkpoint that vouches for these rows.
            file.flush()
            os.fsync(file.fileno())


def _due(every: int, done: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)


def _writes() -> bool:
    return jax.process_index() == 0


def _whole_lines(path: epath.Path) -> list[str]:
    """Lines that end in a newline: a kill in the middle of a write leaves one that does not."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def _plain(value: Any) -> Any:
    """Numbers and lists of them as JSON knows them; what is not finite becomes null."""
    value = np.asarray(value).tolist() if isinstance(value, np.ndarray | np.generic) else value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
