"""Texts from a saved run's policies.

    python -m experiments.sample --workdir RUN [--prompts FILE] [--method sft] [--n 5]

With prompts (one a line) every prompt is continued n times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from deconfound_jax.saved import load


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Which run, how many texts."""

    workdir: str
    prompts: str = ""  # a file, one prompt a line
    method: str = "deconfounded"  # or sft, naive, ...
    n: int = 8
    seed: int = 0
    temperature: float = 1.0  # 0 is greedy


def run(arguments: Arguments) -> list[str]:
    """The texts, prompt by prompt."""
    prompts = None
    if arguments.prompts:
        with open(arguments.prompts, encoding="utf-8") as file:
            prompts = [line.strip() for line in file if line.strip()]
    saved = load(arguments.workdir)
    return saved.sample(arguments.n, prompts, arguments.method, arguments.seed, arguments.temperature)


def main(argv: Sequence[str] | None = None) -> None:
    import tyro

    print("\n".join(run(tyro.cli(Arguments, args=argv, description=__doc__))))


if __name__ == "__main__":
    main()
