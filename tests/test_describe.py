"""Equations, graph and assumptions say what the design says, term by term."""

import html
import re
from xml.etree import ElementTree

import pytest
from matplotlib.mathtext import MathTextParser

from deconfound_jax.causal import describe
from deconfound_jax.structs import Design, Roles

ROLES = Roles(text="headline", outcome="clicks", exposure="impressions")
FULL = Design.parse("category(week) + linear(hour) + intercept(author) + endogenous(popularity ~ z1 + z2)")
PLAIN = Design.parse("category(week)")
EVERY = Design.parse(
    "category(week) + category(site, absorbed) + smooth(hour) + smooth(age, spline, bases=12) + embedding(article) + "
    "interaction(text * device) + interaction(hour * age) + treatment(dose) + intercept(author) + "
    "endogenous(fame ~ z1 + z2) + endogenous(reach ~ z2 + z3) + guardrail(complaints)",
    "beta_binomial",
)
SEEN = Design.parse("hour + selection(rated ~ w1 + w2)")
DESIGNS = [FULL, PLAIN, Design(), Design.parse("endogenous(fame ~ z)"), Design.parse("a + b", "binomial"), EVERY, SEEN]
COUNTS = Design.parse("category(week)", "normal", "empirical_logit")
LOGIT = "y = log((clicks + ½) / (impressions − clicks + ½)),  v = 1/(clicks + ½) + 1/(impressions − clicks + ½)"


@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_equations_and_diagrams_mention_every_column(design):
    names = [ROLES.text, ROLES.outcome] + [c for t in design.terms for c in t.columns if c != "text"]
    pictures = (describe.equations(design, ROLES), describe.latex(design, ROLES), [describe.mermaid(design, ROLES)])
    for drawn in map("\n".join, pictures):
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


FIRST_LINES = {  # family -> likelihood, with and without an exposure
    "student_t": ("clicks = f(headline) + σ·ε,  ε ~ t(ν),  ν = 2 + 1/δ²",) * 2,
    "bernoulli": ("clicks ~ Bernoulli(logistic(η))",) * 2,
    "beta_binomial": ("clicks ~ BetaBinomial(impressions, μ/δ², (1 − μ)/δ²),  μ = logistic(η)",) * 1,
    "poisson": ("clicks ~ Poisson(impressions·exp(η))", "clicks ~ Poisson(exp(η))"),
    "negative_binomial": (
        "clicks ~ NegativeBinomial(m, m + m²δ²), mean and variance,  m = impressions·exp(η)",
        "clicks ~ NegativeBinomial(m, m + m²δ²), mean and variance,  m = exp(η)",
    ),
    "ordinal": ("P(clicks ≤ k) = logistic(aₖ − η),  a₁ < a₂ < … learned",) * 2,
}


@pytest.mark.parametrize("family", FIRST_LINES)
def test_every_family_states_its_law(family):
    roles = (ROLES, Roles(text="headline", outcome="clicks"))
    for line, role in zip(FIRST_LINES[family], roles, strict=False):
        assert describe.equations(Design(family), role)[0] == line
    form = next(sentence for label, sentence, _ in describe.assumptions(Design(family)) if label == "A4")
    scale = {"student_t": "outcome is", "poisson": "log of", "negative_binomial": "log of"}.get(family, "logit of")
    assert f"the {scale}" in form


def test_every_kind_of_term_states_its_prior():
    lines = describe.equations(EVERY, ROLES)
    assert lines[1].startswith(
        "η = f(headline) + g₁[week] + g₂[site] + g₃(hour) + g₄(age) + g₅(article) + f₆(headline)·device + b₇·hour·age"
        " + b₈·dose + h₈·E[dose | headline, week, site, hour, age, article, device] + g₉[author] + γ₁·fame + c₁·e₁"
    )
    for line in (
        "g₂[site] flat: fixed effects",
        "g₃ = b₃·hour + w₃(hour) + E[φ | hour]·m₃,  w₃ ~ GP(0, s₃², ℓ₃) on 20 basis functions,  b₃ ~ N(0, 1)",
        "g₄ = b₄·age + w₄(age) + E[φ | age]·m₄,  w₄ ~ penalised spline of scale s₄ on 12 basis functions,"
        "  b₄ ~ N(0, 1)",
        "g₅ = article·b₅ + E[φ | article]·m₅,  b₅ ~ N(0, s₅²I),  m₅ ~ N(0, r₅²I),  s₅, r₅ learned",
        "f₆(headline) = φ(headline)·β₆,  β₆ ~ N(0, s₆²I),  s₆ learned,  device standardised",
        "b₇ ~ N(0, 1) on standardised hour times standardised age",
        "b₈, h₈ ~ N(0, 1) on standardised dose and what it is expected to be",
        "γⱼ ~ N(0, 1),  cⱼ ~ N(0, 1),  κ ~ N(0, 1) on standardised scales",
        "reward of a text = f(headline) − λ·f′(headline),  f′ that of complaints",
    ):
        assert line in lines


def test_every_first_stage_has_all_instruments_and_the_errors_before_it():
    lines = describe.equations(EVERY, ROLES)
    others = "headline, week, site, hour, age, article, device, dose, author, z1, z2, z3"
    assert f"e₁ = (fame − E[fame | {others}]) / sd(U₁)" in lines
    assert f"e₂ = (reach − E[reach | {others}, e₁]) / sd(U₂)" in lines


