"""Sensitivity: published numbers, exact identities of omitted variables, and refits under a broken exclusion."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from deconfound_jax.causal import sensitivity as sens
from deconfound_jax.causal.classical.linear import ols, two_stage, with_intercept
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.terms import prepare
from deconfound_jax.structs import Design


def flat_posterior(logs, features_nd, text, gamma=0.0):
    """A posterior that only says what the bounds ask for, with a text prior so wide that no ridge is left."""
    design = Design.parse(text)
    prepared = prepare(logs, features_nd, design)
    d = features_nd.shape[1]
    draws = {"text": np.zeros((4, d)), "sigma": np.ones(4), "text.scale": np.full(4, 1e6), "gamma": np.full(4, gamma)}
    return Posterior(draws, design, prepared.scaling, {"converged": True}), prepared


def hidden_cause(log_of, seed=0, n=400, d=1):
    """y = 0.2 x + 0.4 c + 0.7 h + noise with x moved by h and c; the log shows c and not h."""
    rng = np.random.default_rng(seed)
    h, c = rng.normal(size=(2, n))
    x = rng.normal(size=(n, d)) + 0.6 * h[:, None] + 0.3 * c[:, None]
    y = 0.2 * x.sum(1) + 0.4 * c + 0.7 * h + rng.normal(size=n)
    return log_of({"outcome": y, "c": c}), x, h


def test_the_robustness_value_is_the_published_one():
    # Cinelli and Hazlett (2020), Darfur: estimate 0.097, error 0.023, 783 degrees of freedom: RV = 13.9%.
    assert sens.robustness_value(0.09731582, 0.02325654 * np.sqrt(783)) == pytest.approx(0.138776, abs=1e-5)
    assert sens.robustness_value(0.0, 1.0) == 0.0 and sens.robustness_value(1e9, 1.0) == pytest.approx(1.0)


def test_the_e_value_is_the_published_one():
    assert sens.e_value(3.9) == pytest.approx(7.26, abs=0.005)  # VanderWeele and Ding (2017)
    assert sens.e_value(1 / 3.9) == pytest.approx(sens.e_value(3.9))
    assert sens.e_value(1.0) == 1.0


def test_at_the_robustness_value_the_bias_is_the_estimate():
    seen = sens.Contrast(0.4, 0.1, 1.7)
    assert seen.bias(seen.robustness, seen.robustness) == pytest.approx(0.4)
    assert seen.interval(0.0, 0.0)[0] == pytest.approx(0.4 - 1.96 * 0.1, abs=1e-4)


def test_for_a_scalar_text_the_bound_is_the_bias_exactly(log_of):
    logs, x, h = hidden_cause(log_of)
    posterior, prepared = flat_posterior(logs, x, "linear(c)")
    seen = sens.contrast(posterior, prepared, np.array([1.0]))
    strengths = sens.strength_of(posterior, prepared, h, np.array([1.0]))
    c = logs.columns["c"][:, None]
    short = ols(logs.outcome_n, with_intercept(x, c)).coefficient_k[1]
    long = ols(logs.outcome_n, with_intercept(x, c, h[:, None])).coefficient_k[1]
    assert seen.estimate == pytest.approx(short, rel=1e-8)
    assert seen.bias(*strengths) == pytest.approx(abs(short - long), rel=1e-6)
    assert seen.error == pytest.approx(ols(logs.outcome_n, with_intercept(x, c)).error_k[1], rel=1e-6)


def test_for_several_features_the_bound_holds_for_every_contrast(log_of):
    logs, x, h = hidden_cause(log_of, d=4)
    posterior, prepared = flat_posterior(logs, x, "linear(c)")
    c = logs.columns["c"][:, None]
    gap = ols(logs.outcome_n, with_intercept(x, c)).coefficient_k - np.delete(
        ols(logs.outcome_n, with_intercept(x, c, h[:, None])).coefficient_k, 6
    )
    rng = np.random.default_rng(1)
    ratios = []
    for v_d in rng.normal(size=(20, 4)):
        seen = sens.contrast(posterior, prepared, v_d)
        ratios.append(abs(v_d @ gap[1:5]) / seen.bias(*sens.strength_of(posterior, prepared, h, v_d)))
    assert max(ratios) < 1 + 1e-6 and max(ratios) > 0.9


def test_a_declared_treatments_robustness_is_that_of_its_t_value(log_of):
    logs, x, _ = hidden_cause(log_of)
    posterior, prepared = flat_posterior(logs, x, "treatment(c)")
    right = with_intercept(x, logs.columns["c"][:, None])
    plain = ols(logs.outcome_n, right, robust=False, debiased=False)
    seen = sens.treatment_contrast(posterior, prepared, "c")
    f = plain.coefficient_k[2] / plain.error_k[2] / np.sqrt(len(x))
    assert seen.estimate == pytest.approx(plain.coefficient_k[2], rel=1e-6)
    assert seen.robustness == pytest.approx(sens.robustness_value(f, 1.0), rel=1e-5)
    assert sens.risk_ratio(posterior, prepared, "c", 0.3) is None, "c has many values"


def test_the_risk_ratio_follows_the_family():
    rows = SimpleNamespace(columns_nq=np.array([[0.0], [1.0]]), offset=np.log(0.2 / 0.8))
    scaling = {"outcome.sd": 2.0, "outcome.mean": np.log(0.2 / 0.8), "t.sd": np.ones(1)}
    design = SimpleNamespace(response="identity")
    posterior = SimpleNamespace(scaling=scaling, design=design)
    rate = np.exp(0.5) / (0.8 + 0.2 * np.exp(0.5))
    for family, expected in (("normal", np.exp(0.91 * 0.25)), ("poisson", np.exp(0.5)), ("binomial", rate)):
        spec = SimpleNamespace(family=family, blocks=[SimpleNamespace(name="t", start=0)])
        ratio = sens.risk_ratio(posterior, SimpleNamespace(spec=spec, rows=rows), "t", 0.5)
        assert ratio == pytest.approx(expected)
    logit = SimpleNamespace(scaling=scaling, design=SimpleNamespace(response="empirical_logit"))
    spec = SimpleNamespace(family="normal", blocks=[SimpleNamespace(name="t", start=0)])
    assert sens.risk_ratio(logit, SimpleNamespace(spec=spec, rows=rows), "t", 0.5) == pytest.approx(rate)


def test_the_effect_of_a_broken_exclusion_is_that_of_a_refit(entangled):
    logs, x = entangled(n=500)
    posterior, prepared = flat_posterior(logs, x, "endogenous(p ~ z) + category(week, absorbed)", gamma=0.7)
    v_d = np.array([1.0, -0.5, 2.0])
    (seen,) = sens.exclusion(posterior, prepared, v_d)
    for delta in (0.0, 0.8, -1.5):
        y = logs.outcome_n - delta * logs.columns["z"]
        refit = two_stage(y, x, logs.columns["p"], logs.columns["z"], codes_nc=logs.columns["week"])
        assert seen.at(delta) == pytest.approx(v_d @ refit.coefficient_k[:3], rel=1e-8)
    assert seen.at(-seen.estimate / seen.slope) == pytest.approx(0.0, abs=1e-12)
    assert seen.flip == pytest.approx(abs(seen.estimate / seen.slope))
    mean, sd = seen.under_prior(0.5, error=0.1)
    assert mean == seen.estimate and sd == pytest.approx(np.hypot(0.1, 0.5 * seen.slope))


def test_units_of_outcome_and_features_cancel(log_of):
    logs, x, h = hidden_cause(log_of)
    scaled = dataclasses.replace(logs, columns=dict(logs.columns) | {"outcome": 10 * logs.outcome_n})
    one = sens.contrast(*flat_posterior(logs, x, "linear(c)"), np.array([1.0]))
    other = sens.contrast(*flat_posterior(scaled, 4 * x, "linear(c)"), np.array([4.0]))
    assert np.array([other.estimate, other.error, other.scale]) == pytest.approx(
        10 * np.array([one.estimate, one.error, one.scale]), rel=1e-8
    )


def test_the_ranking_contrast_is_the_better_half_against_the_worse(log_of):
    logs, x, _ = hidden_cause(log_of, d=2)
    posterior, prepared = flat_posterior(logs, x, "linear(c)")
    posterior.draws["text"][:] = [1.0, 0.0]
    upper = x[:, 0] > np.median(x[:, 0])
    assert sens.ranking_contrast(posterior, prepared, x) == pytest.approx(x[upper].mean(0) - x[~upper].mean(0))
    posterior.draws["text"][:] = 0.0
    assert not sens.ranking_contrast(posterior, prepared, x).any()
