"""The loop around a step: metrics, evaluations, checkpoints, resume.

A stage writes rows to `workdir/metrics.jsonl` and states to `workdir/checkpoints/<name>/`. Run again after a kill at
any moment, it leaves the same rows and the same state as an unbroken run, the field `clock` aside. What is carried
over is the state alone: batch i is a pure function of i, and a step's key is `fold_in(key, step)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from deconfound_jax.train import checkpoint
from deconfound_jax.train.dispatch import count_tokens, stack_batches
from deconfound_jax.train.metrics import MetricsLog, Writer
from deconfound_jax.train.metrics import read_metrics as read_metrics
from deconfound_jax.train.preemption import Preempted, asked_to_stop
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
    dispatch: int = 1,
    tokens: int | None = None,
    keys: Callable[[int], Any] | None = None,
    writers: Sequence[Writer] = (),
) -> TrainState:
    """Trains from `state`, or from where a former run of this stage stopped, to `steps` updates.

    Args:
      state: the stage's start; given up to the step, which donates it.
      step: compiled `(state, frozen, batch, key) -> (state, metrics)`; metrics are scalars or short lists of them.
      batches: i -> the batch of update i, a pure function: resume carries no iterator.
      evaluators: (every, function (state, done) -> numbers) each; run at 0, at every `every` updates and at the end.
        Each reads the state and keeps nothing of it: the next step overwrites it.
      on_step: (name, done, steps, newest numbers on the host), for a progress bar; never waits for the device.
        The numbers have `tokens_per_second` where the batches have tokens.
      dispatch: updates of one call of `step`, which is then `dispatch.scan_steps`' and takes stacked batches.
      tokens: a step reads so many, for the rate; None: as its batch's shapes say, see `dispatch.count_tokens`.
      keys: i -> the names of the rows in batch i, written down where a loss is not finite.
      writers: get every row that is appended to metrics.jsonl; rows written again after a resume come again.
    Returns:
      the state after `steps` updates. A finished stage restores it and trains nothing.
    Raises:
      ValueError when `steps` is less than 1, or a checkpoint is further than it, or `dispatch` does not divide
        `steps`, `checkpoint_every` or the period of an evaluator; see also `checkpoint.restore_latest`.
      NonFinite: a loss, gradient norm or parameter is not finite; `workdir/nonfinite.json` says where. Seen when the
        rows are fetched: before a checkpoint or evaluation, and every ten seconds.
      Preempted: SIGTERM came; the state is saved.
      OSError: the disk is full; what was there before is whole.
    """
    periods = {"steps": steps, "checkpoint_every": checkpoint_every}
    _check_dispatch(name, dispatch, periods | {f"evaluators[{i}]": every for i, (every, _) in enumerate(evaluators)})
    log, folder = MetricsLog(workdir, name, writers, keys), epath.Path(workdir) / "checkpoints" / name
    with asked_to_stop() as asked:
        (state, done), stops = _start(log, folder, state, steps, evaluators), False
        _check_dispatch(name, dispatch, {f"the {done} steps done": done})
        while done < steps and not stops:
            batch = stack_batches(batches, done, dispatch)
            log.start_clock()
            state, metrics = step(state, frozen, batch, key)
            done += dispatch
            log.keep(done, dispatch, metrics, count_tokens(batch) if tokens is None else tokens * dispatch)
            stops = asked()
            saves = stops or _due(checkpoint_every, done, steps)
            now = [evaluator for every, evaluator in evaluators if _due(every, done, steps)]
            if saves or now or log.impatient():
                # Only here does the host wait for the device; in between, steps are queued ahead.
                log.flush()
            log.evaluate(now, state, done)
            if saves:
                _save(log, folder, state, done)
            if on_step:
                on_step(name, done, steps, log.newest)
    # Asked once more: it may have come while the last state was being saved.
    if stops or asked():
        raise Preempted(f"stage {name!r}: stopped after step {done} of {steps}, its state is saved in {folder}")
    return state


def _start(log: MetricsLog, folder: epath.Path, state: TrainState, steps: int, evaluators: Sequence[Evaluator]):
    # Resume order: 1. the newest whole checkpoint, else the given state; 2. rows and damaged states beyond it are cut,
    # as they will be written again; 3. a fresh state is evaluated; 4. batches and keys follow from the step number.
    restored = checkpoint.restore_latest(folder, state)
    state, done = restored or (state, 0)
    if not max(done, 1) <= steps:
        least = max(done, 1)
        raise ValueError(f"stage {log.name!r}: expected steps of at least {least} ({done} are done), got {steps}")
    log.cut(done if restored else -1)
    checkpoint.drop_beyond(folder, done)
    if not restored:
        log.evaluate([evaluator for _, evaluator in evaluators], state, done)
    return state, done


def _save(log: MetricsLog, folder: epath.Path, state: TrainState, done: int) -> None:
    """Saves a state whose parameters are finite; a step's loss is of those before its update."""
    if not _finite(state.params):
        log.stop({"step": done, **log.newest}, "parameters")
    checkpoint.save(folder, done, state)
    log.stop_clock()


def _finite(params: Any) -> bool:
    leaves = [leaf for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    if jax.process_count() > 1:
        return bool(_all_finite(leaves))
    # A state that is saved comes to the host anyway: nothing needs to be compiled for it.
    return all(np.isfinite(np.asarray(leaf)).all() for leaf in leaves)


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.all(jnp.asarray([jnp.isfinite(leaf).all() for leaf in leaves]))


def _due(every: int, done: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)


def _check_dispatch(name: str, dispatch: int, periods: Mapping[str, int]) -> None:
    # A shorter dispatch at the end of a period would be compiled a second time.
    for period, length in periods.items():
        if dispatch < 1 or length % dispatch:
            raise ValueError(f"stage {name!r}: dispatch: expected a divisor of {period} = {length}, got {dispatch}")
