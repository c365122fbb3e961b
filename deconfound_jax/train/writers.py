"""Writers beside metrics.jsonl: TensorBoard, Weights & Biases. Each is a function of rows.

    run_stage(..., writers=[tensorboard(workdir / "tensorboard")])

A number is shown as `<stage>/<metric>`, an evaluation's as `<stage>/eval/<metric>`, over the stage's own steps. Rows
that are written again after a resume are shown again.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from deconfound_jax.train.metrics import Row, Writer

_NOT_SHOWN = {"name", "step", "eval", "clock"}


def tensorboard(folder) -> Writer:
    """Rows as TensorBoard's event files in `folder`, a local path.

    Raises ModuleNotFoundError that says what to install.
    """
    events = _module("tensorboardX", "tensorboardX").SummaryWriter(str(folder))

    def write(rows):
        for row in rows:
            for tag, number in scalars(row):
                events.add_scalar(tag, number, row["step"])
        events.flush()

    return write


def weights_and_biases(project: str, run: str) -> Writer:
    """Rows as a run of a wandb project; the same name goes on with the same run.

    Raises ModuleNotFoundError that says what to install.
    """
    client = _module("wandb", "wandb").init(project=project, name=run, id=run, resume="allow")
    stages = set()

    def write(rows):
        for row in rows:
            name = row["name"]
            if name not in stages:
                # Every stage has steps of its own; wandb's one counter only ever grows.
                client.define_metric(f"{name}/*", step_metric=f"{name}/step")
                stages.add(name)
            client.log({f"{name}/step": row["step"], **dict(scalars(row))})

    return write


def scalars(row: Row) -> Iterator[tuple[str, float]]:
    """(tag, number) of every number in a row; a short list is one tag an entry, null is left out."""
    prefix = f"{row['name']}/eval/" if row.get("eval") else f"{row['name']}/"
    for key, value in row.items():
        if key in _NOT_SHOWN:
            continue
        entries = enumerate(value) if isinstance(value, list) else [(None, value)]
        for i, number in entries:
            if isinstance(number, int | float) and not isinstance(number, bool):
                yield prefix + key + ("" if i is None else f"/{i}"), float(number)


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise  # it is there, and lacks something itself
        raise ModuleNotFoundError(f"this writer needs {package}: pip install {package}", name=name) from error
