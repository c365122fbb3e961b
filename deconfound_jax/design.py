"""The causal assumptions as a value: a family and one term a confounder, read from a small grammar.

    category(week) + smooth(hour) + endogenous(popularity ~ z1 + z2) + intercept(author)

Plain data: JSON in and out, no computation, no eval.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

FAMILIES = ("normal", "student_t", "bernoulli", "binomial", "beta_binomial", "poisson", "negative_binomial", "ordinal")
RESPONSES = ("identity", "empirical_logit")
OPTIONS = {  # what may stand after the comma, by kind; "bases=" takes a number
    "linear": (),
    "category": ("absorbed",),
    "intercept": (),
    "smooth": ("spline", "bases="),
    "embedding": (),
    "interaction": (),
    "treatment": (),
    "endogenous": (),
    "selection": (),
    "guardrail": (),
}
TERM_KINDS = tuple(OPTIONS)
NEEDS_INSTRUMENTS = ("endogenous", "selection")


@dataclasses.dataclass(frozen=True)
class Term:
    """One confounder's place in the design.

    kind        linear      N(0, 1) coefficient on the standardised column
                category    one effect a level, learned scale, plus the level's
                            mean of the features (Mundlak): may confound. With
                            `absorbed`: fixed effects, a flat prior on each level
                intercept   one effect a level, learned scale, no means: the level
                            is declared independent of the text
                smooth      a smooth function of a number: Hilbert-space Gaussian
                            process, or a penalised B-spline with `spline`
                embedding   an array a row (an article, a prompt): one coefficient
                            a dimension, learned scale, and E[phi(x) | c] beside it
                interaction column times `by`; with the text on one side the text's
                            effect differs with the other
                treatment   a declared scalar treatment: linear, and E[t | x, c] beside it
                endogenous  coefficient gamma plus a control function of the first
                            stage on `instruments`
                selection   `column` is 1 where the outcome was seen; its equation also
                            has `instruments`, which move nothing else
                guardrail   a second outcome, modelled jointly: reward y1 - lambda y2
    """

    kind: str
    column: str
    instruments: tuple[str, ...] = ()
    by: str = ""
    options: tuple[str, ...] = ()

    def __post_init__(self):
        if self.kind not in TERM_KINDS:
            raise ValueError(f"Term.kind: expected one of {TERM_KINDS}, got {self.kind!r}{_nearest(self.kind)}")
        if self.kind == "endogenous" and not self.instruments:
            raise ValueError(f"Term({self}): an endogenous term needs an instrument: endogenous({self.column} ~ z)")
        if self.instruments and self.kind not in NEEDS_INSTRUMENTS:
            raise ValueError(f"Term({self}): instruments belong to one of {NEEDS_INSTRUMENTS}, got {self.kind!r}")
        if (self.kind == "interaction") != bool(self.by):
            raise ValueError(f"Term({self}): expected interaction(a * b), and a * b nowhere else")
        for option in self.options:
            if option not in OPTIONS[self.kind] and not (option.startswith("bases=") and self.kind == "smooth"):
                raise ValueError(f"Term({self}): expected options out of {OPTIONS[self.kind]}, got {option!r}")
            if option.startswith("bases=") and not option.removeprefix("bases=").isdigit():
                raise ValueError(f"Term({self}): expected bases=<number>, got {option!r}")

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column of the log that the term reads."""
        return tuple(name for name in (self.column, self.by, *self.instruments) if name)

    @property
    def bases(self) -> int:
        """Number of basis functions of a smooth term."""
        return next((int(o.removeprefix("bases=")) for o in self.options if o.startswith("bases=")), 20)

    def __str__(self) -> str:
        inside = self.column + (f" * {self.by}" if self.by else "")
        inside += f" ~ {' + '.join(self.instruments)}" if self.instruments else ""
        return f"{self.kind}({', '.join([inside, *self.options])})"


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
        # A smooth and a level effect of one column add up (a trend and its jumps); two of one kind would not.
        places = [(t.column, t.by, "smooth" if t.kind == "smooth" else "") for t in self.terms]
        if len(set(places)) < len(places):
            raise ValueError(f"Design.terms: a column may carry one term (and a smooth), got {[*map(str, self.terms)]}")
        smooth = {t.column for t in self.terms if t.kind == "smooth"}
        for term in self.terms:
            if term.column in smooth and term.kind not in ("smooth", "category", "intercept", "interaction"):
                raise ValueError(f"Design.terms: smooth({term.column}) holds a line already, got {term} beside it")
        for kind in ("selection", "guardrail"):
            if sum(t.kind == kind for t in self.terms) > 1:
                raise ValueError(f"Design.terms: one {kind} term is supported, got {[*map(str, self.terms)]}")
        if self._of("selection") and self.family not in ("normal", "bernoulli"):
            raise ValueError(f"Design: selection needs the normal or the bernoulli family, got {self.family!r}")
        if self._of("selection") and (self.endogenous_terms or self.guardrail):
            raise ValueError("Design: selection beside endogenous or guardrail terms is not supported")

    @classmethod
    def parse(cls, text: str, family: str = "normal", response: str = "identity") -> Design:
        """Reads `category(week, absorbed) + linear(hour) + endogenous(popularity ~ z1 + z2)`.

        A bare column is linear. An empty text is a design without confounders.
        Raises ValueError naming the piece that could not be read.
        """
        return cls(family, tuple(_term(piece) for piece in _split(text, "+")), response)

    @property
    def endogenous_terms(self) -> tuple[Term, ...]:
        return tuple(t for t in self.terms if t.kind == "endogenous")

    @property
    def endogenous(self) -> Term | None:
        """The first endogenous term, or None."""
        return self._of("endogenous")

    @property
    def guardrail(self) -> Term | None:
        return self._of("guardrail")

    @property
    def selection(self) -> Term | None:
        return self._of("selection")

    def without_instruments(self) -> Design:
        """The design of someone who takes the endogenous confounders for ordinary covariates."""
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

    def _of(self, kind: str) -> Term | None:
        return next((t for t in self.terms if t.kind == kind), None)


