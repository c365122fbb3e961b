"""Rows as TensorBoard and Weights & Biases get them, and as the progress bar shows them."""

import sys
import types

import pytest

from deconfound_jax.train.loop import read_metrics
from deconfound_jax.train.metrics import MetricsLog
from deconfound_jax.train.writers import scalars, tensorboard, weights_and_biases
from experiments.cli import note_of

ROWS = [
    {"name": "dpo", "step": 0, "eval": True, "kl": 0.5, "clock": 1.0},
    {"name": "dpo", "step": 1, "loss": 0.7, "pair": [1.0, None, 3], "text": "x", "clock": 2.0},
]
SHOWN = [("dpo/eval/kl", 0.5, 0), ("dpo/loss", 0.7, 1), ("dpo/pair/0", 1.0, 1), ("dpo/pair/2", 3.0, 1)]


@pytest.fixture
def calls(monkeypatch):
    """Stands in for both packages; what was called, in order."""
    found = []

    class SummaryWriter:
        def __init__(self, folder):
            found.append(("open", folder))

        def add_scalar(self, tag, number, step):
            found.append((tag, number, step))

        def flush(self):
            found.append("flush")

    class Run:
        def define_metric(self, name, step_metric):
            found.append((name, step_metric))

        def log(self, numbers):
            found.append(numbers)

    wandb = types.SimpleNamespace(init=lambda **asked: found.append(asked) or Run())
    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return found


def test_tensorboard_gets_every_number_at_its_stages_step(calls, tmp_path):
    tensorboard(tmp_path)(ROWS)
    assert calls == [("open", str(tmp_path)), *SHOWN, "flush"]


def test_wandb_gets_every_number_over_its_stages_steps(calls):
    write = weights_and_biases("project", "run")
    write(ROWS)
    write([{"name": "joint", "step": 1, "loss": 0.1}])
    assert calls[0] == {"project": "project", "name": "run", "id": "run", "resume": "allow"}
    assert calls[1:4] == [
        ("dpo/*", "dpo/step"),
        {"dpo/step": 0, "dpo/eval/kl": 0.5},
        {"dpo/step": 1, "dpo/loss": 0.7, "dpo/pair/0": 1.0, "dpo/pair/2": 3.0},
    ]
    assert calls[4:] == [("joint/*", "joint/step"), {"joint/step": 1, "joint/loss": 0.1}]


def test_flags_and_words_are_no_numbers():
    assert list(scalars({"name": "a", "step": 3, "done": True, "word": "x", "n": 2})) == [("a/n", 2.0)]


@pytest.mark.parametrize(
    ("name", "make"), [("tensorboardX", lambda: tensorboard("x")), ("wandb", lambda: weights_and_biases("a", "b"))]
)
def test_a_missing_package_is_named(monkeypatch, name, make):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=f"this writer needs {name}: pip install {name}"):
        make()


def test_writers_get_what_the_file_gets(tmp_path):
    got = []
    log = MetricsLog(tmp_path, "fit", writers=[got.extend])
    log.keep(2, 2, {"loss": [1.0, 0.5], "pair": [[1.0, float("nan")], [2.0, 3.0]]}, 0)
    log.flush()
    log.evaluate([lambda state, done: {"kl": state}, lambda state, done: {"share": 2 * state}], 0.25, 2)
    assert (log.newest["loss"], log.newest["kl"], log.newest["share"]) == (0.5, 0.25, 0.5)
    assert got == read_metrics(tmp_path)
    assert [(row["step"], row.get("loss"), row.get("pair"), row.get("kl")) for row in got] == [
        (1, 1.0, [1.0, None], None), (2, 0.5, [2.0, 3.0], None), (2, None, None, 0.25),
        (2, None, None, None)
    ]  # fmt: skip


def test_a_writer_that_fails_ends_no_run(tmp_path, caplog):
    tried, got = [], []

    def broken(rows):
        tried.append(rows)
        raise ConnectionError("no route")

    log = MetricsLog(tmp_path, "fit", writers=[broken, got.extend])
    for done in (1, 2):
        log.evaluate([lambda state, done: {"kl": state}], 0.5, done)
    assert len(tried) == 1 and got == read_metrics(tmp_path) and len(got) == 2
    assert "'fit': a writer failed and gets no more rows (ConnectionError: no route)" in caplog.text


def test_the_rate_leaves_out_compiling_evaluating_and_saving(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("deconfound_jax.train.metrics.time.monotonic", lambda: now[0])
    log = MetricsLog(tmp_path, "fit")

    def dispatch(seconds, done):
        log.start_clock()
        now[0] += seconds
        log.keep(done, 1, {"loss": 1.0 / done}, tokens=100)

    dispatch(60, 1)  # it compiles
    dispatch(1, 2)
    dispatch(1, 3)
    log.flush()
    assert log.newest == {"loss": 1 / 3, "tokens_per_second": 100}
    now[0] += 1000  # a save
    dispatch(0.5, 4)
    log.flush()
    assert log.newest["tokens_per_second"] == 200
    now[0] += 11
    assert log.impatient(), "rows are fetched when they are ten seconds old"
    assert "tokens_per_second" not in read_metrics(tmp_path)[-1]


def test_the_bar_shows_what_is_known():
    assert note_of({}) == note_of({"kl": None, "reward": 1.0}) == ""
    newest = {"tokens_per_second": 12345.6, "kl": 0.25, "loss": 0.69314}
    assert note_of(newest) == "loss 0.693  KL 0.250  12,346 tokens/s"
