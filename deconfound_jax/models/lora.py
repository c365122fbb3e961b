"""Low-rank adapters: what is trained beside frozen kernels.

    lora = init_lora(key, params, rank=8)                             # the only tree that an optimizer sees
    logits_blv, _ = decoder.apply({**params, "lora": lora}, tokens_bl)
    params = merge_lora(params, lora)                                 # a decoder like any other

Adapters are a nested dict as parameters are, so `models.params` writes and reads them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict


def init_lora(key, params: Any, pattern: str = "_proj$", rank: int = 8, alpha: float = 16.0) -> dict[str, Any]:
    """Adapters of the kernels whose path matches: x W becomes x W + (x a) b.

        a ~ Normal(0, (alpha / rank)^2 / in),   b = 0

    so a decoder with new adapters is the decoder. The factor alpha / rank lies in a, not beside the product: the
    gradient of b is Hu et al.'s, and a saved pair needs no number with it.

    Args:
      params: what `Decoder.init` returns.
      pattern: regular expression, searched in paths such as "layers/q_proj".
      rank, alpha: width of the low-rank product, and alpha / rank its scale.
    Returns:
      The collection "lora": {"layers": {"q_proj": {"a": (layers, in, rank), "b": (layers, rank, out)}}}.
    Raises:
      ValueError: no kernel matches; it names those there are.

        init_lora(key, params, pattern="(q|v)_proj", rank=4)

    Source: Hu et al. 2106.09685.
    """
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    kernels = _kernels(params)
    chosen = [path for path in kernels if re.search(pattern, "/".join(path))]
    if not chosen:
        names = sorted("/".join(path) for path in kernels)
        raise ValueError(f"pattern: expected to match one of {names}, got {pattern!r}")
    found = {}
    for path, row_key in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        *layers, fan_in, out = kernels[path].shape
        # At least float32: an optimizer's steps of 1e-4 vanish in bfloat16.
        stored = jnp.promote_types(kernels[path].dtype, jnp.float32)
        noise = jax.random.normal(row_key, (*layers, fan_in, rank), stored)
        found[*path, "a"] = noise * (alpha / rank / fan_in**0.5)
        found[*path, "b"] = jnp.zeros((*layers, rank, out), stored)
    return unflatten_dict(found)


def merge_lora(params: Any, lora: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters {"params": ...} with W + a b in place of W; kernels without an adapter are the same arrays.

    Raises:
      ValueError: an adapter of a kernel that is not there, or of another shape.
    """
    kernels, adapters = _kernels(params), flatten_dict(dict(lora))
    flat = flatten_dict(params["params"])
    for path in {path[:-1] for path in adapters}:
        name, a, b = "/".join(path), adapters[*path, "a"], adapters[*path, "b"]
        if path not in kernels:
            raise ValueError(f"lora: expected adapters of {sorted('/'.join(k) for k in kernels)}, got {name!r}")
        kernel, shape = kernels[path], (*a.shape[:-1], b.shape[-1])
        if kernel.shape != shape:
            raise ValueError(f"lora: {name}: expected a product of shape {kernel.shape}, got {shape}")
        flat[*path, "kernel"] = kernel + jnp.matmul(a, b, precision="highest").astype(kernel.dtype)
    return {"params": unflatten_dict(flat)}


def _kernels(params: Any) -> dict[tuple[str, ...], jax.Array]:
    """Path -> kernel, of every dense layer."""
    return {path[:-1]: leaf for path, leaf in flatten_dict(params["params"]).items() if path[-1] == "kernel"}
