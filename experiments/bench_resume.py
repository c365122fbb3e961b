"""Kills a training at random moments and goes on with it: it must end as the unbroken one, bit for bit.

    python -m experiments.bench_resume [--record]

A small DPO stage and a joint stage behind it, on a tiny newsroom. SIGKILL and SIGTERM take turns, and every other one
of either is held back until a state is being saved. At last a state is damaged by hand: it must be refused and the one
before it used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from deconfound_jax import config as knobs
from deconfound_jax.causal.reward import Reward
from deconfound_jax.causal.spec import Prepared
from deconfound_jax.causal.terms import prepare
from deconfound_jax.models import tokenizer
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.recipes.joint import align_jointly, joint_stage
from deconfound_jax.recipes.preference import align_dpo, dpo_stage
from deconfound_jax.recipes.stage import Record, Stage
from deconfound_jax.recipes.texts import Texts
from deconfound_jax.simulate import newsroom
from deconfound_jax.structs import Design
from deconfound_jax.train.loop import read_metrics
from experiments import rundir
from experiments.cli import parse_study, preemptible, publish, tables_and_bars

SAID = "resume with the same command"  # by a run that SIGTERM stopped
_PATIENCE = 300  # seconds for a process to get where it is waited for


@dataclasses.dataclass(frozen=True)
class BenchResume:
    """How often a run is killed, and how long it is."""

    name: str = "bench_resume"  # of the record
    workdir: str = "runs/bench_resume"
    kills: int = 20  # in all
    chains: int = 5  # runs among which they are divided; each is gone on with until it ends
    stages: tuple[Literal["dpo", "joint"], ...] = ("dpo", "joint")  # one behind the other
    steps: int = 60  # of either stage
    checkpoint_every: int = 3  # saves take the larger part of the time
    seeds: tuple[int, ...] = (0,)  # of the training and of the moments


def run(config: BenchResume, workdir) -> dict[str, Any]:
    """Kills and resumes; writes and returns flat results.

    Returns:
      `resume.kills_survived` of `resume.kills`, `resume.bit_equal`, how many of either signal landed and how many
      while a state was being saved, `resume.damaged_refused`; sentences under `failed`.
    """
    workdir = epath.Path(workdir).absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    for former in ("whole", *(f"chain{chain}" for chain in range(config.chains))):
        (workdir / former).rmtree(missing_ok=True)
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
    expected = train(config, workdir / "whole")
    rows = rows_of(workdir / "whole")
    rng, shots, survived = np.random.default_rng(config.seeds[0]), [], 0
    for chain in range(config.chains):
        share = range(chain, config.kills, config.chains)
        landed = kill_repeatedly(config, workdir / f"chain{chain}", list(share), len(rows), rng)
        equal = train(config, workdir / f"chain{chain}") == expected and rows_of(workdir / f"chain{chain}") == rows
        shots, survived = shots + landed, survived + len(landed) * equal
    results = {
        "resume.kills": len(shots),
        "resume.kills_survived": survived,
        "resume.bit_equal": survived == len(shots),
    }
    for name, number in (("sigkill", signal.SIGKILL), ("sigterm", signal.SIGTERM)):
        mine = [shot for shot in shots if shot["signal"] == number]
        results |= {f"resume.{name}": len(mine), f"resume.{name}_during_save": sum(shot["saving"] for shot in mine)}
    results["resume.sigterm_saved"] = sum(shot["said"] for shot in shots)
    results["resume.damaged_refused"] = damaged_is_refused(config, workdir / "whole", expected)
    results["failed"] = failures(results, config)
    rundir.write_results(workdir, results)
    return results


class Setup(NamedTuple):
    """What a training is made of; built once a process."""

    decoder: Decoder
    texts: Texts
    reference: Any
    prepared: Prepared
    reward: Reward  # of made-up coefficients: what is learned does not matter here
    compiled: Mapping[str, Stage]


@functools.cache
def setup(config: BenchResume) -> Setup:
    """A newsroom of 300 headlines, a decoder at random, and the two compiled steps."""
    logs, _ = newsroom.simulate(knobs.Newsroom(articles=60, weeks=5, topics=8), 0)
    features_nd = np.array([newsroom.parse(text) for text in logs.text], float)
    prepared = prepare(logs, features_nd, Design.parse("endogenous(popularity ~ z) + category(week)"))
    words = tokenizer.closed(newsroom.vocabulary(knobs.Newsroom(topics=8)))
    decoder = Decoder(knobs.Decoder(width=16, layers=1, heads=2, length=24), words.size)
    texts = Texts(words.encode(logs.text, 24), logs.codes("article"))
    reference = jax.jit(decoder.init)(jax.random.key(config.seeds[0]), jnp.asarray(texts.tokens_nl[:1]))
    coefficients_sd = np.random.default_rng(config.seeds[0]).normal([0.5, -0.3, 0.3], 0.1, (32, 3))
    reward = Reward((coefficients_sd @ features_nd.T).astype(np.float32), "model")
    dpo, joint = _knobs(config)
    compiled = {"dpo": dpo_stage(decoder, dpo), "joint": joint_stage(decoder, prepared.spec, dpo, joint)}
    return Setup(decoder, texts, reference, prepared, reward, compiled)


def train(config: BenchResume, workdir) -> str:
    """Both stages, from wherever a former run stopped; the SHA-256 of their final states."""
    of, (dpo, joint), seed = setup(config), _knobs(config), config.seeds[0]
    risk, watch = knobs.Align(accept_risk=True, equal_texts="drop"), [(2 * config.checkpoint_every, _size)]
    final = []
    for name in config.stages:
        record = Record(workdir, name, config.checkpoint_every)
        common = of.decoder, of.compiled[name], of.reference, of.texts
        if name == "dpo":
            final.append(align_dpo(*common, of.reward, dpo, risk, seed, record, watch))
        else:
            final.append(align_jointly(*common, of.prepared, dpo, risk, joint, seed, record, watch))
    return _digest(final)


def kill_repeatedly(config: BenchResume, workdir, shots: Sequence[int], rows: int, rng) -> list[dict[str, Any]]:
    """Starts the training in processes of its own and kills them, one after the other; what landed, a dict each.

    Shot i is SIGKILL where i is even and SIGTERM where it is odd; both in turn come at a random moment and while a
    state is being saved. Moments are spread over the run by the rows written so far.
    """
    landed = []
    for moment, shot in zip(np.sort(rng.uniform(0.02, 0.9, len(shots))) * rows, shots, strict=True):
        number = (signal.SIGKILL, signal.SIGTERM)[shot % 2]
        aimed, delay = shot // 2 % 2 == 0, rng.uniform(0.0, 0.02 if shot // 2 % 2 == 0 else 0.2)
        process = _start(config, workdir)
        deadline = time.monotonic() + _PATIENCE
        while process.poll() is None and not _reached(workdir, moment, aimed):
            if time.monotonic() > deadline:
                process.kill()
            time.sleep(0.001)
        time.sleep(delay)
        saving = bool(_partial(workdir))
        alive = process.poll() is None
        process.send_signal(number)
        out, err = process.communicate(timeout=_PATIENCE)
        said = number == signal.SIGTERM and process.returncode == 0 and SAID in out
        if process.returncode not in (-number, 0):
            raise RuntimeError(f"shot {shot}: the process ended with {process.returncode}: {err[-2000:]}")
        if alive and (said or process.returncode == -number):
            # SIGKILL leaves what was under way, so that is looked at afterwards.
            saving = bool(_partial(workdir)) if number == signal.SIGKILL else saving
            landed.append({"signal": number, "saving": saving, "said": said})
    return landed


def damaged_is_refused(config: BenchResume, workdir: epath.Path, expected: str) -> bool:
    """Cuts the newest state of the last stage in half; whether the run names it, goes on and ends as before."""
    folder = workdir / "checkpoints" / config.stages[-1]
    newest = max(folder.iterdir(), key=lambda path: int(path.name))
    path = max(_files(newest), key=lambda path: path.stat().length)
    path.write_bytes(path.read_bytes()[: path.stat().length // 2])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = train(config, workdir)
    return found == expected and any(f"{newest} is damaged" in str(warning.message) for warning in caught)


def rows_of(workdir) -> list[dict[str, Any]]:
    """The run's rows without the clock."""
    return [{k: v for k, v in row.items() if k != "clock"} for row in read_metrics(workdir)]


