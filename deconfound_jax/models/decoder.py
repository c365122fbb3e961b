"""One causal transformer for every family: its config says which (`models.families` reads published ones).

    d = Decoder(config.Decoder(), vocabulary=tokenizer.size)
    params = d.init(key, tokens_bl)
    logits_blv, hidden_bld = d.apply(params, tokens_bl)

`params` is everywhere what `init` returns, so `d.apply` is the policy. Layers are scanned: every leaf under
"layers" has the layers first. A second collection "lora", where one is given, adds its low-rank products
(`models.lora`). PAD may lie left or right of a text: rows are moved to the left edge, read, and moved back.
"""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from deconfound_jax.config import Decoder as DecoderConfig
from deconfound_jax.models.block import Block
from deconfound_jax.models.layers import NEVER, Norm, cast, param_dtype, rotary
from deconfound_jax.models.rows import gather_table, keep_rows
from deconfound_jax.models.tokenizer import PAD

COLLECTIONS = ("params", "lora")  # what belongs to a layer, stacked over the layers
_SMALL = nn.initializers.normal(0.02)


class Decoder(nn.Module):
    """Embedding, blocks, norm, logits.

        p(token_t | tokens before t) = softmax(E norm(h_{t-1})),   0 for `config.forbidden`

    In own vocabularies the forbidden ids are 0, which no token has, and BEGIN's, so what is sampled is a text and
    log-probabilities of texts sum to one.

    Sources: Radford et al. 2019 (GPT-2); Touvron et al. 2302.13971 (Llama); Yang et al. 2412.15115 and 2505.09388
    (Qwen); Gemma Team 2408.00118 and 2503.19786.
    """

    config: DecoderConfig
    vocabulary: int

    def setup(self):
        c = check(self.config)
        stored = param_dtype(c)
        self.embed_tokens = nn.Embed(self.vocabulary, c.width, embedding_init=_SMALL, param_dtype=stored)
        if c.positions == "learned":
            self.positions = self.param("positions", _SMALL, (c.length, c.width), stored)
        self.layers = _scanned(c)(c)
        self.norm = Norm(c)
        if not c.tied:
            self.lm_head = self.param("lm_head", _SMALL, (c.width, self.vocabulary), stored)

    def __call__(self, tokens_bl, positions_bl=None, segments_bl=None):
        """Tokens (b, l) int, PAD (-1) where there is none -> next token's logits (b, l, v), hidden (b, l, d).

        Both in float32 at least; what stands at PAD means nothing.

        Args:
          positions_bl, segments_bl: of rows that hold several texts, PAD to the right. Segment 0 is seen by all that
            follows, another only by itself: a prompt (0) and its completions (1, 2, ...) in one row.
        """
        hidden_bld = self.hidden(tokens_bl, positions_bl, segments_bl)
        return self.predict(hidden_bld), hidden_bld

    def hidden(self, tokens_bl, positions_bl=None, segments_bl=None):
        """Normed last states (b, l, d): `predict` makes them logits, a few positions at a time where memory counts."""
        chex.assert_rank(tokens_bl, 2)
        if (positions_bl is None) != (segments_bl is None):
            raise ValueError("positions_bl, segments_bl: expected both or neither, got one of them")
        if segments_bl is not None:
            return self.read(self.embed(tokens_bl, positions_bl), positions_bl, segments_bl)
        # Texts at the left edge: then a token sees no PAD, and no mask but the causal one is needed.
        order_bl = jnp.argsort(tokens_bl == PAD, axis=1, stable=True)
        hidden_bld = self.read(self.embed(jnp.take_along_axis(tokens_bl, order_bl, 1)))
        return jnp.take_along_axis(hidden_bld, jnp.argsort(order_bl, axis=1)[..., None], 1)

    def embed(self, tokens_bl, positions_bl=None):
        """Token plus learned position, in the parameters' precision; positions are 0, 1, ... unless given.

        Positions that are given stay below `Decoder.length`, the caller's to see to: rows may be wider.
        """
        c, length = self.config, tokens_bl.shape[1]
        if positions_bl is None and length > c.length:
            raise ValueError(f"tokens: expected at most Decoder.length = {c.length} positions, got {length}")
        x_bld = jnp.take(gather_table(self.embed_tokens.embedding), jnp.maximum(tokens_bl, 0), axis=0)
        x_bld = x_bld * jnp.asarray(c.embedding_scale, cast(c))
        if c.positions == "learned":
            x_bld = x_bld + (self.positions[None, :length] if positions_bl is None else self.positions[positions_bl])
        return keep_rows(x_bld)

    def read(self, x_bld, positions_bl=None, segments_bl=None):
        """Embedded tokens at the left edge of their rows -> normed states of the last layer."""
        c = self.config
        if positions_bl is None:
            positions_bl = jnp.arange(x_bld.shape[1])[None]
        segments = None if segments_bl is None else (segments_bl, positions_bl)
        tables = rotary(c, positions_bl)
        x_bld, _ = self.layers(x_bld.astype(cast(c)), tables, segments, jnp.asarray(local_layers(c)))
        return self.norm(x_bld).astype(param_dtype(c))

    def predict(self, hidden_bld):
        """Normed states (..., d) -> logits (..., v), float32 at least."""
        c = self.config
        return bounded(c, read_table(c, hidden_bld, self.embed_tokens.embedding if c.tied else self.lm_head))


