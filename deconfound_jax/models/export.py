"""The decoder out again, as a folder that transformers loads: config.json, model.safetensors, the tokenizer's files.

    export_pretrained("out/policy", "llama", decoder_config, params, tokenizer_files=find_tokenizer_files(source))
    AutoModelForCausalLM.from_pretrained("out/policy")  # in an environment that has torch

A folder is written under another name and renamed when it is whole, config.json last: what can be loaded is complete.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from deconfound_jax.config import Decoder as DecoderConfig
from deconfound_jax.models.config_json import write_config
from deconfound_jax.models.decoder import param_shapes
from deconfound_jax.models.families import FAMILIES, SCORE, place
from deconfound_jax.models.pretrained import SINGLE, tensor_shapes
from deconfound_jax.models.weights import write_safetensors

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
Leaves = dict[tuple[str, ...], np.ndarray]  # path below "params" -> leaf
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)
_OWN_FILES = ("config.json", SINGLE)


def export_pretrained(
    folder: str | os.PathLike,
    family: str,
    config: DecoderConfig,
    params: Mapping[str, Any],
    tokenizer_files: Sequence[str | os.PathLike] = (),
    token_ids: Mapping[str, int] | None = None,
) -> None:
    """Writes a language model, in the parameters' own precision.

    Args:
      folder: absent or empty so far.
      family: a key of `families.FAMILIES`, transformers' model_type.
      params: what `Decoder.init` returns; low-rank additions are merged before (`models.lora`).
      tokenizer_files: copied beside the weights, see `find_tokenizer_files`.
      token_ids: bos_token_id, eos_token_id, pad_token_id for config.json; null there where left out.

    Raises ValueError naming a field that the family cannot hold or a parameter of the wrong shape, FileExistsError for
    a folder that holds something.
    """
    config, leaves = _leaves(config, params)
    record = write_config(family, config)
    _write(folder, family, leaves, record | _known(token_ids or {}), {}, tokenizer_files)


def export_reward_model(
    folder: str | os.PathLike,
    family: str,
    config: DecoderConfig,
    params: Mapping[str, Any],
    head: jax.Array | np.ndarray,
    pad_token_id: int,
    pooling: str = "last",
    tokenizer_files: Sequence[str | os.PathLike] = (),
    token_ids: Mapping[str, int] | None = None,
) -> None:
    """Writes a reward model as a sequence classifier with one label.

        reward(text) = head . hidden of the text's last token

    Args:
      head: (d,) or (d, 1).
      pad_token_id: transformers reads the last token that is not this one, so it must be an id that no text ends with.
      pooling: of the hidden states; "last", as classifiers know no other.

    The other arguments and errors are `export_pretrained`'s.
    """
    if pooling != "last":
        raise ValueError(f"pooling: expected 'last', all that a sequence classifier can do, got {pooling!r}")
    config, leaves = _leaves(config, params)
    head = np.asarray(head)
    if head.shape not in ((config.width,), (config.width, 1)):
        raise ValueError(f"head: expected shape ({config.width},) or ({config.width}, 1), got {head.shape}")
    if not 0 <= pad_token_id < config.vocabulary:
        raise ValueError(f"pad_token_id: expected an id below {config.vocabulary}, got {pad_token_id}")
    record = write_config(family, config) | _known({**(token_ids or {}), "pad_token_id": pad_token_id})
    record |= {"architectures": [FAMILIES[family].classifier], "num_labels": 1}
    record |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    leaves.pop(("lm_head",), None)  # a classifier has no logits
    extra = {SCORE: head.reshape(1, -1)}
    _write(folder, family, leaves, record, extra, tokenizer_files)


def find_tokenizer_files(folder: str | os.PathLike) -> list[epath.Path]:
    """The files of a published folder that make its tokenizer, its chat template and its defaults of generation."""
    return [epath.Path(folder) / name for name in _TOKENIZER_FILES if (epath.Path(folder) / name).exists()]


def _leaves(
    config: DecoderConfig, params: Mapping[str, Any]
) -> tuple[DecoderConfig, dict[tuple[str, ...], np.ndarray]]:
    """The config with the embedding's rows as vocabulary, and path -> leaf on the host."""
    if set(params) != {"params"}:
        raise ValueError(f"params: expected the collection 'params' alone, got {sorted(params)}: merge 'lora' first")
    flat = jax.tree_util.tree_flatten_with_path(params["params"])[0]
    leaves = {tuple(k.key for k in path): leaf for path, leaf in flat}
    embedding = leaves.get(("embed_tokens", "embedding"))
    if embedding is not None:
        config = dataclasses.replace(config, vocabulary=len(embedding))
    expected = param_shapes(config)
    for path in sorted(expected.keys() | leaves.keys()):
        shapes = [tree[path].shape if path in tree else None for tree in (expected, leaves)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"params: {'/'.join(path)}: expected shape {shapes[0]}, got {shapes[1]}")
    return config, jax.device_get(leaves)


def _known(token_ids: Mapping[str, int]) -> dict[str, int | None]:
    unknown = sorted(set(token_ids) - set(TOKEN_IDS))
    if unknown:
        raise ValueError(f"token_ids: expected some of {', '.join(TOKEN_IDS)}, got {', '.join(unknown)}")
    # None is written too: left out, transformers takes another model's id.
    return {name: token_ids.get(name) for name in TOKEN_IDS}


def _write(folder, family, leaves, record, extra, tokenizer_files) -> None:
    folder, files = epath.Path(folder), [epath.Path(file) for file in tokenizer_files]
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: expected no folder or an empty one, found files in it")
    for file in files:
        if file.name in _OWN_FILES or not file.is_file():
            raise ValueError(f"tokenizer_files: expected a file beside {' and '.join(_OWN_FILES)}, got {file}")
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():  # of an export that was cut off
        partial.rmtree()
    partial.mkdir(parents=True)
    sources = _sources(family, leaves)
    dtype = np.result_type(*{leaf.dtype for leaf in leaves.values()})
    shapes = tensor_shapes(family, leaves) | {name: tensor.shape for name, tensor in extra.items()}

    def make(name):
        return np.asarray(extra[name] if name in extra else _tensor(sources[name], leaves), dtype)

    specs = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    write_safetensors(partial / SINGLE, specs, make, {"format": "pt"})
    for file in files:
        file.copy(partial / file.name)
    (partial / "config.json").write_text(json.dumps({**record, "torch_dtype": str(dtype)}, indent=2) + "\n")
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)


def _sources(family: str, leaves: Leaves) -> dict[str, list]:
    """Tensor's name -> (part, path, layer or None, transposed) of the leaves that it is made of."""
    sources: dict[str, list] = {}
    for path, leaf in leaves.items():
        where = place(family, path)
        for i in range(len(leaf)) if path[0] == "layers" else (None,):
            sources.setdefault(where.name.format(i), []).append((where.part, path, i, where.transposed))
    return sources


def _tensor(parts: list, leaves: Leaves) -> np.ndarray:
    blocks = [leaves[path] if i is None else leaves[path][i] for _, path, i, _ in sorted(parts)]
    tensor = np.concatenate(blocks, -1) if len(blocks) > 1 else blocks[0]
    return tensor.T if parts[0][-1] else tensor
