"""What the command lines share: parsing over a preset, progress bars, tables on the terminal."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from deconfound_jax.config import Run
from experiments.presets import PRESETS


def parse_run(argv: Sequence[str] | None, description: str) -> tuple[Run, Run, argparse.Namespace]:
    """Reads `--preset NAME --workdir DIR [--record] [--field.name value ...]`.

    `--logs FILE` is short for `--logs.path FILE`. Returns the resolved config, the
    preset it started from, and the remaining arguments.
    """
    import tyro

    parser = argparse.ArgumentParser(description=description, add_help=False)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="newsroom")
    parser.add_argument("--workdir", default="")
    parser.add_argument("--record", action="store_true")
    known, rest = parser.parse_known_args(argv)
    preset = PRESETS[known.preset]()
    known.workdir = known.workdir or f"runs/{known.preset}"
    rest = ["--logs.path" if a == "--logs" else a.replace("--logs=", "--logs.path=") for a in rest]
    note = f"{description} Also: --preset {{{','.join(sorted(PRESETS))}}}, --workdir DIR, --record, --logs FILE."
    return tyro.cli(Run, args=rest, default=preset, description=note), preset, known


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int, Mapping[str, Any]], None]]:
    """A progress bar a stage with time left; yields the `on_step` of `train.loop.run_stage`."""
    import rich.progress as bars

    columns = (
        bars.TextColumn("{task.description:<28}"), bars.BarColumn(), bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(), bars.TextColumn("left"), bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with bars.Progress(*columns) as bar:
        tasks: dict[str, Any] = {}

        def on_step(name: str, done: int, total: int, metrics: Mapping[str, Any]) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total, note="")
            note = f"loss {float(metrics['loss']):.3f}" if "loss" in metrics else ""
            bar.update(tasks[name], completed=done, note=note)

        yield on_step


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal columns as a Markdown table that reads well in a terminal, too."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names] + [[_cell(row.get(name)) for name in names] for row in rows]
    width = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, width, strict=True)) + " |" for line in cells]
    rule = "|" + "|".join("-" * (w + 2) for w in width) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
