"""Scores a saved run's rewards on randomized arms of another file.

    python -m experiments.evaluate_reward --workdir RUN --arms FILE.parquet [--features FILE.npz] \\
        [--roles.text headline --roles.group test ...]

Roles default to the run's own. Arms are compared inside a group and context. A run on real
logs keeps its first log's posterior: arms whose texts were in that log are not held out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from deconfound_jax.evaluate import ab
from deconfound_jax.models.features import read_features
from deconfound_jax.saved import load
from deconfound_jax.structs import Roles, dump_json
from experiments.cli import markdown


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to score, and on which arms."""

    workdir: str
    arms: str
    features: str = ""  # an array file with a row a row of --arms; needed where the run was fitted on such a file
    on_bad_rows: str = "error"
    out: str = ""  # a JSON file for the scores
    roles: Roles = Roles()


def run(arguments: Arguments) -> dict[str, dict[str, float]]:
    """Scores by method; see `evaluate.ab.scores`."""
    from deconfound_jax.logs.read import read

    saved = load(arguments.workdir)
    # What only fitting reads plays no part in judging: the arms need not have it.
    roles = dataclasses.replace(
        arguments.roles, confounders=(), instruments=(), weight="", time="", key="", pair_within=""
    )
    rejected = saved.workdir / "rejected_arms.jsonl"
    logs = read(arguments.arms, roles, on_bad_rows=arguments.on_bad_rows, rejected_path=rejected)
    features_nd = (
        read_features(arguments.features, len(logs), saved.config.features.array, roles.text)
        if arguments.features
        else None
    )
    if features_nd is None:
        features_nd = saved.features(logs.text)
    arms, found = ab.arms_of(logs), {}
    for path in sorted((saved.workdir / "posterior").iterdir()):
        if path.stem in saved.config.methods:
            scored = saved.score(logs.text, features_nd, path.stem)
            found[path.stem] = {k: float(v) for k, v in ab.scores(scored["mean"], arms).items()}
    return found


def main(argv: Sequence[str] | None = None) -> None:
    import argparse

    import tyro

    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--workdir", default="")
    known, _ = parser.parse_known_args(argv)
    roles = load(known.workdir).config.roles if known.workdir else Roles()
    default = Arguments(tyro.MISSING, tyro.MISSING, roles=roles)
    arguments = tyro.cli(Arguments, args=argv, default=default, description=__doc__)
    found: dict[str, Any] = run(arguments)
    names = ("pair_accuracy", "pair_accuracy_z196", "winner_hit_rate", "lift_per_1000", "n_pairs", "n_pairs_z196")
    print(markdown([{"method": m} | {n: scores[n] for n in names} for m, scores in found.items()]))
    if arguments.out:
        with open(arguments.out, "w") as file:
            file.write(dump_json(found))


if __name__ == "__main__":
    main()
