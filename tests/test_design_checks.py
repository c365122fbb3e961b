"""Designs that cannot work are refused with the term's name; those that can are not."""

import numpy as np
import pytest

from deconfound_jax.causal.collinear import sample
from deconfound_jax.causal.design_check import check_design
from deconfound_jax.structs import Design, Logs, Roles

N = 60


def levels(letter, codes):
    return np.asarray([f"{letter}{code}" for code in codes], object)


@pytest.fixture(scope="module")
def made():
    """(columns...) -> a log that works under every design below, with the given columns changed; and its features."""
    rng = np.random.default_rng(0)
    features_nd = rng.normal(size=(N, 4))
    z1, z2, hour = rng.normal(size=(3, N))
    columns = {
        "text": levels("t", range(N)), "outcome": rng.normal(size=N), "shown": np.full(N, 40.0), "hour": hour,
        "z1": z1, "z2": z2, "p": z1 + hour + rng.normal(size=N), "q": z2 + rng.normal(size=N),
        "week": levels("w", np.arange(N) % 6), "flag": np.arange(N) % 2 == 0, "harm": rng.normal(size=N),
        "article": rng.normal(size=(N, 3)), "dose": rng.normal(size=N), "seen": (np.arange(N) % 3 > 0).astype(float),
        "unit": levels("u", range(N)), "hits": rng.integers(0, 20, N).astype(float),
    }  # fmt: skip

    def make(roles=None, **changes):
        return Logs.of({**columns, **changes}, roles or Roles()), features_nd

    return make


WORKS = [
    "", "flag", "hour + category(week)", "category(week, absorbed)", "smooth(hour)", "smooth(hour, spline)",
    "embedding(article)", "flag + interaction(text * flag)",
    "interaction(hour * flag)", "treatment(dose)", "treatment(flag)",
    "intercept(week)", "endogenous(p ~ z1)", "guardrail(harm)", "selection(seen ~ z1 + z2) + hour",
    "endogenous(p ~ z1 + z2) + endogenous(q ~ z2) + hour + category(week)",
]  # fmt: skip


@pytest.mark.parametrize("text", WORKS)
def test_a_design_that_works_passes(made, text):
    check_design(*made(), Design.parse(text))


FAMILIES = {  # family, response -> an outcome that fits
    ("bernoulli", "identity"): "seen", ("binomial", "identity"): "hits", ("beta_binomial", "identity"): "hits",
    ("poisson", "identity"): "hits", ("negative_binomial", "identity"): "hits", ("ordinal", "identity"): "hits",
    ("student_t", "identity"): "harm", ("normal", "identity"): "seen", ("normal", "empirical_logit"): "hits",
}  # fmt: skip


@pytest.mark.parametrize(("family", "response"), FAMILIES)
def test_a_family_that_fits_passes(made, family, response):
    logs, features_nd = made(Roles(outcome=FAMILIES[family, response], exposure="shown"))
    check_design(logs, features_nd, Design(family, (), response))