def output_table(c: DecoderConfig, params: Any):
    """What makes states logits: the embedding (v, d) where it is tied, else `lm_head` (d, v)."""
    return params["params"]["embed_tokens"]["embedding"] if c.tied else params["params"]["lm_head"]


def read_table(c: DecoderConfig, hidden, table):
    """States (..., d) times `output_table`, or the part of it that holds some ids: logits as yet unbounded."""
    pattern = "...d,vd->...v" if c.tied else "...d,dv->...v"
    return jnp.einsum(pattern, hidden.astype(cast(c)), table.astype(cast(c)), preferred_element_type=param_dtype(c))


def bounded(c: DecoderConfig, logits, first=0):
    """Logits (..., v) of the ids first, first + 1, ...: capped, and `NEVER` for `config.forbidden`."""
    if c.logit_cap:
        logits = c.logit_cap * jnp.tanh(logits / c.logit_cap)
    if not c.forbidden:
        return logits
    ids = (first + jnp.arange(logits.shape[-1])).reshape((1,) * (logits.ndim - 1) + (-1,))
    return jnp.where(functools.reduce(jnp.logical_or, [ids == i for i in c.forbidden]), NEVER, logits)


def _scanned(c: DecoderConfig):
    """Block over the layers: parameters and the local flags have the layers first, the stream is carried."""
    block = Block
    if c.remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if c.remat == "dots" else None
        block = nn.remat(block, prevent_cse=False, policy=policy)
    return nn.scan(
        block,
        variable_axes=dict.fromkeys(COLLECTIONS, 0),
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast, 0),
        length=c.layers,
    )


def local_layers(c: DecoderConfig) -> np.ndarray:
    """Which layers see only a window, (layers,) bool."""
    if not c.window:
        return np.zeros(c.layers, bool)
    return np.asarray([not c.global_every or (i + 1) % c.global_every != 0 for i in range(c.layers)])


def check(c: DecoderConfig) -> DecoderConfig:
    """The config; ValueError names a field that does not fit the others."""
    if not c.head_width and c.width % c.heads:
        raise ValueError(f"Decoder.heads: expected a divisor of width {c.width}, got {c.heads}")
    if c.kv_heads and c.heads % c.kv_heads:
        raise ValueError(f"Decoder.kv_heads: expected a divisor of heads {c.heads}, got {c.kv_heads}")
    if c.attention == "cudnn" and (c.attention_cap or c.dtype != "bfloat16"):
        raise ValueError("Decoder.attention: expected xla or auto with an attention_cap or without bfloat16, got cudnn")
    if c.chunk < 0 or (c.chunk and c.remat != "layer"):
        raise ValueError(f"Decoder.chunk: expected remat='layer' beside it, got {c.remat!r}: nothing would be saved")
    if len(c.rotary_scaling) not in (0, 1, 4):
        raise ValueError(f"Decoder.rotary_scaling: expected 0, 1 or 4 numbers, got {c.rotary_scaling}")
    return c


def param_shapes(config: DecoderConfig) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Path below "params" -> shape and dtype of every leaf, in the tree's order."""
    decoder = Decoder(config, config.vocabulary)
    tree = jax.eval_shape(decoder.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return {tuple(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def count_parameters(params: Any) -> int:
    """Numbers in a tree of arrays (or of shapes, from `jax.eval_shape`)."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
