"""The types every layer shares: plain data, JSON in and out, no computation.

Legend of dimension letters, used in names throughout the package:

    n rows of the log      d feature width        k columns of a term
    s posterior draws      v vocabulary           l sequence length
    b batch                g texts in a group     p pairs

so `features_nd` is (rows, width), `draws_sn` is (draws, rows), `tokens_bl` is
(batch, length).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from deconfound_jax.design import Design as Design
from deconfound_jax.design import Term as Term


@dataclasses.dataclass(frozen=True)
class Roles:
    """Which column of a log is what. An empty name means: there is none."""

    text: str = "text"  # the words whose effect is wanted
    outcome: str = "outcome"  # what happened: a number, or a count of `exposure`
    exposure: str = ""  # how often the text was shown (trials of a binomial)
    confounders: tuple[str, ...] = ()  # settled before the text is shown
    embedding: tuple[str, ...] = ()  # confounders that are an array a row: an article, a prompt
    treatment: str = ""  # a declared scalar treatment: its effect is wanted, too
    observed: str = ""  # 1 where the outcome was seen, 0 where it was not (and may be empty)
    guardrail: str = ""  # a second outcome that must not get worse
    instruments: tuple[str, ...] = ()  # move the endogenous confounder and nothing else
    prompt: str = ""  # what the text answers
    arm: str = ""  # true where the row was randomized
    propensity: str = ""  # probability with which the text was chosen to be shown
    weight: str = ""  # a row counts as this many rows
    time: str = ""  # orders rows for a split by time
    key: str = ""  # names a row uniquely; default: the row number
    group: str = ""  # the unit that is split, resampled and judged: a test
    pair_within: str = ""  # training pairs are formed inside one value of this column
    context: tuple[str, ...] = ()  # arms are compared only where these agree, too

    def columns(self) -> tuple[str, ...]:
        """Every column named under some role, without repeats, in order."""
        names: list[str] = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            names += [value] if isinstance(value, str) else list(value)
        return tuple(dict.fromkeys(name for name in names if name))

    def to_json(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Roles:
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})


@dataclasses.dataclass(frozen=True)
class Logs:
    """Validated columns under roles.

    `columns` maps a column's name to an array of length n. Text and category
    columns are object arrays of `str`; numbers are float64.
    """

    columns: Mapping[str, np.ndarray]
    roles: Roles
    fingerprint: str

    @classmethod
    def of(cls, columns: Mapping[str, np.ndarray], roles: Roles) -> Logs:
        """Wraps arrays that are known to be valid and fingerprints them."""
        columns = {name: np.asarray(value) for name, value in columns.items()}
        return cls(columns, roles, fingerprint(columns))

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def text(self) -> list[str]:
        return [str(t) for t in self.columns[self.roles.text]]

    @property
    def outcome_n(self) -> np.ndarray:
        return np.asarray(self.columns[self.roles.outcome], np.float64)

    @property
    def exposure_n(self) -> np.ndarray:
        return np.asarray(self.columns[self.roles.exposure], np.float64)

    def codes(self, column: str) -> np.ndarray:
        """Integer codes (n,) of a column's values, in sorted order of value."""
        return np.unique(np.asarray(self.columns[column]).astype(str), return_inverse=True)[1]

    def take(self, index: np.ndarray) -> Logs:
        """The rows at `index` (integers or a boolean mask), as a log of its own."""
        return Logs.of({name: value[index] for name, value in self.columns.items()}, self.roles)


def fingerprint(columns: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names and values of columns, 16 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(columns):
        value = np.asarray(columns[name])
        digest.update(name.encode())
        if value.dtype.kind in "OUS":
            digest.update("\x1f".join(str(v) for v in value).encode())
        else:
            digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:16]


class Pairs(NamedTuple):
    """Preferences inside groups: b groups of g texts that share a forward pass, p = g (g - 1) / 2 pairs each."""

    tokens_bgl: Any  # whole texts, or what follows the group's prompt
    reference_bg: Any  # log-probability under the frozen reference, nats a text
    label_bp: Any  # P(text i is better than text j), i < j in the order of `align.groups.pair_index`
    weight_bp: Any  # a pair counts so often; 0 masks it
    prompt_bq: Any = None  # tokens before every text of a group; None: texts are whole, BEGIN first


class Scored(NamedTuple):
    """Single texts with the posterior of their reward."""

    tokens_bl: Any
    reference_b: Any  # log-probability under the frozen reference, nats a text
    reward_b: Any  # posterior mean, or one joint draw
    sd_b: Any  # posterior standard deviation, 0 where it is not known
    label_b: Any  # desirability, P(reward above the log's median)
    weight_b: Any  # 0 masks a text
    prompt_bq: Any = None


class Rollouts(NamedTuple):
    """g texts sampled by the policy for each of b prompts, with one reward each."""

    tokens_bgl: Any
    old_bgl: Any  # log-probability of each scored token under the policy that drew it, nats; 0 where there is none
    reference_bgl: Any  # the same under the frozen reference
    reward_bg: Any
    weight_bg: Any
    prompt_bq: Any = None


def dump_json(data: Mapping[str, Any]) -> str:
    """JSON with a stable order and no NaN: what must be read again fails when written."""
    return json.dumps(data, indent=2, sort_keys=True, allow_nan=False)
