"""Prompt and completions in one row: the same log-probabilities and gradients as in rows of their own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deconfound_jax import config
from deconfound_jax.align.logprobs import packed_scores
from deconfound_jax.align.packed import pack
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.tokenizer import PAD

VOCABULARY = 23
LEARNED = config.Decoder(width=16, layers=2, heads=2, length=32, forbidden=())
ROTARY = dataclasses.replace(
    LEARNED, positions="rotary", norm="rms", kv_heads=1, window=5, global_every=2, layers=2, bias=False, qkv_bias=False
)
PROMPT = np.array([[5, 6, 7, 8], [9, 4, PAD, PAD]])
COMPLETION = np.array([[[10, 11, 12], [13, 14, PAD], [15, PAD, PAD]], [[16, 17, 18], [10, 19, 20], [PAD] * 3]])


@functools.cache
def make(decoder):
    """Parameters far from uniform."""
    params = jax.jit(decoder.init)(jax.random.key(0), np.zeros((1, 4), np.int32))
    return jax.tree.map(lambda leaf: 4.0 * np.asarray(leaf) if leaf.ndim > 1 else leaf, params)


@functools.partial(jax.jit, static_argnums=0)
def predict(decoder, params, prompt_bp, completion_bgc):
    """Normed states (b, l, d) of the packed rows, and the log-probability of each completion token (b, g, c)."""
    row = pack(prompt_bp, completion_bgc)
    hidden = decoder.apply(params, row.tokens_bl, row.positions_bl, row.segments_bl, method="hidden")
    sources = row.sources_bgc.reshape(len(hidden), -1, 1)
    log_prob = jax.nn.log_softmax(decoder.apply(params, jnp.take_along_axis(hidden, sources, 1), method="predict"))
    target = jnp.maximum(row.targets_bgc, 0).reshape(len(hidden), -1, 1)
    return hidden, jnp.take_along_axis(log_prob, target, -1).reshape(completion_bgc.shape)


def apart(decoder, params):
    """Log-probability of each completion token (b, g, c), one row a completion."""
    texts = [[*p[p != PAD], *c[c != PAD]] for p, rows in zip(PROMPT, COMPLETION, strict=True) for c in rows]
    tokens_rl = np.array([text + [PAD] * (7 - len(text)) for text in texts], np.int32)
    logits_rlv = np.asarray(jax.jit(decoder.apply)(params, tokens_rl)[0], np.float64)
    log_prob_rlv = logits_rlv - np.log(np.exp(logits_rlv).sum(-1, keepdims=True))
    found = np.zeros(COMPLETION.shape)
    for row, (i, j) in enumerate(np.ndindex(COMPLETION.shape[:2])):
        start = (PROMPT[i] != PAD).sum()
        for t, token in enumerate(texts[row][start:]):
            found[i, j, t] = log_prob_rlv[row, start + t - 1, token]
    return found


@pytest.mark.parametrize("small", [LEARNED, ROTARY])
def test_a_packed_completion_is_predicted_as_in_a_row_of_its_own(small):
    decoder = Decoder(small, VOCABULARY)
    _, log_prob = predict(decoder, make(decoder), PROMPT, COMPLETION)
    expected = apart(decoder, make(decoder))
    np.testing.assert_allclose(np.where(COMPLETION == PAD, 0.0, log_prob), expected, atol=1e-4)
    assert np.abs(expected).max() > 3, "a uniform model would test nothing"


def test_no_completion_reads_another():
    decoder = Decoder(LEARNED, VOCABULARY)
    other = COMPLETION.copy()
    other[:, 0] = 21
    first, second = (predict(decoder, make(decoder), PROMPT, texts)[0] for texts in (COMPLETION, other))
    np.testing.assert_array_equal(first[:, 7:10], second[:, 7:10])
    assert not np.allclose(first[:, 4:7], second[:, 4:7])


def test_left_padding_rows_wider_than_the_decoder_and_texts_longer_than_it():
    left = np.array([[5, 6, 7, 8], [PAD, PAD, 9, 4]])
    packed = jax.jit(pack)
    for one, other in zip(packed(left, COMPLETION), packed(PROMPT, COMPLETION), strict=True):
        np.testing.assert_array_equal(one, other)
    decoder = Decoder(dataclasses.replace(LEARNED, length=7), VOCABULARY)
    params = make(decoder)

    def shape(prompt_bp):
        return jax.eval_shape(lambda params: packed_scores(decoder, params, pack(prompt_bp, COMPLETION)), params)

    assert shape(PROMPT).logprob.shape == COMPLETION.shape
    with pytest.raises(ValueError, match="at most Decoder.length = 7 positions, got 8"):
        shape(np.concatenate([PROMPT, PROMPT[:, :1]], 1))
    with pytest.raises(ValueError, match="expected both or neither"):
        decoder.apply(params, PROMPT, np.zeros_like(PROMPT))