NOT_COUNTS = np.where(np.arange(N) == 7, 2.5, 1.0)
NEGATIVE = np.where(np.arange(N) == 7, -1.0, 1.0)
MISFITS = {  # family, response, outcome, message
    "bernoulli": ("bernoulli", "identity", NOT_COUNTS, r"'bernoulli': expected 0 or 1 in 'outcome', got 2.5 in row 7"),
    "bernoulli of counts": ("bernoulli", "identity", np.arange(N) % 3, r"expected 0 or 1 .* got 2 in row 2"),
    "binomial": ("binomial", "identity", np.arange(N), r"from 0 to the exposure in 'outcome', got 41 in row 41"),
    "beta_binomial": ("beta_binomial", "identity", NEGATIVE, r"from 0 to the exposure in 'outcome', got -1 in row 7"),
    "empirical logit": (
        "normal",
        "empirical_logit",
        NOT_COUNTS,
        r"'binomial': expected a whole number .* 2.5 in row 7",
    ),
    "poisson": ("poisson", "identity", NOT_COUNTS, r"'poisson': expected a whole number >= 0.*may be normal"),
    "negative_binomial": ("negative_binomial", "identity", NEGATIVE, r"a whole number >= 0 .* got -1 in row 7"),
    "ordinal": ("ordinal", "identity", NOT_COUNTS, r"'ordinal': expected a whole grade in 'outcome', got 2.5 in row 7"),
    "many grades": ("ordinal", "identity", np.arange(N), r"at most 20 grades in 'outcome', got 60; use normal"),
    "student_t": ("student_t", "identity", np.arange(N) % 2, r"'student_t': expected many values .* got two; use bern"),
    "nan": (
        "normal",
        "identity",
        np.where(np.arange(N) == 3, np.nan, 1.0),
        r"got nan in row 3 of .* selection\(seen ~ w",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_family_that_does_not_fit_is_named(made, case):
    family, response, outcome_n, message = MISFITS[case]
    logs, features_nd = made(Roles(exposure="shown"), outcome=np.asarray(outcome_n, float))
    with pytest.raises(ValueError, match=message):
        check_design(logs, features_nd, Design(family, (), response))


def test_an_unseen_outcome_may_be_missing_where_selection_is_modelled(made):
    outcome_n = np.where(np.arange(N) % 3 > 0, 1.0 * np.arange(N), np.nan)
    logs, features_nd = made(outcome=outcome_n)
    check_design(logs, features_nd, Design.parse("selection(seen ~ z1)"))
    logs, features_nd = made(outcome=np.where(np.arange(N) == 1, np.nan, outcome_n))
    with pytest.raises(ValueError, match="an outcome in every row that was seen, got nan in row 1"):
        check_design(logs, features_nd, Design.parse("selection(seen ~ z1)"))


X = np.random.default_rng(0).normal(size=(N, 4))  # the features of `made`
HALF = np.arange(N) % 30  # every value twice
REFUSED = {  # design, changed columns, message
    "text in a number": (
        "hour",
        {"hour": levels("h", HALF)},
        r"linear\(hour\): expected numbers in 'hour', got .*'h0'",
    ),
    "array in a number": ("article", {}, r"linear\(article\): .* got an array of shape \(60, 3\); use embedding"),
    "array as levels": ("category(article)", {}, r"category\(article\): expected one level a row, got an array"),
    "nan confounder": ("hour", {"hour": np.where(HALF == 3, np.nan, 1.0)}, "linear.hour.: expected finite .* in row 3"),
    "number for an array": ("embedding(hour)", {}, r"embedding\(hour\): expected an array \(n, k\)"),
    "smooth flag": (
        "smooth(flag)",
        {},
        r"smooth\(flag\): expected at least 5 different values of 'flag', got 2; use lin",
    ),
    "one dose": ("treatment(dose)", {"dose": np.ones(N)}, r"treatment\(dose\): expected at least 2 different values"),
    "one p": ("endogenous(p ~ z1)", {"p": np.ones(N)}, r"endogenous\(p ~ z1\): expected at least 2 different values"),
    "outcome as a term": ("outcome", {}, r"linear\(outcome\): expected columns settled before the outcome"),
    "function of the text": (
        "hour",
        {"hour": X @ [1, 2, 0, 3.0] + 4},
        r"linear\(hour\): .* not a function of the text",
    ),
    "smooth of the text": (
        "smooth(hour)",
        {"hour": X[:, 1]},
        r"smooth\(hour\): expected .* not a function of the text",
    ),
    "dose of the text": ("treatment(dose)", {"dose": -X[:, 1]}, r"treatment\(dose\): .* not a function of the text"),
    "p of the text": ("endogenous(p ~ z1)", {"p": X[:, 0]}, r"endogenous\(p ~ z1\): .* not a function of the text"),
    "array of the text": ("embedding(article)", {"article": X[:, :2] @ np.ones((2, 3))}, "not a function of the text"),
    "text of the array": (
        "embedding(article)",
        {"article": np.concatenate([X, X[::-1]], 1)},
        "texts that vary given 'a",
    ),
    "a text a level": (
        "category(unit)",
        {},
        r"category\(unit\): expected levels of several rows, got one in every level",
    ),
    "intercept a row": (
        "intercept(unit)",
        {},
        r"intercept\(unit\): .* beside the normal family.* one row in every level",
    ),
    "constant instrument": (
        "endogenous(p ~ z1)",
        {"z1": np.full(N, 2.0)},
        "an instrument that varies, got 2 in every row",
    ),
    "instrument is the term": ("z1 + endogenous(p ~ z1)", {}, r"no confounder; 'z1' is also in linear\(z1\)"),
    "instrument is an interaction": ("interaction(z1 * hour) + endogenous(p ~ z1)", {}, "'z1' is also in interaction"),
    "instrument is endogenous": ("endogenous(p ~ z1) + endogenous(z1 ~ z2)", {}, r"'z1' is also in endogenous\(z1"),
    "instrument is itself": ("endogenous(p ~ p)", {}, r"expected an instrument that moves 'p' given the other terms"),
    "instrument of the text": (
        "endogenous(p ~ z1)",
        {"z1": X[:, 0]},
        "an instrument that is not a function of the text",
    ),
    "equal to a confounder": (
        "hour + endogenous(p ~ z1)",
        {"z1": 3 - HALF, "hour": HALF},
        r"of linear\(hour\): nothing",
    ),
    "of a category": (
        "category(week) + endogenous(p ~ z1)",
        {"z1": np.arange(N) % 6 % 4},
        r"of category\(week\): noth",
    ),
    "of a smooth": (
        "smooth(hour) + endogenous(p ~ z1)",
        {"z1": X[:, 1] ** 3, "hour": X[:, 1] + 1e-3 * X[:, 2]},
        "smooth",
    ),
    "of a smooth's values": ("smooth(hour) + endogenous(p ~ z1)", {"z1": HALF % 7, "hour": HALF}, r"of smooth\(hour\)"),
    "too few instruments": ("endogenous(p ~ z1) + endogenous(q ~ z1)", {}, "as many instruments as .* got 1 for 2"),
    "interaction of levels": (
        "interaction(text * week)",
        {},
        r"interaction\(text \* week\): expected numbers in 'week'",
    ),
    "interaction with p": (
        "interaction(text * p) + endogenous(p ~ z1)",
        {},
        "got 'p'; its products are endogenous, too",
    ),
    "seen a third": (
        "selection(seen ~ z1)",
        {"seen": np.arange(N) % 3 / 2},
        r"expected 'seen' to hold 0 and 1, got \[0.0, 0.5",
    ),
    "all seen": (
        "selection(seen ~ z1)",
        {"seen": np.ones(N)},
        r"selection\(seen ~ z1\): expected 'seen' to hold 0 and 1",
    ),
    "one harm": ("guardrail(harm)", {"harm": np.ones(N)}, r"guardrail\(harm\): expected at least 2 different values"),
    "dose of a category": (
        "category(week) + treatment(dose)",
        {"dose": np.arange(N) % 6},
        r"treatment\(dose\): .*varies w",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_design_that_cannot_work_names_the_term(made, case):
    text, changes, message = REFUSED[case]
    logs, features_nd = made(**changes)
    with pytest.raises(ValueError, match=message):
        check_design(logs, features_nd, Design.parse(text))


def test_levels_of_one_text_each_are_refused_and_of_two_are_not(made):
    """Five rows a level, all of one text: nothing tells the text's effect from the level's."""
    logs, features_nd = made(article=levels("a", np.arange(N) // 5))
    repeated_nd = features_nd[np.arange(N) // 5]
    for design in ("category(article)", "category(article, absorbed)"):
        with pytest.raises(ValueError, match=r"category\(article.*: expected levels that hold several texts, got one"):
            check_design(logs, repeated_nd, Design.parse(design))
        check_design(logs, features_nd[np.arange(N) // 5 + np.arange(N) % 2], Design.parse(design))
        check_design(logs, np.zeros((N, 0)), Design.parse(design))  # no text, nothing to be told apart
    check_design(logs, repeated_nd, Design.parse("intercept(article)"))


def test_a_category_of_few_levels_that_the_features_hold_is_refused(made):
    logs, features_nd = made()
    hot_nd = (np.arange(N)[:, None] % 6 == np.arange(5)[None, :]).astype(float)
    with pytest.raises(ValueError, match=r"category\(week\): .* not a function of the text"):
        check_design(logs, np.concatenate([features_nd, hot_nd], 1), Design.parse("category(week)"))
    check_design(logs, np.concatenate([features_nd, hot_nd[:, :4]], 1), Design.parse("category(week)"))


def test_few_texts_make_no_confounder_a_function_of_them(made):
    """With as many features as different texts everything is one; that says nothing."""
    logs, _ = made()
    check_design(logs, np.random.default_rng(1).normal(size=(N, N)), Design.parse("hour + endogenous(p ~ z1)"))


def test_an_intercept_a_row_is_fine_where_the_family_has_no_scale(made):
    roles = Roles(outcome="hits", exposure="shown", weight="weight")
    logs, features_nd = made(roles, weight=np.full(N, 2.0))
    for family in ("binomial", "poisson"):
        check_design(logs, features_nd, Design.parse("intercept(unit)", family))
    check_design(logs, features_nd, Design.parse("intercept(unit)", "beta_binomial"))  # every row counts twice
    logs, features_nd = made(Roles(outcome="hits", exposure="shown"))
    for family in ("beta_binomial", "negative_binomial", "student_t"):
        with pytest.raises(ValueError, match=rf"beside the {family} family"):
            check_design(logs, features_nd, Design.parse("intercept(unit)", family))


def test_selection_needs_the_observed_column(made):
    logs, features_nd = made(Roles(observed="flag"))
    with pytest.raises(ValueError, match=r"selection\(seen ~ z1\): expected the column of Roles.observed, 'flag'"):
        check_design(logs, features_nd, Design.parse("selection(seen ~ z1)"))


def test_a_large_log_is_looked_at_on_a_sample_first(made):
    """A column that is the text's on the sampled rows alone is fine."""
    rng, n = np.random.default_rng(0), 5000
    features_nd, outcome_n = rng.normal(size=(n, 2)), rng.normal(size=n)
    hour_n = features_nd @ [1.0, 2.0]
    logs = Logs.of({"text": levels("t", range(n)), "outcome": outcome_n, "hour": hour_n}, Roles())
    with pytest.raises(ValueError, match="not a function of the text"):
        check_design(logs, features_nd, Design.parse("hour"))
    rows_m = sample(logs, features_nd, Design.parse("hour"))
    assert 2000 <= len(rows_m) < n
    others_n = np.setdiff1d(np.arange(n), rows_m)
    hour_n = hour_n + np.isin(np.arange(n), others_n[::50])
    check_design(Logs.of({**logs.columns, "hour": hour_n}, Roles()), features_nd, Design.parse("hour"))
