"""The benchmark's jobs: each runs in a process of its own, so that its peak memory is its own.

    python -m experiments.bench_jobs '{"job": "wide", "rows": 4000, "width": 8, "levels": 50, "seed": 0}'

A job takes numbers and returns a flat dict; seconds are wall-clock, the first call's (with
compilation) and a later one's. Data are simulated: p is confounded with y through u, z moves p
alone, and levels move the text, p and y; gamma is 3.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from deconfound_jax.causal.fit import fit
from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.causal.stream import fit_stream
from deconfound_jax.config import Causal
from deconfound_jax.structs import Logs, Roles

GAMMA = 3.0
BATCH = 1 << 16
INSTRUMENT = "endogenous(p ~ z)"
WIDE = f"category(author, absorbed) + {INSTRUMENT}"
WARM_STEPS = 2  # of `median_seconds`
ROLES = Roles(confounders=("author", "p"), instruments=("z",))
_CHUNK = 100_000  # rows drawn at once


class Simulated(NamedTuple):
    """Rows of a log as arrays: features in fp32, columns by name."""

    features_nd: np.ndarray
    columns: dict[str, np.ndarray]

    def batches(self, size: int = BATCH) -> Iterator[tuple[Logs, np.ndarray]]:
        """Views of consecutive rows, as `fit_stream` takes them."""
        for start in range(0, len(self.features_nd), size):
            rows = slice(start, start + size)
            yield Logs({k: v[rows] for k, v in self.columns.items()}, ROLES, ""), self.features_nd[rows]


def simulate(rows: int, width: int, levels: int, seed: int, start: int = 0) -> Simulated:
    """Rows of one log; parts of a longer one differ by `start` (levels have the same effects in all)."""
    features_nd = np.empty((rows, width), np.float32)
    columns = {name: np.empty(rows) for name in ("outcome", "p", "z")} | {"author": np.empty(rows, np.int64)}
    effect_c = np.random.default_rng([seed, 0]).normal(size=levels)
    for at in range(0, rows, _CHUNK):
        n, part = min(_CHUNK, rows - at), slice(at, at + _CHUNK)
        rng = np.random.default_rng([seed, 1 + start + at])
        rng.standard_normal((n, width), dtype=np.float32, out=features_nd[part])
        s, u, z, e0, e1 = rng.normal(size=(5, n))
        author = rng.integers(levels, size=n)
        features_nd[part, 0] += 0.6 * s + 0.5 * effect_c[author]
        p = 0.8 * z + s + u + 0.3 * e0 + effect_c[author]
        y = features_nd[part, :3] @ np.float32([0.3, 0.6, -0.3]) + GAMMA * p + 2 * u + 0.5 * e1 + effect_c[author]
        for name, value in (("outcome", y), ("p", p), ("z", z), ("author", author)):
            columns[name][part] = value
    return Simulated(features_nd, columns)


def wide(rows: int, width: int, levels: int, seed: int, again: bool = True) -> dict[str, Any]:
    """Features, a large category and an instrumented confounder, from features held once in fp32."""
    data = simulate(rows, width, levels, seed)
    config = Causal(design=WIDE, seed=seed)
    posterior, seconds = _timed(lambda: fit_stream(data.batches(), config))
    found = {"seconds": seconds, **_answer(posterior)}
    if again:
        found["seconds_again"] = _timed(lambda: fit_stream(data.batches(), config))[1]
    return found


def narrow(rows: int, width: int, seed: int, repeats: int = 3) -> dict[str, Any]:
    """An instrumented confounder beside exogenous controls: the job that peers do, too."""
    config = Causal(design=INSTRUMENT, seed=seed)
    first = _timed(lambda: fit_stream(simulate(5 * width + 500, width, 1, seed).batches(), config))[1]
    data = simulate(rows, width, 1, seed)
    runs = [_timed(lambda: fit_stream(data.batches(), config)) for _ in range(repeats)]
    answer = _answer(runs[0][0])
    return {"first_call_seconds": first, "seconds": float(np.median([s for _, s in runs])), **answer}


def write_parquet(rows: int, width: int, levels: int, seed: int, folder: str, start: int = 0) -> dict[str, Any]:
    """One part of a long log as a Parquet file with the features in one list column."""
    import duckdb

    data = simulate(rows, width, levels, seed, start)
    table = dict(data.columns) | {f"f{i}": np.ascontiguousarray(data.features_nd[:, i]) for i in range(width)}
    listed = ", ".join(f"f{i}" for i in range(width))
    with duckdb.connect() as connection:
        connection.register("part", table)
        target = f"{folder}/{start:010d}.parquet"
        connection.execute(
            f"COPY (SELECT outcome, p, z, author, [{listed}] AS features FROM part) TO '{target}' "
            f"(FORMAT parquet, ROW_GROUP_SIZE {BATCH}, COMPRESSION uncompressed)"
        )
    return {}


def parquet(files: list[str], width: int, seed: int) -> dict[str, Any]:
    """The exact fit streamed from Parquet, with the resident set sampled along the way; compiled beforehand."""
    from deconfound_jax.logs.batches import read_batches

    config = Causal(design=WIDE, seed=seed)
    first = _timed(lambda: fit_stream(simulate(5 * width + 500, width, 10, seed).batches(), config))[1]
    with resident() as samples:
        batches = read_batches(files, ROLES, "features", categories=("author",), rows=BATCH)
        posterior, seconds = _timed(lambda: fit_stream(batches, config))
    keep = samples[:: max(1, len(samples) // 200)]
    memory = {"memory_seconds": [round(t, 2) for t, _ in keep], "memory_gb": [round(gb, 4) for _, gb in keep]}
    return {"first_call_seconds": first, "seconds": seconds, **_answer(posterior), **memory}


def svi(rows: int, width: int, seed: int) -> dict[str, Any]:
    """Stochastic variational inference on clicks, whose design has no closed form."""
    data = simulate(rows, width, 8, seed)
    rate_n = 1 / (1 + np.exp(-data.columns["outcome"] / data.columns["outcome"].std()))
    clicks_n = (np.random.default_rng([seed, 2]).uniform(size=rows) < rate_n).astype(float)
    columns = data.columns | {"outcome": clicks_n, "text": np.asarray([f"t{i}" for i in range(rows)], object)}
    logs = Logs.of(columns, ROLES)
    config = Causal(design="p + intercept(author)", family="bernoulli", fit="svi", draws=256, seed=seed)
    posterior, seconds = _timed(lambda: fit(logs, data.features_nd, config))
    return {"seconds": seconds, "rows_per_second": rows / seconds, "converged": posterior.converged}


def canary(rows: int, draws: int, seed: int) -> dict[str, Any]:
    """NUTS on one hierarchical model of 8 groups, as rows (Bernoulli) and as counts (binomial)."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    groups = 8
    rng = np.random.default_rng(seed)
    code_n = rng.integers(groups, size=rows)
    hit_n = rng.binomial(1, 1 / (1 + np.exp(-rng.normal(size=groups)[code_n]))).astype(float)

    def logits():
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.5))
        raw = numpyro.sample("raw", dist.Normal(0.0, 1.0).expand([groups]).to_event(1))
        return mean + numpyro.sample("scale", dist.HalfNormal(1.0)) * raw

    def by_row():
        numpyro.sample("y", dist.Bernoulli(logits=logits()[jnp.asarray(code_n)]), obs=jnp.asarray(hit_n))

    def by_group():
        total, hit = jnp.bincount(code_n, length=groups), jnp.asarray(np.bincount(code_n, hit_n, groups))
        numpyro.sample("y", dist.Binomial(total, logits=logits()), obs=hit)

    def seconds(model):
        kernel = numpyro.infer.NUTS(model)
        sampler = numpyro.infer.MCMC(kernel, num_warmup=draws, num_samples=draws, progress_bar=False)
        sampler.run(jax.random.key(seed))
        return _timed(lambda: jax.block_until_ready((sampler.run(jax.random.key(1 + seed)), sampler.get_samples())))[1]

    found = {"bernoulli_seconds": seconds(by_row), "binomial_seconds": seconds(by_group)}
    return found | {"ratio": found["bernoulli_seconds"] / found["binomial_seconds"]}


