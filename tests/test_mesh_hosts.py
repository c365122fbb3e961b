"""Several processes as one run: who reads which rows, how they are joined, two of them here, and a slice's command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import mesh_regression
import numpy as np
import pytest

from deconfound_jax.train import hosts

ROOT = Path(__file__).resolve().parents[1]
RUN_TPU = ROOT / "experiments" / "run_tpu.sh"

ON_TWO_PROCESSES = """
import json
import jax
from mesh_regression import train
from deconfound_jax.train.mesh import make_mesh, rows_of

mesh = make_mesh()
assert (jax.process_count(), dict(mesh.shape), rows_of(mesh)[1]) == (2, {"data": 2, "fsdp": 1, "tensor": 1}, 2)
across = make_mesh(data=1, tensor=2)
assert rows_of(across) == (0, 1), "both read all rows where kernels are divided between them"
print(json.dumps({"process": jax.process_index(), "found": [train(mesh), train(across)]}))
"""


def test_two_processes_are_one(tmp_path):
    (tmp_path / "script.py").write_text(ON_TWO_PROCESSES)
    command = [RUN_TPU, "--local", "2", "--python", sys.executable, "--logs", tmp_path, "--env", "XLA_FLAGS=",
               "--env", f"PYTHONPATH={Path(__file__).parent}", tmp_path / "script.py"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one_device = mesh_regression.train()
    for process in range(2):
        log = (tmp_path / f"worker-{process}.log").read_text()
        assert f"hosts: process {process} of 2" in log
        found = json.loads(next(line for line in log.splitlines() if line.startswith("{")))
        assert found["process"] == process
        for found_there in found["found"]:
            np.testing.assert_allclose(found_there, one_device, rtol=1e-5)


class Lying:
    """A sharding whose devices are (process, share of the rows) pairs."""

    def __init__(self, *held):
        self.held = held

    def devices_indices_map(self, shape):
        devices = [type("Device", (), {"process_index": process})() for process, _ in self.held]
        return {device: (slice(share, share + 1),) for device, (_, share) in zip(devices, self.held, strict=True)}


def test_which_part_of_a_batch_a_process_reads(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert hosts.part(Lying((0, 0), (0, 1), (1, 2), (1, 3)), 4) == (1, 2)
    assert hosts.part(Lying((0, 0), (1, 0)), 1) == (0, 1)  # a kernel between them
    assert hosts.part(Lying((0, 1), (1, 0), (2, 1), (3, 0)), 2) == (0, 2)
    with pytest.raises(ValueError, match="equal parts of a batch's 3 shares"):
        hosts.part(Lying((0, 0), (0, 1), (1, 1), (1, 2)), 3)


def test_processes_are_joined_as_the_environment_says(monkeypatch):
    asked = []
    monkeypatch.setattr(hosts, "_join", lambda **arguments: asked.append(arguments))
    assert hosts.start(environment={}) == hosts.start("a:1", 1, 0) == "one process" and not asked
    given = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "0"}
    assert hosts.start(environment=given) == "process 0 of 4, coordinator a:1"
    assert hosts.start("b:2", 3, 2, environment=given) == "process 2 of 3, coordinator b:2"
    assert [(a["num_processes"], a["process_id"]) for a in asked] == [(4, 0), (3, 2)]
    hosts.start(environment={"DECONFOUND_HOSTS": "auto"})
    assert asked[2] == {}
    with pytest.raises(ValueError, match="hosts.index: expected a number, got ''"):
        hosts.start(environment={**given, "JAX_PROCESS_ID": ""})
    with pytest.raises(ValueError, match="index < processes"):
        hosts.start(environment={**given, "JAX_PROCESS_ID": "4"})


def run_tpu(*arguments):
    done = subprocess.run([str(RUN_TPU), *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_the_slices_command_line():
    subprocess.run(["bash", "-n", str(RUN_TPU)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(RUN_TPU)], check=True)
    _, out, _ = run_tpu("--tpu", "v4", "--zone", "z", "--env", "A=b c", "--dry-run", "experiments.align", "--x", "it's")
    # Unquoted by the shell here and by a worker's, the words are those that were given.
    here = subprocess.run(["bash", "-c", f"printf '%s\\n' {out}"], capture_output=True, text=True).stdout.splitlines()
    assert here[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh"] and "--worker=all" in here
    there = subprocess.run(["bash", "-c", here[-1].replace("cd deconfound_jax && env", "printf '%s\\n'")],
                           capture_output=True, text=True).stdout.splitlines()  # fmt: skip
    assert there[:2] == ["DECONFOUND_HOSTS=auto", "A=b c"] and there[-3:] == ["experiments.align", "--x", "it's"]
    for wrong, message in {
        ("--tpu", "v4", "x"): "--zone", ("--local", "0", "x"): "--local", ("--env", "A", "x"): "NAME=VALUE",
        ("--nope", "x"): "unknown option", ("x",): "--tpu NAME or --local N",
        ("--local", "1", "--tpu", "a", "x"): "both",
    }.items():  # fmt: skip
        status, _, error = run_tpu(*wrong)
        assert status == 2 and message in error, wrong
