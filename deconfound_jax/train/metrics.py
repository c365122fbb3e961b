"""The rows of a run: `metrics.jsonl`, one line a step or evaluation, and the writers beside it.

    {"name": "dpo", "step": 40, "eval": true, "kl": 0.8, "clock": 12.5}

Metrics wait on the device until `flush`; there they are looked through for what is not finite.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from deconfound_jax.train.files import append_lines, whole_lines, write_whole, writes

Row = Mapping[str, Any]
Writer = Callable[[Sequence[Row]], None]  # rows as they were appended; see `train.writers`

WATCHED = ("loss", "grad_norm")  # a run stops where one of these is not finite
_STOPPED = "nonfinite.json"
_PATIENCE = 10.0  # seconds after which rows are fetched though nothing asks for them
_log = logging.getLogger(__name__)


class NonFinite(FloatingPointError):
    """A loss, gradient or parameter that is not finite: the run has stopped, its last state on disk is finite."""


def read_metrics(workdir, name: str | None = None) -> list[dict[str, Any]]:
    """The rows of `workdir/metrics.jsonl`, of one stage or of all; evaluations carry `"eval": true`.

    A last line torn by a kill is left out.
    """
    rows = [json.loads(line) for line in whole_lines(epath.Path(workdir) / "metrics.jsonl")]
    return [row for row in rows if name in (None, row["name"])]


class MetricsLog:
    """One stage's rows, appended to metrics.jsonl and handed to the writers by process 0.

    Args:
      keys: i -> the names of the rows in batch i, for `nonfinite.json`.
    """

    def __init__(self, workdir, name: str, writers: Sequence[Writer] = (), keys: Callable | None = None):
        self.folder, self.name = epath.Path(workdir), name
        self.path = self.folder / "metrics.jsonl"
        self._writers, self._keys = list(writers), keys
        self._waiting: list[tuple[int, int, Any, float]] = []  # steps done after it, steps of it, metrics, clock
        self._began = self._flushed = time.monotonic()
        self._metrics, self._found = {}, {}
        self._since, self._tokens = None, 0  # of the rate: when the clock started, tokens since

    def cut(self, done: int) -> None:
        """Leaves this stage's rows up to its step `done`, and those of other stages, which cut their own."""
        rows = ((line, json.loads(line)) for line in whole_lines(self.path))
        lines = [line for line, row in rows if row["name"] != self.name or row["step"] <= done]
        if writes():
            write_whole(self.path, "".join(line + "\n" for line in lines))
            (self.folder / _STOPPED).unlink(missing_ok=True)  # what it tells of is tried again, or was mended

    def start_clock(self) -> None:
        """Before a dispatch: the rate counts the time from here to the next flush, evaluations and saves left out."""
        self._since = time.monotonic() if self._since is None else self._since

    def stop_clock(self) -> None:
        self._since, self._tokens = None, 0

    def keep(self, done: int, steps: int, metrics: Mapping[str, Any], tokens: int) -> None:
        """Metrics of the `steps` steps that led to `done`, stacked where there are several; still on the device."""
        now = time.monotonic()
        first = not self._metrics and not self._waiting
        # The first dispatch of a process compiles: it is no measure of the rate.
        self._since, self._tokens = (now, 0) if first else (self._since, self._tokens + tokens)
        self._waiting.append((done, steps, metrics, now - self._began))

    def impatient(self) -> bool:
        """Whether a watcher has waited for ten seconds. Not with several processes: they must stop together."""
        return jax.process_count() == 1 and time.monotonic() - self._flushed > _PATIENCE

    def flush(self) -> None:
        """Waits for the device, then writes the rows that are kept.

        Raises:
          NonFinite: a loss or a gradient's norm is not finite. The rows up to there and `nonfinite.json` are written.
        """
        waiting, self._waiting = jax.device_get(self._waiting), []
        self._flushed = now = time.monotonic()
        if waiting:
            rows = [row for piece in waiting for row in self._split(*piece)]
            bad = next((i for i, row in enumerate(rows) if self._unfit(row)), None)
            self._append(rows if bad is None else rows[: bad + 1])
            if bad is not None:
                self.stop(rows[bad], " and ".join(self._unfit(rows[bad])))
            self._metrics = {k: v for k, v in rows[-1].items() if k not in ("name", "step", "clock")}
            if self._since is not None and self._tokens:
                self._metrics["tokens_per_second"] = self._tokens / max(now - self._since, 1e-9)
            self.stop_clock()

    def stop(self, row: Row, what: str) -> None:
        """Writes `nonfinite.json`, the row and the keys of its batch, and raises NonFinite."""
        batch = row["step"] - 1
        keys = None if self._keys is None else np.asarray(self._keys(batch)).tolist()
        record = {"stage": self.name, "step": row["step"], "batch": batch, "what": what, "row_keys": keys,
                  "metrics": {k: _said(v) for k, v in row.items() if k not in ("name", "step", "clock")}}  # fmt: skip
        path = self.folder / _STOPPED
        if writes():
            write_whole(path, json.dumps(record, indent=2, allow_nan=False) + "\n")
        raise NonFinite(f"stage {self.name!r}: {what} not finite after step {row['step']}, on batch {batch}; {path} "
                        "holds its metrics and row keys. No state since the last checkpoint is kept")  # fmt: skip

    def evaluate(self, evaluators: Iterable[Callable], state: Any, done: int) -> None:
        """Writes a row of what each evaluator finds."""
        for evaluator in evaluators:
            found = jax.device_get(dict(evaluator(state, done)))
            clock = time.monotonic() - self._began
            self._append([{"name": self.name, "step": done, "eval": True, **found, "clock": clock}])
            self._found = {**self._found, **found}
            self.stop_clock()

    @property
    def newest(self) -> dict[str, Any]:
        """What is known on the host: of the last step, and where it does not say, of the last evaluation."""
        return {**self._found, **self._metrics}

    def _split(self, done: int, steps: int, metrics: Mapping[str, Any], clock: float) -> list[dict[str, Any]]:
        pick = (lambda leaf, i: leaf) if steps == 1 else (lambda leaf, i: leaf[i])
        return [
            {"name": self.name, "step": done - steps + 1 + i, **{k: pick(v, i) for k, v in metrics.items()},
             "clock": clock} for i in range(steps)
        ]  # fmt: skip

    @staticmethod
    def _unfit(row: Row) -> list[str]:
        return [name for name in WATCHED if name in row and not np.all(np.isfinite(row[name]))]

    def _append(self, rows: Sequence[Row]) -> None:
        if not writes():
            return
        rows = [{k: _plain(v) for k, v in row.items()} for row in rows]
        # On disk before the checkpoint that vouches for these rows.
        append_lines(self.path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
        for writer in list(self._writers):
            try:
                writer(rows)
            except Exception as error:
                # The record is on disk: what shows it elsewhere ends no run.
                _log.warning("stage %r: a writer failed and gets no more rows (%s: %s)", self.name,
                             type(error).__name__, error)  # fmt: skip
                self._writers.remove(writer)


def _plain(value: Any) -> Any:
    """Numbers and lists of them as JSON knows them; what is not finite becomes null."""
    value = np.asarray(value).tolist() if isinstance(value, np.ndarray | np.generic) else value
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _said(value: Any) -> Any:
    """As `_plain`, but what is not finite keeps its name: "nan", "inf", "-inf"."""
    value = np.asarray(value).tolist() if isinstance(value, np.ndarray | np.generic) else value
    if isinstance(value, list | tuple):
        return [_said(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
