"""The policy as objectives see it: what is trained, laid over what is frozen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def variables_of(params: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Variables for `Decoder.apply`: those trained, over `frozen["base"]` where there is one.

        variables_of({"params": ...}, {"beta": 0.1})                             # the whole policy is trained
        variables_of({"lora": ...}, {"beta": 0.1, "base": {"params": ...}})      # its adapters are

    The base is an argument of the compiled step and has no optimizer state.
    """
    return {**frozen.get("base", {}), **params}
