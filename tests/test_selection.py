"""Outcomes that are seen by choice: the likelihood by other means, and the truth behind the naive bias."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from numpyro.handlers import seed, substitute, trace

from deconfound_jax.causal import nuts
from deconfound_jax.causal.fit import fit_prepared
from deconfound_jax.causal.model import causal_model
from deconfound_jax.causal.reward import residual_form
from deconfound_jax.causal.selection import log_bvn
from deconfound_jax.causal.spec import Block, Rows, Selection, Spec
from deconfound_jax.causal.terms import prepare
from deconfound_jax.config import Causal
from deconfound_jax.structs import Design

SLOPE = np.asarray([0.5, -0.5])
QUICK = Causal(draws=200, chains=2, warmup=150, text_sd=1.0)


def _log(log_of, family="normal", n=800, rho=0.7):
    """Who likes x0 is more often heard, and so is who has a high error."""
    rng = np.random.default_rng(0)
    features_nd, w, u, e = rng.normal(size=(n, 2)), *rng.normal(size=(3, n))
    error = rho * u + np.sqrt(1 - rho**2) * e
    seen = (0.2 + 0.8 * features_nd[:, 0] + 0.8 * w + u > 0).astype(float)
    y = 0.5 + features_nd @ SLOPE + error
    y = (y > 0).astype(float) if family == "bernoulli" else y
    logs = log_of({"outcome": np.where(seen > 0, y, np.nan), "seen": seen, "w": w}, observed="seen")
    return logs, features_nd


def test_bivariate_normal_distribution_function():
    rng = np.random.default_rng(0)
    h, k = 1.5 * rng.normal(size=(2, 40))
    k[:10] = h[:10] + 0.05 * rng.normal(size=10)
    k[10:20] = -h[10:20] + 0.05 * rng.normal(size=10)
    jitted = jax.jit(log_bvn)
    for rho in (0.0, 0.6, 0.99):
        for sign in (1.0, -1.0):
            law = scipy.stats.multivariate_normal([0, 0], [[1, sign * rho], [sign * rho, 1]], allow_singular=True)
            expected = law.cdf(np.stack([h, k], 1), rng=np.random.default_rng(1))
            found = jitted(*(jnp.asarray(v, jnp.float32) for v in (h, k, rho, np.full(40, sign))))
            assert np.isfinite(found).all()
            np.testing.assert_allclose(np.exp(found), expected, atol=2e-5)
    tail = log_bvn(*(jnp.float32(v) for v in (-6.0, -5.0, -0.5, 1.0)))  # 1e-28: a difference would have lost it
    s = np.sqrt(0.75)

    def inner(x):
        return np.exp(scipy.stats.norm.logpdf(x) + scipy.stats.norm.logcdf((-5 + 0.5 * x) / s) + 60)

    np.testing.assert_allclose(tail, np.log(scipy.integrate.quad(inner, -16, -6)[0]) - 60, rtol=1e-4)


def test_derivatives_of_the_bivariate_normal():
    at = [jnp.float32(v) for v in (0.3, -0.7, 0.6)]
    for sign in (1.0, -1.0):

        def value(h, k, rho, sign=sign):
            return log_bvn(h, k, rho, jnp.float32(sign))

        found = jax.grad(value, argnums=(0, 1, 2))(*at)
        for i in range(3):
            up, down = ([v + (j == i) * d for j, v in enumerate(at)] for d in (0.01, -0.01))
            np.testing.assert_allclose(found[i], (value(*up) - value(*down)) / 0.02, rtol=2e-3)


@pytest.mark.parametrize("family", ["normal", "probit"])
def test_simulated_outcomes_are_selected_as_the_law_says(family):
    """Heckman's formulas: P(seen) = Phi(w), E[y | seen] = eta + rho sigma phi(w) / Phi(w)."""
    n, rho, index, eta = 200_000, 0.6, 0.4, 0.3
    spec = Spec(family, (Block("text", 0, 1, 1.0),), (), selection=Selection(Block("exclusions", 1, 2, 1.0)))
    one, zero = np.ones(n), np.zeros((n, 0))
    rows = Rows(np.zeros((n, 2)), zero.astype(int), one, zero, one, one, one, one, 0.0)
    sites = {"intercept": eta, "selection.intercept": index, "sigma": 1.0, "rho.atanh": np.arctanh(rho / 0.999)}
    sites = {name: jnp.asarray(value) for name, value in sites.items()}
    made = trace(seed(substitute(causal_model, data=sites), jax.random.key(0))).get_trace(spec, rows)
    y, seen = np.asarray(made["outcome"]["value"]), np.asarray(made["observed"]["value"]) > 0
    law = scipy.stats.norm
    np.testing.assert_allclose(seen.mean(), law.cdf(index), atol=0.005)
    if family == "normal":
        np.testing.assert_allclose(y[seen].mean(), eta + rho * law.pdf(index) / law.cdf(index), atol=0.01)
    else:
        both = scipy.stats.multivariate_normal([0, 0], [[1, rho], [rho, 1]]).cdf([index, eta])
        np.testing.assert_allclose(y[seen].mean(), both / law.cdf(index), atol=0.005)


