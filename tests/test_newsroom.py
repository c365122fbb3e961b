"""The newsroom simulation: its numbers make the point the package exists for, and its truth stays out of the log."""

import dataclasses

import numpy as np
import pytest

from deconfound_jax.config import Newsroom
from deconfound_jax.simulate import newsroom
from deconfound_jax.simulate.newsroom import ATTRIBUTES, grammar_minimum, parse, simulate, true_reward, vocabulary

SEEDS = range(5)
TRUE_WCE = np.asarray([a.coefficient for a in ATTRIBUTES])


def coefficients(config, seed, how):
    """Coefficients of the standardised counts W, C, E: OLS, with p as covariate, or 2SLS; weeks absorbed."""
    logs, truth = simulate(config, seed)
    week_nw = np.eye(config.weeks)[logs.codes("week")]
    count_nk = np.stack([a.standardise(truth.attributes_nk[:, k]) for k, a in enumerate(ATTRIBUTES)], axis=1)
    p_n, z_n = logs.columns["popularity"], logs.columns["z"]
    first_stage = np.column_stack([count_nk, z_n, week_nw])
    extra = {
        "naive": [],
        "covariate": [p_n],
        "2sls": [first_stage @ np.linalg.lstsq(first_stage, p_n, rcond=None)[0]],
    }[how]
    design = np.column_stack([count_nk, *extra, week_nw])
    return np.linalg.lstsq(design, logs.outcome_n, rcond=None)[0][:3]


def fits(config, how):
    return np.asarray([coefficients(config, seed, how) for seed in SEEDS])


def test_naive_fails_and_the_instrument_recovers_the_truth():
    config = Newsroom()
    naive, covariate, iv = (fits(config, how) for how in ("naive", "covariate", "2sls"))
    assert (naive[:, 0] > 1.5).all(), "W should look far better than its 0.6"
    assert (naive[:, 1] > 0).all(), "C, which is bad, should look good"
    assert (np.abs(covariate[:, 0] - 0.6) > 0.35).all(), "conditioning on p alone should bias W through u"
    assert (covariate[:, 1] < -0.38).all(), "and C"
    assert (np.abs(iv - TRUE_WCE[None, :]) < 0.1).all()


def test_without_an_unseen_cause_the_covariate_is_right():
    assert (np.abs(fits(Newsroom(kappa=0.0), "covariate") - TRUE_WCE[None, :]) < 0.05).all()


def test_not_entangled_every_ranking_is_right():
    naive = fits(Newsroom(entangled=False), "naive")
    assert (np.sign(naive) == np.sign(TRUE_WCE)[None, :]).all()
    assert np.abs(naive.mean(axis=0) - TRUE_WCE).max() < 0.12
    _, truth = simulate(Newsroom(entangled=False), 0)
    correlation = np.corrcoef(np.column_stack([truth.mood_n, truth.attributes_nk]).T)[0, 1:]
    assert np.abs(correlation).max() < 0.05


def test_a_weak_instrument_is_useless_and_a_broken_exclusion_misleads():
    weak = fits(Newsroom(instrument=0.03), "2sls")
    strong = fits(Newsroom(), "2sls")
    assert weak[:, 0].std() > 5 * strong[:, 0].std()
    assert (fits(Newsroom(exclusion=1.5), "2sls")[:, 0] < 0).all(), "exclusion broken: W looks bad"


def test_text_truth_equals_row_truth():
    logs, truth = simulate(Newsroom(articles=100), 3)
    np.testing.assert_array_equal([parse(t) for t in logs.text], truth.attributes_nk)
    np.testing.assert_array_equal(true_reward(logs.text), truth.reward_n)
    low, high = truth.attributes_nk.min(axis=0), truth.attributes_nk.max(axis=0)
    assert (low.tolist(), high.tolist()) == ([4, 0, 0], [12, 3, 3])


@pytest.mark.parametrize("entangled", [True, False])
def test_counts_are_uniform_over_their_population(entangled):
    # Many weeks, so that the realised week effects are close to their population.
    _, truth = simulate(Newsroom(articles=20_000, headlines=1, weeks=20_000, entangled=entangled), 0)
    for k, attribute in enumerate(ATTRIBUTES):
        share = np.bincount(truth.attributes_nk[:, k])[attribute.low :] / 20_000
        np.testing.assert_allclose(share, 1 / (attribute.high - attribute.low + 1), atol=0.01)
        standard_n = attribute.standardise(truth.attributes_nk[:, k])
        assert abs(standard_n.mean()) < 0.02 and abs(standard_n.std() - 1) < 0.02


def test_true_reward_by_hand():
    # 8 words are the mean; sd of 4..12 is sqrt(80 / 12), of 0..3 sqrt(15 / 12).
    text = "harbor harbor ferry ferry dock dock tide tide tide why joy joy joy"
    expected = 0.6 * 1 / (80 / 12) ** 0.5 - 0.3 * -0.5 / 1.25**0.5 + 0.3 * 1.5 / 1.25**0.5
    np.testing.assert_allclose(true_reward([text]), [expected])
    np.testing.assert_allclose(grammar_minimum(), -0.6 * 4 / (80 / 12) ** 0.5 - 0.6 * 1.5 / 1.25**0.5)


