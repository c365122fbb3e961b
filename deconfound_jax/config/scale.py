"""Knobs of the devices that a run is divided over."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mesh:
    """All devices of all processes as data x fsdp x tensor, see `train.mesh`."""

    data: int = 0  # parts of a batch's rows; 0: what the other two leave of the devices
    fsdp: int = 1  # parts of the rows, and of the parameters: for models that one device does not hold
    tensor: int = 1  # parts of every kernel's heads or inner width: where one row is too large for a device
