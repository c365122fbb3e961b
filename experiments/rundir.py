"""The run directory: what a run is, on disk, and whether a command may go on with one."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import os
import platform
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from deconfound_jax.causal.posterior import Posterior
from deconfound_jax.config import Align, Run
from deconfound_jax.models.params import save_params
from deconfound_jax.recipes.stage import Record
from deconfound_jax.structs import dump_json
from deconfound_jax.train.files import write_whole, writes
from deconfound_jax.train.hosts import fetch
from deconfound_jax.train.mesh import make_mesh
from deconfound_jax.train.metrics import Writer
from deconfound_jax.train.writers import tensorboard, weights_and_biases

# A run goes on with other devices, and shown elsewhere.
_FREE = ("mesh", "writers")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpyro", "chex", "einops", "numpy", "scipy")


def claim(workdir: epath.PathLike, config: Run, preset: Run | None, fingerprint: str) -> epath.Path:
    """Makes the directory and writes config.json, or checks that the run in it is this one; devices and writers may
    be others.

    Raises:
      ValueError: the directory holds a run with another config or other data; every
        differing field is named.
    """
    workdir = epath.Path(workdir)
    path = workdir / "config.json"
    resolved = json.loads(json.dumps(dataclasses.asdict(config)))
    if path.exists():
        stored = json.loads(path.read_text())
        bound, asked = ({k: v for k, v in c.items() if k not in _FREE} for c in (stored["config"], resolved))
        changed = [f"{k}: {a!r} there, {b!r} asked for" for k, (a, b) in difference(bound, asked).items()]
        if stored["data"] != fingerprint:
            changed.append(f"data: fingerprint {stored['data']} there, {fingerprint} asked for")
        if changed:
            raise ValueError(f"{workdir} holds another run; take another --workdir, or restore: " + "; ".join(changed))
        return workdir
    if writes():
        preset_json = json.loads(json.dumps(dataclasses.asdict(preset))) if preset else resolved
        changed = {name: new for name, (_, new) in difference(preset_json, resolved).items()}
        write_whole(path, dump_json({"config": resolved, "changed_from_preset": changed, "data": fingerprint}))
    return workdir


def mesh_of(config: Run) -> Mesh:
    """All devices as `config.mesh` divides them; ValueError where it does not."""
    return make_mesh(**dataclasses.asdict(config.mesh))


def record_of(config: Run, workdir, name: str, on_step: Callable | None = None) -> Record:
    """Where the stage `name` of a run is written, and shown."""
    writers = open_writers(config.writers, os.fspath(workdir), config.name) if writes() else ()
    return Record(workdir, name, config.checkpoint_every, on_step, writers)


@functools.cache
def open_writers(names: tuple[str, ...], workdir: str, run: str) -> tuple[Writer, ...]:
    """Opens the writers of one run directory, once in a process."""
    place = epath.Path(workdir)
    opened = {
        "tensorboard": lambda: tensorboard(place / "tensorboard"),
        "wandb": lambda: weights_and_biases("deconfound_jax", f"{run}-{place.name}"),
    }
    return tuple(opened[name]() for name in names)


def difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted names of the leaves in which two nested configs differ, with both values."""
    found = {}
    for name in sorted(set(old) | set(new)):
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= difference(a, b, f"{prefix}{name}.")
        elif a != b:
            found[prefix + name] = (a, b)
    return found


def save_policies(workdir: epath.Path, policies: Mapping) -> None:
    """What was trained of each policy, all of it or adapters."""
    for method, params in policies.items():
        whole = fetch(params)  # takes every process
        if writes():
            save_params(workdir / "policies" / f"{method}.npz", whole)


def save_run(workdir: epath.Path, policies: Mapping, posteriors: Mapping[str, Posterior],
             features_nd: np.ndarray) -> None:  # fmt: skip
    """What `deconfound_jax.load` reads: policies, posteriors, the log's features."""
    save_policies(workdir, policies)
    if not writes():
        return
    (workdir / "posterior").mkdir(parents=True, exist_ok=True)
    for method, posterior in posteriors.items():
        posterior.save(workdir / "posterior" / f"{method}.npz")
    with (workdir / "log_features.npy").open("wb") as file:
        np.save(file, features_nd.astype(np.float32))


def write_results(workdir: epath.Path, results: Mapping[str, Any]) -> None:
    """results.json: one flat object, keys `<study>.<log>.<features>.<method>.<metric>`; not a number becomes null."""
    if writes():
        write_whole(workdir / "results.json", dump_json({k: _finite(v) for k, v in results.items()}))


def pages():
    """The module that fills the report, or None where jinja2 or matplotlib is missing, as on an accelerator image."""
    try:
        from experiments import pages as module
    except ImportError as error:
        logging.getLogger(__name__).warning("no report is written: %s", error)
        return None
    return module


def risked(config: Align, method: str) -> Align:
    """A baseline trains whatever its verdict: it is there to be compared with. Ours must pass."""
    return dataclasses.replace(config, accept_risk=config.accept_risk or method in ("naive", "covariate"))


def best_method(config: Run) -> str:
    """The method that tables and report are about: the last one named that takes the confounders out."""
    ours = [m for m in config.methods if m in ("deconfounded", "joint")]
    return ours[-1] if ours else config.methods[-1]


def provenance() -> dict[str, Any]:
    """Command, machine and versions that a published number carries."""
    command = "python -m " + " ".join(["experiments." + epath.Path(sys.argv[0]).stem, *sys.argv[1:]])
    versions = {"python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in _PACKAGES}
    device = jax.devices()[0]
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, {jax.device_count()} x {device.device_kind} ({device.platform})"
    )
    return {"command": command, "machine": machine, "versions": versions}


def record(workdir: epath.Path, script: str, config: Run, table: str) -> epath.Path:
    """Copies results with their provenance to docs/results/<script>/<study>.{json,md}: a published number."""
    folder = epath.Path("docs/results") / script
    if not writes():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    made = provenance() | {"seeds": list(config.seeds)}
    results = json.loads((workdir / "results.json").read_text())
    (folder / f"{config.name}.json").write_text(dump_json({"provenance": made, "results": results}))
    figure = workdir / "truth.png"
    if figure.exists():
        figure.copy(folder / f"{config.name}.png", overwrite=True)
    lines = [f"# {config.name}", "", f"    {made['command']}", "", table, "", f"Machine: {made['machine']}.", ""]
    lines.append("Versions: " + ", ".join(f"{k} {v}" for k, v in made["versions"].items()) + ".")
    (folder / f"{config.name}.md").write_text("\n".join(lines) + "\n")
    return folder


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
