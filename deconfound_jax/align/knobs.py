"""The scalars that an objective reads from `frozen`: traced arguments, so that one compilation serves all values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def read_knobs(frozen: Mapping[str, Any], names: tuple[str, ...], loss: str) -> list[Any]:
    """The scalars of these names, in order.

    Raises:
      ValueError: some are not there; it names them.
    """
    missing = [name for name in names if name not in frozen]
    if missing:
        raise ValueError(f"frozen: expected {list(names)} for {loss}, got {sorted(frozen)} without {missing}")
    return [frozen[name] for name in names]
