"""The newest two states of a training stage on disk, each with the checksums of its files.

    save(folder, step, state)
    restored = restore_latest(folder, like=init_state(params, optimizer))  # (state, step), or None

    folder/40/state/         Orbax: parameters, optimizer state, causal state, step
    folder/40/sha256.json    bytes and SHA-256 of every file under state/
    folder/50.partial/       a save under way, or what a kill left of one: never read

That is all a stage needs to go on: its batches and keys are pure functions of the step. A state gets its number as
its name when it and its checksums are complete, so a kill at any moment leaves the one before it whole. What damages
a complete one (a truncated file, a missing one, a flipped bit) is seen before it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from deconfound_jax.train.files import free_bytes, writes
from deconfound_jax.train.hosts import place as lay

_STATE, _SUMS = "state", "sha256.json"
_PARTIAL, _REMOVED = ".partial", ".removed"  # under way; neither is read


def save(folder, step: int, state: Any) -> None:
    """Writes the state of `step` under `folder/<step>` and keeps, beside it, the newest one before it.

    Returns when it is on disk: a row in a log that is written after is never ahead of its checkpoint. Every process
    of a run calls it; the folder is one that all of them see.

    Raises:
      OSError naming the path and the bytes: the disk is full, or the folder cannot be written. What was written of
        this state is gone again; the one before it is as it was.
    """
    folder = epath.Path(folder).absolute()
    partial = folder / f"{step}{_PARTIAL}"
    try:
        if writes():
            _remove(partial)
            partial.mkdir(parents=True)
        with _orbax() as orbax:
            orbax.save(partial / _STATE, args=ocp.args.StandardSave(_storable(state)))
        if writes():
            (partial / _SUMS).write_text(json.dumps(_sums(partial / _STATE), indent=1, sort_keys=True))
            _remove(folder / str(step))
            partial.rename(folder / str(step))
    except Exception as error:  # Orbax and TensorStore tell of a full disk in several types
        if writes():
            _remove(partial)
        raise OSError(f"checkpoint {folder / str(step)}: could not write a state of {nbytes(state)} bytes, "
                      f"{free_bytes(folder)} bytes are free ({type(error).__name__}: {error})") from error  # fmt: skip
    if writes():
        _keep_two(folder, step)
    _wait("saved")


def restore_latest(folder, like: Any) -> tuple[Any, int] | None:
    """The newest whole state and its step, or None where the folder holds none.

    A damaged newest state is passed over with a RuntimeWarning that says what is wrong with which file.

    Arguments:
      like: a state with the tree, shapes, types and placement to restore to, such as a fresh `init_state`.
    Returns:
      the state, strong-typed and committed as `like` is, so that the next step is bit for bit the unbroken run's.
    Raises:
      ValueError naming every state where all are damaged, or a leaf that the checkpoint lacks, has beside, or has in
        another shape or type.
    """
    folder = epath.Path(folder).absolute()
    damaged: list[str] = []
    for step in sorted(_steps(folder), reverse=True):
        place = folder / str(step)
        fault = _agreed_fault(place)
        if not fault:
            if damaged:
                warnings.warn(f"{'; '.join(damaged)}; going on from {place}", RuntimeWarning, stacklevel=2)
            return _read(place, like), step
        damaged.append(f"checkpoint {place} is damaged: {fault}")
    if damaged:
        raise ValueError(f"{'; '.join(damaged)}; none is whole: remove {folder} to train this stage anew")
    return None


def drop_beyond(folder, step: int) -> None:
    """Removes the states after `step`, which `restore_latest` passed over: damaged, they are no way back."""
    folder = epath.Path(folder).absolute()
    for other in _steps(folder) if writes() else ():
        if other > step:
            _remove(folder / str(other))


def nbytes(tree: Any) -> int:
    """Bytes of all leaves, on every device together."""
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _steps(folder: epath.Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []


def _keep_two(folder: epath.Path, step: int) -> None:
    # The newest may be damaged by whatever comes; one before it is the way back. States beyond it are of a future that
    # is undone: they were passed over as damaged, or belong to a stage that was begun anew.
    before = max((other for other in _steps(folder) if other < step), default=step)
    for path in list(folder.iterdir()):
        if path.suffix in (_PARTIAL, _REMOVED) or (path.name.isdigit() and int(path.name) not in (step, before)):
            _remove(path)


def _remove(path: epath.Path) -> None:
    if path.exists() and path.name.isdigit():
        # Under another name first: a kill in between leaves no number on half a folder.
        aside = path.with_name(path.name + _REMOVED)
        aside.rmtree(missing_ok=True)
        path = path.rename(aside)
    path.rmtree(missing_ok=True)


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(folder.iterdir()):
        yield from _files(path) if path.is_dir() else (path,)


def _sums(folder: epath.Path) -> dict[str, list]:
    """Relative name -> [bytes, SHA-256] of every file."""
    return {path.relative_to(folder).as_posix(): _sum(path) for path in _files(folder)}


def _sum(path: epath.Path) -> list:
    # In pieces, and not by `hashlib.file_digest`: some object stores' files know `read` alone.
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            size += len(piece)
    return [size, digest.hexdigest()]


def _fault(place: epath.Path) -> str:
    """What is wrong with a state on disk; empty where it is whole."""
    try:
        sums = json.loads((place / _SUMS).read_text())
        if not sums:
            return f"{_SUMS} names no file"
        for name, (size, digest) in sums.items():
            path = place / _STATE / name
            found = _sum(path) if path.exists() else None
            if found is None or found[0] != size:
                return f"{_STATE}/{name}: expected {size} bytes, got {found[0] if found else 'no file'}"
            if found[1] != digest:
                return f"{_STATE}/{name}: its SHA-256 is not that of {_SUMS}"
    except FileNotFoundError:
        return f"it has no {_SUMS}"
    except (ValueError, TypeError, AttributeError):
        return f"{_SUMS} cannot be read"
    return ""


def _agreed_fault(place: epath.Path) -> str:
    """`_fault` as process 0 sees it: all processes must restore the same step."""
    if jax.process_count() == 1:
        return _fault(place)
    fault = _fault(place) if writes() else ""
    bad = bool(multihost_utils.broadcast_one_to_all(np.asarray(bool(fault))))
    return fault or ("process 0 says so" if bad else "")


def _wait(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _read(place: epath.Path, like: Any) -> Any:
    with _orbax() as orbax:
        found = orbax.metadata(place / _STATE).item_metadata.tree
        stored = _storable(like)
        _check(str(place), found=_leaves(found), expected=_leaves(stored))
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, stored)
        state = orbax.restore(place / _STATE, args=ocp.args.StandardRestore(abstract))
        return jax.tree.map(lambda leaf, empty: leaf if empty.size else empty, state, like)


def _storable(state: Any) -> Any:
    """The state with a 0 in place of every array without an element, which Orbax refuses to write."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else lay(np.zeros((), leaf.dtype), leaf.sharding), state)


@contextlib.contextmanager
def _orbax() -> Iterator[ocp.Checkpointer]:
    # Orbax tells about its own inner life on the absl logger, and every error twice that it also raises.
    with warnings.catch_warnings(), _quiet("absl"):
        warnings.filterwarnings("ignore", module=r"orbax")
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as orbax:
            yield orbax


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
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
