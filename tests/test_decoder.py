"""The decoder: causality, padding, several texts in a row, computation types, sizes."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deconfound_jax import config
from deconfound_jax.align.logprobs import sequence_logprob
from deconfound_jax.models.decoder import Decoder, count_parameters
from deconfound_jax.models.tokenizer import BEGIN, PAD

VOCABULARY, LENGTH = 23, 8
SMALL = config.Decoder(width=16, layers=2, heads=2, length=LENGTH)
GEMMA = dataclasses.replace(
    SMALL, heads=4, kv_heads=2, head_width=8, norm="rms", norm_plus_one=True, norm_after=True, qk_norm=True,
    positions="rotary", local_base=100.0, activation="gelu_tanh", gated=True, bias=False, qkv_bias=False, window=3,
    global_every=2, attention_cap=5.0, logit_cap=8.0, embedding_scale=4.0,
)  # fmt: skip


@functools.cache
def make(small=SMALL, scale=4.0):
    """A decoder whose logits differ enough that every error shows."""
    decoder = Decoder(small, VOCABULARY)
    params = jax.jit(decoder.init)(jax.random.key(0), jnp.full((1, LENGTH), BEGIN))
    return decoder, jax.tree.map(lambda leaf: leaf * scale if leaf.ndim > 2 else leaf, params)


@functools.partial(jax.jit, static_argnames=("decoder", "method"))
def apply(decoder, params, *args, method="__call__"):
    return decoder.apply(params, *args, method=method)


@functools.partial(jax.jit, static_argnames="decoder")
def logprob(decoder, params, tokens_nl):
    return sequence_logprob(decoder, params, tokens_nl)


def random_tokens():
    tokens_bl = np.random.default_rng(1).integers(4, VOCABULARY, (3, LENGTH)).astype(np.int32)
    tokens_bl[:, 0] = BEGIN
    return tokens_bl


@pytest.mark.parametrize("small", [SMALL, dataclasses.replace(GEMMA, layers=1)], ids=["gpt2", "window"])
def test_a_state_depends_on_no_later_token_and_on_none_before_its_window(small):
    decoder, params = make(small)
    x_bld = apply(decoder, params, random_tokens(), method="embed")
    weight_d = np.random.default_rng(2).normal(size=16).astype(np.float32)

    @jax.jit
    @jax.jacrev
    def jacobian(x_bld):
        return decoder.apply(params, x_bld, method="read")[0] @ weight_d

    # (t, t'): how much the state at t moves with the embedding at t'.
    influence_tt = np.abs(jacobian(x_bld))[:, 0].sum(-1)
    seen = np.tril(np.ones((LENGTH, LENGTH), bool))
    if small.window:
        seen &= ~np.tril(np.ones((LENGTH, LENGTH), bool), -small.window)
    assert np.all(influence_tt[~seen] == 0)
    assert np.all(influence_tt[seen] > 0)


@pytest.mark.parametrize("small", [SMALL, GEMMA], ids=["gpt2", "gemma"])
def test_padding_left_or_right_changes_nothing_and_stays_finite(small):
    decoder, params = make(small)
    whole_bl = random_tokens()
    padded_bl = whole_bl.copy()
    padded_bl[0, 5:] = PAD
    padded_bl[1] = np.concatenate([np.full(3, PAD), whole_bl[1, :5]])
    padded_bl[2] = PAD  # a row that only fills up a batch
    for padded, whole in zip(apply(decoder, params, padded_bl), apply(decoder, params, whole_bl), strict=True):
        np.testing.assert_allclose(padded[0, :5], whole[0, :5], atol=1e-5)
        np.testing.assert_allclose(padded[1, 3:], whole[1, :5], atol=1e-5)
        assert np.isfinite(padded).all()
    chex.assert_tree_all_finite(jax.jit(jax.grad(lambda p: logprob(decoder, p, padded_bl).sum()))(params))


@pytest.mark.parametrize("small", [SMALL, GEMMA], ids=["gpt2", "gemma"])
def test_texts_that_share_a_row_do_not_see_each_other(small):
    decoder, params = make(small)
    prompt, first, second = [BEGIN, 5, 6], [7, 8], [9, 10, 11]
    packed_1l = np.array([prompt + first + second], np.int32)
    positions_1l = np.array([[0, 1, 2, 3, 4, 3, 4, 5]], np.int32)
    segments_1l = np.array([[0, 0, 0, 1, 1, 2, 2, 2]], np.int32)
    logits, _ = apply(decoder, params, packed_1l, positions_1l, segments_1l)
    alone, _ = apply(decoder, params, np.array([prompt + second], np.int32))
    np.testing.assert_allclose(logits[0, 5:], alone[0, 3:], atol=1e-5)
    np.testing.assert_allclose(logits[0, :5], apply(decoder, params, packed_1l[:, :5])[0][0], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_computation_type_is_a_knob_and_parameters_stay_float32(dtype):
    decoder = Decoder(dataclasses.replace(SMALL, dtype=dtype), VOCABULARY)
    exact, params = make(scale=1.0)
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), random_tokens())
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, params)
    (logits, hidden), inner = jax.jit(lambda p: decoder.apply(p, random_tokens(), capture_intermediates=True))(params)
    assert logits.dtype == hidden.dtype == jnp.float32
    assert inner["intermediates"]["norm"]["__call__"][0].dtype == dtype
    expected, _ = apply(exact, params, random_tokens())
    np.testing.assert_allclose(logits, expected, atol=1e-6 if dtype == "float32" else 0.02)


def test_sizes():
    def size(decoder, vocabulary):
        shapes = jax.eval_shape(Decoder(decoder, vocabulary).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
        return count_parameters(shapes)

    # Tied embeddings and positions, then 12 width^2 + 13 width a block, then the last norm.
    assert size(config.Decoder(), 200) == (200 + 24) * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64
    assert 0.9e6 < size(config.Decoder(width=128, layers=4, length=32), 2000) < 1.1e6


def test_errors_name_the_field():
    decoder, params = make()
    with pytest.raises(ValueError, match=r"Decoder.length = 8 positions, got 9"):
        decoder.apply(params, jnp.ones((1, LENGTH + 1), jnp.int32))
    with pytest.raises(ValueError, match=r"Decoder.heads: expected a divisor of width 16, got 3"):
        make(config.Decoder(width=16, heads=3))
    with pytest.raises(ValueError, match=r"Decoder.kv_heads: expected a divisor of heads 4, got 3"):
        make(config.Decoder(width=16, kv_heads=3))
    with pytest.raises(ValueError, match=r"Decoder.chunk: expected remat='layer' beside it, got 'none'"):
        make(config.Decoder(width=16, chunk=4))
