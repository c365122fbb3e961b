"""Reference estimators against the libraries people trust, where the `peers` extra is installed."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from deconfound_jax.causal.classical.crossfit import standardised
from deconfound_jax.causal.classical.doubly_robust import aipw, partially_linear
from deconfound_jax.causal.classical.glm import logit, poisson
from deconfound_jax.causal.classical.linear import liml, ols, two_stage, with_intercept
from experiments import known_peers

N = 300
EXACT = {"rtol": 1e-6, "atol": 1e-12}


@pytest.fixture(scope="module")
def log():
    rng = np.random.default_rng(0)
    u, z, c = rng.normal(size=N), rng.normal(size=(N, 3)), rng.normal(size=(N, 2))
    p = np.stack([z @ [1.0, 0.3, 0] + u + rng.normal(size=N), 100 + 40 * z[:, 2] + 30 * u], 1)
    y = c @ [1.0, 2.0] + p @ [0.5, 0.01] + u + (1 + abs(c[:, 0])) * rng.normal(size=N)
    codes = np.stack([rng.integers(0, 40, N), rng.integers(0, 9, N)], 1)
    return {"y": y, "c": c, "p": p, "z": z, "codes": codes, "weight": rng.uniform(0.2, 3, N)}


@pytest.fixture(autouse=True)
def quiet():
    """The peers' deprecations are theirs to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


KINDS = {"unadjusted": {"robust": False}, "robust": {}, "clustered": {}}


@pytest.mark.parametrize("kind", KINDS)
def test_least_squares_equals_statsmodels(log, kind):
    sm = pytest.importorskip("statsmodels.api")
    cluster = log["codes"][:, 0]
    theirs = {
        "unadjusted": {"cov_type": "nonrobust"},
        "robust": {"cov_type": "HC1"},
        "clustered": {"cov_type": "cluster", "cov_kwds": {"groups": cluster}},
    }[kind]
    x = with_intercept(log["c"], log["p"])
    ours = ols(log["y"], x, None, log["weight"], cluster if kind == "clustered" else None, **KINDS[kind])
    peer = sm.WLS(log["y"], x, weights=log["weight"]).fit(**theirs)
    np.testing.assert_allclose(ours.coefficient_k, peer.params, **EXACT)
    np.testing.assert_allclose(ours.error_k, peer.bse, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("debiased", [False, True])
def test_instruments_equal_linearmodels(log, kind, debiased):
    iv = pytest.importorskip("linearmodels.iv")
    cluster = log["codes"][:, 0] if kind == "clustered" else None
    theirs = {"cov_type": kind, "debiased": debiased} | ({"clusters": cluster} if kind == "clustered" else {})
    parts = (log["y"], with_intercept(log["c"]), log["p"], log["z"])
    for estimator, peer in ((two_stage, iv.IV2SLS), (liml, iv.IVLIML)):
        ours = estimator(*parts, None, log["weight"], cluster, debiased=debiased, **KINDS[kind])
        found = peer(*parts, weights=log["weight"]).fit(**theirs)
        np.testing.assert_allclose(ours.coefficient_k, found.params, **EXACT)
        np.testing.assert_allclose(ours.error_k, found.std_errors, **EXACT)
        np.testing.assert_allclose(ours.kappa, getattr(found, "kappa", 1.0), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("categories", [1, 2])
def test_absorbed_levels_equal_linearmodels(log, kind, categories):
    iv, pandas = pytest.importorskip("linearmodels.iv"), pytest.importorskip("pandas")
    codes, x = log["codes"][:, :categories], np.concatenate([log["c"], log["p"]], 1)
    cluster = log["codes"][:, 0] if kind == "clustered" else None
    levels = pandas.DataFrame({f"c{i}": pandas.Categorical(column) for i, column in enumerate(codes.T)})
    theirs = {"cov_type": kind, "debiased": True} | ({"clusters": cluster} if kind == "clustered" else {})
    ours = ols(log["y"], x, codes, log["weight"], cluster, **KINDS[kind])
    peer = iv.AbsorbingLS(log["y"], x, absorb=levels, weights=log["weight"]).fit(**theirs)
    np.testing.assert_allclose(ours.coefficient_k, peer.params, **EXACT)
    np.testing.assert_allclose(ours.error_k, peer.std_errors, **EXACT)


def test_glm_equals_statsmodels(log):
    sm = pytest.importorskip("statsmodels.api")
    rng, x = np.random.default_rng(1), with_intercept(log["c"])
    trials = rng.integers(1, 20, N)
    hits = rng.binomial(trials, 0.3)
    counts, exposure = rng.poisson(np.exp(3 + 0.5 * log["c"][:, 0])), rng.uniform(1, 5, N)
    cluster = {"groups": log["codes"][:, 0], "use_correction": False}
    for ours, y, extra, family in (
        (logit(hits, x, trials), np.stack([hits, trials - hits], 1), {}, sm.families.Binomial()),
        (poisson(counts, x, exposure), counts, {"exposure": exposure}, sm.families.Poisson()),
    ):
        peer = sm.GLM(y, x, family=family, **extra).fit(tol=1e-13)
        np.testing.assert_allclose(ours.coefficient_k, peer.params, **EXACT)
        np.testing.assert_allclose(ours.error_k, peer.bse, **EXACT)
    clustered = poisson(counts, x, exposure, cluster_n=log["codes"][:, 0])
    peer = sm.GLM(counts, x, family=sm.families.Poisson(), exposure=exposure)
    errors = peer.fit(tol=1e-13, cov_type="cluster", cov_kwds=cluster).bse
    np.testing.assert_allclose(clustered.error_k, errors, **EXACT)


def test_doubly_robust_estimators_equal_theirs_given_folds_and_nuisances(log):
    pytest.importorskip("doubleml"), pytest.importorskip("econml")
    rng = np.random.default_rng(2)
    d = (rng.random(N) < 1 / (1 + np.exp(-2 * log["c"][:, 0]))).astype(float)
    linear, weighted = partially_linear(log["y"], d, log["c"]), aipw(log["y"], d, log["c"], clip=0.1)
    assert weighted.clipped > 10
    for ours, theirs in (
        (linear.effect, known_peers.doubleml_plr(log["y"], d, linear)),
        (weighted.effect, known_peers.doubleml_irm(log["y"], d, weighted)),
        (linear.effect, known_peers.econml_linear_dml(log["y"], d, standardised(log["c"]), linear)),
    ):
        np.testing.assert_allclose(ours, float(np.ravel(theirs)[0]), **EXACT)
