"""Published weights into the decoder: a folder of safetensors, or a repository of the hub.

    decoder_config, params = load_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    logits_blv, _ = Decoder(decoder_config, decoder_config.vocabulary).apply(params, tokens_bl)

Every tensor's name, type, shape and place is checked against the headers before the first one is read. Then one
stacked leaf at a time is on the host; where a tied head is stored again, first that and the embedding, to compare them.
Pickles and code are never read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict

from deconfound_jax.config import Decoder as DecoderConfig
from deconfound_jax.models.config_json import read_config
from deconfound_jax.models.decoder import param_shapes
from deconfound_jax.models.families import SCORE, Place, canonical_name, place
from deconfound_jax.models.weights import FLOATS, Precision, Stored, check_precision, read_header, read_tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt")  # of a repository's files; none of them is code
ELSEWHERE = ("*/*", "consolidated*")  # the same weights in other formats
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HEAD = "lm_head.weight"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def load_pretrained(
    source: str | os.PathLike, dtype: Precision = "float32", revision: str | None = None
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Reads a language model.

    Args:
      source: a folder with config.json and safetensors, sharded or not; or "organisation/name" on the hub.
      dtype: of the parameters that are returned, whatever the file's; `Decoder.dtype` of the config, the precision of
        computation, stays the caller's to choose.
      revision: of the repository, a branch, a tag or a commit.

    Returns the decoder's config and what its `init` returns. The arrays go to JAX's default device, a leaf at a time;
    `with jax.default_device(jax.devices("cpu")[0])` keeps them on the host until they are sharded.

    Raises FileNotFoundError, or ValueError naming the file, the tensor, the expected and the found shape.
    """
    folder = find_folder(source, revision)
    family, config = _read_config(folder)
    return config, _load(folder, family, config, dtype, extra={})[0]


def load_reward_model(
    source: str | os.PathLike, dtype: Precision = "float32", revision: str | None = None
) -> tuple[DecoderConfig, dict[str, Any], jax.Array]:
    """Reads a sequence classifier with one label: config, params, head (d,).

        reward(text) = head . hidden of the text's last token

    Arguments and errors are `load_pretrained`'s. No logits belong to such a model: its config is tied, so that the
    parameters hold no `lm_head`.
    """
    folder = find_folder(source, revision)
    family, config = _read_config(folder)
    config = dataclasses.replace(config, tied=True)
    params, extra = _load(folder, family, config, dtype, extra={SCORE: (1, config.width)})
    return config, params, jnp.asarray(extra[SCORE][0])


def tensor_shapes(
    family: str, shapes: Mapping[tuple[str, ...], jax.ShapeDtypeStruct | np.ndarray]
) -> dict[str, tuple[int, ...]]:
    """Tensor's name -> shape, of a checkpoint with these leaves."""
    tensors = {}
    for path, leaf in shapes.items():
        where, stacked = place(family, path), path[0] == "layers"
        shape = leaf.shape[1:] if stacked else leaf.shape
        shape = (*shape[:-1], shape[-1] * where.parts)
        for i in range(leaf.shape[0] if stacked else 1):
            tensors[where.name.format(i)] = shape[::-1] if where.transposed else shape
    return tensors


def _load(folder, family: str, config: DecoderConfig, dtype: str, extra: Mapping[str, tuple[int, ...]]):
    """The parameters, and the tensors of `extra` (name -> shape), which are no part of the decoder."""
    check_precision(dtype)
    found = _open(folder, family)
    if extra:
        found.pop(_HEAD, None)
    shapes = param_shapes(config)
    expected, embedding = tensor_shapes(family, shapes) | dict(extra), place(family, ("embed_tokens", "embedding")).name
    repeated = config.tied and _HEAD in found
    _check(folder, family, expected | ({_HEAD: expected[embedding]} if repeated else {}), found)
    if repeated:
        _check_tied(found[_HEAD], found[embedding])
    leaves = {
        path: jnp.asarray(_leaf(place(family, path), path[0] == "layers", leaf.shape, found, dtype))
        for path, leaf in shapes.items()
    }
    return {"params": unflatten_dict(leaves)}, {name: read_tensor(found[name]).astype(dtype) for name in extra}


def _leaf(where: Place, stacked: bool, shape: tuple[int, ...], found: Mapping[str, Stored], dtype: str) -> np.ndarray:
    def read(i):
        tensor = read_tensor(found[where.name.format(i)])
        return np.split(tensor.T if where.transposed else tensor, where.parts, axis=-1)[where.part]

    leaf = np.empty(shape, jnp.dtype(dtype))
    if not stacked:
        leaf[...] = read(0)
        return leaf
    for i, layer in enumerate(leaf):
        layer[...] = read(i)
    return leaf


