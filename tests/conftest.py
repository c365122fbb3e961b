"""What holds for every test: a cache of compilations, strict shapes, warnings as errors; and the toy logs."""

import os
import pathlib

import numpy as np
import pytest

# LAPACK's own threads fight over small matrices where cores are few: ten times the time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Warnings that a third party forces, each with its reason; none is known.
_ALLOWED = ()


def pytest_configure(config):
    import jax

    jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".jax_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    for line in ("error", *_ALLOWED):
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session")
def entangled():
    """(n, seed, gamma, kappa) -> a log and its features, the true effect of x being (.3, .6, -.3).

    s moves wording and p, u moves p and y unseen, z moves p alone.
    """

    def make(n=1000, seed=0, gamma=3.0, kappa=2.0, weeks=8):
        rng = np.random.default_rng(seed)
        s, u, z, e0, e1, e2, e3, e4 = rng.normal(size=(8, n))
        features_nd = np.stack([e0, 0.6 * s + 0.8 * e1, 0.3 * s + np.sqrt(0.91) * e2], 1)
        p = 0.8 * z + s + u + 0.3 * e3
        week_n = rng.integers(weeks, size=n)
        y = features_nd @ [0.3, 0.6, -0.3] + gamma * p + kappa * u + 0.5 * e4
        y = y + 0.5 * rng.normal(size=weeks)[week_n]
        return make_log({"outcome": y, "p": p, "z": z, "week": names("w", week_n)}), features_nd

    return make


@pytest.fixture(scope="session")
def clicks():
    """(n, seed, mean, deviation) -> counts of n texts, features, and each text's true logit without its week's."""

    def make(n=1000, seed=0, mean=200, deviation=0.0, weeks=8, base=-3.0):
        rng = np.random.default_rng(seed)
        effect = 0.5 * rng.normal(size=weeks)
        week_n = rng.integers(weeks, size=n)
        features_nd = rng.normal(size=(n, 3)) + 0.5 * effect[week_n][:, None]
        reward_n = features_nd @ [0.15, 0.3, -0.15] + deviation * rng.normal(size=n)
        shown = 1.0 + rng.poisson(mean, size=n)
        rate = 1 / (1 + np.exp(-(base + reward_n + effect[week_n])))
        hit = rng.binomial(shown.astype(int), rate).astype(float)
        columns = {"outcome": hit, "shown": shown, "week": names("w", week_n)}
        return make_log(columns, exposure="shown"), features_nd, reward_n

    return make


@pytest.fixture(scope="session")
def log_of():
    """(columns, roles...) -> a log; texts are t0, t1, ... unless given."""
    return make_log


def make_log(columns, **roles):
    from deconfound_jax.structs import Logs, Roles

    n = len(next(iter(columns.values())))
    return Logs.of({"text": names("t", range(n))} | columns, Roles(**roles))


def names(letter, codes):
    return np.asarray([f"{letter}{code}" for code in codes], object)
