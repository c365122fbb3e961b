"""The three Upworthy logs of `upworthy_designs`, what is judged, and a simulated miniature for where there is no data.

One random arm a test, all arms of the broken window, all arms: each without the fold it
is judged on. Folds are whole connected components of (test, headline, lede, image), and
only randomized arms (none of the window) are in one.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import NamedTuple

import numpy as np

from deconfound_jax.evaluate import ab
from deconfound_jax.logs.split import components, folds, one_arm
from deconfound_jax.models.features import read_features
from deconfound_jax.structs import Logs, Roles

ROLES = Roles(
    text="headline", outcome="clicks", exposure="impressions", group="clickability_test_id", context=("eyecatcher_id",)
)
LOGS = ("one_arm", "broken_window", "all_arms")
_WINDOW, _LINKS = "randomization_imbalance_risk", ("lede", "eyecatcher_id")
_TABLE, _FEATURES = "packages.parquet", "minilm_features.npz"


class Archive(NamedTuple):
    """Every arm with the design's columns, features of its headline, and the fold that judges it (-1: none)."""

    logs: Logs
    features_nd: np.ndarray
    component_n: np.ndarray
    fold_n: np.ndarray


class Part(NamedTuple):
    """Rows to learn from and the fold they are judged on."""

    log: str
    fold: int
    train: np.ndarray
    held_out: np.ndarray


class Judged(NamedTuple):
    """Randomized pairs of one fold with |z| > 1.96, and how to look a reward up."""

    table: ab.PairTable
    clear_p: np.ndarray

    def correct(self, reward_n: np.ndarray) -> np.ndarray:
        """(p,) of the clear pairs: 1 right, 0 wrong, one half for a tie."""
        return ab.pair_correct(reward_n, self.table)[self.clear_p]


def missing(folder: str) -> str:
    """Which file of the archive is not in the folder; empty where all are."""
    absent = [name for name in (_TABLE, _FEATURES) if not (pathlib.Path(folder) / name).is_file()]
    return ", ".join(str(pathlib.Path(folder) / name) for name in absent)


def read_archive(folder: str, lede_width: int, count: int, seed: int) -> Archive:
    """Reads the archive's exploratory packages and MiniLM features.

    Args:
      folder: holds packages.parquet and minilm_features.npz.
      lede_width: principal components of the lede's features that stand for it.
      count, seed: of the folds.
    """
    from deconfound_jax.logs.read import read

    path = pathlib.Path(folder)
    logs = read(
        path / _TABLE, ROLES, categories=("test_week",), numeric=("site_users",),
        extra=("lede", "eyecatcher_id", "test_week", "site_users", _WINDOW),
    )  # fmt: skip
    lede_nd = read_features(path / _FEATURES, len(logs), "lede").astype(np.float64)
    features_nd = read_features(path / _FEATURES, len(logs), "headline").astype(np.float64)
    return archive(logs, features_nd, lede_nd, lede_width, count, seed)


def archive(logs: Logs, features_nd, lede_nd, lede_width: int, count: int, seed: int) -> Archive:
    """Adds the design's columns: week, week_number, log_traffic, test, image (in its test), arm, lede_vector."""
    test_n = logs.columns[ROLES.group]
    image_n = np.asarray([f"{a} {b}" for a, b in zip(test_n, logs.columns["eyecatcher_id"], strict=True)], object)
    centred_nd = lede_nd - lede_nd.mean(0)[None, :]
    axes = np.linalg.eigh(centred_nd.T @ centred_nd)[1][:, ::-1]
    columns = dict(logs.columns) | {
        "week": logs.columns["test_week"],
        "week_number": np.asarray([float(week) for week in logs.columns["test_week"]]),
        "log_traffic": np.log(np.asarray(logs.columns["site_users"], float)),
        "test": test_n,
        "image": image_n,
        "arm": np.asarray([f"arm {i}" for i in range(len(logs))], object),
        "lede_vector": centred_nd @ axes[:, :lede_width],
    }
    component_n = components(logs, _LINKS)
    fold_n = folds(component_n, count, seed, ~logs.columns[_WINDOW].astype(bool))
    return Archive(dataclasses.replace(logs, columns=columns), features_nd, component_n, fold_n)


def parts(data: Archive, log: str, seed: int) -> list[Part]:
    """One log's training rows for each fold; the window's rows are in no fold, and the same each time."""
    window_n, found = data.logs.columns[_WINDOW].astype(bool), []
    for fold in range(data.fold_n.max() + 1):
        outside = data.fold_n != fold
        if log == "one_arm":
            train = one_arm(data.logs, np.flatnonzero(outside & ~window_n), seed + fold)
        else:
            train = np.flatnonzero(window_n if log == "broken_window" else outside)
        found.append(Part(log, fold, train, np.flatnonzero(data.fold_n == fold)))
    return found


def judged(data: Archive, part: Part) -> Judged:
    """The pairs of a part's held-out arms that share test and image and that their own outcomes tell apart."""
    table = ab.pairs(ab.arms_of(data.logs.take(part.held_out), data.component_n[part.held_out]))
    return Judged(table, np.abs(table.z_p) > ab.Z_CLEAR)


def simulate(seed: int, tests: int = 240, arms: int = 4, width: int = 6) -> tuple[Logs, np.ndarray, np.ndarray]:
    """A miniature of the archive with a known effect: log, features (n, width), lede features.

    A week moves the click rate and, with the story, what headlines are written: naive is
    confounded. True logit of an arm: week + test + image + features @ effect + noise.
    """
    rng = np.random.default_rng(seed)
    weeks, n = 20, tests * arms
    test_n = np.repeat(np.arange(tests), arms)
    week_t = np.sort(rng.integers(weeks, size=tests))
    mood_w, story_t = rng.normal(size=weeks), rng.normal(size=tests)
    axis_d, effect_d = rng.normal(size=width), 0.3 * rng.normal(size=width)
    features_nd = rng.normal(size=(n, width)) + np.outer(mood_w[week_t[test_n]] + story_t[test_n], axis_d)
    lede_nd = story_t[test_n, None] * np.ones((1, width)) + 0.5 * rng.normal(size=(tests, width))[test_n]
    image_n = test_n * 2 + (np.arange(n) % arms >= arms // 2)
    eta_n = -3 + features_nd @ effect_d + 0.8 * mood_w[week_t[test_n]] + 0.5 * story_t[test_n]
    eta_n = eta_n + 0.1 * rng.normal(size=2 * tests)[image_n] + 0.1 * rng.normal(size=n)
    shown_n = 2000.0 + rng.poisson(1000, n)
    name = lambda letter, codes: np.asarray([f"{letter}{code}" for code in codes], object)  # noqa: E731
    columns = {
        "headline": name("headline ", range(n)), "lede": name("lede ", test_n), "eyecatcher_id": name("e", image_n),
        "clickability_test_id": name("t", test_n), "test_week": np.asarray([str(w) for w in week_t[test_n]], object),
        "clicks": rng.binomial(shown_n.astype(int), 1 / (1 + np.exp(-eta_n))).astype(float), "impressions": shown_n,
        "site_users": np.exp(12 + 0.1 * week_t[test_n] + 0.1 * rng.normal(size=tests)[test_n]),
        _WINDOW: np.isin(week_t, range(8, 14))[test_n],
    }  # fmt: skip
    return Logs.of(columns, ROLES), features_nd, lede_nd
