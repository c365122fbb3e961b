"""Predictions by chunks: by hand, in units, from the model itself, and in bounded memory."""

import tracemalloc

import numpy as np
import pytest

from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.predict import linear_predictor, predict, predict_chunks
from deconfound_jax.causal.terms import prepare
from deconfound_jax.structs import Design


@pytest.fixture
def made(log_of):
    """(family, n, s) -> prepared rows of features and one confounder p, and a made-up posterior."""

    def make(family="normal", n=7, s=5, **sites):
        rng = np.random.default_rng(0)
        features_nd, p = rng.normal(size=(n, 2)), rng.normal(size=n)
        y = {"normal": 3 * p + 10, "ordinal": np.arange(n) % 3 * 2.0 + 1}.get(family, np.arange(n) % 4 + 1.0)
        logs = log_of({"outcome": y, "p": p, "shown": np.full(n, 20.0)}, exposure="shown")
        design = Design.parse("p", family)
        prepared = prepare(logs, features_nd, design)
        draws = {"intercept": rng.normal(size=s), "text": rng.normal(size=(s, 2)), "p": rng.normal(size=(s, 1))}
        draws |= {"sigma": np.full(s, 0.5), "text.scale": np.ones(s)} | sites
        return prepared, Posterior(draws, design, prepared.scaling, {"converged": True})

    return make


def test_link_scale_by_hand_and_whatever_the_chunk(made):
    prepared, posterior = made()
    x, p = prepared.rows.columns_nq[:, :2], prepared.rows.columns_nq[:, 2]
    eta_su = posterior["intercept"][:, None] + posterior["text"] @ x.T + posterior["p"] * p[None, :]
    np.testing.assert_allclose(linear_predictor(posterior, prepared), eta_su)
    sd, mean = float(prepared.scaling["outcome.sd"]), float(prepared.scaling["outcome.mean"])
    np.testing.assert_allclose(predict(posterior, prepared, "draws", "link", chunk=3), sd * eta_su)
    np.testing.assert_allclose(predict(posterior, prepared, "draws", chunk=3), mean + sd * eta_su)
    np.testing.assert_allclose(predict(posterior, prepared, "mean", chunk=2), (mean + sd * eta_su).mean(0))
    found = predict(posterior, prepared, "summary", chunk=4)
    np.testing.assert_allclose(found["upper"], np.quantile(mean + sd * eta_su, 0.95, axis=0))
    np.testing.assert_allclose(found["sd"], (sd * eta_su).std(0))


def test_response_is_in_units_of_the_outcome(made):
    prepared, posterior = made("binomial")
    eta_su = linear_predictor(posterior, prepared)
    expected = 1 / (1 + np.exp(-(prepared.rows.offset + eta_su)))
    np.testing.assert_allclose(predict(posterior, prepared, "draws"), expected)
    cuts = {"cut.first": np.full(5, -1.0), "cut.gap1": np.full(5, 2.0)}
    prepared, posterior = made("ordinal", **cuts)  # grades 1, 3, 5
    eta_su = linear_predictor(posterior, prepared)
    above = [1 / (1 + np.exp(cut - eta_su)) for cut in (-1.0, 1.0)]
    np.testing.assert_allclose(predict(posterior, prepared, "draws"), 1 + 2 * above[0] + 2 * above[1])


def test_replicated_outcomes_come_from_the_model_at_each_draw(made):
    prepared, posterior = made("normal", n=4000, s=3)
    found = predict(posterior, prepared, "draws", "outcome", chunk=1000)
    sd = float(prepared.scaling["outcome.sd"])
    noise = (found - predict(posterior, prepared, "draws")) / (0.5 * sd)
    np.testing.assert_allclose(noise.mean(1), 0, atol=0.06)
    np.testing.assert_allclose(noise.std(1), 1, atol=0.04)
    assert abs(np.corrcoef(noise[:, :1000], noise[:, 1000:2000])[0, 3]) < 0.1  # a chunk has noise of its own
    assert abs(np.corrcoef(noise[0], noise[1])[0, 1]) < 0.06
    counts = predict(*made("binomial")[::-1], "draws", "outcome")
    assert (counts == counts.round()).all() and counts.max() <= 20


def test_memory_does_not_grow_with_draws_times_rows(made):
    def peak(n):
        prepared, posterior = made(n=n, s=200)
        predict(posterior, prepared, chunk=128)
        tracemalloc.start()
        try:
            assert predict(posterior, prepared, chunk=128).shape == (n,)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    grown = peak(4096) - peak(1024)
    assert grown < 0.1 * 3072 * 200 * 8  # the draws of the further rows alone would be ten times that
    prepared, posterior = made(n=300, s=4)
    assert [part.shape for part in predict_chunks(posterior, prepared, chunk=128)] == [(4, 128), (4, 128), (4, 44)]


def test_unknown_kinds_and_scales_are_named(made):
    prepared, posterior = made()
    with pytest.raises(ValueError, match="predict.kind: expected one of .*'summary'.*, got 'median'"):
        predict(posterior, prepared, "median")
    with pytest.raises(ValueError, match="predict.scale: expected one of .*'response'.*, got 'rate'"):
        predict(posterior, prepared, scale="rate")
