"""The causal graph that a design asserts, as a Mermaid flowchart and as an SVG."""

from __future__ import annotations

import html
from typing import NamedTuple

from deconfound_jax.structs import Design, Roles, Term

_WIDTH, _LINE = 760, 19  # of the drawing, in its own units
_LEFT, _MIDDLE, _RIGHT = 112, 380, 648
_TREATED = 246  # a treatment stands between text and outcome, a bit lower
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


def graph(design: Design, roles: Roles) -> Graph:
    """The nodes and edges that a design asserts; both pictures are drawn from it.

    An endogenous column has no arrow into the text: an unobserved mood moves both.
    With an arrow, instrument and shock would both move the text, the text would be a
    collider, and A2 would fail. A guardrail has the outcome's causes and shares its
    shock; whether an outcome is seen depends on the text, the confounders, columns of
    its own and that shock. The text may move a treatment, and a treatment nothing but
    the outcome.
    """
    nodes = {"text": roles.text, "outcome": roles.outcome}
    exogenous = _exogenous(design, roles)
    endogenous = {f"p{i}": t.column for i, t in enumerate(design.endogenous_terms, 1)}
    if len(endogenous) == 1:
        endogenous = {"p": design.endogenous.column}
    instruments = list(dict.fromkeys(z for term in design.terms for z in term.instruments))
    causes = ["text", *exogenous, *endogenous]
    effects = ["outcome", *["guardrail"] * bool(design.guardrail)]
    moved = [*endogenous, *["seen"] * bool(design.selection)]
    edges = [(node, effect, False) for effect in effects for node in causes]
    for node, (_, term) in exogenous.items():
        if term.kind == "treatment":
            edges.append(("text", node, False))
            continue
        reached = [] if term.kind == "intercept" else ["text"]  # declared independent of the text
        reached += [other for other, (_, t) in exogenous.items() if t.kind == "treatment"]
        edges += [(node, other, False) for other in [*reached, *moved]]
    nodes |= {node: label for node, (label, _) in exogenous.items()} | endogenous
    nodes |= {"guardrail": design.guardrail.column} if design.guardrail else {}
    nodes |= {"seen": design.selection.column} if design.selection else {}
    nodes |= {f"z{i}": z for i, z in enumerate(instruments, 1)}
    edges += [(f"z{i}", node, False) for i in range(1, len(instruments) + 1) for node in moved]
    edges += [("text", "seen", False)] if design.selection else []
    if endogenous:
        nodes["s"] = "season, mood (unobserved)"
        edges += [("s", node, True) for node in ("text", *endogenous)]
    if moved or design.guardrail:
        nodes["u"] = "shock u (unobserved)"
        edges += [("u", node, True) for node in (*moved, *effects)]
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
    if hidden := [node for node in ("s", "u") if node in nodes]:
        lines += ["    classDef unobserved stroke-dasharray: 4 3", f"    class {','.join(hidden)} unobserved"]
    return "\n".join(lines)


def svg(design: Design, roles: Roles) -> str:
    """The graph as one inline SVG, without fonts or files of its own.

    Columns with the same arrows share a box, so ten confounders draw as clearly as
    one. Strokes and letters are `currentColor`: the page decides on dark or light.
    Names are escaped.
    """
    boxes, drawn = _boxes(design, roles), graph(design, roles)
    place = {node: _box_of(node, design, roles) for node in drawn.nodes}
    edges = dict.fromkeys((place[a], place[b], dashed) for a, b, dashed in drawn.edges if place[a] != place[b])
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


def _exogenous(design: Design, roles: Roles) -> dict[str, tuple[str, Term]]:
    """Node -> (column, the first term that names it), of every exogenous column beside the text."""
    found: dict[str, tuple[str, Term]] = {}
    named = set()
    for i, term in enumerate(design.terms, 1):
        if term.kind in ("endogenous", "selection", "guardrail"):
            continue
        for column, node in ((term.column, f"c{i}"), (term.by, f"c{i}b")):
            if column not in ("", "text", roles.text, *named):
                found[node] = (column, term)
                named.add(column)
    return found


def _box_of(node: str, design: Design, roles: Roles) -> str:
    if node in ("text", "outcome", "s", "u", "seen"):
        return node
    if node == "guardrail":  # the outcome's causes are its own
        return "outcome"
    if node[0] == "z":
        return "instruments"
    if node[0] == "p":
        return "p"
    kind = _exogenous(design, roles)[node][1].kind
    return {"intercept": "intercepts", "treatment": "treatments"}.get(kind, "confounders")


def _boxes(design: Design, roles: Roles) -> dict[str, _Box]:
    drawn = graph(design, roles)
    labels: dict[str, tuple[str, ...]] = {}
    for node, label in drawn.nodes.items():
        box = _box_of(node, design, roles)
        labels[box] = (*labels.get(box, ()), label)
    tallest = max(len(labels.get("confounders", ())), len(labels.get("intercepts", ())))
    middle = 36 if not tallest else _LINE * tallest + 110  # height of the row text -> outcome
    boxes = {"text": _Box(_LEFT, middle, labels["text"]), "outcome": _Box(_RIGHT, middle, labels["outcome"])}
    for name, x in (("confounders", _MIDDLE), ("intercepts", _RIGHT)):
        if name in labels:
            boxes[name] = _Box(x, 17 + _LINE * len(labels[name]) / 2, labels[name])
    below = middle + 110
    if "treatments" in labels:
        boxes["treatments"] = _Box(_TREATED, middle + 48 + _LINE * len(labels["treatments"]) / 2, labels["treatments"])
        below += 16 + _LINE * len(labels["treatments"])
    if hub := next((name for name in ("p", "seen") if name in labels), ""):
        boxes[hub] = _Box(_MIDDLE, below + _LINE * (len(labels[hub]) - 1) / 2, labels[hub])
        below += _LINE * (len(labels[hub]) - 1) / 2
        count = len(labels["instruments"])
        boxes["instruments"] = _Box(_MIDDLE, boxes[hub].y + boxes[hub].half_height + 64 + _LINE * count / 2,
                                    labels["instruments"])  # fmt: skip
    if "s" in labels:
        boxes["s"] = _Box(_LEFT, below, ("season, mood", "(unobserved)"), observed=False)
    if "u" in labels:
        boxes["u"] = _Box(_RIGHT, below, ("shock u", "(unobserved)"), observed=False)
    return boxes


def _mermaid_label(label: str) -> str:
    # Mermaid reads #NN; inside quotes as a character reference; letters of every script pass unchanged.
    return "".join(c if c.isalnum() or c in " _-.,()" else f"#{ord(c)};" for c in label)


def _short(label: str) -> str:
    return label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…"


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
