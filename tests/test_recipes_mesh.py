"""Recipes on several devices and in several processes give what one device gives; what does not divide is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import mesh_recipes
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from deconfound_jax.config import Decoder, Dpo, Mesh
from deconfound_jax.models.decoder import Decoder as DecoderModel
from deconfound_jax.recipes.choice import check_scale, stage_of
from deconfound_jax.train.mesh import AXES
from experiments import align, rundir
from experiments.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(Path(__file__).with_name("mesh_recipes.py"))


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return mesh_recipes.losses(tmp_path_factory.mktemp("one"))


def agree(line, one_device, stages):
    found = json.loads(line)
    assert found.keys() == set(stages)
    assert len(set(one_device["dpo"])) == 4, "the policy moves"
    for name in stages:
        # The last evaluation of a joint stage is at its end: its steps are rounded up to whole dispatches.
        expected = one_device[name][: 4 if name == "dpo" else -1]
        np.testing.assert_allclose(found[name][: len(expected)], expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_two_devices_are_one(one_device, tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", SCRIPT, str(tmp_path), "1x2", "dpo", "joint"]
    done = subprocess.run(command, cwd=ROOT, text=True, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    agree(done.stdout, one_device, ("dpo", "joint"))


def test_two_processes_are_one(one_device, tmp_path):
    command = [ROOT / "experiments" / "run_tpu.sh", "--local", "2", "--python", sys.executable, "--logs", tmp_path,
               "--env", f"PYTHONPATH={ROOT}", SCRIPT, tmp_path / "run", "1x2", "dpo"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for process in range(2):
        log = (tmp_path / f"worker-{process}.log").read_text()
        agree(next(line for line in log.splitlines() if line.startswith("{")), one_device, ["dpo"])


def refused(**knobs):
    """The smoke preset with some knobs changed, as the command line names them, on a mesh of 2 x 2."""
    config = PRESETS["smoke"]()
    for name, value in knobs.items():
        part, field = name.split("__")
        config = dataclasses.replace(config, **{part: dataclasses.replace(vars(config)[part], **{field: value})})
    with pytest.raises(ValueError) as caught:
        check_scale(config, AbstractMesh((2, 2, 1), AXES))
    return str(caught.value)


def test_what_does_not_divide_is_refused_by_its_knob():
    shares = r"expected a multiple of 4 rows (2 data x 2 fsdp), got"
    assert refused(dpo__groups=6) == f"dpo.groups: {shares} 6"
    assert refused(sft__batch=30) == f"sft.batch: {shares} 30"
    for recipe, field in (("top", "batch"), ("kto", "batch"), ("dro", "batch"), ("grpo", "groups")):
        assert refused(align__recipe=recipe, **{f"{recipe}__{field}": 2}) == f"{recipe}.{field}: {shares} 2"
    assert refused(align__accumulate=4).startswith("dpo.groups: expected a multiple of 16 rows (2 data x 2 fsdp x 4")
    divisor = "align.dispatch: expected a divisor of"
    assert refused(align__dispatch=3) == f"{divisor} dpo.steps = 10, got 3"
    assert refused(align__dispatch=10) == f"{divisor} align.evaluate_every = 5, got 10"
    assert refused(align__dispatch=0).endswith("got 0")
    check_scale(PRESETS["smoke"](), AbstractMesh((2, 2, 1), AXES))


def test_a_run_is_refused_before_anything_is_trained_or_written(tmp_path):
    config = PRESETS["smoke"]()
    config = dataclasses.replace(config, align=dataclasses.replace(config.align, accumulate=3))
    with pytest.raises(ValueError, match="dpo.groups: expected a multiple of 3 rows"):
        align.run(config, tmp_path / "run")
    with pytest.raises(ValueError, match="the 1 devices there are, got .x2x1"):
        align.run(dataclasses.replace(PRESETS["smoke"](), mesh=Mesh(fsdp=2)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_stages_made_without_a_config_refuse_too():
    decoder = DecoderModel(Decoder(width=8, layers=1, heads=2), 10)
    with pytest.raises(ValueError, match="dpo.groups: expected a multiple of align.accumulate = 5, got 32"):
        stage_of(decoder, Dpo(), None, accumulate=5)
    with pytest.raises(ValueError, match="align.dispatch: expected a divisor of the stage's 100 steps, got 7"):
        stage_of(decoder, Dpo(), None, dispatch=7)
    with pytest.raises(ValueError, match=r"dpo.groups: expected a multiple of 12 rows \(12 data"):
        stage_of(decoder, Dpo(), None, mesh=AbstractMesh((12, 1, 1), AXES))


def test_writers_are_opened_once_by_the_process_that_writes(tmp_path, monkeypatch):
    opened, config = [], dataclasses.replace(PRESETS["smoke"](), writers=("tensorboard", "wandb"))
    monkeypatch.setattr(rundir, "tensorboard", lambda folder: opened.append(str(folder)) or "board")
    monkeypatch.setattr(rundir, "weights_and_biases", lambda *names: opened.append(names) or "wandb")
    for name in ("sft", "dpo"):
        assert rundir.record_of(config, tmp_path, name).writers == ("board", "wandb")
    assert opened == [str(tmp_path / "tensorboard"), ("deconfound_jax", f"smoke-{tmp_path.name}")]
    monkeypatch.setattr(rundir, "writes", lambda: False)
    assert rundir.record_of(config, tmp_path, "dpo").writers == ()
    assert rundir.record_of(PRESETS["smoke"](), tmp_path, "dpo").writers == ()


def test_a_run_goes_on_with_other_devices_and_writers(tmp_path):
    config = PRESETS["smoke"]()
    rundir.claim(tmp_path, config, None, "data")
    other = dataclasses.replace(config, mesh=Mesh(fsdp=4), writers=("tensorboard",))
    rundir.claim(tmp_path, other, None, "data")
    with pytest.raises(ValueError, match="align.accumulate: 1 there, 2 asked for"):
        rundir.claim(tmp_path, dataclasses.replace(other, align=dataclasses.replace(config.align, accumulate=2)), None,
                     "data")  # fmt: skip
