"""The grammar of designs: read, printed and read again, and refused with the piece that is wrong."""

import json

import pytest

from deconfound_jax.structs import Design, Term

GRAMMAR = {  # text -> terms
    "": (),
    "hour": (Term("linear", "hour"),),
    "category(week) + intercept(author)": (Term("category", "week"), Term("intercept", "author")),
    "category(week, absorbed)": (Term("category", "week", options=("absorbed",)),),
    "smooth(hour)": (Term("smooth", "hour"),),
    "smooth(hour, spline, bases=9)": (Term("smooth", "hour", options=("spline", "bases=9")),),
    "smooth(week) + category(week)": (Term("smooth", "week"), Term("category", "week")),
    "embedding(article)": (Term("embedding", "article"),),
    "interaction(text * device)": (Term("interaction", "text", by="device"),),
    "treatment(dose)": (Term("treatment", "dose"),),
    "endogenous(p ~ z1 + z2)": (Term("endogenous", "p", ("z1", "z2")),),
    "selection(seen ~ w)": (Term("selection", "seen", ("w",)),),
    "guardrail(complaints)": (Term("guardrail", "complaints"),),
}


@pytest.mark.parametrize("text", GRAMMAR)
def test_a_design_reads_and_prints(text):
    design = Design.parse(text)
    assert design.terms == GRAMMAR[text]
    assert Design.parse(str(design)) == design
    assert Design.from_json(json.loads(json.dumps(design.to_json()))) == design


def test_spaces_and_lines_do_not_matter():
    assert Design.parse(" category( week ,absorbed )\n + endogenous(p~z1+z2)") == Design.parse(
        "category(week, absorbed) + endogenous(p ~ z1 + z2)"
    )


WRONG = {
    "linaer(hour)": r"cannot read 'linaer\(hour\)'.*nearest is 'linear'",
    "hour * age": r"cannot read 'hour \* age'",
    "category(week": "unbalanced parentheses",
    "endogenous(p)": r"an endogenous term needs an instrument: endogenous\(p ~ z\)",
    "linear(p ~ z)": r"linear\(p ~ z\)\): instruments belong to one of",
    "interaction(a)": r"expected interaction\(a \* b\)",
    "linear(a * b)": r"expected interaction\(a \* b\), and a \* b nowhere else",
    "category(week, absrobed)": r"expected options out of \('absorbed',\), got 'absrobed'",
    "smooth(hour, bases=few)": "expected bases=<number>, got 'bases=few'",
    "linear(hour, bases=4)": "expected options out of",
    "category(week) + intercept(week)": "a column may carry one term",
    "guardrail(a) + guardrail(b)": "one guardrail term is supported",
    "selection(s ~ w) + endogenous(p ~ z)": "selection beside endogenous or guardrail",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_cannot_be_read_is_named(text):
    with pytest.raises(ValueError, match=WRONG[text]):
        Design.parse(text)


@pytest.mark.parametrize(
    ("family", "response", "text", "message"),
    [
        ("gauss", "identity", "", r"Design.family: expected one of \('normal'.*got 'gauss'"),
        ("normal", "logit", "", r"Design.response: expected one of .* got 'logit'"),
        ("poisson", "empirical_logit", "", "'empirical_logit' belongs to the normal family, got 'poisson'"),
        (
            "poisson",
            "identity",
            "selection(s ~ w)",
            "selection needs the normal or the bernoulli family, got 'poisson'",
        ),
    ],
)
def test_what_does_not_go_together_is_named(family, response, text, message):
    with pytest.raises(ValueError, match=message):
        Design.parse(text, family, response)


def test_what_others_would_assume():
    design = Design.parse("category(week) + endogenous(p ~ z) + endogenous(q ~ z + w)", "poisson")
    assert str(design.without_instruments()) == "category(week) + linear(p) + linear(q)"
    assert design.without_terms() == Design("poisson")
    assert design.endogenous.column == "p" and [t.column for t in design.endogenous_terms] == ["p", "q"]
    assert design.guardrail is None and design.selection is None


def test_a_smooth_term_knows_its_bases():
    assert [Design.parse(t).terms[0].bases for t in ("smooth(a)", "smooth(a, bases=7)")] == [20, 7]
    assert Term("interaction", "a", by="b").columns == ("a", "b")
    assert Term("selection", "seen", ("w1", "w2")).columns == ("seen", "w1", "w2")
