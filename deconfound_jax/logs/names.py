"""Columns that roles name and the file lacks, and roles that contradict each other."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from deconfound_jax.logs.check import Problem, nearest
from deconfound_jax.structs import Roles

MEASURED = ("text", "outcome", "exposure", "weight", "treatment", "observed", "guardrail", "propensity")
MEASURED += ("instruments", "confounders", "embedding")  # a column may have one of these roles


def name_problems(
    roles: Roles, categories: Sequence[str], numeric: Sequence[str], extra: Sequence[str], names: Sequence[str]
) -> list[Problem]:
    """Columns that the file (its column `names`) lacks or has twice, and roles that contradict each other."""
    problems, counts = [], Counter(names)
    for column in dict.fromkeys((*roles.columns(), *extra)):
        if not counts[column]:
            wanted = f"a column of the file ({_role(roles, column)})"
            problems.append(Problem(-1, column, wanted, f"no such column{nearest(column, names)}"))
        elif counts[column] > 1:
            problems.append(Problem(-1, column, "a column name used once", f"{counts[column]} columns of this name"))
    declarable = (*roles.confounders, *extra)
    for argument, columns in (("categories", categories), ("numeric", numeric)):
        for column in columns:
            if column not in declarable:
                wanted = f"{argument} to name a confounder or an extra column"
                problems.append(Problem(-1, column, wanted, f"neither{nearest(column, declarable)}"))
    for column in set(categories) & set(numeric):
        problems.append(Problem(-1, column, "either categories or numeric", "both"))
    return problems + _conflicts(roles)


def _role(roles: Roles, column: str) -> str:
    """The field that names a column, for a message: `Roles.outcome`, or `extra`."""
    for field in dataclasses.fields(roles):
        value = getattr(roles, field.name)
        if column == value or (isinstance(value, tuple) and column in value):
            return f"Roles.{field.name}"
    return "extra"


def _conflicts(roles: Roles) -> list[Problem]:
    # group, key, context and time may repeat a confounder (a week, an article); these may not.
    places: dict[str, list[str]] = {}
    for field in MEASURED:
        value = getattr(roles, field)
        for column in filter(None, (value,) if isinstance(value, str) else value):
            places.setdefault(column, []).append(field)
    wanted = f"one role among {', '.join(MEASURED)}"
    return [Problem(-1, c, wanted, " and ".join(fields)) for c, fields in places.items() if len(fields) > 1] + [
        Problem(-1, "", f"Roles.{field} to name a column", "no name")
        for field in ("text", "outcome") if not getattr(roles, field)
    ]  # fmt: skip
