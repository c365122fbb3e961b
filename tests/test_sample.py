"""Generation: cached steps are the whole pass, draws follow the model, every row ends where it should."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deconfound_jax import config
from deconfound_jax.align.logprobs import sequence_logprob
from deconfound_jax.models.cache import lay_out, prefill, step
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.lora import init_lora
from deconfound_jax.models.sample import bucket, generate, pad_prompts, sample
from deconfound_jax.models.tokenizer import BEGIN, END, PAD

VOCABULARY, LENGTH = 23, 8
DRAWS = 2048  # of one shape everywhere: few compilations
ANYTHING = np.array([[BEGIN] + [PAD] * (LENGTH - 1)] * DRAWS, np.int32)  # the prompt that forces nothing
SMALL = config.Decoder(width=16, layers=2, heads=2, length=LENGTH)
GEMMA = dataclasses.replace(
    SMALL, heads=4, kv_heads=2, head_width=8, norm="rms", norm_plus_one=True, norm_after=True, qk_norm=True,
    positions="rotary", local_base=100.0, activation="gelu_tanh", gated=True, bias=False, qkv_bias=False, window=3,
    global_every=2, attention_cap=5.0, logit_cap=8.0, embedding_scale=4.0, forbidden=(),
)  # fmt: skip
LLAMA = dataclasses.replace(GEMMA, window=0, attention_cap=0.0, logit_cap=0.0, tied=False)


@functools.cache
def make(small=SMALL):
    """A decoder whose logits differ enough that every error shows."""
    decoder = Decoder(small, VOCABULARY)
    params = jax.jit(decoder.init)(jax.random.key(0), jnp.full((1, LENGTH), BEGIN))

    def widen(path, leaf):
        return leaf if leaf.ndim < 2 else leaf * (12.0 if path[1].key in ("embed_tokens", "lm_head") else 4.0)

    return decoder, jax.tree_util.tree_map_with_path(widen, params)


@functools.partial(jax.jit, static_argnames="decoder")
def apply(decoder, params, tokens_bl):
    return decoder.apply(params, tokens_bl)[0]


@functools.partial(jax.jit, static_argnames="decoder")
def logprob(decoder, params, tokens_nl):
    return sequence_logprob(decoder, params, tokens_nl)


def whole(key, prompt_nl, temperature=1.0):
    return sample(*make(), jax.random.key(key), DRAWS, LENGTH, prompt_nl, temperature)


def prompts():
    """Three prompts, padded left, right and not at all."""
    return np.array([[PAD, PAD, 5, 6], [7, PAD, PAD, PAD], [8, 9, 10, 11]], np.int32)


def texts(drawn):
    """(b, n) lists of prompt and drawn tokens."""
    drawn = np.asarray(drawn)
    return [[[*p[p != PAD], *row[row != PAD]] for row in rows] for p, rows in zip(prompts(), drawn, strict=True)]


@pytest.mark.parametrize("adapters", [False, True], ids=["bare", "lora"])
@pytest.mark.parametrize("small", [SMALL, GEMMA, LLAMA], ids=["gpt2", "gemma", "llama"])
def test_cached_steps_equal_the_whole_pass(small, adapters):
    decoder, params = make(small)
    if adapters:
        lora = init_lora(jax.random.key(1), params, rank=3)
        params = {**params, "lora": jax.tree.map(lambda leaf: leaf + 0.1, lora)}
    more_bnm = np.random.default_rng(2).integers(4, VOCABULARY, (3, 2, 4))
    rows_r = [[*p[p != PAD], *more] for p, rows in zip(prompts(), more_bnm, strict=True) for more in rows]
    rows_rl = np.array([row + [PAD] * (LENGTH - len(row)) for row in rows_r])
    expected_rlv = np.asarray(apply(decoder, params, rows_rl))
    last_r = np.array([len(row) for row in rows_r]) - 5

    @jax.jit
    def steps(params, tokens_mbn):
        first_bv, cache = prefill(decoder, params, jnp.asarray(prompts()), len(tokens_mbn), tokens_mbn.shape[2])
        weights = lay_out(decoder, params)
        _, logits_mbnv = jax.lax.scan(lambda cache, t: step(decoder, weights, t, cache)[::-1], cache, tokens_mbn)
        return first_bv, logits_mbnv

    first_bv, logits_mbnv = steps(params, jnp.asarray(np.moveaxis(more_bnm, 2, 0)))
    np.testing.assert_allclose(first_bv, expected_rlv[np.arange(0, 6, 2), last_r[::2]], atol=1e-4)
    for t, logits_bnv in enumerate(logits_mbnv):
        expected_rv = expected_rlv[np.arange(6), last_r + t + 1]
        np.testing.assert_allclose(logits_bnv.reshape(6, -1), expected_rv, atol=1e-4)
    assert np.ptp(expected_rlv[0, :3], axis=-1).min() > 1


@pytest.mark.parametrize(("rows", "samples"), [(1, 3), (2, 1)])  # dimensions of one are what tempts XLA into copies
def test_a_step_copies_no_cache(rows, samples):
    decoder, params = make(GEMMA)

    def run(params):
        cache, weights = prefill(decoder, params, jnp.ones((rows, 4), int), 13, samples)[1], lay_out(decoder, params)
        token_bn = jnp.ones((rows, samples), int)
        return jax.lax.fori_loop(0, 13, lambda _, cache: step(decoder, weights, token_bn, cache)[1], cache)

    text = jax.jit(run).lower(params).compile().as_text()
    operations = re.findall(r"= f32\[[\d,]+,13,8\]\S* ([\w-]+)\(", text)
    assert "dynamic-update-slice" in operations, "the cache has another shape: the pattern finds nothing"
    # Before the loop one array of zeros becomes a layer's keys, another's, ...: three copies. One a step is four more.
    assert operations.count("copy") < 2 * GEMMA.layers


@pytest.mark.parametrize("small", [SMALL, GEMMA], ids=["gpt2", "gemma"])
def test_generated_logprobs_are_the_models_own_whatever_the_filters(small):
    decoder, params = make(small)
    drawn = generate(
        decoder, params, jax.random.key(3), prompts(), 6, samples=4, temperature=1.5, top_k=9, top_p=0.95, min_p=0.01,
        repetition_penalty=1.3, stop=(END, 12),
    )  # fmt: skip
    chex.assert_shape(list(drawn), (3, 4, 6))
    assert [leaf.dtype for leaf in drawn] == [jnp.int32, jnp.float32, jnp.bool_]
    np.testing.assert_array_equal(drawn.mask, drawn.tokens != PAD)
    rows = [row for rows in texts(drawn.tokens) for row in rows]
    rows_rl = np.array([row + [PAD] * (LENGTH - len(row)) for row in rows])
    logprobs_rlv = jax.nn.log_softmax(apply(decoder, params, rows_rl))
    found_r = np.asarray(drawn.logprob).reshape(12, 6)
    for row, logprobs_lv, found_m, prompt in zip(rows, logprobs_rlv, found_r, np.repeat(prompts(), 4, 0), strict=True):
        start = (prompt != PAD).sum()
        expected = [logprobs_lv[t - 1, row[t]] for t in range(start, len(row))]
        np.testing.assert_allclose(found_m, expected + [0.0] * (6 - len(expected)), atol=1e-4)


def test_a_row_ends_at_a_stop_token_or_where_its_positions_end():
    decoder, params = make()
    drawn = np.asarray(generate(decoder, params, jax.random.key(3), prompts(), 6, samples=200, stop=(END, 12)).tokens)
    lengths = np.array([[len(text) for text in rows] for rows in texts(drawn)])
    reached_bn = np.isin(drawn, (END, 12)).any(-1)
    assert 0 < reached_bn.sum() < reached_bn.size, "the test needs both kinds of row"
    for row, reached in zip(drawn.reshape(-1, 6), reached_bn.ravel(), strict=True):
        kept = row[: (row != PAD).sum()]
        assert np.isin(kept, (END, 12)).sum() == reached == np.isin(kept[-1], (END, 12))
    room_b = np.array([6, 6, 4])  # new tokens, or Decoder.length = 8 less the prompt
    expected_b1 = (np.array([2, 1, 4]) + room_b)[:, None]
    assert (lengths == expected_b1)[~reached_bn].all() and (lengths <= expected_b1).all()


def test_an_empty_row_and_a_full_one_draw_nothing():
    decoder, params = make()
    rows = np.array([[PAD] * LENGTH, list(range(4, 4 + LENGTH)), [5] + [PAD] * (LENGTH - 1)], np.int32)
    drawn = generate(decoder, params, jax.random.key(0), rows, 3, stop=(END,))
    assert drawn.mask.any(-1)[:, 0].tolist() == [False, False, True]
    assert (np.asarray(drawn.logprob)[:2] == 0).all()


def test_a_samples_numbers_depend_on_no_other_row_and_on_no_padding():
    decoder, params = make()
    together = generate(decoder, params, jax.random.key(7), prompts(), 4, samples=3, stop=(END,))
    alone = generate(decoder, params, jax.random.key(7), prompts()[:1, 2:], 4, samples=2, stop=(END,))
    np.testing.assert_array_equal(together.tokens[:1, :2], alone.tokens)
    np.testing.assert_allclose(together.logprob[:1, :2], alone.logprob, atol=1e-5)
    same = generate(decoder, params, jax.random.key(7), np.repeat(prompts()[2:], 3, 0), 4, samples=3, stop=(END,))
    assert len(np.unique(np.asarray(same.tokens).reshape(9, 4), axis=0)) > 5, "rows share their random numbers"


def test_one_compilation_for_every_setting():
    decoder, params = make()
    one = jax.jit(
        chex.assert_max_traces(lambda p, k, *knobs: generate(decoder, p, k, prompts(), 3, 2, *knobs, stop=(END,)), n=1)
    )
    greedy = one(params, jax.random.key(0), 0.0, 0, 1.0, 0.0, 1.0).tokens
    np.testing.assert_array_equal(greedy[:, 0], greedy[:, 1])
    for knobs in ((0.0, 5, 0.5, 0.1, 1.0), (1.0, 1, 1.0, 0.0, 1.0), (1.0, 0, 0.0, 0.0, 1.0), (1.0, 0, 1.0, 1.0, 1.0)):
        np.testing.assert_array_equal(one(params, jax.random.key(1), *knobs).tokens, greedy)
    assert (one(params, jax.random.key(1), 2.0, 0, 1.0, 0.0, 1.0).tokens != greedy).any()
    assert (one(params, jax.random.key(1), 0.0, 0, 1.0, 0.0, 9.0).tokens != greedy).any()


def test_buckets_hold_the_longest_prompt():
    assert [bucket(length, (4, 16, 8)) for length in (1, 4, 5, 16)] == [4, 4, 8, 16]
    with pytest.raises(ValueError, match=r"buckets: expected one of at least 17, got \(4, 16, 8\)"):
        bucket(17, (4, 16, 8))
    padded = pad_prompts(np.hstack([prompts(), np.full((3, 9), PAD)]), (2, 6))
    assert padded.tolist() == [[5, 6] + [PAD] * 4, [7] + [PAD] * 5, [8, 9, 10, 11, PAD, PAD]]


def test_sampled_logprob_is_that_of_the_text():
    decoder, params = make()
    tokens_nl, logprob_n = whole(3, ANYTHING, 0.7)
    np.testing.assert_allclose(logprob_n, logprob(decoder, params, tokens_nl), atol=1e-3)
    tokens_nl = np.asarray(tokens_nl)
    ended_n = (tokens_nl == END).any(1)
    assert 0 < ended_n.sum() < len(ended_n), "the test needs both kinds of text"
    for row in tokens_nl[ended_n]:
        assert (row[list(row).index(END) + 1 :] == PAD).all()
    assert (tokens_nl[:, 0] == BEGIN).all() and not (tokens_nl[:, 1:] == BEGIN).any()
    assert not (tokens_nl[~ended_n] == PAD).any()


def test_greedy_equals_the_uncached_argmax():
    decoder, params = make()
    tokens_nl, _ = whole(4, ANYTHING, 0.0)
    expected_nl = np.full((3, LENGTH), PAD)
    expected_nl[:, 0] = BEGIN
    for t in range(1, LENGTH):
        expected_nl[:, t] = apply(decoder, params, expected_nl)[:, t - 1].argmax(-1)
        if expected_nl[0, t] == END:
            break
    np.testing.assert_array_equal(tokens_nl, np.broadcast_to(expected_nl[:1], tokens_nl.shape))


def test_samples_follow_the_models_probabilities():
    decoder, params = make()
    tokens_nl, _ = sample(decoder, params, jax.random.key(5), DRAWS, LENGTH)
    expected_v = DRAWS * np.asarray(jax.nn.softmax(apply(decoder, params, ANYTHING[:3])[0, 0]))
    counted_v = np.bincount(tokens_nl[:, 1], minlength=VOCABULARY)
    assert (np.abs(counted_v - expected_v) < 5 * np.sqrt(expected_v + 1)).all()
    assert expected_v.max() > 2 * np.median(expected_v), "a uniform model would test nothing"


def test_a_prompt_is_forced_and_not_scored():
    decoder, params = make()
    prompt_nl = np.array(ANYTHING)
    prompt_nl[::2, 1:4] = [5, 6, 7]
    prompt_nl[1::2, 1] = 8
    prompt_nl[1, 1:4] = [8, END, 9]  # over before it begins, kept as it came
    tokens_nl, logprob_n = whole(6, prompt_nl)
    forced_nl = prompt_nl != PAD
    np.testing.assert_array_equal(np.asarray(tokens_nl)[forced_nl], prompt_nl[forced_nl])
    assert len(np.unique(tokens_nl[::2, 4])) > 3
    assert (tokens_nl[1, 4:] == PAD).all() and logprob_n[1] == 0
    of_prompt_n = logprob(decoder, params, prompt_nl)
    np.testing.assert_allclose(logprob_n, logprob(decoder, params, tokens_nl) - of_prompt_n, atol=1e-3)


def test_errors_name_the_field():
    decoder, params = make()
    with pytest.raises(ValueError, match=r"prompt: expected shape \(2, at most 4\)"):
        sample(decoder, params, jax.random.key(0), 2, 4, jnp.ones((1, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"new_tokens, samples: expected at least 1 of each, got 0 and 1"):
        generate(decoder, params, jax.random.key(0), prompts(), 0, stop=())
    with pytest.raises(ValueError, match=r"Decoder.length = 8 positions, got 9"):
        generate(decoder, params, jax.random.key(0), jnp.ones((1, LENGTH + 1), jnp.int32), 1, stop=())
