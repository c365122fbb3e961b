"""Adapters: new ones change nothing, merged ones compute the same, only they are trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deconfound_jax import config
from deconfound_jax.align.logprobs import sequence_logprob
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.lora import init_lora, merge_lora
from deconfound_jax.models.params import load_params, save_params

DECODER = Decoder(config.Decoder(width=16, layers=2, heads=2, kv_heads=1, gated=True, length=6), 23)
TOKENS = np.random.default_rng(0).integers(4, 23, (2, 6)).astype(np.int32)


@functools.cache
def params():
    return jax.jit(DECODER.init)(jax.random.key(0), TOKENS)


def trained(lora):
    """Adapters that do something."""
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), lora)


@jax.jit
def logits(variables):
    return DECODER.apply(variables, TOKENS)[0]


def test_new_adapters_change_nothing_and_cover_attention_and_mlp():
    lora = init_lora(jax.random.key(1), params(), rank=3)
    found = {name: (leaf["a"].shape, leaf["b"].shape) for name, leaf in lora["layers"].items()}
    assert found == {
        **{"q_proj": ((2, 16, 3), (2, 3, 16)), "o_proj": ((2, 16, 3), (2, 3, 16))},
        **{"k_proj": ((2, 16, 3), (2, 3, 8)), "v_proj": ((2, 16, 3), (2, 3, 8))},
        **{"up_proj": ((2, 16, 3), (2, 3, 64)), "gate_proj": ((2, 16, 3), (2, 3, 64))},
        "down_proj": ((2, 64, 3), (2, 3, 16)),
    }
    np.testing.assert_array_equal(logits({**params(), "lora": lora}), logits(params()))


def test_alpha_over_rank_scales_the_gradient():
    def slope(alpha):
        lora = init_lora(jax.random.key(1), params(), "q_proj", rank=4, alpha=alpha)
        return jax.grad(lambda lora: logits({**params(), "lora": lora}).sum())(lora)["layers"]["q_proj"]["b"]

    np.testing.assert_allclose(slope(8.0), 2 * slope(4.0), rtol=1e-4, atol=1e-6)
    assert np.abs(slope(4.0)).max() > 1e-3


@pytest.mark.parametrize("pattern", ["_proj$", "layers/(q|v)_proj"])
def test_merged_equals_beside(pattern):
    lora = trained(init_lora(jax.random.key(1), params(), pattern, rank=3))
    beside, merged = logits({**params(), "lora": lora}), merge_lora(params(), lora)
    np.testing.assert_allclose(logits(merged), beside, atol=1e-4)
    assert np.abs(beside - logits(params())).max() > 0.05
    untouched = set(params()["params"]["layers"]) - set(lora["layers"])
    for name in untouched:
        assert merged["params"]["layers"][name] == params()["params"]["layers"][name]


def test_only_adapters_are_trained(tmp_path):
    base = jax.tree.map(np.array, params())
    lora = init_lora(jax.random.key(1), params(), rank=2)
    optimizer = optax.adam(1e-2)
    state = optimizer.init(lora)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert sizes == sorted(2 * [leaf.size for leaf in jax.tree.leaves(lora)])

    @jax.jit
    def step(lora, state):
        loss, slope = jax.value_and_grad(
            lambda lora: -sequence_logprob(DECODER, {**params(), "lora": lora}, TOKENS).mean()
        )(lora)
        updates, state = optimizer.update(slope, state)
        return optax.apply_updates(lora, updates), state, loss

    losses = []
    for _ in range(5):
        lora, state, loss = step(lora, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    jax.tree.map(np.testing.assert_array_equal, params(), base)

    save_params(tmp_path / "lora.npz", lora)
    read = jax.tree.map(jnp.asarray, load_params(tmp_path / "lora.npz"))
    np.testing.assert_array_equal(logits({**params(), "lora": read}), logits({**params(), "lora": lora}))


def test_errors_name_the_kernels_there_are():
    with pytest.raises(ValueError, match=r"pattern: expected to match one of \['layers/down_proj'.*got 'query'"):
        init_lora(jax.random.key(0), params(), "query")
    with pytest.raises(ValueError, match="rank: expected at least 1, got 0"):
        init_lora(jax.random.key(0), params(), rank=0)
    pair = {"a": jnp.zeros((2, 16, 3)), "b": jnp.zeros((2, 3, 5))}
    with pytest.raises(ValueError, match=r"lora: layers/q_proj: expected a product of shape \(2, 16, 16\)"):
        merge_lora(params(), {"layers": {"q_proj": pair}})
    with pytest.raises(ValueError, match=r"lora: expected adapters of .*got 'layers/query'"):
        merge_lora(params(), {"layers": {"query": pair}})