def _term(piece: str) -> Term:
    if re.fullmatch(r"[\w.]+", piece):
        return Term("linear", piece)
    call = re.fullmatch(r"(\w+)\((.*)\)", piece, re.DOTALL)
    if call and call[1] in TERM_KINDS:
        first, *options = _split(call[2], ",") or [""]
        parts = re.fullmatch(r"([\w.]+)\s*(?:\*\s*([\w.]+))?\s*(?:~\s*(.+))?", first, re.DOTALL)
        instruments = tuple(z.strip() for z in parts[3].split("+")) if parts and parts[3] else ()
        if parts and all(re.fullmatch(r"[\w.]+", z) for z in instruments):
            return Term(call[1], parts[1], instruments, parts[2] or "", tuple(re.sub(r"\s", "", o) for o in options))
    known = f"kind(column) with kind in {TERM_KINDS}{_nearest(call[1]) if call else ''}"
    raise ValueError(f"design: cannot read {piece!r}; expected column, or {known}")


def _nearest(kind: str) -> str:
    close = [] if kind in TERM_KINDS else difflib.get_close_matches(kind, TERM_KINDS, n=1)
    return f"; nearest is {close[0]!r}" if close else ""


def _split(text: str, at: str) -> Sequence[str]:
    """The pieces of `text` between separators outside parentheses."""
    pieces, depth, current = [], 0, ""
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == at and depth == 0:
            pieces.append(current.strip())
            current = ""
        else:
            current += letter
    if depth:
        raise ValueError(f"design: unbalanced parentheses in {text!r}")
    pieces.append(current.strip())
    return [] if pieces == [""] else pieces