def test_selection_states_its_equation_and_its_link():
    probit = Design.parse("selection(rated ~ w)", "bernoulli")
    line = "rated = 1 where π₁·w1 + π₂·w2 + a·(φ(headline), hour) + U > 0,  U ~ N(0, 1),  corr(U, ε) = ρ"
    assert describe.equations(SEEN, ROLES)[1] == line
    assert describe.equations(probit, ROLES)[0] == "clicks ~ Bernoulli(Φ(η))"
    assert "probit of the outcome" in describe.assumptions(probit)[1][1]
    for design, moves in ((SEEN, "w1 and w2 move that"), (probit, "w moves that")):
        label, sentence, checkable = describe.assumptions(design)[-1]
        assert label == "A8" and not checkable and moves in sentence and "rated says whether" in sentence


FAMILY_DESIGNS = [Design(family) for family in FIRST_LINES] + [
    COUNTS,
    Design.parse("selection(rated ~ w)", "bernoulli"),
]


@pytest.mark.parametrize("design", DESIGNS + FAMILY_DESIGNS, ids=lambda d: f"{d.family} {d}")
def test_latex_can_be_typeset_and_says_the_same(design):
    parser = MathTextParser("agg")
    lines = describe.latex(design, ROLES)
    assert len(lines) == len(describe.equations(design, ROLES))
    for line in lines:
        assert line.isascii()
        parser.parse(f"${line}$")


def test_latex_by_hand():
    assert describe.latex(PLAIN, Roles(text="head_line", outcome="50% ~\\^"))[0] == (
        r"\text{50\% \textasciitilde{}\textbackslash{}\textasciicircum{}} = f(\text{head\_line}) + g_{1}[\text{week}]"
        r" + \varepsilon ,\quad \varepsilon  \sim  \mathcal{N}(0, \sigma ^{2})"
    )


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


def test_graph_of_every_kind():
    nodes, edges = describe.graph(EVERY, ROLES)
    node = {label: name for name, label in nodes.items()}
    pairs = {(nodes[a], nodes[b]) for a, b, dashed in edges if not dashed}
    for column in ("week", "site", "hour", "age", "article", "device"):
        assert {(column, "headline"), (column, "clicks"), (column, "dose"), (column, "fame")} <= pairs
    # The text may move the treatment; the treatment moves nothing but the outcomes, as the guardrail does nothing.
    assert ("headline", "dose") in pairs
    assert {b for a, b in pairs if a == "dose"} == {"clicks", "complaints"}
    assert not [edge for edge in edges if edge[0] == "guardrail"]
    assert {a for a, b in pairs if b == "complaints"} == {a for a, b in pairs if b == "clicks"}
    assert {(a, b) for a, b in pairs if a.startswith("z")} == {
        (z, p) for z in ("z1", "z2", "z3") for p in ("fame", "reach")
    }
    assert {b for a, b, _ in edges if a == "u"} == {node["fame"], node["reach"], "outcome", "guardrail"}


def test_graph_of_selection_has_no_way_back():
    nodes, edges = describe.graph(SEEN, ROLES)
    assert "s" not in nodes and nodes["seen"] == "rated"
    assert {(a, b) for a, b, dashed in edges if dashed} == {("u", "seen"), ("u", "outcome")}
    assert {a for a, b, dashed in edges if b == "seen" and not dashed} == {"text", "c1", "z1", "z2"}
    assert not [edge for edge in edges if edge[0] == "seen"]
    assert "class u unobserved" in describe.mermaid(SEEN, ROLES)


def test_names_are_escaped_in_both_pictures():
    odd = Roles(text='a"]<script>&b', outcome="çlîcks 点击")
    drawn = describe.svg(PLAIN, odd)
    ElementTree.fromstring(drawn)
    assert "<script" not in drawn
    assert html.escape(odd.text) in drawn
    assert 'text["a#34;#93;#60;script#62;#38;b"]' in describe.mermaid(PLAIN, odd)
    assert 'outcome["çlîcks 点击"]' in describe.mermaid(PLAIN, odd)


MANY = Design.parse(" + ".join(f"confounder_number_{i}_{'x' * 30}" for i in range(12)))


@pytest.mark.parametrize(("design", "count"), [(MANY, 3), (EVERY, 9), (SEEN, 6)], ids=["many", "every", "seen"])
def test_boxes_stay_inside_the_drawing_and_apart(design, count):
    long = Roles(text="t" * 60, outcome="o" * 60)
    root = ElementTree.fromstring(describe.svg(design, long))
    width, height = map(float, root.get("viewBox").split()[2:])
    boxes = [[float(r.get(k)) for k in ("x", "y", "width", "height")] for r in root.iter(_svg("rect"))]
    assert len(boxes) == count
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


def test_assumptions_of_every_kind():
    sentences = {label: sentence for label, sentence, _ in describe.assumptions(EVERY, ROLES)}
    assert "dose comes before the outcome" in sentences["A0"] and "author, fame, reach, z1" in sentences["A0"]
    assert "each in its own way" in sentences["A3"] and "log" in sentences["A2"]
    for words in (
        "smooth in hour",
        "every number of article",
        "linear in device",
        "hour times age",
        "complaints likewise",
    ):
        assert words in sentences["A4"]
    assert "wording or treatment and outcome" in sentences["A5"]
    just = Design.parse("endogenous(a ~ z1 + z2) + endogenous(b ~ z1 + z2)")
    assert [checkable for label, _, checkable in describe.assumptions(just) if label in ("A1", "A2")] == [False, False]


@pytest.mark.parametrize("design", [PLAIN, Design()], ids=str)
def test_instrument_assumptions_need_an_endogenous_term(design):
    found = describe.assumptions(design)
    assert [label for label, _, _ in found] == ["A0", "A4", "A5", "A6", "A7", "A8"]
    assert not any("instrument" in sentence or "first stage" in sentence for _, sentence, _ in found)


def _svg(tag):
    return "{http://www.w3.org/2000/svg}" + tag
