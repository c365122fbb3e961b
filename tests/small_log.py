"""A small file of arms with Upworthy's columns, made up: tests of real-log studies read it."""

from __future__ import annotations

import duckdb
import numpy as np

WORDS = "why this one secret village school bridge joy fury train garden never always people change world".split()


def write_arms(
    path, tests: int = 60, arms: int = 4, seed: int = 0, noise_seed: int | None = None, noisy_tests=()
) -> str:
    """Writes a Parquet file of `tests * arms` rows; outcomes of `noisy_tests` are replaced by noise of `noise_seed`."""
    rng = np.random.default_rng(seed)
    rows = []
    for test in range(tests):
        week = 201400 + test % 6
        base = 0.01 * (1 + test % 6)
        for arm in range(arms):
            text = " ".join(rng.choice(WORDS, rng.integers(4, 9))) + f" {test}-{arm}"
            shown = int(rng.integers(800, 1500))
            clicks = int(rng.binomial(shown, base * (1.4 if "why" in text else 1.0)))
            rows.append((f"t{test:03d}", text, f"lede {test}", f"image {test}", clicks, shown, week, test < 12))
    if noise_seed is not None:
        noise = np.random.default_rng(noise_seed)
        rows = [(*r[:4], int(noise.integers(0, 300)), *r[5:]) if r[0] in noisy_tests else r for r in rows]
    connection = duckdb.connect()
    connection.execute(
        "create table arms (clickability_test_id varchar, headline varchar, lede varchar, eyecatcher_id varchar, "
        "clicks bigint, impressions bigint, test_week bigint, randomization_imbalance_risk boolean)"
    )
    connection.executemany("insert into arms values (?, ?, ?, ?, ?, ?, ?, ?)", rows)
    connection.execute(f"copy arms to '{path}' (format parquet)")
    return str(path)
