"""A design in words and pictures: equations, graph, and the assumptions they rest on.

Everything here is text made from a `Design` and its `Roles`; no data are seen. The
equations are written in `equations`, the pictures drawn in `draw`. Assumptions carry
the labels A0 to A8 of `docs/method.md`.
"""

from __future__ import annotations

from collections.abc import Iterable

from deconfound_jax.causal.builders import modifier
from deconfound_jax.causal.draw import Graph, graph, mermaid, svg
from deconfound_jax.causal.equations import equations, latex
from deconfound_jax.structs import Design, Roles

__all__ = ["Graph", "assumptions", "equations", "graph", "latex", "mermaid", "svg"]

_LINKS = {
    "bernoulli": "logit of the outcome", "binomial": "logit of the outcome", "beta_binomial": "logit of the outcome",
    "poisson": "log of the expected count", "negative_binomial": "log of the expected count",
    "ordinal": "logit of every grade or a lower one",
}  # fmt: skip


def assumptions(design: Design, roles: Roles | None = None) -> list[tuple[str, str, bool]]:
    """What must hold for this design's reward to be causal.

    Returns:
      (label, sentence, checkable): labels A0 to A8, A1 to A3 only where the design
      has an endogenous term; checkable = data can speak against it, if only in part.
    """
    text = roles.text if roles else "text"
    columns = list(dict.fromkeys(c for t in design.terms if t.kind not in ("selection", "guardrail")
                                 for c in (t.column, t.by) if c not in ("", "text", text)))  # fmt: skip
    treatments = [t.column for t in design.terms if t.kind == "treatment"]
    instruments = list(dict.fromkeys(z for t in design.terms for z in t.instruments))
    before = [c for c in columns if c not in treatments] + instruments
    order = "the design names no confounder, so only the text is claimed to come before the outcome."
    if before:
        order = f"{_and(before)} {'is' if len(before) == 1 else 'are'} settled before the text is shown; else part of "
        order += "the text's effect runs through what comes later, and f is the direct effect only."
    if treatments:
        order += f" {_and(treatments)} comes before the outcome; where it moves the text, or the text moves it, each "
        order += "effect is the direct one."
    beyond = f"beyond {_and(columns + ['what the first stage catches'] * bool(design.endogenous))}" if columns else ""
    what = f"both wording{' or treatment' * bool(treatments)} and outcome"
    given = f"given {_and(columns)}" if columns else "in the log"
    return [
        ("A0", f"Time order: {order}", False),
        *(_instrument_assumptions(design) if design.endogenous else []),
        ("A4", f"Form: {_form(design, text)}. Residuals can speak against this, in part.", True),
        ("A5", f"No unmeasured confounder: nothing else moves {what}, {beyond or 'at all'}.", False),
        ("A6", f"Positivity: every direction of the text features that is scored varies {given}.", True),
        ("A7", "No interference: a text's outcome does not depend on the texts shown beside it.", False),
        ("A8", _selection_assumption(design), False),
    ]


def _and(names: Iterable[str]) -> str:
    *head, last = list(names) or [""]
    return f"{', '.join(head)} and {last}" if head else last


def _instrument_assumptions(design: Design) -> list[tuple[str, str, bool]]:
    names = list(dict.fromkeys(z for t in design.endogenous_terms for z in t.instruments))
    columns = [t.column for t in design.endogenous_terms]
    p, z, several, over = _and(columns), _and(names), len(names) > 1, len(names) > len(columns)
    verb = "move" if several else "moves"
    test = " An overidentification test can speak against it, in part." if over else ""
    exogeneity = f"given the text and the other columns, {z} tell{'' if several else 's'} nothing about what unseen "
    exogeneity += f"moves both {p} and the outcome"
    if design.family in _LINKS:
        link = "logit link" if "logit" in _LINKS[design.family] else "log link"
        exogeneity += f"; with the {link} not about its spread either, and it is linear in the first stage's error"
    relevance = f"{z} {verb} {p}" + (", each in its own way" if len(columns) > 1 else "")
    return [
        ("A1", f"Exclusion: {z} {verb} the outcome only through {p}.{test}", over),
        ("A2", f"Exogeneity: {exogeneity}.{test}", over),
        ("A3", f"Relevance: {relevance}, strongly enough that the answer does not follow the prior.", True),
    ]


def _selection_assumption(design: Design) -> str:
    if not (term := design.selection):
        return "No selection: a row is in the log whatever its outcome was."
    w, verb = _and(term.instruments), "move" if len(term.instruments) > 1 else "moves"
    return (
        f"Selection: {term.column} says whether an outcome is seen, and is modelled; {w} {verb} that and nothing else, "
        "and the errors of both are jointly normal."
    )


def _form(design: Design, text: str) -> str:
    words = {
        "linear": "linear in {}",
        "treatment": "linear in {}",
        "endogenous": "linear in {}",
        "category": "one effect a level of {}",
        "intercept": "one effect a level of {}, independent of the text",
        "smooth": "smooth in {}",
        "embedding": "linear in every number of {}",
    }
    parts = ["linear in the text's features"]
    for term in design.terms:
        if term.kind == "interaction":
            side = modifier(term, text)
            product = f"with {term.column} times {term.by}"
            parts.append(f"with an effect of the text that is linear in {side}" if side else product)
        elif term.kind in words:
            parts.append(words[term.kind].format(term.column))
    link = _LINKS.get(design.family, "outcome")
    if design.response == "empirical_logit":
        link = "logit of the outcome"
    elif design.selection and design.family == "bernoulli":
        link = "probit of the outcome"
    guardrail = f"; {design.guardrail.column} likewise" if design.guardrail else ""
    return f"the {link} is additive: {'; '.join(parts)}{guardrail}"
