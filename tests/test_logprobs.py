"""Log-probabilities, entropy and divergence of tokens: kept, streamed over the vocabulary, and by hand in fp64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deconfound_jax import config
from deconfound_jax.align import logprobs
from deconfound_jax.align.logprobs import Scores, check_targets, packed_scores, score, sequence_logprob, token_scores
from deconfound_jax.align.packed import pack
from deconfound_jax.models.decoder import Decoder, output_table
from deconfound_jax.models.tokenizer import PAD

VOCABULARY, WIDTH, TOKENS = 23, 8, 6
SMALL = config.Decoder(width=WIDTH, layers=1, heads=2, length=16)
CAPPED = dataclasses.replace(SMALL, tied=False, logit_cap=3.0, forbidden=())
WIDE = dataclasses.replace(SMALL, vocabulary=4096, forbidden=())
TARGET = np.array([5, 22, PAD, 2, 20, 7])
TEXTS = np.array([[1, 5, 4, 2, PAD], [1, 3, 2, PAD, PAD], [PAD, PAD, 1, 7, 2]], np.int32)


@functools.cache
def make(small, seed=0, scale=20.0):
    """A decoder and its parameters, far from uniform."""
    decoder = Decoder(small, VOCABULARY)
    params = init(decoder, jax.random.key(seed))
    return decoder, jax.tree.map(lambda leaf: scale * np.asarray(leaf) if leaf.ndim > 1 else leaf, params)


@functools.partial(jax.jit, static_argnums=0)
def init(decoder, key):
    return decoder.init(key, jnp.ones((1, 2), jnp.int32))


@functools.partial(jax.jit, static_argnums=0)
def predict(decoder, params, hidden):
    return decoder.apply(params, hidden, method="predict")


scores = jax.jit(score, static_argnums=(0, 5))
whole_texts = jax.jit(token_scores, static_argnums=0)


def by_hand(z_nv, other_nv):
    """The three scores of rows of logits, in numpy's fp64."""
    log_p, log_q = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in np.asarray((z_nv, other_nv), np.float64))
    p = np.exp(log_p)
    found = log_p[np.arange(TOKENS), TARGET], -(p * log_p).sum(-1), (p * (log_p - log_q)).sum(-1)
    return [np.where(TARGET != PAD, a, 0.0) for a in found]


@pytest.fixture(scope="module")
def states():
    return np.random.default_rng(1).normal(size=(2, TOKENS, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("block", [5, 7, 23, 100])  # with a rest, with a large rest, and in one piece
@pytest.mark.parametrize("small", [SMALL, CAPPED])
def test_scores_by_hand(small, block, states):
    (decoder, params), (_, other) = make(small), make(small, seed=1)
    found = scores(decoder, params, states[0], TARGET, (other, states[1]), block)
    logits = [predict(decoder, p, h) for p, h in ((params, states[0]), (other, states[1]))]
    for a, expected in zip(found, by_hand(*logits), strict=True):
        np.testing.assert_allclose(a, expected, atol=2e-6)
        assert np.abs(expected).max() > 0.1, "all equal would test nothing"
    alone = jax.eval_shape(lambda params: score(decoder, params, states[0], TARGET, None, block), params)
    assert alone.kl is None


@functools.partial(jax.jit, static_argnums=(0, 6))
def slope(decoder, params, h, other, q, which, block):
    """Gradients by states and output table of the scores' weighted squares, of those scores that `which` picks."""

    def loss(params, h):
        found = score(decoder, params, h, TARGET, (other, q), block)
        return sum(w * jnp.sum(jnp.arange(1.0, TOKENS + 1) * a**2) for w, a in zip(which, found, strict=True))

    dparams, dh = jax.grad(loss, argnums=(0, 1))(params, h)
    return dh, output_table(decoder.config, dparams)


@pytest.mark.parametrize("small", [SMALL, CAPPED])
def test_streamed_gradients_are_the_kept_ones(small, states):
    with jax.enable_x64(True):
        wide = dataclasses.replace(small, dtype="float64")
        (decoder, params), (_, other) = make(wide), make(wide, seed=1)
        h, q = states.astype("float64")
        for which, name in zip(np.eye(3), Scores._fields, strict=True):
            expected = slope(decoder, params, h, other, q, which, VOCABULARY)
            for block in (5, 7):
                found = slope(decoder, params, h, other, q, which, block)
                for streamed, kept in zip(found, expected, strict=True):
                    np.testing.assert_allclose(streamed, kept, atol=1e-13 * np.abs(kept).max(), err_msg=name)
                    assert np.abs(kept).max() > 1e-3


@pytest.mark.parametrize("block", [7, 23])
def test_no_gradient_at_padding_nor_into_the_reference(block, states):
    decoder, params = make(SMALL)

    def loss(h, other, q):
        found = score(decoder, params, h, TARGET, (other, q), block)
        return sum((a + 2.0 * a**2).sum() for a in found)

    dh, dother, dq = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(states[0], params, states[1])
    dh = np.asarray(dh)
    assert np.all(dh[TARGET == PAD] == 0) and np.all(np.abs(dh[TARGET != PAD]).max(-1) > 0)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves((dother, dq)))


def test_huge_logits_and_half_precision(states):
    decoder, params = make(SMALL, scale=1e4)
    for block in (7, 23):
        found = scores(decoder, params, states[0], TARGET, (params, states[0]), block)
        assert all(np.isfinite(np.asarray(a)).all() for a in found)
        np.testing.assert_allclose(found.kl, 0, atol=1e-3)
    half = Decoder(dataclasses.replace(SMALL, dtype="bfloat16"), VOCABULARY)
    _, params = make(SMALL)
    streamed, kept = (scores(half, params, states[0], TARGET, None, block) for block in (7, 23))
    exact = scores(Decoder(SMALL, VOCABULARY), params, states[0], TARGET, None, 23)
    for a, b, c in zip(streamed[:2], kept[:2], exact[:2], strict=True):
        assert a.dtype == b.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=1e-5)  # the sums do not know bf16
        np.testing.assert_allclose(a, c, atol=0.05)


