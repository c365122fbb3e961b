"""Files that are whole or not there: a full disk or a kill leaves none that is cut off."""

from __future__ import annotations

import os
import shutil

import jax
from etils import epath


def writes() -> bool:
    """Whether this process writes: of several, the first."""
    return jax.process_index() == 0


def write_whole(path: epath.Path, text: str) -> None:
    """Writes a file under another name first, then renames it.

    Raises OSError naming path and bytes where the disk is full; what was there before is then still there.
    """
    data, aside = text.encode(), path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        aside.write_bytes(data)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise _unwritten(path, len(data), error) from error


def append_lines(path: epath.Path, text: str) -> None:
    """Appends whole lines and returns when they are on disk.

    Raises OSError naming path and bytes where the disk is full; the file is then as it was before.
    """
    data = text.encode()
    if "://" in os.fspath(path):
        # Object stores have no append.
        path.write_bytes((path.read_bytes() if path.exists() else b"") + data)
        return
    size = os.path.getsize(path) if path.exists() else 0
    try:
        # Unbuffered: a buffer would try again on closing.
        with open(path, "ab", buffering=0) as file:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
    except OSError as error:
        os.truncate(path, size)
        raise _unwritten(path, len(data), error) from error


def whole_lines(path: epath.Path) -> list[str]:
    """Lines that end in a newline: a kill in the middle of a write leaves one that does not."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def free_bytes(path: epath.Path) -> int | str:
    """Bytes free where a local path lies, or will; `unknown` for an object store."""
    if "://" in os.fspath(path):
        return "unknown"
    place = path.absolute()
    return shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free


def _unwritten(path: epath.Path, size: int, error: OSError) -> OSError:
    return OSError(f"{path}: could not write {size} bytes, {free_bytes(path.parent)} bytes are free ({error})")
