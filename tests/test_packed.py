"""Prompt and completions in one row: the same log-probabilities and gradients as in rows of their own."""

import dataclasses

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


def apart(decoder, params):
    """Log-probability of each completion token (b, g, c), one row a completion."""
    found = np.zeros(COMPLETION.shape, np.float32)
    for i, j in np.ndindex(COMPLETION.shape[:2]):
        prompt = PROMPT[i][PROMPT[i] != PAD]
        completion = COMPLETION[i, j][COMPLETION[i, j] != PAD]
        logits_blv, _ = decoder.apply(params, np.concatenate([prompt, completion])[None].astype(np.int32))
        log_prob = jax.nn.log_softmax(logits_blv[0])
        for t, token in enumerate(completion):
            found[i, j, t] = log_prob[len(prompt) + t - 1, token]
    return found


@pytest.mark.parametrize("small", [LEARNED, ROTARY])
def test_a_packed_completion_is_predicted_as_in_a_row_of_its_own(small):
    decoder = Decoder(small, VOCABULARY)
    params = decoder.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    params = jax.tree.map(lambda leaf: 4.0 * leaf if leaf.ndim > 1 else leaf, params)
    row = pack(PROMPT, COMPLETION)
    hidden = decoder.apply(params, row.tokens_bl, row.positions_bl, row.segments_bl, method="hidden")
    sources = row.sources_bgc.reshape(2, -1)
    logits = decoder.apply(params, jnp.take_along_axis(hidden, sources[..., None], 1), method="predict")
    target = jnp.maximum(row.targets_bgc, 0).reshape(2, -1, 1)
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), target, -1).reshape(COMPLETION.shape)
    expected = apart(decoder, params)
    np.testing.assert_allclose(np.where(COMPLETION == PAD, 0.0, log_prob), expected, atol=1e-4)
    assert np.abs(expected).max() > 3, "a uniform model would test nothing"


def test_no_completion_reads_another():
    decoder = Decoder(LEARNED, VOCABULARY)
    params = decoder.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    other = COMPLETION.copy()
    other[:, 0] = 21
    rows = [pack(PROMPT, completion) for completion in (COMPLETION, other)]
    first, second = (decoder.apply(params, r.tokens_bl, r.positions_bl, r.segments_bl, method="hidden") for r in rows)
    np.testing.assert_array_equal(first[:, 7:10], second[:, 7:10])
    assert not np.allclose(first[:, 4:7], second[:, 4:7])


def test_left_padding_rows_wider_than_the_decoder_and_texts_longer_than_it():
    left = np.array([[5, 6, 7, 8], [PAD, PAD, 9, 4]])
    for one, other in zip(pack(left, COMPLETION), pack(PROMPT, COMPLETION), strict=True):
        np.testing.assert_array_equal(one, other)
    decoder = Decoder(dataclasses.replace(LEARNED, length=7), VOCABULARY)
    params = decoder.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    assert packed_scores(decoder, params, pack(PROMPT, COMPLETION)).logprob.shape == COMPLETION.shape
    with pytest.raises(ValueError, match="at most Decoder.length = 7 positions, got 8"):
        packed_scores(decoder, params, pack(np.concatenate([PROMPT, PROMPT[:, :1]], 1), COMPLETION))
    with pytest.raises(ValueError, match="expected both or neither"):
        decoder.apply(params, PROMPT, np.zeros_like(PROMPT))
