"""A design in words and pictures: equations, graph, assumptions.

Everything here is text made from a `Design` and its `Roles`; no data are seen.
Assumptions carry the labels A0 to A8 of `docs/method.md`.
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import NamedTuple

from deconfound_jax.structs import Design, Roles, Term

_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
_WIDTH, _LINE = 760, 19  # of the drawing, in its own units
_LEFT, _MIDDLE, _RIGHT = 112, 380, 648
_LONGEST = 22  # letters of a name that fit a box; the full name is its tooltip


class Graph(NamedTuple):
    """The causal graph: labels by node, and edges as (from, to, dashed)."""

    nodes: dict[str, str]
    edges: list[tuple[str, str, bool]]


class _Box(NamedTuple):
    x: float
    y: float
    labels: tuple[str, ...]
    observed: bool = True

    @property
    def half_width(self) -> float:
        return max(52.0, 4.2 * max(len(_short(label)) for label in self.labels) + 12)

    @property
    def half_height(self) -> float:
        return (_LINE * len(self.labels) + 14) / 2


def equations(design: Design, roles: Roles, *, gamma_sd: float = 1.0, control_sd: float = 1.0) -> list[str]:
    """The design as equations, one string a line, in plain Unicode.

    Args:
      design: family, response and terms.
      roles: names of text, outcome and exposure.
      gamma_sd: prior sd of the endogenous coefficient, in sd of y per sd of p.
      control_sd: prior sd of the control function's coefficient c₀.

    Returns:
      Likelihood, first stage where there is one, f, priors of the terms, scale.
      Names are not escaped: whoever puts them into HTML does that.

    Example:
      >>> equations(Design.parse("linear(hour)"), Roles(text="x", outcome="y"))[0]
      'y = f(x) + b₁·hour + ε,  ε ~ N(0, σ²)'
    """
    terms = list(enumerate(design.terms, 1))
    eta = " + ".join([f"f({roles.text})", *(_summand(i, term) for i, term in terms)])
    lines = _likelihood(design, roles, eta)
    if design.endogenous:
        lines += _first_stage(design, roles)
    lines.append(f"f({roles.text}) = φ({roles.text})·β,  β ~ N(0, s²I),  s learned")
    lines += [_prior(i, term, gamma_sd, control_sd) for i, term in terms]
    return lines


def graph(design: Design, roles: Roles) -> Graph:
    """The nodes and edges that a design asserts; both pictures are drawn from it.

    The endogenous column has no arrow into the text: an unobserved mood moves both.
    With an arrow, instrument and shock would both move the text, the text would be a
    collider, and A2 would fail.
    """
    nodes = {"text": roles.text, "outcome": roles.outcome}
    edges = [("text", "outcome", False)]
    for i, term in enumerate(design.terms, 1):
        if term.kind == "endogenous":
            continue
        nodes[f"c{i}"] = term.column
        edges.append((f"c{i}", "outcome", False))
        if term.kind != "intercept":  # an intercept's levels are declared independent of the text
            edges.append((f"c{i}", "text", False))
        edges += [(f"c{i}", "p", False)] if design.endogenous else []
    if design.endogenous:
        instruments = {f"z{i}": z for i, z in enumerate(design.endogenous.instruments, 1)}
        nodes |= {"p": design.endogenous.column} | instruments
        nodes |= {"s": "season, mood (unobserved)", "u": "shock u (unobserved)"}
        edges += [("p", "outcome", False), *((z, "p", False) for z in instruments)]
        edges += [("s", "text", True), ("s", "p", True), ("u", "p", True), ("u", "outcome", True)]
    return Graph(nodes, edges)


def mermaid(design: Design, roles: Roles) -> str:
    """The graph as source of a Mermaid flowchart; unobserved causes are dashed.

    Example:
      >>> print(mermaid(Design(), Roles(text="x", outcome="y")))
      flowchart LR
          text["x"]
          outcome["y"]
          text --> outcome
    """
    nodes, edges = graph(design, roles)
    lines = ["flowchart LR"]
    for node, label in nodes.items():
        left, right = ("([", "])") if node in ("s", "u") else ("[", "]")
        lines.append(f'    {node}{left}"{_mermaid_label(label)}"{right}')
    lines += [f"    {a} {'-.->' if dashed else '-->'} {b}" for a, b, dashed in edges]
    if design.endogenous:
        lines += ["    classDef unobserved stroke-dasharray: 4 3", "    class s,u unobserved"]
    return "\n".join(lines)


def svg(design: Design, roles: Roles) -> str:
    """The graph as one inline SVG, without fonts or files of its own.

    Columns with the same arrows share a box, so ten confounders draw as clearly as
    one. Strokes and letters are `currentColor`: the page decides on dark or light.
    Names are escaped.
    """
    boxes = _boxes(design, roles)
    kinds = {f"c{i}": "intercepts" if t.kind == "intercept" else "confounders" for i, t in enumerate(design.terms, 1)}
    edges = dict.fromkeys(
        (kinds.get(a, "instruments" if a.startswith("z") else a), b, dashed)
        for a, b, dashed in graph(design, roles).edges
    )
    height = max(box.y + box.half_height for box in boxes.values()) + 10
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="dag" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" '
        f'font-size="14" fill="none" stroke="currentColor" style="width:100%;max-width:{_WIDTH}px">',
        f"<title>Causal graph: {html.escape(str(design) or 'no confounders')}</title>",
        '<defs><marker id="dag-tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 1 L10 5 L0 9 z" fill="currentColor" stroke="none"/></marker></defs>',
    ]
    lines += [_draw_edge(boxes[a], boxes[b], dashed) for a, b, dashed in edges]
    return "\n".join(lines + [_draw_box(box) for box in boxes.values()] + ["</svg>"])


def assumptions(design: Design) -> list[tuple[str, str, bool]]:
    """What must hold for this design's reward to be causal.

    Returns:
      (label, sentence, checkable): labels A0 to A8, A1 to A3 only where the design
      has an endogenous term; checkable = data can speak against it, if only in part.
    """
    columns = [t.column for t in design.terms]
    instruments = design.endogenous.instruments if design.endogenous else ()
    before = [*columns, *instruments]
    order = "the design names no confounder, so only the text is claimed to come before the outcome."
    if before:
        order = f"{_and(before)} {'is' if len(before) == 1 else 'are'} settled before the text is shown; else part of "
        order += "the text's effect runs through what comes later, and f is the direct effect only."
    beyond = f"beyond {_and(columns + ['what the first stage catches'] * bool(instruments))}" if columns else "at all"
    given = f"given {_and(columns)}" if columns else "in the log"
    return [
        ("A0", f"Time order: {order}", False),
        *(_instrument_assumptions(design) if design.endogenous else []),
        ("A4", f"Form: {_form(design)}. Residuals can speak against this, in part.", True),
        ("A5", f"No unmeasured confounder: nothing else moves both wording and outcome, {beyond}.", False),
        ("A6", f"Positivity: every direction of the text features that is scored varies {given}.", True),
        ("A7", "No interference: a text's outcome does not depend on the texts shown beside it.", False),
        ("A8", "No selection: a row is in the log whatever its outcome was.", False),
    ]


def _sub(i: int) -> str:
    return str(i).translate(_SUBSCRIPTS)


def _and(names: Iterable[str]) -> str:
    *head, last = list(names) or [""]
    return f"{', '.join(head)} and {last}" if head else last


def _summand(i: int, term: Term) -> str:
    if term.kind == "endogenous":
        return f"γ·{term.column} + c₀·e"
    return f"b{_sub(i)}·{term.column}" if term.kind == "linear" else f"g{_sub(i)}[{term.column}]"


def _likelihood(design: Design, roles: Roles, eta: str) -> list[str]:
    y, n = roles.outcome, roles.exposure
    if design.family == "binomial":
        law = f"Binomial({n}, logistic(η))" if n else "Bernoulli(logistic(η))"
        return [f"{y} ~ {law}", f"η = {eta}"]
    if design.response == "empirical_logit":
        return [
            f"y = log(({y} + ½) / ({n} − {y} + ½)),  v = 1/({y} + ½) + 1/({n} − {y} + ½)",
            f"y = {eta} + ε,  ε ~ N(0, σ²v)",
        ]
    return [f"{y} = {eta} + ε,  ε ~ N(0, σ²)"]


def _first_stage(design: Design, roles: Roles) -> list[str]:
    p, zs = design.endogenous.column, design.endogenous.instruments
    pushes = " + ".join(f"π{_sub(i) if len(zs) > 1 else ''}·{z}" for i, z in enumerate(zs, 1))
    others = [t.column for t in design.terms if t.kind != "endogenous"]
    given = ", ".join([roles.text, *others, *zs])
    rest = " + a·(" + ", ".join([f"φ({roles.text})", *others]) + ")"
    return [f"{p} = {pushes}{rest} + U", f"e = ({p} − E[{p} | {given}]) / sd(U)"]


def _prior(i: int, term: Term, gamma_sd: float, control_sd: float) -> str:
    k, column = _sub(i), term.column
    if term.kind == "linear":
        return f"b{k} ~ N(0, 1) on standardised {column}"
    if term.kind == "endogenous":
        return f"γ ~ N(0, {gamma_sd**2:g}),  c₀ ~ N(0, {control_sd**2:g}) on standardised scales"
    if term.kind == "intercept":
        return f"g{k}[{column}] ~ N(0, s{k}²),  s{k} learned: levels declared independent of the text"
    level = f"g{k}[{column}] = d{k}[{column}] + φ̄[{column}]·m{k},  d{k} ~ N(0, s{k}²),  s{k} learned"
    return f"{level},  φ̄ = the level's mean of φ"


def _instrument_assumptions(design: Design) -> list[tuple[str, str, bool]]:
    p, names = design.endogenous.column, design.endogenous.instruments
    z, several = _and(names), len(names) > 1
    verb = "move" if several else "moves"
    over = " An overidentification test can speak against it, in part." if several else ""
    exogeneity = f"given the text and the other columns, {z} tell{'' if several else 's'} nothing about what unseen "
    exogeneity += f"moves both {p} and the outcome"
    if design.family == "binomial":
        exogeneity += "; with the logit link not about its spread either, and it is linear in the first stage's error"
    return [
        ("A1", f"Exclusion: {z} {verb} the outcome only through {p}.{over}", several),
        ("A2", f"Exogeneity: {exogeneity}.{over}", several),
        ("A3", f"Relevance: {z} {verb} {p}, strongly enough that the answer does not follow the prior.", True),
    ]


def _form(design: Design) -> str:
    words = {
        "linear": "linear in {}",
        "category": "one effect a level of {}",
        "intercept": "one effect a level of {}, independent of the text",
        "endogenous": "linear in {}",
    }
    parts = ["linear in the text's features", *(words[t.kind].format(t.column) for t in design.terms)]
    logit = design.family == "binomial" or design.response == "empirical_logit"
    return f"the {'logit of the outcome' if logit else 'outcome'} is additive: {'; '.join(parts)}"


def _mermaid_label(label: str) -> str:
    # Mermaid reads #NN; inside quotes as a character reference; letters of every script pass unchanged.
    return "".join(c if c.isalnum() or c in " _-.,()" else f"#{ord(c)};" for c in label)


def _short(label: str) -> str:
    return label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…"


def _boxes(design: Design, roles: Roles) -> dict[str, _Box]:
    confounders = tuple(t.column for t in design.terms if t.kind in ("linear", "category"))
    intercepts = tuple(t.column for t in design.terms if t.kind == "intercept")
    tallest = max(len(confounders), len(intercepts))
    middle = 36 if not tallest else _LINE * tallest + 110  # height of the row text -> outcome
    boxes = {"text": _Box(_LEFT, middle, (roles.text,)), "outcome": _Box(_RIGHT, middle, (roles.outcome,))}
    for name, x, labels in (("confounders", _MIDDLE, confounders), ("intercepts", _RIGHT, intercepts)):
        if labels:
            boxes[name] = _Box(x, 17 + _LINE * len(labels) / 2, labels)
    if design.endogenous:
        z = design.endogenous.instruments
        boxes["p"] = _Box(_MIDDLE, middle + 110, (design.endogenous.column,))
        boxes["s"] = _Box(_LEFT, middle + 110, ("season, mood", "(unobserved)"), observed=False)
        boxes["u"] = _Box(_RIGHT, middle + 110, ("shock u", "(unobserved)"), observed=False)
        boxes["instruments"] = _Box(_MIDDLE, middle + 190 + _LINE * len(z) / 2, z)
    return boxes


def _draw_edge(a: _Box, b: _Box, dashed: bool) -> str:
    """An arrow between the borders of two boxes, along the line of their centres."""
    dx, dy = b.x - a.x, b.y - a.y
    leave, arrive = (min(x.half_width / (abs(dx) or 1e-9), x.half_height / (abs(dy) or 1e-9)) for x in (a, b))
    start, end = (a.x + leave * dx, a.y + leave * dy), (b.x - arrive * dx, b.y - arrive * dy)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    path = f"M{start[0]:.1f} {start[1]:.1f} L{end[0]:.1f} {end[1]:.1f}"
    return f'<path d="{path}" stroke-width="1.4" marker-end="url(#dag-tip)"{dash}/>'


def _draw_box(box: _Box) -> str:
    x, y, radius = box.x - box.half_width, box.y - box.half_height, 6 if box.observed else box.half_height
    dash = "" if box.observed else ' stroke-dasharray="5 4"'
    rect = (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{2 * box.half_width:.1f}" height="{2 * box.half_height:.1f}" '
        f'rx="{radius:.0f}" fill="currentColor" fill-opacity="0.06" stroke-width="1.2"{dash}/>'
    )
    texts = [
        f'<text x="{box.x:.0f}" y="{y + 21 + _LINE * i:.1f}" text-anchor="middle" fill="currentColor" stroke="none">'
        f"{html.escape(_short(label))}<title>{html.escape(label)}</title></text>"
        for i, label in enumerate(box.labels)
    ]
    return "\n".join([rect, *texts])