WORDS4 = "harbor ferry dock tide"


@pytest.mark.parametrize(
    "text, counts",
    [
        (WORDS4, (4, 0, 0)),
        (f"{WORDS4} why why secret joy", (4, 3, 1)),
        ("harbor rose chess wine fury", (4, 0, 1)),  # several topics are on the grammar
        (" ".join(["harbor"] * 12), (12, 0, 0)),
        ("", None),
        ("harbor ferry dock", None),
        (" ".join(["harbor"] * 13), None),
        (f"{WORDS4} why why why why", None),
        (f"{WORDS4} joy joy joy joy", None),
        (f"{WORDS4} joy why", None),
        (f"why {WORDS4}", None),
        (f"{WORDS4} why harbor", None),
        (f"{WORDS4} [UNK]", None),
        (f"{WORDS4} Why", None),
    ],
)
def test_grammar(text, counts):
    assert parse(text) == counts
    if counts is None:
        assert true_reward([text, WORDS4])[0] == grammar_minimum()
    else:
        assert true_reward([text])[0] > grammar_minimum()


def test_true_reward_of_no_text_is_empty():
    assert true_reward([]).shape == (0,)


def test_log_holds_no_truth():
    logs, truth = simulate(Newsroom(articles=50), 0)
    assert set(logs.columns) == {"headline", "engagement", "popularity", "z", "article", "week"}
    assert set(logs.columns) == set(logs.roles.columns())
    hidden = [truth.reward_n, truth.mood_n, truth.unseen_n, truth.article_effect_n, truth.week_effect_n]
    numbers = [logs.columns[c] for c in ("engagement", "popularity", "z")]
    assert not any(np.allclose(h, number) for h in hidden for number in numbers)
    for text, name in zip(logs.text, logs.columns["article"], strict=True):
        assert parse(text) is not None and isinstance(name, str)


def test_mechanism_of_outcome_and_popularity():
    """What is left of y and p after the stated parts is noise of the stated size."""
    config = Newsroom(exclusion=0.7)
    logs, truth = simulate(config, 1)
    p_n, z_n = logs.columns["popularity"], logs.columns["z"]
    noise_p = p_n - 0.8 * z_n - truth.mood_n - truth.unseen_n
    effects = 3 * p_n + 2 * truth.unseen_n + 0.5 * truth.article_effect_n + 0.5 * truth.week_effect_n + 0.7 * z_n
    noise_y = logs.outcome_n - truth.reward_n - effects
    for noise, sd in ((noise_p, 0.3), (noise_y, 0.5)):
        np.testing.assert_allclose([noise.mean(), noise.std()], [0, sd], atol=0.03)
    assert np.corrcoef(np.stack([noise_p, noise_y, truth.unseen_n, z_n]))[np.triu_indices(4, 1)].max() < 0.06


def test_articles_have_one_week_and_one_topic():
    logs, truth = simulate(Newsroom(articles=60, headlines=4), 2)
    topic_of = {word: topic for topic in newsroom.TOPICS for word in topic.split()}
    weeks, topics = {}, {}
    for text, article, week in zip(logs.text, logs.columns["article"], logs.columns["week"], strict=True):
        weeks.setdefault(article, set()).add(week)
        topics.setdefault(article, set()).update(topic_of[w] for w in text.split() if w in topic_of)
    assert len(weeks) == 60
    assert all(len(found) == 1 for found in [*weeks.values(), *topics.values()])
    assert len(np.unique(truth.article_effect_n)) == 60


def test_deterministic_by_seed_and_constants_leave_texts_alone():
    config = Newsroom(articles=40)
    logs, _ = simulate(config, 5)
    assert simulate(config, 5)[0].fingerprint == logs.fingerprint
    assert simulate(config, 6)[0].fingerprint != logs.fingerprint
    shifted, _ = simulate(dataclasses.replace(config, gamma=1.0), 5)
    assert shifted.text == logs.text
    difference = logs.outcome_n - shifted.outcome_n
    np.testing.assert_allclose(difference, 2.0 * logs.columns["popularity"], atol=1e-12)


def test_vocabulary_is_closed_distinct_and_fits():
    config = Newsroom(topics=7, articles=200)
    words = vocabulary(config)
    assert len(words) == len(set(words)) == 7 * 4 + 30
    assert {word for text in simulate(config, 0)[0].text for word in text.split()} == set(words)
    full = vocabulary(Newsroom())
    assert len(full) == len(set(full)) == 190 and len(full) + 4 <= 200


@pytest.mark.parametrize(
    "field, value", [("articles", 0), ("headlines", 0), ("weeks", 0), ("topics", 0), ("topics", 41)]
)
def test_impossible_sizes_are_named(field, value):
    with pytest.raises(ValueError, match=rf"Newsroom\.{field}: expected .* got {value}"):
        simulate(dataclasses.replace(Newsroom(), **{field: value}), 0)
