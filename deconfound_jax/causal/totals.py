"""Cross products of a log that comes in batches: memory that does not grow with rows.

Every row is r = [1, features, numbers], and the totals over rows with weights w are

    sum w r r',    sum over rows of a level w r,    sum w of rows in a pair of levels

with r less the means of a first block: centring on the true means later cancels next
to nothing, since a block of a share s of all rows is at most sqrt(1 / s) sds off.
Slices of rows are converted to fp64 as they are multiplied (fp32 products of a
million rows lose 1e-7 and save a third of the time), on as many threads as there
are cores, and are added in the order of rows: equal data, equal bits.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import scipy.sparse

from deconfound_jax.structs import Logs

_BLOCK_CELLS = 12_000_000  # of one block in fp64: 100 MB a thread
_SLICE_ROWS = 8192  # of one matrix product: stays near the processor


class Columns(NamedTuple):
    """Which columns of a log are totalled."""

    numbers: tuple[str, ...]
    categories: tuple[str, ...]


class Totals(NamedTuple):
    """Totals over rows; r columns are [1, features, numbers], less `centre_r`."""

    columns: Columns
    centre_r: np.ndarray
    gram_rr: np.ndarray
    sums: tuple[np.ndarray, ...]  # (levels, r), one a category, levels in order of `names`
    tables: dict[tuple[int, int], scipy.sparse.csr_array]  # categories i < j -> weights of pairs of levels
    names: tuple[np.ndarray, ...]  # level names in sorted order, one array a category
    rows: int  # rows read, not weighted

    @property
    def features(self) -> int:
        """Width d of the features."""
        return len(self.gram_rr) - 1 - len(self.columns.numbers)

    def place(self, number: str) -> int:
        """A numeric column's place in r."""
        return 1 + self.features + self.columns.numbers.index(number)


class _Block(NamedTuple):
    features_nd: np.ndarray
    numbers_nk: np.ndarray
    weight_n: np.ndarray | None
    codes: list[np.ndarray]
    first_row: int


