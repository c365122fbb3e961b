"""Parameter trees on disk: one .npz, names joined by "/", no pickle and no further format library."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from etils import epath


def save_params(path: epath.PathLike, params: Any) -> None:
    """Writes a nested dict of arrays; ValueError for a type that NumPy's format does not know, bfloat16."""
    flat = {
        "/".join(str(k.key) for k in path): np.asarray(v) for path, v in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    for name, value in flat.items():
        if value.dtype.kind == "V":
            raise ValueError(f"{name}: expected a type of NumPy's, got {value.dtype}; `export_pretrained` writes these")
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(file, **flat)


def load_params(path: epath.PathLike) -> dict[str, Any]:
    """Reads what `save_params` wrote; FileNotFoundError where there is nothing."""
    tree: dict[str, Any] = {}
    with epath.Path(path).open("rb") as file, np.load(file, allow_pickle=False) as data:
        for name in data.files:
            *folders, leaf = name.split("/")
            node = tree
            for folder in folders:
                node = node.setdefault(folder, {})
            node[leaf] = data[name]
    return tree
