"""The step, the loop, checkpoints: one trace, the weighted mean, rows and states. What breaks a run: test_resume.

Several devices: test_mesh."""

import contextlib
import functools
import hashlib
import io
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deconfound_jax.train import checkpoint
from deconfound_jax.train.loop import read_metrics, run_stage
from deconfound_jax.train.step import TrainState, adamw, init_state, jit_step, make_step, schedule


def rows_of(workdir, name=None):
    return [{k: v for k, v in row.items() if k != "clock"} for row in read_metrics(workdir, name)]


def checkpoint_steps(folder):
    return sorted(int(path.name) for path in folder.iterdir())


# A regression small enough to compile in no time.
def objective(params, frozen, batch, key):
    x_bd, y_b = batch
    error_b = x_bd @ params["w"] - y_b
    return error_b**2, frozen, 0.01 * (params["w"] ** 2).sum(), {"draw": jax.random.uniform(key)}


def batches(i):
    x_bd = np.random.default_rng(i).normal(size=(4, 3)).astype(np.float32)
    return x_bd, x_bd @ np.array([1.0, -2.0, 0.5], np.float32)


def fresh(steps=6):
    optimizer = adamw(0.1, steps)
    state = init_state({"w": jnp.zeros(3)}, optimizer, causal={"n": 2.0, "empty": (), "none": jnp.zeros((0, 2))})
    return state, make_step(objective, optimizer), np.ones(4, np.float32)


@functools.cache
def compiled(steps):
    """A step for the tests that do not count its compilations."""
    return fresh(steps)[1]


def train(workdir, name="fit", steps=6, every=2, of=batches, **more):
    state, _, frozen = fresh(steps)
    step = compiled(steps)
    key = jax.random.key(1)
    return run_stage(name, state, step, frozen, of, steps, workdir, checkpoint_every=every, key=key, **more)


def test_one_trace_and_one_compilation_a_stage(tmp_path):
    chex.clear_trace_counter()
    optimizer = adamw(0.1, 6)
    step = make_step(chex.assert_max_traces(objective, n=1), optimizer)
    state, asked = init_state({"w": jnp.zeros(3)}, optimizer), []
    stage = ("fit", state, step, np.ones(4, np.float32), lambda i: asked.append(i) or batches(i), 6, tmp_path)
    run_stage(*stage, checkpoint_every=2, key=jax.random.key(1))
    assert step._cache_size() == 1
    assert asked == list(range(6)), "update i sees batch i"


def test_a_resumed_state_needs_no_second_compilation(tmp_path):
    state, step, frozen = fresh()
    state, _ = step(state, frozen, batches(0), jax.random.key(1))
    checkpoint.save(tmp_path, 1, state)
    like, _, _ = fresh()
    restored, done = checkpoint.restore_latest(tmp_path, like)
    chex.assert_trees_all_equal(restored, state)
    assert done == 1 and isinstance(restored, TrainState) and restored.causal["empty"] == ()
    for leaf in jax.tree.leaves(restored):
        assert leaf.committed and not leaf.weak_type
    step(restored, frozen, batches(1), jax.random.key(1))
    assert step._cache_size() == 1


def test_the_fresh_state_owns_strong_committed_arrays():
    params = {"w": jnp.zeros(3), "scale": jnp.asarray(1.0)}
    optimizer = optax.sgd(0.1)
    state = init_state(params, optimizer, causal=3.0)
    for leaf in jax.tree.leaves(state):
        assert leaf.committed and not leaf.weak_type
    jit_step(lambda state, frozen, batch, key: (state._replace(step=state.step + 1), {}))(state, (), (), 0)
    assert state.params["w"].is_deleted(), "the state is donated"
    np.testing.assert_array_equal(params["w"], np.zeros(3))


def test_the_loss_is_the_weighted_mean_and_the_penalty():
    state, step, _ = fresh()
    weight = np.array([1.0, 0.0, 3.0, 1.0], np.float32)
    (x, y), w = batches(0), np.array([1.0, 2.0, 3.0])
    state = state._replace(params={"w": jnp.asarray(w, jnp.float32)})
    _, metrics = step(state, weight, (x, y), jax.random.key(1))
    error = x @ w - y
    gradient = 2 * (weight * error) @ x / 5 + 0.02 * w
    np.testing.assert_allclose(metrics["loss"], (weight * error**2).sum() / 5 + 0.14, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-5)


def test_every_step_draws_from_its_own_key(tmp_path):
    train(tmp_path)
    draws = [row["draw"] for row in read_metrics(tmp_path, "fit")]
    expected = [float(jax.random.uniform(jax.random.fold_in(jax.random.key(1), i))) for i in range(6)]
    assert draws == expected and len(set(draws)) == 6


def test_it_learns(tmp_path):
    state = train(tmp_path, steps=200, every=100)
    np.testing.assert_allclose(state.params["w"], [1.0, -2.0, 0.5], atol=0.05)


