"""SIGTERM as a request: the stage ends its dispatch, saves and raises `Preempted`; the same command goes on from there.

Clusters send it some seconds before they take a machine away.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

# Dispatches of this process so far. Processes call in lockstep, and agree on the number of a call to stop after.
_calls = itertools.count()


class Preempted(Exception):
    """The run was asked to stop and has: its state is on disk."""


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Yields `asked()`, to be called after every dispatch: whether to save and stop now.

    One process: its SIGTERM, while the context lasts; only the main thread may handle signals, so in another one the
    answer is always no. Several: `jax.distributed` takes the SIGTERM of any of them and lets all stop after the same
    dispatch, some later than it came; no process reads another's arrays for that.
    """
    if jax.process_count() > 1:
        yield lambda: multihost_utils.reached_preemption_sync_point(next(_calls))
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        # None: a handler that was not set from Python, and cannot be set again from it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