def test_texts_left_and_right_of_their_padding():
    decoder, params = make(SMALL)
    found = whole_texts(decoder, params, TEXTS)
    logits_blv, _ = jax.jit(decoder.apply)(params, TEXTS)
    log_blv = np.asarray(jax.nn.log_softmax(logits_blv))
    expected = np.zeros((3, 4))
    for b, t in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 2), (2, 3)):
        expected[b, t] = log_blv[b, t, TEXTS[b, t + 1]]
    np.testing.assert_allclose(found.logprob, expected, atol=1e-5)
    assert np.all((np.asarray(found.entropy) > 0) == (expected != 0))
    moved = np.array([TEXTS[0], TEXTS[1], [1, 7, 2, PAD, PAD]])
    sequences = jax.jit(sequence_logprob, static_argnums=0)
    for texts in (TEXTS, moved):
        np.testing.assert_allclose(sequences(decoder, params, texts), expected.sum(-1), atol=1e-5)


def test_packed_completions_are_scored_as_texts_of_their_own():
    decoder, params = make(SMALL)
    _, other = make(SMALL, seed=1)
    prompt, completion = np.array([[1, 5, 6], [1, 9, PAD]]), np.array([[[7, 2], [8, PAD]], [[4, 2], [PAD, PAD]]])
    found = jax.jit(lambda params, other: packed_scores(decoder, params, pack(prompt, completion), other))(
        params, other
    )
    texts = np.full((4, 5), PAD)
    for row, (b, g) in zip(texts, np.ndindex(2, 2), strict=True):
        text = [token for token in (*prompt[b], *completion[b, g]) if token != PAD]
        row[: len(text)] = text
    apart = whole_texts(decoder, params, texts, other)
    for row, (b, g) in enumerate(np.ndindex(2, 2)):
        start, count = (prompt[b] != PAD).sum() - 1, (completion[b, g] != PAD).sum()
        for a, whole in zip(map(np.asarray, found), map(np.asarray, apart), strict=True):
            np.testing.assert_allclose(a[b, g, :count], whole[row, start : start + count], atol=1e-5)
            assert np.all(a[b, g, count:] == 0)
    assert np.abs(np.asarray(found.kl)).max() > 0.1


def test_what_is_streamed_is_decided_by_size_and_by_the_decoder(monkeypatch, states):
    decoder, params = make(SMALL)

    def streamed(decoder):
        jaxpr = jax.make_jaxpr(functools.partial(score, decoder))(params, states[0], jnp.asarray(TARGET))
        return "scan" in str(jaxpr)

    assert not streamed(decoder)
    monkeypatch.setattr(logprobs, "_BLOCK", 10)
    assert not streamed(decoder)
    assert streamed(Decoder(dataclasses.replace(SMALL, remat="layer", chunk=4), VOCABULARY))
    monkeypatch.setattr(logprobs, "_KEPT", TOKENS * VOCABULARY - 1)
    assert streamed(decoder)


def temporary_bytes(block, frozen=False):
    """Of the gradient of 512 tokens' log-probability at 4,096 ids; only compiles."""
    decoder = Decoder(WIDE, WIDE.vocabulary)
    params = jax.eval_shape(decoder.init, jax.random.key(0), jnp.ones((1, 2), jnp.int32))
    h, target = jax.ShapeDtypeStruct((512, WIDTH), jnp.float32), jax.ShapeDtypeStruct((512,), jnp.int32)

    def loss(params, h, target):
        return score(decoder, params, h, target, None, block).logprob.sum()

    compiled = jax.jit(jax.grad(loss, argnums=1 if frozen else (0, 1))).lower(params, h, target).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_a_blocks():
    table = WIDE.vocabulary * WIDTH * 4
    kept, streamed = temporary_bytes(WIDE.vocabulary), temporary_bytes(256)
    assert kept > 512 * WIDE.vocabulary * 4
    # Two blocks, and no second gradient of the table beside the one that is returned.
    assert streamed < 2.5 * 512 * 256 * 4 + table / 2
    assert temporary_bytes(256, frozen=True) < 2.5 * 512 * 256 * 4 + table / 2, "a frozen table's gradient is made"


def test_a_text_without_targets_is_named():
    check_targets(TEXTS[:2])
    with pytest.raises(ValueError, match=r"rows \[1\] have none \(1 of 2\)"):
        check_targets(np.array([[1, 4, 2], [1, PAD, PAD]]))
