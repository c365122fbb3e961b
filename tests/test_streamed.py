"""Streamed back-propagation: the gradient is the direct one, parameter by parameter; the memory is a chunk's."""

import dataclasses

import jax
import numpy as np
import pytest

from deconfound_jax.align import logprobs
from deconfound_jax.align.logprobs import packed_scores
from deconfound_jax.align.packed import pack
from deconfound_jax.models import block, layers
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.tokenizer import PAD
from experiments.lm_gradients import GPT2, OBJECTIVES, gradients, relative_differences, texts
from experiments.lm_memory import TINY, temporary_bytes

ROWS, LENGTH, VOCABULARY = 4, 23, 37  # no multiple of chunk or block
LLAMA = dataclasses.replace(TINY, layers=2, width=24, inner=32, vocabulary=VOCABULARY)
GEMMA = dataclasses.replace(
    LLAMA, norm_plus_one=True, norm_after=True, qk_norm=True, window=6, global_every=2, local_base=1e3,
    activation="gelu_tanh", attention_cap=5.0, logit_cap=7.0,
)  # fmt: skip
SMALL_GPT2 = dataclasses.replace(GPT2, width=24, vocabulary=VOCABULARY)
BAR = 1e-12


def worst(c, objective="sft", chunk=5, block=11):
    with jax.enable_x64(True):
        streamed, direct = gradients(c, objective, texts(ROWS, LENGTH, VOCABULARY), chunk, block)
        return relative_differences(streamed, direct)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_streamed_gradients_are_the_direct_ones(objective):
    differences = worst(SMALL_GPT2, objective)
    assert max(differences.values()) < BAR, max(differences, key=differences.get)
    assert {"lm_head", "positions", "layers/k_proj/bias[1]", "layers/q_proj/kernel[0]"} <= set(differences)


@pytest.mark.parametrize("c", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_of_every_family(c):
    differences = worst(c)
    assert max(differences.values()) < BAR, max(differences, key=differences.get)


def test_of_prompts_and_completions_in_one_row():
    prompt, completion = np.split(texts(2, 24, VOCABULARY), [9], axis=1)
    packed = pack(np.where(prompt == PAD, 3, prompt), completion.reshape(2, 3, 5))
    with jax.enable_x64(True):
        wide = dataclasses.replace(GEMMA, dtype="float64")
        decoders = [Decoder(c, VOCABULARY) for c in (dataclasses.replace(wide, remat="layer", chunk=5), wide)]
        params = jax.jit(decoders[0].init)(jax.random.key(0), packed.tokens_bl)
        params = jax.tree.map(lambda leaf: 3.0 * leaf if leaf.ndim > 1 else leaf + 0.1, params)
        streamed, direct = (
            jax.jit(jax.grad(lambda p, d=decoder: packed_scores(d, p, packed).logprob.sum()))(params)
            for decoder in decoders
        )
        assert max(relative_differences(streamed, direct).values()) < BAR


def test_attention_read_in_one_piece_has_the_same_gradient(monkeypatch):
    monkeypatch.setattr(block, "whole_rows", lambda c, segments: True)
    assert max(worst(LLAMA).values()) < BAR


def test_a_wrong_gradient_is_seen(monkeypatch):
    # Keys that end a chunk too early: the last chunk of a span reads less than it should.
    right = layers.causal_mask

    def blind(c, start, size, seen, segments, local):
        mask = right(c, start, size, seen, segments, local)
        return mask if mask is None or seen == size else mask.at[..., 0].set(False)

    monkeypatch.setattr(block, "causal_mask", blind)
    assert max(worst(LLAMA).values()) > 1e-3


def test_a_parameter_without_gradient_is_held_against_the_whole():
    direct = {"params": {"norm": {"scale": np.array([3.0, 4.0]), "bias": np.array([1e-12, 0.0])}}}
    moved = {"params": {"norm": {"scale": np.array([3.0, 4.5]), "bias": np.array([2e-12, 0.0])}}}
    found = relative_differences(moved, direct)
    np.testing.assert_allclose([found["norm/scale"], found["norm/bias"]], [0.1, 2e-13], rtol=1e-6)


def test_memory_is_a_chunks(monkeypatch):
    # Compiled only. Streaming the logits alone gives a ratio of 1.0 here, the layers alone 2.9, both 12.
    monkeypatch.setattr(logprobs, "_BLOCK", 1 << 16)
    length = 1024
    checkpointed, streamed = (temporary_bytes(kind, TINY, length, chunk=32) for kind in ("checkpointed", "streamed"))
    stack = TINY.layers * length * TINY.width * 4  # each layer's input
    assert checkpointed > 10 * streamed
    assert streamed < 8 * stack, "something is kept beside the layers' inputs that is as long as the text"


def test_memory_grows_with_the_length_and_not_with_its_square():
    short, long = (temporary_bytes("streamed", TINY, length, chunk=32) for length in (1024, 4096))
    assert long < 4.5 * short
