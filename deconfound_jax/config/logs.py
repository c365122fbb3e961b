"""Where logs come from, how strictly they are read, how they are split."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Split:
    """Which rows are held out."""

    by: Literal["components", "time", "column"] = "components"
    # components: rows that share one of these stay together, beside group and exact text
    columns: tuple[str, ...] = ()
    column: str = ""  # column: a boolean (or 0/1) column, true rows are held out
    held_out: float = 0.3  # components and time: the share of rows judged, never fitted
    seed: int = 0  # components: which of them are held out


@dataclasses.dataclass(frozen=True)
class LogsSource:
    """A file of logs and what to do with rows that are wrong."""

    path: str = ""  # Parquet, CSV or JSONL; empty: the preset's simulation
    on_bad_rows: Literal["error", "drop"] = "error"  # drop also writes rejected_rows.jsonl
    # a confounder's missing value: level = own category, or mean + indicator
    missing: Literal["error", "level", "drop"] = "error"
    split: Split = Split()
    one_arm_logs: int = 0  # > 0: that many logs, each with one random arm a training group (a log, not a trial)
    observational: str = ""  # boolean column: true rows are never judged, and form a log of their own
