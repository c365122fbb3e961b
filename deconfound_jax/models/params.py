"""Parameter trees on disk: one .npz, names joined by "/", no pickle and no further format library."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from etils import epath


def save_params(path: epath.PathLike, params: Any) -> None:
    """Writes a nested dict of arrays."""
    flat = {
        "/".join(str(k.key) for k in path): np.asarray(v) for path, v in jax.tree_util.tree_flatten_with_path(params)[0]
    }
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
