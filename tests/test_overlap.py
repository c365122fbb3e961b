"""Overlap of a treatment and positivity of the text, against known propensities and known collinearity."""

from __future__ import annotations

import numpy as np
import pytest
from test_instruments import raw_of

from deconfound_jax.causal.overlap import controls_of, culprits, overlap, positivity, propensity


def treated(seed, n, slope):
    rng = np.random.default_rng(seed)
    c = rng.normal(size=(n, 1))
    chance = 1 / (1 + np.exp(-slope * c[:, 0]))
    return (rng.uniform(size=n) < chance).astype(float), c, chance


def test_a_coin_overlaps_everywhere():
    t, c, _ = treated(0, 2000, 0.0)
    found = overlap(t, c)
    assert found.share > 0.99
    assert found.effective_rows == pytest.approx(min(t.sum(), 2000 - t.sum()), rel=0.01)
    assert overlap(np.array([0.0, 1.0, 0.0, 1.0]), np.zeros((4, 1))).share == 1.0


def test_effective_rows_are_kishs_where_the_propensity_is_known():
    t, c, chance = treated(1, 20_000, 1.0)
    found = overlap(t, c)
    arms = [(t == 1, 1 / chance), (t == 0, 1 / (1 - chance))]
    kish = min((w[arm].sum() ** 2) / (w[arm] ** 2).sum() for arm, w in arms)
    assert found.effective_rows == pytest.approx(kish, rel=0.1)
    assert np.abs(found.propensity_n - chance).max() < 0.03


def test_separation_is_no_overlap_though_own_weights_look_perfect():
    c = np.linspace(-2, 2, 1000)[:, None]
    t = (c[:, 0] > 0).astype(float)
    chance = propensity(t == 1, c, np.ones(1000))
    own = np.where(t == 1, chance, 1 - chance)
    kish = (1 / own).sum() ** 2 / (1 / own**2).sum() / 1000
    found = overlap(t, c)
    assert kish > 0.5, "the weights of the arms' own rows see nothing"
    assert found.share < 0.01 and found.effective_rows < 10


def test_a_treatment_of_many_values_counts_what_the_controls_leave():
    rng = np.random.default_rng(2)
    c = rng.normal(size=(5000, 1))
    found = overlap(0.6 * c[:, 0] + 0.8 * rng.normal(size=5000), c)
    assert found.share == pytest.approx(0.64, abs=0.03) and found.propensity_n is None
    assert overlap(c[:, 0], c).effective_rows < 1e-6
    noise = rng.normal(size=(600, 300))
    assert overlap(rng.normal(size=600), noise).share == pytest.approx(1.0, abs=0.15), "they fit by chance"


def test_a_constant_treatment_is_refused():
    with pytest.raises(ValueError, match="expected values that differ, got 1"):
        overlap(np.ones(5), np.zeros((5, 1)))


def test_weights_count_rows():
    t, c, _ = treated(3, 300, 1.0)
    weight_n = np.where(np.arange(300) < 100, 3.0, 1.0)
    again = np.concatenate([np.arange(300), np.arange(100), np.arange(100)])
    assert overlap(t, c, weight_n).effective_rows == pytest.approx(overlap(t[again], c[again]).effective_rows, rel=1e-4)


def text_log(seed=0, n=600, copy_noise=None):
    """Three features; a control that is the second one plus noise, and a coin's level."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3))
    control = x[:, [1]] + copy_noise * rng.normal(size=(n, 1)) if copy_noise is not None else rng.normal(size=(n, 1))
    found = raw_of(rng.normal(size=n), x[:, :0], x[:, :0], x, codes_n=rng.integers(5, size=n))
    return found._replace(controls_nq=control, swept=(("copy", "block", slice(3, 4)), ("week", "level", 0)))


def test_unrelated_terms_leave_the_text_whole():
    found = positivity(text_log())
    assert found.share > 0.97 and found.rank == 3 and found.deficient == 0
    assert culprits(text_log(), 0.05) == ()


def test_a_copy_of_a_feature_is_named():
    exact, near = text_log(copy_noise=0.0), text_log(copy_noise=0.05)
    assert positivity(exact).deficient == 1 and positivity(exact).share < 1e-6
    assert positivity(near).deficient == 0 and positivity(near).share < 0.05
    assert culprits(exact, 0.05) == culprits(near, 0.05) == ("copy",)


def test_a_mild_relation_is_no_deficiency():
    assert 0.5 < positivity(text_log(copy_noise=1.0)).share < 0.9


def test_levels_that_pin_the_text_are_named():
    found = text_log()
    codes_n = np.unique(found.text_nd[:, 0] > 0, return_inverse=True)[1]
    pinned = found._replace(
        text_nd=np.stack([codes_n.astype(float), found.text_nd[:, 1]], 1), codes_nc=codes_n[:, None]
    )
    assert positivity(pinned).deficient == 1
    assert culprits(pinned, 0.05) == ("week",)


def test_constant_and_repeated_features_are_no_directions():
    found = text_log()
    wide = found._replace(text_nd=np.concatenate([found.text_nd, found.text_nd[:, :1], np.ones((600, 1))], 1))
    assert positivity(wide).rank == 3 and positivity(wide).share > 0.97
    assert positivity(found._replace(text_nd=np.ones((600, 2)))).rank == 0


def test_few_levels_are_controls_of_a_propensity_and_many_are_not():
    found = text_log()
    assert controls_of(found).shape == (600, 3 + 1 + 4)
    assert controls_of(found._replace(codes_nc=np.arange(600)[:, None] // 2)).shape == (600, 4)