def test_rates():
    rate = schedule(2.0, 20)
    np.testing.assert_allclose([rate(0), rate(1), rate(2), rate(11), rate(20), rate(99)], [1, 2, 2, 1, 0, 0], atol=1e-6)
    assert all(rate(i) > 0 for i in range(20))
    assert schedule(2.0, 1)(0) == 2.0


def test_a_finished_stage_trains_nothing(tmp_path):
    first = train(tmp_path)
    train(tmp_path, "second")
    log = (tmp_path / "metrics.jsonl").read_bytes()

    def forbidden(*_):
        raise AssertionError("a finished stage took a step")

    like, _, _ = fresh()
    again = run_stage("fit", like, forbidden, (), forbidden, 6, tmp_path, checkpoint_every=2, key=None)
    chex.assert_trees_all_equal(again, first)
    assert (tmp_path / "metrics.jsonl").read_bytes() == log
    with pytest.raises(ValueError, match=r"'fit': expected steps of at least 6 \(6 are done\), got 5"):
        train(tmp_path, steps=5)


def test_an_undone_stage_leaves_the_rows_of_others(tmp_path):
    train(tmp_path, "before")
    whole = train(tmp_path)
    train(tmp_path, "after")
    rows = rows_of(tmp_path)
    for step in checkpoint_steps(tmp_path / "checkpoints" / "fit")[1:]:
        (tmp_path / "checkpoints" / "fit" / str(step)).rename(tmp_path / f"gone{step}")
    resumed = train(tmp_path)
    train(tmp_path, "after")  # it is finished, and would not write its rows again
    for name in ("before", "fit", "after"):
        assert rows_of(tmp_path, name) == [row for row in rows if row["name"] == name]
    chex.assert_trees_all_equal(resumed, whole)


def test_a_stage_without_checkpoint_starts_its_rows_anew(tmp_path):
    def broken(i):
        if i == 3:
            raise RuntimeError("power cut")
        return batches(i)

    evaluators = [(1, lambda state, done: {"w": state.params["w"]})]
    with pytest.raises(RuntimeError, match="power cut"):
        train(tmp_path, every=5, of=broken, evaluators=evaluators)
    assert len(rows_of(tmp_path)) == 7
    train(tmp_path, evaluators=evaluators)
    assert [row["step"] for row in rows_of(tmp_path)] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]


def test_the_newest_two_checkpoints_are_kept(tmp_path):
    train(tmp_path, steps=9, every=2)
    assert checkpoint_steps(tmp_path / "checkpoints" / "fit") == [8, 9]


def test_a_half_written_checkpoint_is_not_read(tmp_path):
    train(tmp_path)
    folder = tmp_path / "checkpoints" / "fit"
    (folder / "7.partial" / "state").mkdir(parents=True)
    (folder / "4").rename(folder / "4.removed")
    state, done = checkpoint.restore_latest(folder, fresh()[0])
    assert done == 6
    checkpoint.save(folder, 8, state)
    assert {path.name for path in folder.iterdir()} == {"6", "8"}, "what a kill left is gone with the next save"


def test_sums_ask_a_file_for_read_alone(tmp_path):
    class Place:  # of an object store
        def open(self, mode):
            return contextlib.closing(types.SimpleNamespace(read=io.BytesIO(data).read, close=lambda: None))

    data = bytes(range(251)) * 9000  # more than a piece
    assert checkpoint._sum(Place()) == [len(data), hashlib.sha256(data).hexdigest()]


def test_checkpoints_of_another_shape_or_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkpoint.restore_latest("nothing", fresh()[0]) is None
    checkpoint.save("here/first", 3, fresh()[0])
    state, done = checkpoint.restore_latest("here/first", fresh()[0])
    assert done == 3
    other = init_state({"w": jnp.zeros(4)}, adamw(0.1, 6), causal={"n": 2.0, "empty": (), "none": jnp.zeros((0, 2))})
    with pytest.raises(ValueError, match=r"opt_state.1.0.mu.w: expected float32\[4\], got float32\[3\]"):
        checkpoint.restore_latest("here/first", other)
    with pytest.raises(ValueError, match=r"causal.n: expected nothing, got float32\[\]"):
        checkpoint.restore_latest("here/first", state._replace(causal=()))


def test_progress_and_rows(tmp_path):
    seen = []
    train(tmp_path, steps=5, on_step=lambda *call: seen.append(call))
    assert [call[:3] for call in seen] == [("fit", i, 5) for i in range(1, 6)]
    assert seen[0][3] == {} and seen[2][3]["loss"] == read_metrics(tmp_path)[1]["loss"]
    for row in read_metrics(tmp_path):
        assert list(row)[:2] == ["name", "step"] and list(row)[-1] == "clock"


def test_what_is_not_finite_is_null_in_json(tmp_path):
    train(tmp_path, evaluators=[(6, lambda state, done: {"score": jnp.nan, "pair": np.array([1.0, np.inf])})])
    row = read_metrics(tmp_path)[0]
    assert row["eval"] is True and row["score"] is None and row["pair"] == [1.0, None]
