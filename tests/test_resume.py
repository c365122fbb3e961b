"""What breaks a run, and what is left of it: kills, damaged files, a full disk, numbers that are not finite."""

import contextlib
import functools
import json
import os
import resource
import signal
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deconfound_jax.train import checkpoint
from deconfound_jax.train.dispatch import count_tokens, scan_steps
from deconfound_jax.train.files import append_lines
from deconfound_jax.train.loop import read_metrics, run_stage
from deconfound_jax.train.metrics import MetricsLog, NonFinite
from deconfound_jax.train.preemption import Preempted
from deconfound_jax.train.step import adamw, init_state, make_step

STEPS = 12


def objective(params, frozen, batch, key):
    x_bd, y_b = batch
    error_b = x_bd @ params["w"] - y_b
    return error_b**2, jnp.ones_like(y_b), 0.0, {"draw": jax.random.uniform(key), "w": params["w"]}


def batches(i):
    x_bd = np.random.default_rng(i).normal(size=(4, 3)).astype(np.float32)
    return x_bd, x_bd @ np.array([1.0, -2.0, 0.5], np.float32)


@functools.cache
def compiled(dispatch=1):
    optimizer = adamw(0.1, STEPS)
    return scan_steps(make_step(objective, optimizer), dispatch), optimizer


def train(workdir, of=batches, dispatch=1, every=4, **more):
    step, optimizer = compiled(dispatch)
    state, key = init_state({"w": jnp.zeros(3)}, optimizer), jax.random.key(1)
    return run_stage("fit", state, step, (), of, STEPS, workdir, checkpoint_every=every, key=key, dispatch=dispatch,
                     **more)  # fmt: skip


def rows_of(workdir):
    return [{k: v for k, v in row.items() if k != "clock"} for row in read_metrics(workdir)]


