"""The MiniLM sentence encoder: BERT in Flax, its weights from safetensors, text in, unit vectors out."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import chex
import einops
import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from tokenizers import Tokenizer

from deconfound_jax.models import weights
from deconfound_jax.models.features import pool

BUCKETS = (8, 16, 24, 32, 48, 64, 96, 128)  # padded lengths in tokens: one compilation each
# Full float32 also where the default is coarser (TF32, bf16): the same text keeps its vector on every device.
PRECISION = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT, under the names of `config.json`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"BertConfig.hidden_size: expected a multiple of num_attention_heads = {self.num_attention_heads},"
                f" got {self.hidden_size}"
            )

    @classmethod
    def read(cls, path: str | os.PathLike) -> BertConfig:
        """Reads `config.json`; ValueError names a field that is missing or that this encoder does not compute."""
        data = json.loads(Path(path).read_text())
        fixed = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
        for name, expected in fixed.items():
            if data.get(name, expected) != expected:
                raise ValueError(f"{path}: {name}: expected {expected!r}, got {data[name]!r}")
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [name for name in names if name not in data]
        if missing:
            raise ValueError(f"{path}: expected a field {missing[0]!r}, missing{_nearest(missing[0], data)}")
        return cls(**{name: data[name] for name in names})


class Layer(nn.Module):
    """Self-attention and MLP; each adds to its input, then normalises (post-layernorm)."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden_bld: jax.Array, mask_bl: jax.Array) -> jax.Array:
        c = self.config
        dense = functools.partial(nn.Dense, precision=PRECISION)
        split = functools.partial(einops.rearrange, pattern="b l (h e) -> b h l e", h=c.num_attention_heads)
        query_bhle, key_bhle, value_bhle = (
            split(dense(c.hidden_size, name=name)(hidden_bld)) for name in ("query", "key", "value")
        )
        scores_bhlm = jnp.einsum("bhle,bhme->bhlm", query_bhle, key_bhle, precision=PRECISION)
        scores_bhlm = scores_bhlm / np.sqrt(c.hidden_size // c.num_attention_heads).astype(np.float32)
        scores_bhlm = jnp.where(mask_bl[:, None, None, :], scores_bhlm, jnp.finfo(scores_bhlm.dtype).min)
        mixed_bhle = jnp.einsum("bhlm,bhme->bhle", jax.nn.softmax(scores_bhlm), value_bhle, precision=PRECISION)
        mixed_bld = einops.rearrange(mixed_bhle, "b h l e -> b l (h e)")
        mixed_bld = dense(c.hidden_size, name="attention_out")(mixed_bld)
        hidden_bld = _norm(c, "attention_norm")(hidden_bld + mixed_bld)
        inner_blf = nn.gelu(dense(c.intermediate_size, name="mlp_in")(hidden_bld), approximate=False)
        return _norm(c, "mlp_norm")(hidden_bld + dense(c.hidden_size, name="mlp_out")(inner_blf))


class Bert(nn.Module):
    """Token ids to hidden states, for a single segment (token type 0), without dropout."""

    config: BertConfig

    @nn.compact
    def __call__(self, tokens_bl: jax.Array, mask_bl: jax.Array) -> jax.Array:
        c = self.config
        word_bld = nn.Embed(c.vocab_size, c.hidden_size, name="word")(tokens_bl)
        positions_l = jnp.arange(tokens_bl.shape[1])
        position_ld = nn.Embed(c.max_position_embeddings, c.hidden_size, name="position")(positions_l)
        segment_bld = nn.Embed(c.type_vocab_size, c.hidden_size, name="segment")(jnp.zeros_like(tokens_bl))
        hidden_bld = _norm(c, "norm")(word_bld + position_ld[None] + segment_bld)
        for i in range(c.num_hidden_layers):
            hidden_bld = Layer(c, name=f"layer_{i}")(hidden_bld, mask_bl)
        return hidden_bld


def params_from_tensors(tensors: Mapping[str, np.ndarray], config: BertConfig) -> dict:
    """The parameter tree of `Bert(config)` from tensors under their safetensors names.

    Linear weights are stored (out, in) and come out (in, out); everything becomes
    float32. Raises ValueError naming a tensor that is missing, unexpected or of the
    wrong shape.

        params = params_from_tensors(load_safetensors(folder / "model.safetensors"), config)
    """
    places = _places(config)
    # Neither carries weights that the sentence vector depends on.
    given = {name for name in tensors if not name.startswith("pooler.") and name != "embeddings.position_ids"}
    for name in places:
        if name not in given:
            raise ValueError(f"weights: expected a tensor {name!r}, missing{_nearest(name, given)}")
    for name in sorted(given):
        if name not in places:
            raise ValueError(f"weights: unexpected tensor {name!r}{_nearest(name, places)}")
    tokens_bl = jax.ShapeDtypeStruct((1, 2), np.int32)
    mask_bl = jax.ShapeDtypeStruct((1, 2), np.bool_)
    shapes = jax.eval_shape(Bert(config).init, jax.eval_shape(lambda: jax.random.key(0)), tokens_bl, mask_bl)
    shapes = flax.traverse_util.flatten_dict(shapes["params"])
    flat = {}
    for name, path in places.items():
        tensor = np.asarray(tensors[name], np.float32)
        flat[path] = tensor.T if path[-1] == "kernel" else tensor
        if flat[path].shape != shapes[path].shape:
            expected = shapes[path].shape[::-1] if path[-1] == "kernel" else shapes[path].shape
            raise ValueError(f"weights: tensor {name!r}: expected shape {expected}, got {tensor.shape}")
    return flax.traverse_util.unflatten_dict(flat)


@functools.partial(jax.jit, static_argnames="config")
def embed(params: dict, tokens_bl: jax.Array, mask_bl: jax.Array, config: BertConfig) -> jax.Array:
    """Sentence vectors (b, d): the mean of hidden states over the mask, scaled to length one.

    e = h / |h|,  h = sum_l m_l h_l / sum_l m_l
    """
    chex.assert_rank([tokens_bl, mask_bl], 2)
    chex.assert_equal_shape([tokens_bl, mask_bl])
    mean_bd = pool(Bert(config).apply({"params": params}, tokens_bl, mask_bl), mask_bl, "mean")
    return mean_bd / jnp.maximum(jnp.linalg.norm(mean_bd, axis=-1, keepdims=True), 1e-12)


def encode(
    texts: Sequence[str],
    folder: str | os.PathLike = "",
    max_tokens: int = 128,
    batch: int = 64,
    on_batch: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Sentence vectors of texts, each of length one.

    Texts that repeat are computed once. `folder` as in `weights.minilm_folder`;
    longer texts are cut to `max_tokens`, begin and end marks included.
    `on_batch(done, total)` hears of progress, in distinct texts.
    Returns (n, d) float32, in the order of `texts`.

        encode(["You won't believe this", "Council votes on budget"]).shape
        (2, 384)

    Source: Reimers and Gurevych 2019 (1908.10084); weights all-MiniLM-L6-v2.
    """
    folder = weights.minilm_folder(folder)
    config = BertConfig.read(folder / "config.json")
    _check_arguments(texts, folder, config, max_tokens, batch)
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    vectors_ud = np.zeros((len(place), config.hidden_size), np.float32)
    if not place:
        return vectors_ud
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    tokens = [encoding.ids for encoding in tokenizer.encode_batch(list(place))]
    params = jax.device_put(params_from_tensors(weights.load_safetensors(folder / "model.safetensors"), config))
    by_length = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    for start in range(0, len(tokens), batch):
        rows = by_length[start : start + batch]
        tokens_bl, mask_bl = _pad([tokens[i] for i in rows], batch, max_tokens)
        vectors_ud[rows] = np.asarray(embed(params, tokens_bl, mask_bl, config))[: len(rows)]
        if on_batch is not None:
            on_batch(start + len(rows), len(tokens))
    return vectors_ud[[place[text] for text in texts]]


def _norm(config: BertConfig, name: str) -> nn.LayerNorm:
    # The fast variance E[h^2] - E[h]^2 cancels; with an epsilon of 1e-12 nothing would hide that.
    return nn.LayerNorm(epsilon=config.layer_norm_eps, use_fast_variance=False, name=name)


def _places(config: BertConfig) -> dict[str, tuple[str, ...]]:
    """Safetensors name -> path in the parameter tree."""
    places = {
        "embeddings.word_embeddings.weight": ("word", "embedding"),
        "embeddings.position_embeddings.weight": ("position", "embedding"),
        "embeddings.token_type_embeddings.weight": ("segment", "embedding"),
        "embeddings.LayerNorm.weight": ("norm", "scale"),
        "embeddings.LayerNorm.bias": ("norm", "bias"),
    }
    modules = {
        "attention.self.query": ("query", "kernel"),
        "attention.self.key": ("key", "kernel"),
        "attention.self.value": ("value", "kernel"),
        "attention.output.dense": ("attention_out", "kernel"),
        "attention.output.LayerNorm": ("attention_norm", "scale"),
        "intermediate.dense": ("mlp_in", "kernel"),
        "output.dense": ("mlp_out", "kernel"),
        "output.LayerNorm": ("mlp_norm", "scale"),
    }
    for i in range(config.num_hidden_layers):
        for module, (name, weight) in modules.items():
            places[f"encoder.layer.{i}.{module}.weight"] = (f"layer_{i}", name, weight)
            places[f"encoder.layer.{i}.{module}.bias"] = (f"layer_{i}", name, "bias")
    return places


def _nearest(name: str, names) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; the nearest is {close[0]!r}" if close else ""


def _check_arguments(texts: Sequence[str], folder: Path, config: BertConfig, max_tokens: int, batch: int) -> None:
    if isinstance(texts, str):
        raise TypeError("texts: expected a sequence of str, got one str")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts: row {row}: expected str, got {type(text).__name__}")
    if not 3 <= max_tokens <= config.max_position_embeddings:
        raise ValueError(f"max_tokens: expected 3 to {config.max_position_embeddings}, got {max_tokens}")
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    pooling = folder / "1_Pooling" / "config.json"
    if pooling.is_file() and not json.loads(pooling.read_text()).get("pooling_mode_mean_tokens", True):
        raise ValueError(f"{pooling}: pooling_mode_mean_tokens: expected true (this encoder takes the mean), got false")


def _pad(tokens: Sequence[Sequence[int]], batch: int, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask (batch, bucket). Rows beyond the given ones repeat the last, so that no mask is empty."""
    longest = max(map(len, tokens))
    length = next((size for size in BUCKETS if longest <= size <= max_tokens), max_tokens)
    tokens_bl = np.zeros((batch, length), np.int32)
    mask_bl = np.zeros((batch, length), np.bool_)
    for row in range(batch):
        ids = tokens[min(row, len(tokens) - 1)]
        tokens_bl[row, : len(ids)] = ids
        mask_bl[row, : len(ids)] = True
    return tokens_bl, mask_bl