JOBS: dict[str, Callable[..., dict[str, Any]]] = {
    "wide": wide, "narrow": narrow, "write_parquet": write_parquet, "parquet": parquet, "svi": svi, "canary": canary,
}  # fmt: skip


def median_seconds(step: Callable[[], Any], steps: int) -> dict[str, float]:
    """Median of `steps` timed calls, after `WARM_STEPS` in which compilation, allocator and caches settle."""
    times = []
    for _ in range(steps + WARM_STEPS):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return {"seconds": float(np.median(times[WARM_STEPS:])), "steps": steps}


class resident:
    """Samples this process's resident set (seconds, GB) every tenth of a second inside `with`; empty off Linux."""

    def __enter__(self) -> list[tuple[float, float]]:
        self.samples: list[tuple[float, float]] = []
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self.samples

    def __exit__(self, *_) -> None:
        self.done.set()
        self.thread.join()

    def _watch(self) -> None:
        begin = time.perf_counter()
        while True:
            try:
                with open("/proc/self/statm", encoding="ascii") as file:
                    pages = int(file.read().split()[1])
            except OSError:
                return
            self.samples.append((time.perf_counter() - begin, pages * resource.getpagesize() / 1e9))
            if self.done.wait(0.1):
                return


def in_child(
    arguments: dict[str, Any], module: str = "experiments.bench_jobs", python: str = sys.executable, env=None
) -> dict[str, Any]:
    """A job in a process of its own, `peak_gb` added. RuntimeError with the end of its output where it fails."""
    done = subprocess.run([python, "-m", module, json.dumps(arguments)], capture_output=True, text=True, env=env)
    if done.returncode:
        reason = "killed, as for memory" if done.returncode < 0 else (done.stderr or done.stdout)[-2000:]
        raise RuntimeError(f"{arguments['job']}: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_gb() -> float:
    """The largest resident set of this program (where Linux does not tell, of its parent at the start, too)."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            lines = [line.split() for line in file if line.startswith("VmHWM")]
        return int(lines[0][1]) * 1024 / 1e9
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _timed(job: Callable):
    begin = time.perf_counter()
    found = job()
    return found, time.perf_counter() - begin


def _answer(posterior: Posterior) -> dict[str, Any]:
    gamma_s = posterior.effect("p")
    return {"gamma": float(gamma_s.mean()), "gamma_sd": float(gamma_s.std()), "converged": posterior.converged}


def main(argv: list[str] | None = None) -> None:
    arguments = json.loads((argv or sys.argv[1:])[0])
    found = JOBS[arguments.pop("job")](**arguments)
    print(json.dumps(found | {"peak_gb": peak_gb()}))


if __name__ == "__main__":
    main()
