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
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

FAMILIES = ("normal", "binomial")
RESPONSES = ("identity", "empirical_logit")
TERM_KINDS = ("linear", "category", "intercept", "endogenous")


@dataclasses.dataclass(frozen=True)
class Roles:
    """Which column of a log is what. An empty name means: there is none."""

    text: str = "text"  # the words whose effect is wanted
    outcome: str = "outcome"  # what happened: a number, or a count of `exposure`
    exposure: str = ""  # how often the text was shown (trials of a binomial)
    confounders: tuple[str, ...] = ()  # settled before the text is shown
    instruments: tuple[str, ...] = ()  # move the endogenous confounder and nothing else
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


@dataclasses.dataclass(frozen=True)
class Term:
    """One confounder's place in the design.

    kind        linear      N(0, 1) coefficient on the standardised column
                category    one effect a level, learned scale, plus the level's
                            mean of the features (Mundlak): may confound
                intercept   one effect a level, learned scale, no means: the level
                            is declared independent of the text
                endogenous  coefficient gamma plus a control function of the first
                            stage on `instruments`
    """

    kind: str
    column: str
    instruments: tuple[str, ...] = ()

    def __post_init__(self):
        if self.kind not in TERM_KINDS:
            raise ValueError(f"Term.kind: expected one of {TERM_KINDS}, got {self.kind!r}")
        if (self.kind == "endogenous") != bool(self.instruments):
            raise ValueError(
                f"Term({self.kind}, {self.column}): instruments belong to an endogenous term, and it needs one"
            )

    def __str__(self) -> str:
        inside = self.column if not self.instruments else f"{self.column} ~ {' + '.join(self.instruments)}"
        return f"{self.kind}({inside})"


@dataclasses.dataclass(frozen=True)
class Design:
    """The causal assumptions as a value: family, response and one term a confounder.

    `response="empirical_logit"` turns k of n into log((k + .5) / (n - k + .5)) for
    the normal family, each row weighted by its sampling precision.
    """

    family: str = "normal"
    terms: tuple[Term, ...] = ()
    response: str = "identity"

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ValueError(f"Design.family: expected one of {FAMILIES}, got {self.family!r}")
        if self.response not in RESPONSES:
            raise ValueError(f"Design.response: expected one of {RESPONSES}, got {self.response!r}")
        if self.response != "identity" and self.family != "normal":
            raise ValueError(f"Design.response {self.response!r} belongs to the normal family, got {self.family!r}")
        columns = [t.column for t in self.terms]
        if len(set(columns)) < len(columns):
            raise ValueError(f"Design.terms: a column may carry one term, got {columns}")
        if sum(t.kind == "endogenous" for t in self.terms) > 1:
            raise ValueError("Design.terms: one endogenous confounder is supported")

    @classmethod
    def parse(cls, text: str, family: str = "normal", response: str = "identity") -> Design:
        """Reads `category(week) + linear(hour) + endogenous(popularity ~ z1 + z2)`.

        A bare column is linear. An empty text is a design without confounders.
        Raises ValueError naming the piece that could not be read.
        """
        terms = []
        for piece in _split_outside_parentheses(text):
            bare = re.fullmatch(r"[\w.]+", piece)
            call = re.fullmatch(r"(\w+)\(\s*([\w.]+)\s*(?:~\s*(.+?))?\s*\)", piece)
            if bare:
                terms.append(Term("linear", piece))
            elif call and call[1] in TERM_KINDS:
                instruments = tuple(z.strip() for z in call[3].split("+")) if call[3] else ()
                terms.append(Term(call[1], call[2], instruments))
            else:
                raise ValueError(
                    f"design: cannot read {piece!r}; expected column, or kind(column) with kind in {TERM_KINDS}"
                )
        return cls(family, tuple(terms), response)

    @property
    def endogenous(self) -> Term | None:
        return next((t for t in self.terms if t.kind == "endogenous"), None)

    def without_instruments(self) -> Design:
        """The design of someone who takes the endogenous confounder for an ordinary covariate."""
        terms = tuple(Term("linear", t.column) if t.kind == "endogenous" else t for t in self.terms)
        return dataclasses.replace(self, terms=terms)

    def without_terms(self) -> Design:
        """The naive design: outcome on text, nothing else."""
        return dataclasses.replace(self, terms=())

    def __str__(self) -> str:
        return " + ".join(map(str, self.terms))

    def to_json(self) -> dict[str, Any]:
        return {"family": self.family, "terms": str(self), "response": self.response}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Design:
        return cls.parse(data["terms"], data["family"], data["response"])


class Pairs(NamedTuple):
    """Preferences inside groups of texts: pair p of group b compares texts i < j.

    label_bp = P(text i is better than text j), weight_bp >= 0 (0 masks the pair).
    """

    tokens_bgl: Any
    label_bp: Any
    weight_bp: Any


def dump_json(data: Mapping[str, Any]) -> str:
    """JSON with a stable order and no NaN: what must be read again fails when written."""
    return json.dumps(data, indent=2, sort_keys=True, allow_nan=False)


def _split_outside_parentheses(text: str) -> Sequence[str]:
    pieces, depth, current = [], 0, ""
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "+" and depth == 0:
            pieces.append(current.strip())
            current = ""
        else:
            current += letter
    pieces.append(current.strip())
    if depth:
        raise ValueError(f"design: unbalanced parentheses in {text!r}")
    if pieces == [""]:
        return []
    return pieces
