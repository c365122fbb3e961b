"""The decoder: causality, padding, the cached step, sampling."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deconfound_jax import config
from deconfound_jax.align.logprobs import sequence_logprob
from deconfound_jax.models.decoder import Decoder, count_parameters, decode_step, empty_cache
from deconfound_jax.models.sample import sample
from deconfound_jax.models.tokenizer import BEGIN, END, PAD

VOCABULARY, LENGTH = 23, 8
DRAWS = 2048  # of one shape everywhere: few compilations
ANYTHING = np.array([[BEGIN] + [PAD] * (LENGTH - 1)] * DRAWS, np.int32)  # the prompt that forces nothing
SMALL = config.Decoder(width=16, layers=2, heads=2, length=LENGTH)


@functools.cache
def make(small=SMALL, scale=4.0):
    """A decoder whose logits differ enough that every error shows."""
    decoder = Decoder(small, VOCABULARY)
    params = jax.jit(decoder.init)(jax.random.key(0), jnp.full((1, LENGTH), BEGIN))
    return decoder, jax.tree.map(lambda leaf: leaf * scale if leaf.ndim > 1 else leaf, params)


@functools.partial(jax.jit, static_argnames=("decoder", "method"))
def apply(decoder, params, *args, method="__call__"):
    return decoder.apply(params, *args, method=method)


@functools.partial(jax.jit, static_argnames="decoder")
def draw(decoder, params, key, prompt_nl, temperature):
    return sample(decoder, params, key, DRAWS, LENGTH, prompt_nl, temperature)


@functools.partial(jax.jit, static_argnames="decoder")
def logprob(decoder, params, tokens_nl):
    return sequence_logprob(decoder.apply, params, tokens_nl)


def random_tokens():
    tokens_bl = np.random.default_rng(1).integers(4, VOCABULARY, (3, LENGTH)).astype(np.int32)
    tokens_bl[:, 0] = BEGIN
    return tokens_bl


def test_a_logit_depends_on_no_later_token():
    decoder, params = make()
    tokens_bl = random_tokens()
    x_bld = apply(decoder, params, tokens_bl, method="embed")
    weight_v = np.random.default_rng(2).normal(size=VOCABULARY).astype(np.float32)

    @jax.jit
    @jax.jacrev
    def jacobian(x_bld):
        logits_blv, _ = decoder.apply(params, x_bld, tokens_bl != PAD, method="read")
        return logits_blv[0, :, 4:] @ weight_v[4:]

    # (t, t'): how much the logits at t move with the embedding at t'.
    influence_tt = np.abs(jacobian(x_bld))[:, 0].sum(-1)
    later = np.triu(np.ones((LENGTH, LENGTH), bool), k=1)
    assert np.all(influence_tt[later] == 0)
    assert np.all(influence_tt[~later] > 0)


def test_padding_changes_nothing_before_it_and_stays_finite():
    decoder, params = make()
    whole_bl = random_tokens()
    padded_bl = whole_bl.copy()
    padded_bl[:2, 5:] = PAD
    padded_bl[2] = PAD  # a row that only fills up a batch
    logits, hidden = apply(decoder, params, whole_bl)
    padded_logits, padded_hidden = apply(decoder, params, padded_bl)
    np.testing.assert_allclose(padded_logits[:2, :5], logits[:2, :5], atol=1e-5)
    np.testing.assert_allclose(padded_hidden[:2, :5], hidden[:2, :5], atol=1e-5)
    assert np.isfinite(padded_logits).all()
    chex.assert_tree_all_finite(jax.jit(jax.grad(lambda p: logprob(decoder, p, padded_bl).sum()))(params))


def test_padding_is_masked_as_a_key_too():
    decoder, params = make()
    x_bld = np.array(apply(decoder, params, random_tokens(), method="embed"))
    visible_bl = np.ones((3, LENGTH), bool)
    visible_bl[:, 3] = False
    moved_bld = x_bld.copy()
    moved_bld[:, 3] += np.random.default_rng(2).normal(size=x_bld[:, 3].shape)
    logits, _ = apply(decoder, params, x_bld, visible_bl, method="read")
    moved, _ = apply(decoder, params, moved_bld, visible_bl, method="read")
    np.testing.assert_array_equal(logits[:, 4:], moved[:, 4:])
    assert not np.allclose(logits[:, 3], moved[:, 3])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_computation_type_is_a_knob_and_parameters_stay_float32(dtype):
    decoder = Decoder(dataclasses.replace(SMALL, dtype=dtype), VOCABULARY)
    exact, params = make(scale=1.0)
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), random_tokens())
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, params)
    (logits, hidden), inner = jax.jit(lambda p: decoder.apply(p, random_tokens(), capture_intermediates=True))(params)
    assert logits.dtype == hidden.dtype == jnp.float32
    assert inner["intermediates"]["blocks_0"]["up"]["__call__"][0].dtype == dtype
    expected, _ = apply(exact, params, random_tokens())
    np.testing.assert_allclose(logits, expected, atol=1e-6 if dtype == "float32" else 0.02)


def test_sizes():
    def size(decoder, vocabulary):
        shapes = jax.eval_shape(Decoder(decoder, vocabulary).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
        return count_parameters(shapes)

    # Tied embeddings and positions, then 12 width^2 + 13 width a block, then the last norm.
    assert size(config.Decoder(), 200) == (200 + 24) * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64
    assert 0.9e6 < size(config.Decoder(width=128, layers=4, length=32), 2000) < 1.1e6


def test_cached_steps_equal_the_whole_pass():
    decoder, params = make()
    tokens_bl = random_tokens()
    tokens_bl[1, 6:] = PAD
    logits_blv, _ = apply(decoder, params, tokens_bl)
    cache = empty_cache(decoder, 3, LENGTH)
    step = jax.jit(lambda token_b, t, cache: decode_step(decoder, params, token_b, t, cache))
    for t in range(LENGTH):
        logits_bv, cache = step(tokens_bl[:, t], t, cache)
        np.testing.assert_allclose(logits_bv, logits_blv[:, t], atol=1e-4)


def test_sampled_logprob_is_that_of_the_text():
    decoder, params = make(scale=2.0)
    tokens_nl, logprob_n = draw(decoder, params, jax.random.key(3), ANYTHING, 0.7)
    np.testing.assert_allclose(logprob_n, logprob(decoder, params, tokens_nl), atol=1e-4)
    tokens_nl = np.asarray(tokens_nl)
    ended_n = (tokens_nl == END).any(1)
    assert 0 < ended_n.sum() < len(ended_n), "the test needs both kinds of text"
    for row in tokens_nl[ended_n]:
        assert (row[list(row).index(END) + 1 :] == PAD).all()
    assert (tokens_nl[:, 0] == BEGIN).all() and not (tokens_nl[:, 1:] == BEGIN).any()
    assert not (tokens_nl[~ended_n] == PAD).any()


def test_greedy_equals_the_uncached_argmax():
    decoder, params = make()
    tokens_nl, _ = draw(decoder, params, jax.random.key(4), ANYTHING, 0.0)
    expected_nl = np.full((3, LENGTH), PAD)
    expected_nl[:, 0] = BEGIN
    for t in range(1, LENGTH):
        expected_nl[:, t] = apply(decoder, params, expected_nl)[0][:, t - 1].argmax(-1)
        if expected_nl[0, t] == END:
            break
    np.testing.assert_array_equal(tokens_nl, np.broadcast_to(expected_nl[:1], tokens_nl.shape))


def test_samples_follow_the_models_probabilities():
    decoder, params = make()
    tokens_nl, _ = draw(decoder, params, jax.random.key(5), ANYTHING, 1.0)
    logits_blv, _ = apply(decoder, params, random_tokens())
    expected_v = DRAWS * np.asarray(jax.nn.softmax(logits_blv[0, 0]))
    counted_v = np.bincount(tokens_nl[:, 1], minlength=VOCABULARY)
    assert (np.abs(counted_v - expected_v) < 5 * np.sqrt(expected_v + 1)).all()
    assert expected_v.max() > 2 * np.median(expected_v), "a uniform model would test nothing"


def test_a_prompt_is_forced_and_not_scored():
    decoder, params = make()
    prompt_nl = np.array(ANYTHING)
    prompt_nl[::2, 1:4] = [5, 6, 7]
    prompt_nl[1::2, 1] = 8
    tokens_nl, logprob_n = draw(decoder, params, jax.random.key(6), prompt_nl, 1.0)
    forced_nl = prompt_nl != PAD
    np.testing.assert_array_equal(np.asarray(tokens_nl)[forced_nl], prompt_nl[forced_nl])
    assert len(np.unique(tokens_nl[::2, 4])) > 3
    of_prompt_n = logprob(decoder, params, prompt_nl)
    np.testing.assert_allclose(logprob_n, logprob(decoder, params, tokens_nl) - of_prompt_n, atol=1e-4)


def test_sampling_compiles_once_for_every_temperature():
    decoder, params = make()
    chex.clear_trace_counter()
    one = jax.jit(chex.assert_max_traces(lambda p, k, t: sample(decoder, p, k, 2, 4, temperature=t), n=1))
    for seed, temperature in enumerate([0.0, 0.5, 1.0]):
        tokens_nl, _ = one(params, jax.random.key(seed), temperature)
        assert (tokens_nl[:, 0] == BEGIN).all()


def test_errors_name_the_field():
    decoder, params = make()
    with pytest.raises(ValueError, match=r"Decoder.length = 8 positions, got 9"):
        decoder.apply(params, jnp.ones((1, LENGTH + 1), jnp.int32))
    with pytest.raises(ValueError, match=r"Decoder.heads: expected a divisor of width 16, got 3"):
        make(config.Decoder(width=16, heads=3))
    with pytest.raises(ValueError, match=r"prompt: expected shape \(2, at most 4\)"):
        sample(decoder, params, jax.random.key(0), 2, 4, jnp.ones((1, 2), jnp.int32))