def totals(batches: Iterable[tuple[Logs, np.ndarray]], columns: Columns, threads: int = 0) -> Totals:
    """Reads every batch once.

    Args:
      batches: pairs of a log and its features (n, d), any float type, any sizes.
      columns: numeric and category columns to total.
      threads: matrix products at once; 0: one a core that this process may use.

    Raises:
      ValueError: no batch, batches of different widths, a column that a batch lacks,
        or a value that is not finite, named with its row.
    """
    threads = threads or _cores()
    state, index, rows = None, [dict() for _ in columns.categories], 0
    with ThreadPoolExecutor(threads) as pool:
        for block in _blocks(batches, columns, index):
            if state is None:
                state = _start(block, columns)
                pending: deque = deque()
            pending.append(pool.submit(_products, block, state["centre_r"], columns))
            rows = block.first_row + len(block.features_nd)
            if len(pending) > threads:
                _add(state, pending.popleft().result())
        while state and pending:
            _add(state, pending.popleft().result())
    if state is None:
        raise ValueError("batches: expected at least one row, got none")
    return _finish(state, columns, index, rows)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _blocks(batches, columns: Columns, index: list[dict]) -> Iterator[_Block]:
    """Batches cut into blocks of bounded size, categories coded by order of appearance."""
    row, width = 0, None
    for logs, features_nd in batches:
        features_nd = np.asarray(features_nd)
        width = features_nd.shape[1] if width is None and features_nd.ndim == 2 else width
        if features_nd.shape != (len(logs), width):
            raise ValueError(f"batches: expected features ({len(logs)}, {width}) at row {row}, got {features_nd.shape}")
        for name in (*columns.numbers, *columns.categories):
            if name not in logs.columns:
                raise ValueError(f"batches: expected column {name!r} at row {row}, got {sorted(logs.columns)}")
        numbers = [np.asarray(logs.columns[name], np.float64) for name in columns.numbers]
        numbers_nk = np.stack(numbers, 1) if numbers else np.zeros((len(logs), 0))
        weight_n = _weights(logs, row)
        codes = [_codes(logs.columns[name], seen) for name, seen in zip(columns.categories, index, strict=True)]
        step = int(np.clip(_BLOCK_CELLS // (1 + width + numbers_nk.shape[1]), 1024, 1 << 16))
        for start in range(0, len(logs), step):
            part = slice(start, start + step)
            weight = None if weight_n is None else weight_n[part]
            yield _Block(features_nd[part], numbers_nk[part], weight, [c[part] for c in codes], row + start)
        row += len(logs)


def _weights(logs: Logs, row: int) -> np.ndarray | None:
    if not logs.roles.weight:
        return None
    weight_n = np.asarray(logs.columns[logs.roles.weight], np.float64)
    good_n = np.isfinite(weight_n) & (weight_n >= 0)
    if not good_n.all():
        bad = int(np.argmin(good_n))
        raise ValueError(f"{logs.roles.weight}: expected a weight from 0 on, got {weight_n[bad]} in row {row + bad}")
    return weight_n


def _codes(values, seen: dict[str, int]) -> np.ndarray:
    """Codes of a column's values as text; new ones are added to `seen`."""
    values = np.asarray(values)
    if values.dtype.kind == "O":
        return np.fromiter((seen.setdefault(str(v), len(seen)) for v in values), int, len(values))
    distinct, inverse_n = np.unique(values, return_inverse=True)
    codes = [seen.setdefault(str(name), len(seen)) for name in distinct.astype(str)]
    return np.asarray(codes, int)[inverse_n]


def _start(block: _Block, columns: Columns) -> dict:
    """Empty totals, centred on the means of a first block."""
    means = [values.mean(0, dtype=np.float64) for values in (block.features_nd, block.numbers_nk)]
    centre_r = np.concatenate([np.zeros(1), *means])
    r, n = len(centre_r), len(columns.categories)
    tables = {(i, j): scipy.sparse.csr_array((1, 1)) for j in range(n) for i in range(j)}
    sums = [np.zeros((0, r)) for _ in columns.categories]
    return {"centre_r": centre_r, "gram_rr": np.zeros((r, r)), "sums": sums, "tables": tables}


def _products(block: _Block, centre_r: np.ndarray, columns: Columns):
    """One block's cross products, level sums (levels seen, their sums), codes and weights."""
    n, d = block.features_nd.shape
    matrix_nr = np.empty((n if block.codes else min(n, _SLICE_ROWS), len(centre_r)))  # whole only where it is summed
    matrix_nr[:, 0] = 1.0
    gram_rr = np.zeros((len(centre_r),) * 2)
    for start in range(0, n, _SLICE_ROWS):
        rows = slice(start, min(start + _SLICE_ROWS, n))
        part = matrix_nr[rows] if block.codes else matrix_nr[: rows.stop - start]
        np.subtract(block.features_nd[rows], centre_r[None, 1 : 1 + d], out=part[:, 1 : 1 + d])
        np.subtract(block.numbers_nk[rows], centre_r[None, 1 + d :], out=part[:, 1 + d :])
        if block.weight_n is not None:
            part = part * np.sqrt(block.weight_n[rows])[:, None]
        gram_rr += part.T @ part
    if not np.isfinite(gram_rr[0]).all():
        _name_what_is_not_finite(block, gram_rr[0], columns)
    weight_n = np.ones(n) if block.weight_n is None else block.weight_n
    sums = []
    for codes_n in block.codes:
        levels, local_n = np.unique(codes_n, return_inverse=True)
        member = scipy.sparse.csr_array((weight_n, (local_n, np.arange(n))))
        sums.append((levels, member @ matrix_nr))
    return gram_rr, sums, block.codes, weight_n


def _name_what_is_not_finite(block: _Block, sums_r: np.ndarray, columns: Columns) -> None:
    """Raises ValueError with the first such column and its row."""
    d = block.features_nd.shape[1]
    column = int(np.argmin(np.isfinite(sums_r[1:])))
    inside = column < d
    values_n = block.features_nd[:, column] if inside else block.numbers_nk[:, column - d]
    name = f"features, column {column}" if inside else columns.numbers[column - d]
    row = block.first_row + int(np.argmin(np.isfinite(values_n)))
    raise ValueError(f"{name}: expected finite numbers, got NaN or infinity in row {row}")


def _add(state: dict, products) -> None:
    gram_rr, sums, codes, weight_n = products
    state["gram_rr"] += gram_rr
    for i, (levels, sums_lr) in enumerate(sums):
        state["sums"][i] = _grown(state["sums"][i], levels[-1] + 1)
        state["sums"][i][levels] += sums_lr
    for i, j in state["tables"]:
        old = state["tables"][i, j]
        shape = tuple(max(n, codes[k].max() + 1) for n, k in zip(old.shape, (i, j), strict=True))
        old.resize(shape)
        state["tables"][i, j] = old + scipy.sparse.csr_array((weight_n, (codes[i], codes[j])), shape)


def _grown(array_cr: np.ndarray, count: int) -> np.ndarray:
    """The array with rows of zeros added up to `count` or half as many again, lest each block copies it."""
    old = len(array_cr)
    return array_cr if count <= old else np.pad(array_cr, [(0, max(count, old + old // 2) - old), (0, 0)])


def _finish(state: dict, columns: Columns, index: list[dict], rows: int) -> Totals:
    """Levels into sorted order of their names, as a log in memory has them."""
    names, orders = [], []
    for seen in index:
        name_c = np.asarray(list(seen), str)
        orders.append(np.argsort(name_c, kind="stable"))
        names.append(name_c[orders[-1]])
    sums = tuple(total[order] for total, order in zip(state["sums"], orders, strict=True))
    tables = {(i, j): table[orders[i]][:, orders[j]] for (i, j), table in state["tables"].items()}
    return Totals(columns, state["centre_r"], state["gram_rr"], sums, tables, tuple(names), rows)
