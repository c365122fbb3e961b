"""What holds for every test: short compilations and their cache, strict shapes, warnings as errors; the toy logs."""

import importlib.metadata
import os
import pathlib

import numpy as np
import pytest

# By environment, so that the processes that tests start have them too.
# LAPACK's own threads fight over small matrices where cores are few: ten times the time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# A test compiles much and computes little: XLA's shortest way to code that runs takes a fifth of the time, and where
# jaxlib 0.11 drops the last flag, six tenths. XLA ends a process at a flag that it does not know, with the flag's
# name. `XLA_FLAGS= make test` compiles as for users.
if "XLA_FLAGS" not in os.environ:
    _flags = ["--xla_backend_optimization_level=1", "--xla_cpu_parallel_codegen_split_count=1"]
    if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
        _flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(_flags)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # level 0, but for the tests that ask for `optimized`
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

# Warnings that a third party forces, each with its reason.
_ALLOWED = (
    # Two workers share the cache, and its files are not written at once: JAX compiles what it finds half written.
    "ignore:Error reading persistent compilation cache entry:UserWarning",
)


def pytest_configure(config):
    import jax

    jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
    jax.config.update("jax_numpy_rank_promotion", "raise")
    for line in ("error", *_ALLOWED):
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(autouse=True, scope="module")
def forget():
    """Lets a module's programs go: kept, they come to 5 GB a worker, and to memory mappings of which Linux grants a
    process 65,530 and then ends it, most often while a cached program is read."""
    import jax

    yield
    jax.clear_caches()


@pytest.fixture
def optimized():
    """For tests that compute more than they compile, as NUTS does: half the time."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1")


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