@pytest.mark.parametrize("family", ["normal", pytest.param("bernoulli", marks=pytest.mark.slow)])
def test_selection_recovers_what_complete_cases_miss(log_of, monkeypatch, family):
    monkeypatch.setattr(nuts, "_LEAST", 100)
    logs, features_nd = _log(log_of, family)
    design = Design.parse("selection(seen ~ w)", family)
    posterior = fit_prepared(prepare(logs, features_nd, design, QUICK), design, QUICK)
    assert posterior.diagnostics["method"] == "nuts" and "selection" in posterior.diagnostics["why"]
    ours_s = _slope(posterior)
    if family == "normal":  # a logit is another unit than a probit
        seen = logs.columns["seen"] > 0
        complete = prepare(logs.take(seen), features_nd[seen], design.without_terms())
        naive_s = _slope(fit_prepared(complete, design, QUICK))
        assert naive_s.mean() < 0.4 and naive_s.mean() + 2 * naive_s.std() < SLOPE[0]
    assert abs(ours_s.mean() - SLOPE[0]) < 3 * ours_s.std() < 0.5
    assert np.quantile(posterior["rho"], 0.01) > 0.1
    assert abs(posterior["rho"].mean() - 0.7) < 3 * posterior["rho"].std()
    with pytest.raises(ValueError, match="a seen outcome is selected; expected the model form"):
        residual_form(posterior, prepare(logs, features_nd, design))


def _slope(posterior):
    """Draws of the first feature's effect in units of y per unit of feature."""
    return posterior["text"][:, 0] * float(posterior.scaling["outcome.sd"]) / posterior.scaling["features.sd"][0]


def test_an_unseen_outcome_enters_nothing(log_of):
    logs, features_nd = _log(log_of, n=60)
    design = Design.parse("selection(seen ~ w)")
    prepared = prepare(logs, features_nd, design)
    other = dict(logs.columns) | {"outcome": np.where(logs.columns["seen"] > 0, logs.outcome_n, 99.0)}
    again = prepare(log_of(other, observed="seen"), features_nd, design)
    np.testing.assert_array_equal(prepared.rows.outcome_n, again.rows.outcome_n)
    seen = prepared.rows.observed_n > 0
    np.testing.assert_allclose(
        [prepared.rows.outcome_n[seen].mean(), prepared.rows.outcome_n[seen].std()], [0, 1], atol=1e-12
    )
    assert (prepared.rows.outcome_n[~seen] == 0).all() and prepared.spec.selection.exclusions.stop == 3


def test_what_is_wrong_with_a_selection_is_named(log_of):
    logs, features_nd = _log(log_of, n=60)
    design = Design.parse("selection(seen ~ w)")
    for seen, message in ((np.full(60, 1.0), "to hold 0 and 1"), (1 - logs.columns["seen"], "an outcome in every row")):
        broken = log_of(dict(logs.columns) | {"seen": seen}, observed="seen")
        with pytest.raises(ValueError, match=message):
            prepare(broken, features_nd, design)
