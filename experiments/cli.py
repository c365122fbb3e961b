"""What the command lines share: parsing over a preset, progress bars, tables on the terminal."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from etils import epath

from deconfound_jax.config import Run
from deconfound_jax.train import hosts
from deconfound_jax.train.preemption import Preempted
from experiments import rundir
from experiments.presets import PRESETS

Study = TypeVar("Study")


def parse_run(argv: Sequence[str] | None, description: str) -> tuple[Run, Run, argparse.Namespace]:
    """Reads `--preset NAME --workdir DIR [--record] [--field.name value ...]`.

    `--logs FILE` is short for `--logs.path FILE`. Returns the resolved config, the
    preset it started from, and the remaining arguments. Joins the run's other processes first, before anything
    touches a device.
    """
    import tyro

    hosts.start()
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


def parse_study(argv: Sequence[str] | None, study: type[Study], description: str) -> tuple[Study, bool]:
    """Reads a study's own dataclass, `[--field value ...] [--record]`; returns it and whether to record.

    Joins the run's other processes first, as `parse_run` does.
    """
    import tyro

    hosts.start()
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--record", action="store_true")
    known, rest = parser.parse_known_args(argv)
    return tyro.cli(study, args=rest, description=f"{description} Also: --record."), known.record


def publish(config: Any, script: str, text: str, record: bool) -> epath.Path | None:
    """Prints a study's text; with `record` copies its results to docs/results/<script>/, whose folder it returns.

    Args:
      config: with `name`, `workdir` and `seeds`.
    """
    print(text)
    if not record:
        return None
    folder = rundir.record(epath.Path(config.workdir), script, config, text)
    print(f"recorded: {folder}")
    return folder


def tables_and_bars(
    tables: Sequence[Sequence[Mapping[str, Any]]], failed: Sequence[str], above: Sequence[str] = ()
) -> str:
    """Tables as Markdown, and the bars that do not hold, a line each."""
    bars = [*above, *([f"- {line}" for line in failed] or ["Every bar holds."])]
    return "\n\n".join(map(markdown, tables)) + "\n\n" + "\n".join(bars)


@contextlib.contextmanager
def preemptible() -> Iterator[None]:
    """A script that SIGTERM stopped while it trained says so and exits with 0: its state is saved."""
    try:
        yield
    except Preempted as stopped:
        print(f"{stopped}; resume with the same command")
        raise SystemExit(0) from None


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int, Mapping[str, Any]], None]]:
    """A progress bar a stage with time left; yields the `on_step` of `train.loop.run_stage`. See also `preemptible`."""
    import rich.progress as bars

    columns = (
        bars.TextColumn("{task.description:<28}"), bars.BarColumn(), bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(), bars.TextColumn("left"), bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with preemptible(), bars.Progress(*columns) as bar:
        tasks: dict[str, Any] = {}

        def on_step(name: str, done: int, total: int, metrics: Mapping[str, Any]) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total, note="")
            bar.update(tasks[name], completed=done, note=note_of(metrics))

        yield on_step


def note_of(metrics: Mapping[str, Any]) -> str:
    """Loss, KL and tokens per second, where they are known."""
    known = {"loss": "loss {:.3f}", "kl": "KL {:.3f}", "tokens_per_second": "{:,.0f} tokens/s"}
    return "  ".join(text.format(float(metrics[name])) for name, text in known.items() if metrics.get(name) is not None)


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