def states(workdir):
    return sorted(path.name for path in (workdir / "checkpoints" / "fit").iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An unbroken run: its folder and its final state."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, train(workdir)


def damage(workdir, step, how):
    """Breaks the state of `step`, and returns the file's name."""
    place = workdir / "checkpoints" / "fit" / str(step)
    path = max((p for p in (place / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if how in ("sums", "empty"):
        path = place / "sha256.json"
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "bit":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif how == "empty":
        path.write_text("{}")
    else:
        path.write_bytes(data[: len(data) // 2])
    return path.name


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", r"expected \d+ bytes, got \d+"),
        ("missing", r"expected \d+ bytes, got no file"),
        ("bit", "its SHA-256 is not that of sha256.json"),
        ("sums", "cannot be read"),
        ("empty", "names no file"),
    ],
)
def test_a_damaged_newest_state_is_passed_over(tmp_path, whole, how, said):
    train(tmp_path)
    name = damage(tmp_path, STEPS, how)
    with pytest.warns(RuntimeWarning, match=rf"fit/12 is damaged: .*{name}:? {said}; going on from .*fit/8$"):
        state = train(tmp_path)
    chex.assert_trees_all_equal(state, whole[1])
    assert rows_of(tmp_path) == rows_of(whole[0])
    assert states(tmp_path) == ["12", "8"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tmp_path)  # what was damaged has been written anew


def test_a_damaged_state_is_no_way_back(tmp_path):
    with pytest.raises(Preempted):
        train(tmp_path, of=lambda i: [batches(i), i == 9 and os.kill(os.getpid(), signal.SIGTERM)][0])
    assert states(tmp_path) == ["10", "8"]
    damage(tmp_path, 10, "bit")
    with pytest.warns(RuntimeWarning, match="going on from .*fit/8$"):
        train(tmp_path)
    assert states(tmp_path) == ["12", "8"], "the state before the last save is the whole one"


def test_every_file_of_a_state_is_watched(tmp_path):
    train(tmp_path)
    folder = tmp_path / "checkpoints" / "fit"
    files = [path for path in (folder / str(STEPS) / "state").rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 128]))
        assert path.name in checkpoint._fault(folder / str(STEPS)), path
        path.write_bytes(data)
    assert not checkpoint._fault(folder / str(STEPS))


def test_without_a_whole_state_nothing_is_begun_anew(tmp_path):
    train(tmp_path)
    damage(tmp_path, 8, "missing"), damage(tmp_path, 12, "bit")
    rows = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"fit/12 is damaged.*fit/8 is damaged.*none is whole: remove .*fit to train"):
        train(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == rows


@contextlib.contextmanager
def full_disk(size):
    """No file of this process grows beyond `size` bytes: to a writer, a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_state_before_it(tmp_path, whole):
    state = whole[1]
    folder = tmp_path / "fit"
    checkpoint.save(folder, 4, state)
    with pytest.raises(OSError, match=r"fit/8: could not write a state of 48 bytes, \d+ bytes are free .*too large"):
        with full_disk(50):
            checkpoint.save(folder, 8, state)
    assert [path.name for path in folder.iterdir()] == ["4"]
    chex.assert_trees_all_equal(checkpoint.restore_latest(folder, state)[0], state)


def test_a_full_disk_leaves_whole_lines(tmp_path, whole):
    path = tmp_path / "metrics.jsonl"
    append_lines(path, "a" * 9 + "\n")
    with pytest.raises(OSError, match=r"metrics.jsonl: could not write 100 bytes, \d+ bytes are free"):
        with full_disk(50):
            append_lines(path, "b" * 99 + "\n")
    assert path.read_text() == "a" * 9 + "\n"
    torn = (whole[0] / "metrics.jsonl").read_text() + '{"name": "fit", "st'
    path.write_text(torn)
    with pytest.raises(OSError, match=r"metrics.jsonl: could not write \d{3,} bytes"):
        with full_disk(50):
            MetricsLog(tmp_path, "fit").cut(STEPS)  # the first a resumed run does
    assert path.read_text() == torn and os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("dispatch", [1, 2])
def test_what_is_not_finite_stops_the_run_and_names_its_rows(tmp_path, whole, dispatch):
    def poisoned(i):
        x_bd, y_b = batches(i)
        return (x_bd, y_b * np.float32("inf")) if i == 6 else (x_bd, y_b)

    def names(i):
        return np.array([[f"row{4 * i + k}" for k in range(4)]])

    message = r"'fit': loss and grad_norm not finite after step 7, on batch 6; .*nonfinite.json"
    with pytest.raises(NonFinite, match=message):
        train(tmp_path, of=poisoned, keys=names, dispatch=dispatch)
    found = json.loads((tmp_path / "nonfinite.json").read_text())
    assert (found["stage"], found["step"], found["batch"]) == ("fit", 7, 6)
    assert found["row_keys"] == [["row24", "row25", "row26", "row27"]]
    assert found["metrics"]["loss"] == "inf" and np.isfinite(found["metrics"]["draw"])
    assert states(tmp_path) == ["4"], "the last state on disk is finite"
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 8)) and rows[-1]["loss"] is None
    train(tmp_path, dispatch=dispatch)
    assert rows_of(tmp_path) == rows_of(whole[0]) and not (tmp_path / "nonfinite.json").exists(), "mended"


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    def huge(state, frozen, batch, key):
        params = {"w": state.params["w"] + jnp.where(state.step == 6, jnp.inf, 0.0)}
        return state._replace(params=params, step=state.step + 1), {"loss": jnp.where(state.step == 7, 1.0, 2.0)}

    state = init_state({"w": jnp.zeros(3)}, compiled()[1])
    with pytest.raises(NonFinite, match="parameters not finite after step 8"):
        run_stage("fit", state, jax.jit(huge, donate_argnums=0), (), batches, 12, tmp_path, checkpoint_every=4, key=0)
    assert states(tmp_path) == ["4"] and (tmp_path / "nonfinite.json").exists()


@pytest.mark.parametrize("dispatch", [1, 2])
def test_sigterm_saves_and_the_same_call_goes_on(tmp_path, whole, dispatch):
    def guard(*_):
        raise AssertionError("nobody took the signal")

    def terminated(i):
        if i == 5 and not (tmp_path / "checkpoints" / "fit" / "6").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return batches(i)

    before = signal.signal(signal.SIGTERM, guard)
    try:
        with pytest.raises(Preempted, match=r"'fit': stopped after step 6 of 12, its state is saved in .*fit$"):
            train(tmp_path, of=terminated, dispatch=dispatch, evaluators=[(6, lambda state, done: {"at": done})])
        assert signal.getsignal(signal.SIGTERM) is guard, "the handler that was there is put back"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert states(tmp_path) == ["4", "6"] and rows_of(tmp_path)[-1] == {"name": "fit", "step": 6, "eval": True, "at": 6}
    state = train(tmp_path, of=terminated, dispatch=dispatch, evaluators=[(6, lambda state, done: {"at": done})])
    chex.assert_trees_all_equal(state, whole[1])
    assert [row for row in rows_of(tmp_path) if "eval" not in row] == rows_of(whole[0])
    assert [row["at"] for row in rows_of(tmp_path) if "eval" in row] == [0, 6, 12]


def test_sigterm_while_the_last_state_is_judged_is_not_lost(tmp_path, whole):
    def judge(state, done):
        if done == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"at": done}

    with pytest.raises(Preempted, match="stopped after step 12 of 12"):
        train(tmp_path, evaluators=[(6, judge)])
    chex.assert_trees_all_equal(train(tmp_path, evaluators=[(6, judge)]), whole[1])


def test_several_steps_a_dispatch_are_the_same_steps(tmp_path, whole):
    asked, seen = [], []
    state = train(tmp_path, of=lambda i: asked.append(i) or batches(i), dispatch=4,
                  on_step=lambda name, done, steps, newest: seen.append(done))  # fmt: skip
    chex.assert_trees_all_equal(state, whole[1])
    assert rows_of(tmp_path) == rows_of(whole[0])
    assert asked == list(range(STEPS)) and seen == [4, 8, 12]
    assert compiled(4)[0]._cache_size() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dispatch": 5}, "'fit': dispatch: expected a divisor of steps = 12, got 5"),
        ({"dispatch": 4, "every": 6}, "expected a divisor of checkpoint_every = 6, got 4"),
        ({"dispatch": 4, "evaluators": [(4, None), (3, None)]}, r"expected a divisor of evaluators\[1\] = 3, got 4"),
        ({"dispatch": 0}, "expected a divisor of steps = 12, got 0"),
    ],
)
def test_a_dispatch_divides_every_period(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, **change)
    assert not os.listdir(tmp_path)


def test_tokens_are_counted_by_the_batchs_shapes():
    from deconfound_jax.structs import Pairs

    tokens_bgl, other = np.zeros((4, 2, 6), np.int32), np.zeros((4, 2), np.float32)
    assert count_tokens(tokens_bgl[0]) == 12
    assert count_tokens(Pairs(tokens_bgl, other, other, other)) == 48
    assert count_tokens({"rows": other, "texts": Pairs(tokens_bgl, other, other, other, np.zeros((4, 3), int))}) == 60
    assert count_tokens((other, tokens_bgl)) == count_tokens(other) == 0


def test_killed_runs_end_as_the_unbroken_one(tmp_path):
    from experiments import bench_resume

    config = bench_resume.BenchResume(kills=2, chains=1, stages=("dpo",), steps=12, checkpoint_every=2)
    results = bench_resume.run(config, tmp_path)
    assert not results["failed"], results
    assert results["resume.kills_survived"] == 2 and results["resume.bit_equal"] and results["resume.damaged_refused"]
    assert results["resume.sigkill"] == results["resume.sigterm"] == 1