def find_folder(source: str | os.PathLike, revision: str | None = None) -> epath.Path:
    """The folder itself, or the hub's repository of that name, downloaded; FileNotFoundError says what to do."""
    folder = epath.Path(source).expanduser()
    if folder.is_dir():
        return folder
    name = os.fspath(source)
    if not _REPOSITORY.fullmatch(name):
        raise FileNotFoundError(
            f"{name}: expected a folder with config.json and {SINGLE}, or a hub's name like org/name"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(
            f"{name}: no folder of that name, and the hub needs huggingface_hub: `pip install huggingface_hub`,"
            " or download the repository's files yourself and name their folder"
        ) from error
    try:
        return epath.Path(
            snapshot_download(name, revision=revision, allow_patterns=PATTERNS, ignore_patterns=ELSEWHERE)
        )
    except Exception as error:  # the library's errors have no common base
        raise FileNotFoundError(
            f"{name}: no folder of that name, and the hub did not give it ({type(error).__name__}: {error}); on a"
            " machine with a network run `hf download` for it, copy the folder here and name it"
        ) from error


def _read_config(folder: epath.Path) -> tuple[str, DecoderConfig]:
    path = folder / "config.json"
    record = _read_json(path)
    try:
        return read_config(record)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _read_json(path: epath.Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a file, found none")
    try:
        record = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, found a file that is none ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(record).__name__}")
    return record


def _open(folder: epath.Path, family: str) -> dict[str, Stored]:
    """Canonical name -> tensor, of every shard; nothing is read but headers."""
    if (folder / SINGLE).exists():
        headers = [read_header(folder / SINGLE)]
    elif (folder / INDEX).exists():
        headers = _open_shards(folder / INDEX)
    else:
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (*_PICKLES, ".safetensors", ".gguf", ".h5"))
        pickles = [name for name in others if name.endswith(_PICKLES)]
        why = "; a pickle can run code when it is read, so it is not: convert it to safetensors" if pickles else ""
        raise FileNotFoundError(f"{folder}: expected {SINGLE} or {INDEX}, found {', '.join(others) or 'neither'}{why}")
    found: dict[str, Stored] = {}
    for header in headers:
        for name, tensor in header.items():
            canonical = canonical_name(family, name)
            if canonical in found:
                raise ValueError(f"{tensor.path}: tensor {name!r}: expected once, found in {found[canonical].path} too")
            if canonical is not None:
                found[canonical] = tensor
    return found


def _open_shards(index: epath.Path) -> list[dict[str, Stored]]:
    listed = _read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{index}: weight_map: expected tensors' names and files, found {listed!r}")
    headers = {}
    for name, file in listed.items():
        if not (isinstance(file, str) and epath.Path(file).name == file and file.endswith(".safetensors")):
            raise ValueError(f"{index}: tensor {name!r}: expected a safetensors file beside it, found {file!r}")
        if file not in headers:
            headers[file] = read_header(index.parent / file)
        if name not in headers[file]:
            raise ValueError(f"{index.parent / file}: tensor {name!r}: expected, as {INDEX} says, found none")
    return list(headers.values())


def _check_tied(head: Stored, embedding: Stored) -> None:
    if (read_tensor(head) != read_tensor(embedding)).any():
        raise ValueError(
            f"{head.path}: tensor {_HEAD!r}: expected the embedding again, as config.json's tie_word_embeddings says,"
            " found other numbers"
        )


def _check(folder, family: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Stored]) -> None:
    missing = [name for name in expected if name not in found]
    if missing:
        file = folder / (SINGLE if (folder / SINGLE).exists() else INDEX)
        more = f", nor {len(missing) - 1} others" if missing[1:] else ""
        raise ValueError(
            f"{file}: tensor {missing[0]!r}: expected shape {expected[missing[0]]}, found no such tensor{more}"
        )
    for name, tensor in found.items():
        if name not in expected:
            raise ValueError(
                f"{tensor.path}: tensor {name!r}: expected none of that name in this {family}, found {tensor.shape}"
            )
        if tensor.shape != expected[name]:
            raise ValueError(f"{tensor.path}: tensor {name!r}: expected shape {expected[name]}, found {tensor.shape}")
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{tensor.path}: tensor {name!r}: expected one of {', '.join(FLOATS)}, found {tensor.dtype}"
            )
