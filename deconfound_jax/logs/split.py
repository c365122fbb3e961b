"""Which rows are held out: no text, test or story on both sides.

A story is tested several times, so a split by test alone lets held-out rows meet
their own words in training. Rows that share anything are one component, and
components are never cut.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import chex
import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from deconfound_jax.config import Split
from deconfound_jax.logs.check import nearest
from deconfound_jax.structs import Logs


@dataclasses.dataclass(frozen=True)
class SplitResult:
    """Sorted row numbers of both sides, each row's component, and the leak that was avoided.

    `leaked` maps the text and each further column of the split to the share of
    held-out rows whose value is in training, too: under a split by group alone (same
    seed, same share) where components are split, else under this very split.
    """

    train: np.ndarray
    held_out: np.ndarray
    component_n: np.ndarray
    leaked: Mapping[str, float]


def split(logs: Logs, config: Split, eligible: np.ndarray | None = None) -> SplitResult:
    """Splits a log's rows into training and held-out ones.

    components: whole components, in random order, until they hold the share
    `held_out` of the (eligible) rows. time: the last share by `Roles.time`; rows of
    one time stay together. column: the rows where `config.column` is true.

    Args:
      logs: n rows.
      config: how; `config.columns` are what rows may not share, beside group and text.
      eligible: (n,) bool; only components all of whose rows are eligible may be held out.

    Raises:
      ValueError: a role or column that is not there, or a side without rows.

    Example:
      parts = split(logs, Split(columns=("lede", "eyecatcher_id")))
      fitted = logs.take(parts.train)
    """
    _check(logs, config, eligible)
    component_n = components(logs, config.columns)
    if config.by == "components":
        held_n = _draw(component_n, config, eligible)
        # Without a group the naive split is one by row.
        unit_n = _codes(logs.columns[logs.roles.group]) if logs.roles.group else np.arange(len(logs))
        naive_n = _draw(unit_n, config, eligible)
    else:
        held_n = naive_n = _last(logs, config.held_out) if config.by == "time" else _true(logs, config.column)
    for side, rows in (("train", ~held_n), ("held_out", held_n)):
        if not rows.any():
            raise ValueError(f"split: expected rows on both sides of a split by {config.by}, got none in {side}")
    leaked = {c: shared(logs.columns[c], naive_n) for c in dict.fromkeys((logs.roles.text, *config.columns))}
    return SplitResult(np.flatnonzero(~held_n), np.flatnonzero(held_n), component_n, leaked)


def components(logs: Logs, columns: Sequence[str] = ()) -> np.ndarray:
    """Connected components of the rows, which are linked where they share a value.

    Args:
      logs: n rows.
      columns: what links rows beside `Roles.group` and the exact text. A cell without
        a value links nothing.

    Returns:
      (n,) int: components are numbered from 0.
    """
    n = len(logs)
    rows, values, nodes = [], [], n
    for name in dict.fromkeys((logs.roles.group, logs.roles.text, *columns)):
        if name:
            present = np.flatnonzero(_present(_column(logs, name, "columns")))
            rows.append(present)
            values.append(_codes(logs.columns[name][present]) + nodes)
            nodes += len(present)
    row, value = np.concatenate(rows), np.concatenate(values)
    graph = sparse.coo_matrix((np.ones(len(row), bool), (row, value)), shape=(nodes, nodes))
    labels = csgraph.connected_components(graph, directed=False)[1][:n]
    return np.unique(labels, return_inverse=True)[1]


def folds(component_n: np.ndarray, count: int, seed: int, eligible: np.ndarray | None = None) -> np.ndarray:
    """Assigns whole components to `count` folds of about equal rows, for judging each row exactly once.

    Args:
      component_n: (n,) of `components`.
      count: folds.
      seed: of the order.
      eligible: (n,) bool; a component with a row that is not eligible is in no fold.

    Returns:
      (n,) int: the fold in which a row is held out, -1 for never.

    Raises:
      ValueError: fewer eligible components than folds.
    """
    units, unit_n, size = np.unique(component_n, return_inverse=True, return_counts=True)
    allowed = np.ones(len(units), bool)
    if eligible is not None:
        allowed[unit_n[~eligible]] = False
    if allowed.sum() < count:
        raise ValueError(f"folds: expected at least {count} eligible components, got {int(allowed.sum())}")
    order = np.random.default_rng(seed).permutation(len(units))
    order = order[allowed[order]]
    before = np.cumsum(size[order]) - size[order]
    fold_of = np.full(len(units), -1)
    fold_of[order] = np.minimum(before * count // size[order].sum(), count - 1)
    return fold_of[unit_n]


def shared(values_n: np.ndarray, held_n: np.ndarray) -> float:
    """The share of held-out rows whose value is also a training row's; no value is shared by nobody."""
    chex.assert_equal_shape([values_n, held_n])
    present_n, code_n = _present(values_n), _codes(values_n)
    seen_n = np.isin(code_n[held_n & present_n], code_n[~held_n & present_n])
    return float(seen_n.sum() / held_n.sum()) if held_n.any() else 0.0


