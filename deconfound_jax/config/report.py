"""The report's knobs."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Report:
    """What report.html may show."""

    examples: Literal["show", "none"] = "show"  # none: no text from the log leaves it
    n_examples: int = 8
