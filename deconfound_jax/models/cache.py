"""Reading token by token: the decoder's pass over prompts, and one more token with what it left behind.

    weights = lay_out(decoder, params)                      # once
    logits_bv, cache = prefill(decoder, params, prompt_bl, new_tokens=64, samples=4)
    logits_bnv, cache = step(decoder, weights, token_bn, cache)

A prompt is read once and its keys are kept once, whatever the number of its samples: a sample attends to the
prompt's keys, which it shares, and to its own (Athiwaratkun et al. 2403.08845). All samples write at the same place,
so a step is an update in place; that prompts differ in length shows in positions and mask only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from deconfound_jax.config import Decoder as DecoderConfig
from deconfound_jax.models.block import Block
from deconfound_jax.models.decoder import COLLECTIONS, Decoder, bounded, local_layers, output_table
from deconfound_jax.models.layers import NEVER, Norm, cast, head_width, param_dtype, rotary
from deconfound_jax.models.lora import merge_lora
from deconfound_jax.models.tokenizer import PAD


class Weights(NamedTuple):
    """A decoder's parameters as `step` reads them: no layer is sliced out, cast or turned around a second time.

    rest: what lies outside the layers, as stored. layers: a variable dict a layer, in the dtype of computation, whose
    kernels lie in "transposed" as (out, in). table_vd: the logits'.
    """

    rest: dict[str, Any]
    layers: tuple[dict[str, Any], ...]
    table_vd: jax.Array


class Cache(NamedTuple):
    """Keys (rotated) and values, a pair a layer.

    prompt: (b, h, l, e), of texts at the left edge, length_b tokens each. own: (b n h, m, e), the first `size` of the
    room m written. Its leading dimensions are one, as the product wants them: XLA updates in place what it need not
    reshape.
    """

    prompt: tuple[tuple[jax.Array, jax.Array], ...]
    own: tuple[tuple[jax.Array, jax.Array], ...]
    length_b: jax.Array
    size: jax.Array


def lay_out(decoder: Decoder, params: Any) -> Weights:
    """Parameters for `step`, a copy: to be made before the loop, not in it. "lora" is merged.

    Kernels are turned to (out, in): a product with few rows reads them as they lie, where it would pack an (in, out)
    one anew in each step; on CPU that is half the time.
    """
    c, tree = decoder.config, merge_lora(params, params.get("lora", {}))["params"]

    def layer(i):
        others = {name: {k: v[i] for k, v in leaf.items() if k != "kernel"} for name, leaf in tree["layers"].items()}
        kernels = {name: leaf["kernel"][i].T for name, leaf in tree["layers"].items() if "kernel" in leaf}
        return {
            "params": others,
            "transposed": {name: {"kernel": kernel.astype(cast(c))} for name, kernel in kernels.items()},
        }

    table = output_table(c, params)
    rest = {name: leaf for name, leaf in tree.items() if name != "layers"}
    return Weights(rest, tuple(layer(i) for i in range(c.layers)), (table if c.tied else table.T).astype(cast(c)))


def prefill(decoder: Decoder, params: Any, tokens_bl, new_tokens: int, samples: int = 1) -> tuple[jax.Array, Cache]:
    """Reads prompts.

    Args:
      tokens_bl: int, PAD left or right of a prompt; what follows a row without a token means nothing.
      new_tokens, samples: room for the tokens that `step` adds to each of a prompt's samples; static.
    Returns:
      Logits (b, v) after each prompt's last token, and the cache.
    """
    chex.assert_rank(tokens_bl, 2)
    c, length_b = decoder.config, jnp.sum(tokens_bl != PAD, axis=1)
    tokens_bl = jnp.take_along_axis(tokens_bl, jnp.argsort(tokens_bl == PAD, axis=1, stable=True), 1)
    x_bld = decoder.apply(params, tokens_bl, method="embed").astype(cast(c))
    tables = rotary(c, jnp.arange(tokens_bl.shape[1])[None])
    stacked = {name: params[name]["layers"] for name in COLLECTIONS if name in params}

    def layer(x_bld, at):
        variables, local = at
        return Block(c).apply(variables, x_bld, tables, local, method=_read)

    x_bld, pairs_z = jax.lax.scan(layer, x_bld, (stacked, jnp.asarray(local_layers(c))))
    last_bd = jnp.take_along_axis(x_bld, jnp.maximum(length_b - 1, 0)[:, None, None], 1)[:, 0]
    empty = jnp.zeros((len(tokens_bl) * samples * (c.kv_heads or c.heads), new_tokens, head_width(c)), cast(c))
    cache = Cache(
        tuple(zip(*pairs_z, strict=True)),
        tuple((empty, empty) for _ in range(c.layers)),
        length_b,
        jnp.zeros((), jnp.int32),
    )
    normed_bd = Norm(c).apply({"params": params["params"]["norm"]}, last_bd).astype(param_dtype(c))
    return decoder.apply(params, normed_bd, method="predict"), cache


def step(decoder: Decoder, weights: Weights, token_bn, cache: Cache) -> tuple[jax.Array, Cache]:
    """Reads one more token of every sample, and none beyond the room (where the last place would be overwritten).

    Returns:
      Logits (b, n, v) after it, and the cache with its keys and values. A PAD's mean nothing.
    """
    c, (prompts, samples) = decoder.config, token_bn.shape
    position_r1 = repeat(cache.length_b + cache.size, "b -> (b n) 1", n=samples)
    token_r1 = rearrange(token_bn, "b n -> (b n) 1")
    x_r1d = decoder.apply({"params": weights.rest}, token_r1, position_r1, method="embed").astype(cast(c))
    tables, own = rotary(c, position_r1), []
    for variables, local, *pair in zip(weights.layers, local_layers(c), cache.prompt, cache.own, strict=True):
        mask = _visible(c, cache, bool(local))
        x_r1d, pair = Block(c).apply(variables, x_r1d, tables, bool(local), *pair, mask, cache.size, method=_extend)
        own.append(pair)
    normed_rd = Norm(c).apply({"params": weights.rest["norm"]}, x_r1d[:, 0]).astype(param_dtype(c))
    logits_rv = jnp.einsum(
        "rd,vd->rv", normed_rd.astype(cast(c)), weights.table_vd, preferred_element_type=param_dtype(c)
    )
    cache = cache._replace(own=tuple(own), size=cache.size + 1)
    return rearrange(bounded(c, logits_rv), "(b n) v -> b n v", b=prompts), cache


def _read(block: Block, x_bld, tables, local):
    """A layer over whole prompts, and its keys and values, heads first."""
    pair = block.keys_values(x_bld, tables, local)
    out_bld = block.attend(x_bld, *pair, tables, None, local, 0, x_bld.shape[1])
    return out_bld, tuple(rearrange(leaf, "b l h e -> b h l e") for leaf in pair)


def _extend(block: Block, x_r1d, tables, local, prompt, own, mask, size):
    """A layer over one token a sample, and its own keys and values with that token's."""
    new = block.keys_values(x_r1d, tables, local)
    own = tuple(
        jax.lax.dynamic_update_slice_in_dim(old, rearrange(leaf, "r 1 h e -> (r h) 1 e"), size, 1)
        for old, leaf in zip(own, new, strict=True)
    )
    read_r1he = _attention(block.config, block.queries(x_r1d, tables, local), prompt, own, mask)
    return block.finish(x_r1d, read_r1he), own


