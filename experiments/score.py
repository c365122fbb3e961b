"""Rewards of texts from a saved run: text, mean, sd, lower bound, distance to the log.

    python -m experiments.score --workdir RUN --texts FILE [--method naive] [--out scores.csv]

FILE holds one text a line. Distance 1 is as near to the log as its own texts are to
each other; far above 1 the reward is an extrapolation.
"""

from __future__ import annotations

import csv
import dataclasses
import sys
from collections.abc import Sequence

import numpy as np

from deconfound_jax.saved import load

FIELDS = ("mean", "sd", "lower", "distance")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Which run, which texts."""

    workdir: str
    texts: str  # a file, one text a line
    method: str = "deconfounded"
    features: str = ""  # .npy or .npz with a row a text; needed where the run was fitted on a file of features
    out: str = ""  # a CSV file; empty: the terminal


def run(arguments: Arguments) -> list[dict[str, object]]:
    """A row a text, in the file's order; empty lines are left out."""
    from deconfound_jax.models.features import read_features

    with open(arguments.texts, encoding="utf-8") as file:
        texts = [line.strip() for line in file if line.strip()]
    saved = load(arguments.workdir)
    array = saved.config.features.array
    features_nd = read_features(arguments.features, len(texts), array) if arguments.features else None
    scored = saved.score(texts, features_nd, arguments.method)
    return [{"text": t} | {f: float(np.round(scored[f][i], 5)) for f in FIELDS} for i, t in enumerate(texts)]


def main(argv: Sequence[str] | None = None) -> None:
    import tyro

    arguments = tyro.cli(Arguments, args=argv, description=__doc__)
    rows = run(arguments)
    with open(arguments.out, "w", newline="", encoding="utf-8") if arguments.out else _terminal() as file:
        writer = csv.DictWriter(file, ["text", *FIELDS])
        writer.writeheader()
        writer.writerows(rows)


class _terminal:
    """Standard output as a file that `with` does not close."""

    def __enter__(self):
        return sys.stdout

    def __exit__(self, *_):
        sys.stdout.flush()


if __name__ == "__main__":
    main()
