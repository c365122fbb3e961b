"""The known-answers script: it says what it skips, finds a small log's effect, and its bars can fail."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments import known_answers, known_logs
from experiments.known_studies import Answer, Believed, KnownAnswers, Shared, s2_rct

SMALL = KnownAnswers(draws=200, text_width=3, resamples=4)
N = 300


def nothing(name):
    raise known_logs.Missing(f"{name} is not here")


def trial(names, outcome, seed):
    """A randomized treatment of effect 2 beside covariates that move the outcome, too."""
    rng = np.random.default_rng(seed)
    log = {name: rng.normal(size=N) for name in names} | {"treat": (np.arange(N) % 2).astype(float)}
    return log | {outcome: 2 * log["treat"] + log["age"] + rng.normal(size=N)}


def job_training(name):
    """The trial; with survey controls, controls that share nothing with the treated and are worse off."""
    if name not in ("nsw", "nsw_psid", "nsw_cps"):
        nothing(name)
    log = trial(known_logs.NSW, "re78", seed=0)
    if name != "nsw":
        apart = 8 * (log["treat"] == 0)
        log |= {"age": log["age"] - apart, "re78": log["re78"] + 2 * apart}
    return log


def test_everything_missing_is_said_and_nothing_else(tmp_path):
    results = known_answers.run(SMALL, tmp_path, nothing)
    assert {key for key in results} == {"skipped", "failed", "bars", "versions"}
    assert results["bars"] == 0
    assert results["skipped"][0] == "card: card is not here" and len(results["skipped"]) == 6
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_a_trial_is_found_and_missing_overlap_fires(tmp_path):
    rows = []
    results = known_answers.run(SMALL, tmp_path, job_training, rows.append)
    assert abs(results["nsw.experimental.ours"] - 2) < 0.6
    for name in ("ols", "dml", "aipw"):
        assert abs(results[f"nsw_trial.{name}.ours"] - 2) < 3 * results[f"nsw_trial.{name}.error"] < 0.6
    assert not results["nsw_trial.overlap.fires"] and results["nsw_psid.overlap.fires"]
    assert results["nsw_cps.naive.ours"] < -5
    assert abs(results["nsw_trial.posterior.distance"]) < 0.5
    assert results["failed"] == []
    estimators, posteriors, shared = known_answers.tables(rows)
    assert len(estimators) == 15 and len(posteriors) == len(shared) == 3
    # In an environment without the peers each of their rows is named; with them, each is equal.
    assert sum("peer skipped" in line for line in results["skipped"]) in (0, len(estimators))


def test_the_confounded_trial_is_found_given_the_field(monkeypatch):
    rng = np.random.default_rng(0)
    n = 2000
    field, treated = (np.arange(n) % 2).astype(float), rng.integers(0, 2, n).astype(float)
    click = (rng.random(n) < 0.1 + 0.3 * treated + 0.4 * field).astype(float)
    words = np.where(field == 1, "motor steel weld", "market price bank")
    text = [f"{word} {'alpha beta gamma delta'.split()[i % 4]}" for i, word in enumerate(words)]
    log = {"click": click, "treatment": treated, "field": field, "text": np.array(text, object)}
    believed = []
    monkeypatch.setattr("experiments.known_studies.believe", lambda *a, **k: believed.append(a) or None)
    found = {row.name: row for row in s2_rct(lambda name: log, SMALL) if isinstance(row, Answer)}
    assert abs(found["resampled_field"].ours - found["trial"].ours) < 0.05
    assert abs(found["aipw"].ours - found["trial"].ours) < 3 * found["aipw"].error
    assert found["resampled_naive"].ours < found["trial"].ours - 0.15
    assert len(believed) == 2


GOOD = Answer("s", "ols", 1.0, 0.1, 1.0 + 1e-8, "peer", 1.1, True)
NEAR = Believed("s", "posterior", "ols", 1.04, 0.1, 1.0, 0.1, True)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (GOOD._replace(peer=1.00001), "s.ols: 1.0e-05 from peer, bar 1e-06"),
        (GOOD._replace(peer=float("nan")), "s.ols: nan from peer, bar 1e-06"),
        (GOOD._replace(randomized=2.0), "s.ols: 1, randomized 2, bar 1.96 errors"),
        (NEAR._replace(mean=1.06), "s.posterior: mean +0.60 standard errors from ols, bar 0.5"),
        (NEAR._replace(mean=float("nan")), "s.posterior: mean +nan standard errors from ols, bar 0.5"),
        (NEAR._replace(converged=False), "s.posterior: not converged"),
        (Shared("s", 3.0, 0.01, True, False), "s: the overlap check fires"),
        (Shared("s", 300.0, 0.9, False, True), "s: the overlap check does not fire"),
    ],
)
def test_every_bar_can_fail(row, sentence):
    assert known_answers.failures([GOOD, NEAR, row]) == [sentence]
    assert known_answers.bars([GOOD, NEAR]) == 4


def test_bars_hold_and_are_asked_only_where_they_are_identified():
    assert known_answers.failures([GOOD, NEAR, GOOD._replace(randomized=5.0, bar=False)]) == []
    assert known_answers.failures([GOOD._replace(randomized=2.0, randomized_error=1.0)]) == []
    assert known_answers.failures([GOOD._replace(peer=None, by="skipped: x is not installed")]) == []


def test_text_features_read_words_alone():
    texts = ["motor steel weld", "weld motor steel", "market price bank", "bank market price stock"]
    features = known_logs.text_features(texts, 2)
    np.testing.assert_allclose(features[0], features[1], atol=1e-12)
    assert np.linalg.norm(features[2] - features[3]) < 0.7 * np.linalg.norm(features[0] - features[2])
    np.testing.assert_array_equal(features, known_logs.text_features(texts, 2))
