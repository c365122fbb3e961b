"""The losses' invariances and the weighted mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deconfound_jax.align.losses import weighted_mean
from deconfound_jax.align.losses.dpo import dpo
from deconfound_jax.align.losses.likelihood import token_nll
from deconfound_jax.models.tokenizer import PAD

BETA = 0.3
FIRST, SECOND = np.array([1.0, -2.0, 0.5, 7.0], np.float32), np.array([0.2, 1.0, 0.5, -3.0], np.float32)
LABEL = np.array([1.0, 0.0, 0.3, 0.8], np.float32)
TOKENS = np.array([[1, 5, 4, 2, PAD], [1, 3, 2, PAD, PAD], [PAD, PAD, PAD, 1, 2]], np.int32)
LOGPROB = np.array([[-1.0, -2.0, -0.5, 0.0], [-3.0, -0.25, 0.0, 0.0], [0.0, 0.0, 0.0, -0.75]], np.float32)

# Each takes rows of arrays and gives one value a row.
LOSSES = {
    "dpo": (lambda a, b, s: dpo(a, b, s, BETA), (FIRST, SECOND, LABEL)),
    "token_nll": (token_nll, (LOGPROB, TOKENS)),
}


@pytest.mark.parametrize("loss,rows", LOSSES.values(), ids=LOSSES)
def test_a_batch_is_its_rows_stacked(loss, rows):
    singles = [loss(*(a[i : i + 1] for a in rows))[0] for i in range(len(rows[0]))]
    np.testing.assert_allclose(loss(*rows), singles, rtol=1e-6)
    assert loss(*rows).shape == (len(rows[0]),)


@pytest.mark.parametrize("loss,rows", LOSSES.values(), ids=LOSSES)
def test_weight_two_is_the_row_twice_and_weight_zero_is_no_row(loss, rows):
    def mean(index, weight):
        return weighted_mean(loss(*(a[np.array(index)] for a in rows)), jnp.array(weight))

    np.testing.assert_allclose(mean([0, 1, 2], [1.0, 2.0, 1.0]), mean([0, 1, 1, 2], [1.0] * 4), rtol=1e-6)
    np.testing.assert_allclose(mean([0, 1, 2], [1.0, 0.0, 1.0]), mean([0, 2], [1.0, 1.0]), rtol=1e-6)
    assert not np.isclose(mean([0, 1, 2], [1.0, 2.0, 1.0]), mean([0, 1, 2], [1.0, 1.0, 1.0]))


def test_weighted_mean_reads_no_masked_value():
    values, weight = jnp.array([2.0, jnp.nan, jnp.inf]), jnp.array([3.0, 0.0, 0.0])
    assert weighted_mean(values, weight) == 2.0
    assert weighted_mean(values, jnp.zeros(3)) == 0.0
    gradient = jax.grad(lambda w: weighted_mean(w * jnp.array([1.0, 2.0, 3.0]), weight))(1.0)
    assert gradient == 1.0
    with pytest.raises(AssertionError):
        weighted_mean(values, jnp.ones((3, 1)))


def test_dpo_by_hand():
    # Margin 0.3 (1 - 0.2) = 0.24; the second pair's label says the second text, margin -0.9.
    by_hand = [np.log1p(np.exp(-0.24)), np.log1p(np.exp(-0.9))]
    np.testing.assert_allclose(dpo(FIRST, SECOND, LABEL, BETA)[:2], by_hand, rtol=1e-6)


@pytest.mark.parametrize("label", [0.0, 0.25, 0.5, 1.0])
def test_dpo_at_equal_policies_is_log_two(label):
    np.testing.assert_allclose(dpo(FIRST, FIRST, np.full(4, label), BETA), np.log(2), rtol=1e-6)


def test_dpo_swapped_texts_and_label():
    np.testing.assert_allclose(dpo(FIRST, SECOND, LABEL, BETA), dpo(SECOND, FIRST, 1 - LABEL, BETA), rtol=1e-6)


def test_dpo_rests_where_the_margin_says_the_label():
    def slope(margin, label):
        return jax.grad(lambda m: dpo(jnp.array([m]), jnp.zeros(1), jnp.array([label]), BETA)[0])(margin)

    assert slope(0.0, 0.5) == 0
    assert slope(0.0, 1.0) == pytest.approx(-BETA / 2)
    label = float(jax.nn.sigmoid(BETA * 2.0))
    assert slope(2.0, label) == pytest.approx(0, abs=1e-7)
    assert slope(1.0, label) < 0 < slope(3.0, label)


@pytest.mark.parametrize("margin", [1e6, -1e6, 1e30])
def test_dpo_is_finite_at_huge_margins(margin):
    value, gradient = jax.value_and_grad(lambda m: dpo(m, jnp.zeros(3), jnp.array([0.0, 0.5, 1.0]), BETA).sum())(
        jnp.full(3, margin)
    )
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_nll_is_the_mean_over_targets_wherever_the_padding_lies():
    np.testing.assert_allclose(token_nll(LOGPROB, TOKENS), [3.5 / 3, 3.25 / 2, 0.75], rtol=1e-6)
    assert token_nll(np.zeros((1, 4)), np.array([[1, PAD, PAD, PAD, PAD]]))[0] == 0