def _attention(c: DecoderConfig, query_r1he, prompt, own, mask):
    """`layers.attention` of one query a sample, over its prompt's keys and its own."""
    key_bhle, value_bhle = prompt
    key_zme, value_zme = own
    prompts, heads, width, _ = key_bhle.shape
    query_bhqe = rearrange(query_r1he, "(b n) 1 (h g) e -> b h (n g) e", b=prompts, h=heads)
    query_zge = rearrange(query_r1he, "r 1 (h g) e -> (r h) g e", h=heads)
    of_prompt = jnp.einsum("bhqe,bhle->bhql", query_bhqe, key_bhle, preferred_element_type=param_dtype(c))
    of_own = jnp.einsum("zge,zme->zgm", query_zge, key_zme, preferred_element_type=param_dtype(c))
    score = (c.query_scale or head_width(c) ** -0.5) * jnp.concatenate(
        [
            rearrange(of_prompt, "b h (n g) l -> b n h g l", g=query_zge.shape[1]),
            rearrange(of_own, "(b n h) g m -> b n h g m", b=prompts, h=heads),
        ],
        axis=-1,
    )
    if c.attention_cap:
        score = c.attention_cap * jnp.tanh(score / c.attention_cap)
    weight = jax.nn.softmax(jnp.where(mask, score, NEVER), axis=-1).astype(cast(c))
    of_prompt = rearrange(weight[..., :width], "b n h g l -> b h (n g) l") @ value_bhle
    of_own = rearrange(weight[..., width:], "b n h g m -> (b n h) g m") @ value_zme
    return rearrange(of_prompt, "b h (n g) e -> (b n) 1 (h g) e", g=query_zge.shape[1]) + rearrange(
        of_own, "(r h) g e -> r 1 (h g) e", h=heads
    )


def _visible(c: DecoderConfig, cache: Cache, local: bool):
    """Which keys the next token sees, the prompts' and then its own, (b, 1, 1, 1, l + m)."""
    place_1l = jnp.arange(cache.prompt[0][0].shape[2])[None]
    place_1m = jnp.arange(cache.own[0][0].shape[1])[None]
    length_b1 = cache.length_b[:, None]
    prompt_bl, own_1m = place_1l < length_b1, place_1m <= cache.size
    if local:
        prompt_bl = prompt_bl & (length_b1 + cache.size - place_1l < c.window)
        own_1m = own_1m & (cache.size - place_1m < c.window)
    own_bm = jnp.broadcast_to(own_1m, (len(prompt_bl), own_1m.shape[1]))
    return jnp.concatenate([prompt_bl, own_bm], 1)[:, None, None, None]