def failures(results: Mapping[str, Any], config: BenchResume) -> list[str]:
    """Every bar that does not hold, as a sentence."""
    failed = []
    if results["resume.kills"] < config.kills:
        failed.append(f"{results['resume.kills']} kills landed before the run ended, expected {config.kills}")
    if not results["resume.bit_equal"]:
        failed.append(f"{results['resume.kills_survived']} of {results['resume.kills']} kills were survived bit by bit")
    if not results["resume.damaged_refused"]:
        failed.append("a damaged state was not refused, or the run did not end as before")
    return failed


def tables(results: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """A row a signal, and one of the whole."""
    by_signal = [
        {"signal": name.upper(), "landed": results[f"resume.{name}"],
         "while a state was being saved": results[f"resume.{name}_during_save"],
         "saved and said so": results["resume.sigterm_saved"] if name == "sigterm" else None}
        for name in ("sigkill", "sigterm")
    ]  # fmt: skip
    whole = {"kills survived": results["resume.kills_survived"], "of": results["resume.kills"],
             "bit-equal": str(results["resume.bit_equal"]),
             "damaged state refused": str(results["resume.damaged_refused"])}  # fmt: skip
    return [by_signal, [whole]]


def child(config: str) -> None:
    """The training as a process of its own: its config as JSON."""
    given = json.loads(config)
    workdir = given.pop("at")
    with preemptible():
        train(BenchResume(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}), workdir)


def main(argv: Sequence[str] | None = None) -> None:
    config, record = parse_study(argv, BenchResume, __doc__)
    with preemptible():
        results = run(config, config.workdir)
    publish(config, "bench_resume", tables_and_bars(tables(results), results["failed"]), record)


def _knobs(config: BenchResume) -> tuple[knobs.Dpo, knobs.Joint]:
    return knobs.Dpo(steps=config.steps, groups=8), knobs.Joint(rows=64, warm_rows=128, draws=8)


def _start(config: BenchResume, workdir) -> subprocess.Popen:
    given = json.dumps(dataclasses.asdict(config) | {"at": str(workdir)})
    code = "import sys; from experiments.bench_resume import child; child(sys.argv[1])"
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(jax.config.jax_persistent_cache_min_compile_time_secs),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-c", code, given]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _reached(workdir: epath.Path, moment: float, aimed: bool) -> bool:
    path = workdir / "metrics.jsonl"
    return path.exists() and path.read_bytes().count(b"\n") >= moment and (not aimed or bool(_partial(workdir)))


def _partial(workdir: epath.Path) -> list[str]:
    """The states that are being saved."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for stage in os.listdir(workdir / "checkpoints"):
            found += [name for name in os.listdir(workdir / "checkpoints" / stage) if name.endswith(".partial")]
    return found


def _files(folder: epath.Path) -> list[epath.Path]:
    return [found for path in folder.iterdir() for found in (_files(path) if path.is_dir() else [path])]


def _size(state, done: int) -> dict[str, float]:
    return {"size": sum(float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(state.params))}


def _digest(tree: Any) -> str:
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))).hexdigest()


if __name__ == "__main__":
    main()