def one_arm(logs: Logs, index: np.ndarray, seed: int) -> np.ndarray:
    """One random row per group among `index`, sorted: a log as a site without tests would have it.

    Raises:
      ValueError: the log has no group role.
    """
    if not logs.roles.group:
        raise ValueError("one_arm: expected Roles.group to name a column, got no name")
    shuffled = np.random.default_rng(seed).permutation(np.asarray(index))
    groups = _codes(logs.columns[logs.roles.group][shuffled])
    return np.sort(shuffled[np.unique(groups, return_index=True)[1]])


def _check(logs: Logs, config: Split, eligible: np.ndarray | None) -> None:
    ways = ("components", "time", "column")
    if config.by not in ways:
        raise ValueError(f"Split.by: expected one of {ways}, got {config.by!r}{nearest(config.by, ways)}")
    for name in config.columns:
        _column(logs, name, "columns")
    if config.by != "column" and not 0 < config.held_out < 1:
        raise ValueError(f"Split.held_out: expected a share between 0 and 1, got {config.held_out}")
    if eligible is not None:
        if config.by != "components":
            raise ValueError(f"eligible: expected Split.by='components', got {config.by!r}")
        chex.assert_shape(eligible, (len(logs),))
        chex.assert_type(eligible, bool)


def _column(logs: Logs, name: str, field: str) -> np.ndarray:
    if name not in logs.columns:
        raise ValueError(f"Split.{field}: expected a column of the log, got {name!r}{nearest(name, logs.columns)}")
    return logs.columns[name]


def _present(values_n: np.ndarray) -> np.ndarray:
    if values_n.dtype.kind == "f":
        return ~np.isnan(values_n)
    return values_n != "" if values_n.dtype.kind in "OU" else np.ones(len(values_n), bool)


def _codes(values_n: np.ndarray) -> np.ndarray:
    # By hash: sorting thousands of long texts takes twenty times as long.
    seen: dict[object, int] = {}
    return np.array([seen.setdefault(value, len(seen)) for value in values_n.tolist()], int)


def _draw(unit_n: np.ndarray, config: Split, eligible: np.ndarray | None) -> np.ndarray:
    """Rows (n,) bool of whole units, drawn in random order until they hold the share."""
    units, unit_n, size = np.unique(unit_n, return_inverse=True, return_counts=True)
    allowed = np.ones(len(units), bool)
    if eligible is not None:
        allowed[unit_n[~eligible]] = False
    wanted = config.held_out * (len(unit_n) if eligible is None else eligible.sum())
    order = np.random.default_rng(config.seed).permutation(len(units))
    order = order[allowed[order]]
    total = np.cumsum(size[order])
    reached = int(total[-1]) if len(total) else 0
    if reached < wanted - 1e-9 or not reached:
        needed = f"{math.ceil(wanted)} rows in components all of whose rows are eligible"
        raise ValueError(f"Split.held_out: expected {needed}, got {reached}")
    return np.isin(unit_n, order[: np.searchsorted(total, wanted - 1e-9) + 1])


def _last(logs: Logs, share: float) -> np.ndarray:
    if not logs.roles.time:
        raise ValueError("Split.by='time': expected Roles.time to name a column, got no name")
    time_n = np.asarray(logs.columns[logs.roles.time], np.float64)
    return time_n >= np.sort(time_n)[-math.ceil(share * len(time_n) - 1e-9)]


def _true(logs: Logs, name: str) -> np.ndarray:
    if not name:
        raise ValueError("Split.by='column': expected Split.column to name a column, got no name")
    values_n = _column(logs, name, "column")
    if values_n.dtype.kind not in "bfiu" or not np.isin(values_n, (0, 1)).all():
        strange = next(v for v in values_n if isinstance(v, str) or v not in (0, 1))
        raise ValueError(f"Split.column {name!r}: expected true or false (or 0 and 1), got {strange!r}")
    return values_n.astype(bool)
