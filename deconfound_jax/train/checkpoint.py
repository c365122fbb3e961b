"""The newest two states of a training stage on disk.

    save(folder, step, state)
    restored = restore_latest(folder, like=init_state(params, optimizer))  # (state, step), or None

A kill at any moment leaves the checkpoint before it whole.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

_KEEP = 2  # the newest may be torn by a full disk; one before it is the way back


def save(folder, step: int, state: Any) -> None:
    """Writes the state of `step` under `folder/<step>`: under another name first, renamed when complete.

    Returns when it is on disk: a row in a log that is written after is never ahead of its checkpoint.
    """
    with _manager(folder) as manager:
        manager.save(step, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()


def restore_latest(folder, like: Any) -> tuple[Any, int] | None:
    """The newest complete state and its step, or None where the folder holds none.

    Arguments:
      like: a state with the tree, shapes, types and placement to restore to, such as a fresh `init_state`.
    Returns:
      the state, strong-typed and committed as `like` is, so that the next step is bit for bit the unbroken run's.
    Raises:
      ValueError naming a leaf that the checkpoint lacks, has beside, or has in another shape or type.
    """
    if not epath.Path(folder).exists():
        return None
    with _manager(folder) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        _check(f"{folder}/{step}", found=_leaves(manager.item_metadata(step).tree), expected=_leaves(like))
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return manager.restore(step, args=ocp.args.StandardRestore(abstract)), step


@contextlib.contextmanager
def _manager(folder) -> Iterator[ocp.CheckpointManager]:
    # Orbax refuses relative paths and tells about its own inner life on the absl logger.
    options = ocp.CheckpointManagerOptions(max_to_keep=_KEEP, enable_async_checkpointing=False, create=True)
    with warnings.catch_warnings(), _quiet("absl"):
        warnings.filterwarnings("ignore", module=r"orbax")
        handler = ocp.StandardCheckpointHandler()
        with ocp.CheckpointManager(epath.Path(folder).absolute(), options=options, item_handlers=handler) as manager:
            yield manager


def _leaves(tree: Any) -> dict[str, str]:
    """Dotted name of each leaf -> its type and shape, the same for a tree of arrays and for Orbax's metadata."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        for path, leaf in paths
    }


def _check(place: str, found: dict[str, str], expected: dict[str, str]) -> None:
    # Before reading: what Orbax starts to read and then refuses leaves unfinished coroutines behind.
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            wanted, came = (leaves.get(name, "nothing") for leaves in (expected, found))
            raise ValueError(f"checkpoint {place}: {name}: expected {wanted}, got {came}")


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
