"""Every family recovers what its own model drew: simulated, fitted and predicted by one function."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.handlers import seed, substitute

from deconfound_jax.causal.fit import fit_prepared
from deconfound_jax.causal.model import causal_model
from deconfound_jax.causal.predict import predict
from deconfound_jax.causal.spec import Block, Prepared, Rows, Spec
from deconfound_jax.config import Causal
from deconfound_jax.structs import Design

N, DRAWS, GRADES = 300, 96, 4
TEXT_D, CONFOUNDER = np.array([0.8, -0.6, 0.4]), 0.7
TRUTH = {
    "text.scale": 1.0, "text.raw": TEXT_D, "c.raw": np.array([CONFOUNDER]), "intercept": 0.2, "sigma": 0.7,
    "tail": 0.6, "dispersion": 0.4, "cut.first": -1.0, "cut.gap1": 1.0, "cut.gap2": 1.2,
}  # fmt: skip
OFFSET = {"binomial": -1.0, "beta_binomial": -1.0}


@functools.cache
def recovered(family: str):
    """(posterior, prepared): data drawn by the model at TRUTH, the features moving with the confounder."""
    rng = np.random.default_rng(0)
    c_n1, ones = rng.normal(size=(N, 1)), np.ones(N)
    columns_nq = np.concatenate([0.6 * c_n1 + 0.8 * rng.normal(size=(N, 3)), c_n1], 1)
    exposure_n = ones if family in ("normal", "student_t", "bernoulli", "ordinal") else 1.0 + rng.poisson(19, size=N)
    rows = Rows(columns_nq, np.zeros((N, 0), int), ones, np.zeros((N, 0)), exposure_n, ones, ones, ones,
                OFFSET.get(family, 0.0))  # fmt: skip
    categories = GRADES if family == "ordinal" else 0
    spec = Spec(family, (Block("text", 0, 3), Block("c", 3, 4, 1.0)), (), categories=categories)
    with jax.enable_x64(True):
        outcome_n = seed(substitute(causal_model, data=TRUTH), jax.random.key(1))(spec, Rows(*map(jnp.asarray, rows)))
    rows = rows._replace(outcome_n=np.asarray(outcome_n, float))
    scaling = {"outcome.mean": 0.0, "outcome.sd": 1.0, "c.mean": np.zeros(1), "c.sd": np.ones(1),
               "features.mean": np.zeros(3), "features.sd": np.ones(3),
               "outcome.grades": np.arange(float(categories)), "text.column": "text"}  # fmt: skip
    prepared = Prepared(spec, rows, scaling, np.arange(N))
    return fit_prepared(prepared, Design.parse("c", family), Causal(draws=DRAWS)), prepared


def distance(draws_sk, truth_k):
    """Of the truth from the posterior mean, in posterior sds."""
    return np.abs(draws_sk.mean(0) - truth_k) / draws_sk.std(0)


FAMILIES = (
    ("normal", 0.1), ("student_t", 0.1), ("bernoulli", 0.25), ("binomial", 0.1), ("beta_binomial", 0.15),
    ("poisson", 0.1), ("negative_binomial", 0.1), ("ordinal", 0.2),
)  # fmt: skip


@pytest.mark.parametrize(("family", "widest"), FAMILIES)
def test_the_truth_is_recovered(family, widest):
    posterior, _ = recovered(family)
    assert posterior.converged, posterior.diagnostics
    found_sk = np.concatenate([posterior["text"], posterior.effect("c")[:, None]], 1)
    truth_k = np.append(TEXT_D, CONFOUNDER)
    assert distance(found_sk, truth_k).max() < 3.5
    assert found_sk.std(0).max() < widest  # narrow: a posterior as wide as the prior would hold any truth
    assert distance(found_sk, -truth_k).min() > 3.0  # the same distance tells the wrong direction


@pytest.mark.parametrize("family", [family for family, _ in FAMILIES])
def test_what_is_predicted_is_what_was_drawn(family):
    posterior, prepared = recovered(family)
    rows = prepared.rows
    rate_n = rows.outcome_n / (rows.exposure_n if family not in ("normal", "student_t", "ordinal") else 1.0)
    predicted_n = predict(posterior, prepared)
    assert np.corrcoef(predicted_n, rate_n)[0, 1] > 0.4
    assert abs(predicted_n.mean() - rate_n.mean()) < 4 * rate_n.std() / N**0.5
    made_sn = predict(posterior, prepared, "draws", "outcome")
    assert abs(np.median(made_sn.mean(1)) - rows.outcome_n.mean()) < 4 * rows.outcome_n.std() / N**0.5
