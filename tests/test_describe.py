"""Equations, graph and assumptions say what the design says, term by term."""

import html
import re
from xml.etree import ElementTree

import pytest

from deconfound_jax.causal import describe
from deconfound_jax.structs import Design, Roles

ROLES = Roles(text="headline", outcome="clicks", exposure="impressions")
FULL = Design.parse("category(week) + linear(hour) + intercept(author) + endogenous(popularity ~ z1 + z2)")
PLAIN = Design.parse("category(week)")
DESIGNS = [FULL, PLAIN, Design(), Design.parse("endogenous(fame ~ z)"), Design.parse("a + b", "binomial")]
COUNTS = Design.parse("category(week)", "normal", "empirical_logit")
LOGIT = "y = log((clicks + ½) / (impressions − clicks + ½)),  v = 1/(clicks + ½) + 1/(impressions − clicks + ½)"


@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_equations_and_diagrams_mention_every_column(design):
    names = [ROLES.text, ROLES.outcome] + [t.column for t in design.terms]
    names += [z for t in design.terms for z in t.instruments]
    for drawn in ("\n".join(describe.equations(design, ROLES)), describe.mermaid(design, ROLES)):
        assert [name for name in names if not re.search(rf"\b{name}\b", drawn)] == []
    texts = ["".join(t.itertext()) for t in ElementTree.fromstring(describe.svg(design, ROLES)).iter(_svg("text"))]
    assert [name for name in names if name * 2 not in texts] == []  # the letters and their tooltip


def test_equations_of_the_full_design():
    assert describe.equations(FULL, ROLES, gamma_sd=2.0)[:3] == [
        "clicks = f(headline) + g₁[week] + b₂·hour + g₃[author] + γ·popularity + c₀·e + ε,  ε ~ N(0, σ²)",
        "popularity = π₁·z1 + π₂·z2 + a·(φ(headline), week, hour, author) + U",
        "e = (popularity − E[popularity | headline, week, hour, author, z1, z2]) / sd(U)",
    ]
    assert "γ ~ N(0, 4),  c₀ ~ N(0, 1) on standardised scales" in describe.equations(FULL, ROLES, gamma_sd=2.0)


@pytest.mark.parametrize(
    ("design", "expected"),
    [
        (Design.parse("hour", "binomial"), "clicks ~ Binomial(impressions, logistic(η))"),
        (COUNTS, LOGIT),
        (Design(), "clicks = f(headline) + ε,  ε ~ N(0, σ²)"),
    ],
    ids=["binomial", "empirical_logit", "normal"],
)
def test_first_line_is_the_family(design, expected):
    assert describe.equations(design, ROLES)[0] == expected


def test_empirical_logit_states_its_sampling_variance():
    assert describe.equations(COUNTS, ROLES)[1] == "y = f(headline) + g₁[week] + ε,  ε ~ N(0, σ²v)"


def test_only_a_category_is_pooled_with_its_means():
    lines = {line[:2]: line for line in describe.equations(FULL, ROLES) if line.startswith("g")}
    assert "φ̄" in lines["g₁"]
    assert "φ̄" not in lines["g₃"]


def test_graph_without_endogenous_term_has_nothing_unobserved():
    nodes, edges = describe.graph(PLAIN, ROLES)
    assert nodes == {"text": "headline", "outcome": "clicks", "c1": "week"}
    assert set(edges) == {("text", "outcome", False), ("c1", "outcome", False), ("c1", "text", False)}
    assert "-.->" not in describe.mermaid(PLAIN, ROLES)
    assert "dasharray" not in describe.svg(PLAIN, ROLES)


def test_graph_of_an_endogenous_design():
    edges = set(describe.graph(FULL, ROLES).edges)
    assert {("z1", "p", False), ("z2", "p", False), ("p", "outcome", False)} <= edges
    assert {(a, b) for a, b, dashed in edges if dashed} == {
        ("s", "text"), ("s", "p"), ("u", "p"), ("u", "outcome"),
    }  # fmt: skip
    # Exclusion, and no collider: neither instrument nor endogenous column points at the text.
    assert not any(a in ("z1", "z2", "p") and b == "text" for a, b, _ in edges)
    assert not any(a.startswith("z") and b == "outcome" for a, b, _ in edges)
    # The author's levels are declared independent of the text.
    assert ("c3", "text", False) not in edges
    assert ("c2", "text", False) in edges


def test_names_are_escaped_in_both_pictures():
    odd = Roles(text='a"]<script>&b', outcome="çlîcks 点击")
    drawn = describe.svg(PLAIN, odd)
    ElementTree.fromstring(drawn)
    assert "<script" not in drawn
    assert html.escape(odd.text) in drawn
    assert 'text["a#34;#93;#60;script#62;#38;b"]' in describe.mermaid(PLAIN, odd)
    assert 'outcome["çlîcks 点击"]' in describe.mermaid(PLAIN, odd)


def test_boxes_stay_inside_the_drawing_and_apart():
    long = Roles(text="t" * 60, outcome="o" * 60)
    design = Design.parse(" + ".join(f"confounder_number_{i}_{'x' * 30}" for i in range(12)))
    root = ElementTree.fromstring(describe.svg(design, long))
    width, height = map(float, root.get("viewBox").split()[2:])
    boxes = [[float(r.get(k)) for k in ("x", "y", "width", "height")] for r in root.iter(_svg("rect"))]
    assert len(boxes) == 3
    for i, (x, y, w, h) in enumerate(boxes):
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height
        for x2, y2, w2, h2 in boxes[i + 1 :]:
            assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y


def test_assumptions_of_an_endogenous_design_cover_all_nine():
    found = describe.assumptions(FULL)
    assert [label for label, _, _ in found] == [f"A{i}" for i in range(9)]
    sentences = {label: sentence for label, sentence, _ in found}
    assert "z1 and z2 move the outcome only through popularity" in sentences["A1"]
    assert all(column in sentences["A5"] for column in ("week", "hour", "author", "popularity"))
    assert [label for label, _, checkable in found if not checkable] == ["A0", "A5", "A7", "A8"]


def test_one_instrument_cannot_be_checked():
    found = {label: checkable for label, _, checkable in describe.assumptions(Design.parse("endogenous(fame ~ z)"))}
    assert not found["A1"] and not found["A2"] and found["A3"]


@pytest.mark.parametrize("design", [PLAIN, Design()], ids=str)
def test_instrument_assumptions_need_an_endogenous_term(design):
    found = describe.assumptions(design)
    assert [label for label, _, _ in found] == ["A0", "A4", "A5", "A6", "A7", "A8"]
    assert not any("instrument" in sentence or "first stage" in sentence for _, sentence, _ in found)


def _svg(tag):
    return "{http://www.w3.org/2000/svg}" + tag
