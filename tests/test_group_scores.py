"""Groups on a decoder: texts behind a prompt of BEGIN are whole texts, and only what is trained has a gradient."""

import jax
import numpy as np

from deconfound_jax import config
from deconfound_jax.align.logprobs import group_mask
from deconfound_jax.align.losses import weighted_mean
from deconfound_jax.align.preference import preference_objective
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.lora import init_lora
from deconfound_jax.models.tokenizer import PAD
from deconfound_jax.structs import Pairs

DECODER = Decoder(config.Decoder(width=8, layers=1, heads=2, length=8), 13)
PROMPT = np.array([[1], [1]], np.int32)
TEXTS = np.random.default_rng(0).integers(2, 13, (2, 3, 4)).astype(np.int32)
TEXTS[0, 1, 2:] = PAD
WHOLE = np.concatenate([np.ones((2, 3, 1), np.int32), TEXTS], -1)
REFERENCE = np.float32([[-5, -3, -6], [-7, -5, -4]])
LABEL, WEIGHT = np.float32([[0.9, 0.2, 0.5], [1.0, 0.0, 0.7]]), np.float32([[1, 2, 0], [1, 0.5, 1]])


def test_texts_behind_begin_are_whole_texts_and_adapters_alone_have_a_gradient():
    objective, rng = preference_objective(DECODER), np.random.default_rng(1)
    base = jax.jit(DECODER.init)(jax.random.key(0), WHOLE[:, 0])
    lora = init_lora(jax.random.key(1), base, rank=2)
    lora = jax.tree.map(lambda leaf: np.float32(leaf + 0.3 * rng.normal(size=leaf.shape)), lora)

    def loss(params, base, texts, prompt=None):
        batch = Pairs(texts, REFERENCE, LABEL, WEIGHT, prompt)
        per_example, weight, *_ = objective(params, {"beta": 0.3, "base": base}, batch, None)
        return weighted_mean(per_example, weight)

    whole = jax.jit(loss)({"lora": lora}, base, WHOLE)
    packed, gradient = jax.jit(jax.value_and_grad(loss))({"lora": lora}, base, TEXTS, PROMPT)
    np.testing.assert_allclose(packed, whole, rtol=1e-4)
    assert set(gradient) == {"lora"} and all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(gradient))


def test_which_tokens_of_a_group_are_scored():
    np.testing.assert_array_equal(group_mask(WHOLE), TEXTS != PAD)
    np.testing.assert_array_equal(group_mask(TEXTS, PROMPT), TEXTS != PAD)
    left = np.array([[[PAD, PAD, 1, 7]]])  # BEGIN is given, not scored
    np.testing.assert_array_equal(group_mask(left), [[[False, False, True]]])
