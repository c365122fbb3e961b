"""Features phi(x) of a text: pooled hidden states, arrays read from a file, and a cache of computed ones."""

from __future__ import annotations

import difflib
import hashlib
import io
import logging
import os
import uuid
from collections.abc import Callable, Mapping

import chex
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

POOLINGS = ("sum+length", "mean", "last")
SUFFIXES = (".npy", ".npz", ".safetensors")

_log = logging.getLogger(__name__)


def pool(hidden_bld: jax.Array, mask_bl: jax.Array, pooling: str) -> jax.Array:
    """One float32 vector a text from its hidden states.

        sum+length   [sum_l m_l h_l, sum_l m_l]          (b, d + 1)
        mean         sum_l m_l h_l / max(1, sum_l m_l)   (b, d)
        last         h at the last l with m_l = 1        (b, d)

    A text whose mask is empty gives zeros. Sums keep counts of words that a mean
    blurs. Raises ValueError for an unknown pooling.

        features_nd = pool(hidden_bld, tokens_bl != PAD, "sum+length")
    """
    chex.assert_rank([hidden_bld, mask_bl], [3, 2])
    chex.assert_equal_shape_prefix([hidden_bld, mask_bl], 2)
    if pooling not in POOLINGS:
        raise ValueError(f"features.pooling: expected one of {POOLINGS}, got {pooling!r}{_nearest(pooling, POOLINGS)}")
    mask_bl = mask_bl.astype(bool)
    hidden_bld = hidden_bld.astype(jnp.float32)
    count_b1 = jnp.sum(mask_bl, axis=1, keepdims=True, dtype=jnp.float32)
    if pooling == "last":
        position_bl = jnp.broadcast_to(jnp.arange(mask_bl.shape[1])[None, :], mask_bl.shape)
        last_b1 = jnp.max(position_bl, axis=1, keepdims=True, where=mask_bl, initial=0)
        last_bd = jnp.take_along_axis(hidden_bld, last_b1[:, :, None], axis=1)[:, 0]
        return jnp.where(count_b1 > 0, last_bd, 0.0)
    # A `where`, not a product: what stands behind the mask may be NaN.
    sum_bd = jnp.sum(jnp.where(mask_bl[:, :, None], hidden_bld, 0.0), axis=1)
    if pooling == "mean":
        return sum_bd / jnp.maximum(count_b1, 1.0)
    return jnp.concatenate([sum_bd, count_b1], axis=1)


def read_features(path: str | os.PathLike, n_rows: int, array: str = "", text_column: str = "") -> np.ndarray:
    """Features (n_rows, d) float32, aligned with the log's rows, from .npy, .npz or .safetensors.

    The array named `array`, else the only two-dimensional one, else the one named
    `text_column`. If the file also holds integers `<name>_row`, the array is a table
    of distinct texts, and row i of the log is `<name>[<name>_row[i]]`.
    Raises FileNotFoundError, or ValueError naming what was expected, what came and
    the nearest name: unknown suffix or array, wrong length, wrong type, NaN.

        features_nd = read_features("minilm_features.npz", len(logs), text_column="headline")
    """
    path = epath.Path(path)
    arrays = _load(path)
    name = _choose(path, arrays, array, text_column)
    features = arrays[name]
    is_number = any(jnp.issubdtype(features.dtype, kind) for kind in (jnp.floating, jnp.integer))  # bfloat16, too
    if features.ndim != 2 or not is_number or not features.shape[1]:
        raise ValueError(f"{path}: array {name!r}: expected numbers (rows, width), got {_describe(features)}")
    if f"{name}_row" in arrays:
        features = features[_check_index(path, f"{name}_row", arrays[f"{name}_row"], len(features), n_rows)]
    if len(features) != n_rows:
        raise ValueError(f"{path}: array {name!r}: expected {n_rows} rows, one a row of the log, got {len(features)}")
    with np.errstate(over="ignore"):  # what overflows float32 is reported below, with its row
        features = np.asarray(features, np.float32)
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if bad.size:
        raise ValueError(
            f"{path}: array {name!r}: expected finite float32 numbers, got NaN or infinity for {bad.size} rows of the"
            f" log, first {bad[0]}"
        )
    return features


def cached(folder: str | os.PathLike, key: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """The array stored under `key` in `folder`, computed and stored if it is not there.

    `key` must name everything the array depends on (data, weights, settings); its
    hash names the file. A damaged file is computed anew, with a warning in the log.

        features_nd = cached("cache", f"{logs.fingerprint} minilm", lambda: encode(logs.text))
    """
    folder = epath.Path(folder)
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    if path.exists():
        try:
            return _read_npy(path.read_bytes())
        except (ValueError, EOFError, OSError) as error:
            _log.warning("%s: damaged cache file, computed anew (%s)", path, error)
    value = np.asarray(compute())
    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=False)
    folder.mkdir(parents=True, exist_ok=True)
    # Renamed only when whole: a killed run, or two runs at once, leave no torn file under the name.
    temporary = folder / f"{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        temporary.write_bytes(buffer.getbuffer())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return value


def _load(path: epath.Path) -> dict[str, np.ndarray]:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"features.source: expected a file ending in one of {SUFFIXES}, got {str(path)!r}")
    if not path.exists():
        raise FileNotFoundError(f"features.source: expected a file of features, found none at {path}")
    if path.suffix == ".safetensors":
        from deconfound_jax.models import weights  # here: an installation without file formats still pools

        return weights.load_safetensors(path)
    try:
        if path.suffix == ".npy":
            return {path.stem: _read_npy(path.read_bytes())}
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # numpy and zipfile raise half a dozen kinds for a damaged file
        raise ValueError(f"{path}: expected a {path.suffix} file, got one that cannot be read ({error})") from error


def _choose(path: epath.Path, arrays: Mapping[str, np.ndarray], array: str, text_column: str) -> str:
    if array:
        if array not in arrays:
            raise ValueError(
                f"features.array: expected one of {sorted(arrays)} in {path}, got {array!r}{_nearest(array, arrays)}"
            )
        return array
    tables = [name for name in sorted(arrays) if arrays[name].ndim == 2]
    if len(tables) == 1:
        return tables[0]
    if not tables:
        held = {name: value.shape for name, value in sorted(arrays.items())}
        raise ValueError(f"{path}: expected an array (rows, width), got shapes {held}")
    if text_column in tables:
        return text_column
    raise ValueError(
        f"{path}: expected one array, or {text_column!r} with {text_column + '_row'!r}, got {sorted(arrays)}"
        f"{_nearest(text_column, tables)}; name one with `--features.array`"
    )


def _check_index(path: epath.Path, name: str, index: np.ndarray, size: int, n_rows: int) -> np.ndarray:
    if index.ndim != 1 or index.dtype.kind not in "iu":
        raise ValueError(f"{path}: array {name!r}: expected integers (rows,), got {_describe(index)}")
    if len(index) != n_rows:
        raise ValueError(f"{path}: array {name!r}: expected {n_rows} rows, one a row of the log, got {len(index)}")
    bad = np.flatnonzero((index < 0) | (index >= size))
    if bad.size:
        raise ValueError(f"{path}: array {name!r}: row {bad[0]}: expected 0 to {size - 1}, got {index[bad[0]]}")
    return index


def _read_npy(data: bytes) -> np.ndarray:
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def _describe(value: np.ndarray) -> str:
    return f"{value.dtype} of shape {value.shape}"


def _nearest(name: str, names) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; the nearest is {close[0]!r}" if close else ""
