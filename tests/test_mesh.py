"""Where arrays lie on a mesh, and that it changes nothing: rules by path, accumulation, eight devices are one."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import mesh_regression
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh

from deconfound_jax.align.update import update_policy
from deconfound_jax.config import Decoder as DecoderConfig
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.lora import init_lora
from deconfound_jax.train.mesh import AXES, check_rows, make_mesh, shardings
from deconfound_jax.train.step import TrainState, adamw
from experiments import bench_mesh

ROOT = Path(__file__).resolve().parents[1]

ON_EIGHT = """
import json
import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec
from mesh_regression import train
from deconfound_jax.train.mesh import make_mesh, rows_of, shard_batch
from deconfound_jax.train.step import init_state, jit_step
from experiments.mesh_losses import Cases, run_cases

mesh = make_mesh(fsdp=2, tensor=2)
found = {"regression": [train(mesh), train(mesh, accumulate=4)]}
assert rows_of(mesh) == (0, 1) and shard_batch(1.0, mesh).sharding.is_fully_replicated

kernel = np.zeros((2, 16, 16), np.float32)
state = init_state({"q_proj": {"kernel": kernel}, "w": np.zeros(16, np.float32)}, optax.sgd(0.1), mesh=mesh)
lies = jax.tree.map(lambda leaf: leaf.sharding, state)
assert lies.params["w"].is_fully_replicated
assert lies.params["q_proj"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")

def anew(state, frozen, rows_b, key):
    return state._replace(params={"q_proj": {"kernel": rows_b.sum() + kernel}, "w": rows_b}), {"rows": rows_b}

state, metrics = jit_step(anew)(state, {}, shard_batch(np.ones(16, np.float32), mesh), jax.random.key(0))
assert jax.tree.map(lambda leaf: leaf.sharding, state) == lies, "the new state lies otherwise than the old one"
assert metrics["rows"].sharding.is_fully_replicated

try:
    shard_batch({"x_bd": np.ones((6, 3))}, mesh)
except ValueError as error:
    found["refused"] = str(error)
cases = Cases(meshes=("1x1x1", "2x2x2"), objectives=("joint",), precisions=("fp64",), steps=3, width=16, layers=1)
found["cases"] = run_cases(cases)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def state():
    """Shapes of a decoder's training state, nothing computed."""
    decoder = Decoder(DecoderConfig(width=16, layers=2, heads=2, length=8, gated=True, tied=False), 10)
    params = jax.eval_shape(decoder.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    causal = {"moments": {"lm_head": jax.ShapeDtypeStruct((4, 4), jnp.float32)}}
    lora = jax.eval_shape(lambda p: init_lora(jax.random.key(0), p), params)
    whole = params | {"lora": lora}
    return TrainState(whole, jax.eval_shape(adamw(1e-3, 10).init, whole), causal, jax.ShapeDtypeStruct((), jnp.int32))


def specs_of(tree, mesh, **more):
    """Path -> the spec of every leaf, None where it is whole."""
    found = jax.tree_util.tree_flatten_with_path(shardings(tree, mesh, **more))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(lies.spec) for path, lies in found}


def test_rules_by_path(state):
    found = specs_of(state, AbstractMesh((2, 2, 2), AXES))
    layers = "params/params/layers"
    assert found["params/params/embed_tokens/embedding"] == ("tensor", "fsdp")
    assert found["params/params/lm_head"] == ("fsdp", "tensor")
    assert found["params/params/positions"] == (None, "fsdp")
    for name in "qkv":
        assert found[f"{layers}/{name}_proj/kernel"] == (None, "fsdp", "tensor")
    for name in ("gate", "up"):
        assert found[f"{layers}/{name}_proj/kernel"] == (None, "fsdp", "tensor")
    for name in ("o", "down"):
        assert found[f"{layers}/{name}_proj/kernel"] == (None, "tensor", "fsdp")
        assert found[f"{layers}/{name}_proj/bias"] == ()  # added to the stream, which is whole
    assert found[f"{layers}/q_proj/bias"] == (None, "tensor")
    assert found[f"{layers}/mlp_norm/scale"] == found["step"] == found["causal/moments/lm_head"] == ()
    adapters = "params/lora/layers"
    assert found[f"{adapters}/up_proj/a"] == (None, "fsdp") and found[f"{adapters}/up_proj/b"] == (None, None, "tensor")
    assert found[f"{adapters}/o_proj/a"] == (None, "tensor") and found[f"{adapters}/o_proj/b"] == (None, None, "fsdp")


def test_the_optimizers_state_lies_as_its_parameters_do(state):
    found, seen = specs_of(state, AbstractMesh((1, 4, 2), AXES)), 0
    for name, spec in found.items():
        if moment := re.search(r"^opt_state/.*/(mu|nu)/(.*)$", name):
            assert spec == found[f"params/{moment[2]}"], name
            seen += 1
    assert seen == 2 * len(jax.tree.leaves(state.params))


def test_on_one_device_everything_is_whole(state):
    assert set(specs_of(state, make_mesh(jax.devices()[:1])).values()) == {()}


def test_where_rows_lie_costs_nothing_on_one_device():
    decoder = Decoder(DecoderConfig(width=8, layers=1, heads=2, length=4), 10)
    tokens_bl = jnp.zeros((4, 4), jnp.int32)
    params = jax.eval_shape(decoder.init, jax.random.key(0), tokens_bl)
    gradient = jax.grad(lambda params: decoder.apply(params, tokens_bl)[0].sum())
    assert "sharding_constraint" not in str(jax.make_jaxpr(gradient)(params))


def test_an_axis_that_does_not_divide_stays_whole_and_is_named(state, caplog):
    found = specs_of(state, AbstractMesh((1, 2, 3), AXES), log=logging.getLogger("mesh"))
    assert found["params/params/layers/q_proj/kernel"] == (None, "fsdp")  # 16 outputs over 3
    assert "params/params/layers/q_proj/kernel: axis 2 of 16 over tensor=3" in caplog.text
    assert "norm" not in caplog.text


def test_a_mesh_of_another_size_and_rows_it_does_not_divide_are_refused():
    devices = jax.devices()[:1]
    with pytest.raises(ValueError, match=r"mesh: expected .* the 1 devices there are, got \*x2x1"):
        make_mesh(devices, fsdp=2)
    with pytest.raises(ValueError, match=r"mesh.tensor: expected at least 1, got 0"):
        make_mesh(devices, tensor=0)
    mesh = AbstractMesh((2, 4, 3), AXES)
    check_rows("dpo.groups", 16, mesh, accumulate=2)
    with pytest.raises(
        ValueError, match=r"dpo.groups: expected a multiple of 16 rows \(2 data x 4 fsdp x 2 acc.*got 8"
    ):
        check_rows("dpo.groups", 8, mesh, accumulate=2)


def numpy_gradient(x_bd, y_b, weight_b, w):
    error_b = x_bd @ w - y_b
    total = max(weight_b.sum(), 1e-30)
    return 2 * (weight_b * error_b) @ x_bd / total + 0.1 * w, (weight_b * error_b**2).sum() / total + 0.05 * (
        w**2
    ).sum()


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_microbatches_have_the_whole_batchs_gradient(accumulate):
    rng = np.random.default_rng(0)
    x_bd, y_b, w = rng.normal(size=(12, 3)), rng.normal(size=12), np.array([1.0, 2.0, -1.0])
    weight_b = rng.integers(0, 5, 12).astype(float)
    if accumulate > 1:
        weight_b[1::accumulate] = 0.0  # a microbatch that counts for nothing
        y_b[1::accumulate] = np.nan

    def objective(params, frozen, batch, key):
        x, y, weight = batch
        error_b = x @ params - y
        return error_b**2, weight, 0.05 * (params**2).sum(), {"error": error_b.mean()}

    with jax.enable_x64(True):
        after, _, metrics = jax.jit(
            lambda w, batch: update_policy(objective, optax.sgd(1.0), w, optax.sgd(1.0).init(w), {}, batch,
                                           jax.random.key(0), accumulate)
        )(jnp.asarray(w), (x_bd, y_b, weight_b))  # fmt: skip
    kept = weight_b > 0
    gradient, loss = numpy_gradient(x_bd[kept], y_b[kept], weight_b[kept], w)
    np.testing.assert_allclose(w - np.asarray(after), gradient, rtol=1e-12)
    np.testing.assert_allclose([metrics["loss"], metrics["grad_norm"]], [loss, np.linalg.norm(gradient)], rtol=1e-12)
    assert np.isfinite(metrics["error"])


def test_a_batch_that_accumulation_does_not_divide_is_named():
    batch = {"x_bd": jnp.zeros((6, 2)), "y_b": jnp.zeros(4)}
    with pytest.raises(
        ValueError, match=r"batch\['x_bd'\]: expected a first axis that accumulate = 4 divides, got \(6, 2\)"
    ):
        update_policy(None, None, None, None, None, batch, None, accumulate=4)


def test_the_draws_of_a_microbatch_are_its_own():
    def objective(params, frozen, batch, key):
        return 0 * batch * params, jnp.ones_like(batch), 0.0, {"draw": jax.random.uniform(key)}

    key = jax.random.key(5)
    *_, metrics = update_policy(objective, optax.sgd(1.0), jnp.ones(()), optax.sgd(1.0).init(jnp.ones(())), {},
                                jnp.ones(4), key, accumulate=2)  # fmt: skip
    expected = np.mean([jax.random.uniform(jax.random.fold_in(key, i)) for i in range(2)])
    np.testing.assert_allclose(metrics["draw"], expected, rtol=1e-6)


def test_eight_devices_are_one():
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n{ON_EIGHT}"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    one_device = mesh_regression.train()
    for found_there in found["regression"]:
        np.testing.assert_allclose(found_there, one_device, rtol=1e-5)
    assert found["refused"].startswith("batch['x_bd']: expected a multiple of 4 rows (2 data x 2 fsdp), got 6")
    case, cases = "2x2x2.joint.fp64", found["cases"]
    assert len(set(cases[case]["losses"])) == 3, "the policy moves"
    assert bench_mesh.difference(cases[case], cases, case) < 1e-9
    assert not bench_mesh.unexpected({case: cases[case]}), done.stderr
    assert cases["1x1x1.joint.fp64"]["collectives"] == {}


def test_the_bench_names_every_bar_that_does_not_hold(monkeypatch, tmp_path):
    """With losses made up: 1, 2 on one device, the second a little larger on four."""

    def train(config, folder, meshes, processes):
        kinds = {"1x1x1": {}, "4x1x1": {"all-reduce": 2}}
        second = {"1x1x1": 2.0, "4x1x1": 2.0 + 2e-6 * processes}
        return {f"{mesh}.dpo.{precision}": {"losses": [1.0, second[mesh]], "collectives": kinds[mesh]}
                for mesh in meshes for precision in config.precisions}  # fmt: skip

    monkeypatch.setattr(bench_mesh, "train", train)
    config = bench_mesh.BenchMesh(meshes=("4x1x1",), objectives=("dpo",))
    results = bench_mesh.run(config, tmp_path)
    assert results["mesh.4x1x1.dpo.fp32"] == pytest.approx(1e-6)
    assert (
        results["mesh.max_rel_loss_difference.fp32"] == results["mesh.processes.4x1x1.dpo.fp32"] == pytest.approx(2e-6)
    )
    assert results["mesh.collectives.4x1x1"] == ["dpo: all-reduce 2"]
    assert results["failed"] == ["fp64: losses differ by 2.0e-06, expected at most 1e-09"]
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert len(bench_mesh.tables(results, config)[0]) == 2


def test_what_devices_may_send_each_other():
    def wrong(mesh, **counts):
        return len(
            bench_mesh.unexpected(
                {f"{mesh}.dpo.fp64": {"collectives": {k.replace("_", "-"): v for k, v in counts.items()}}}
            )
        )

    assert wrong("8x1x1", all_reduce=2) == 0
    assert wrong("8x1x1", all_reduce=2, all_gather=1) == 1  # parameters are whole there
    assert wrong("2x4x1", all_reduce=2) == 1  # and divided here
    assert wrong("2x2x2", all_reduce=2, all_gather=3, all_to_all=1) == 1
