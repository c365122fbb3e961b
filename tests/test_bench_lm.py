"""The language models' benchmark at a small size: its keys, its bars on made-up numbers, the device's arithmetic."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import bench_lm, lm_device, lm_gradients, lm_memory
from experiments.bench_lm import BenchLm, failures, gradient_table, memory_table, run


def test_a_small_run_writes_what_it_found(tmp_path, monkeypatch):
    small = dataclasses.replace(
        bench_lm.SIZES["small"], memory={"shapes": "tiny", "lengths": (256,), "vocabularies": (1024,)}
    )
    monkeypatch.setitem(bench_lm.SIZES, "small", small)
    monkeypatch.setattr(lm_gradients, "OBJECTIVES", {"sft": lm_gradients.sft})
    found = run(BenchLm(jobs=("memory", "gradients")), tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert found["failed"] == [] and 0 < found["gradient.rel_diff.sft"] < 1e-12
    assert found["memory.checkpoint_over_streamed.T256.V1024"] > 1.5
    (row,) = memory_table(found)
    assert (row["vocabulary"], row["tokens"]) == (1024, 256)
    assert [row["objective"] for row in gradient_table(found)] == ["sft"]
    with pytest.raises(ValueError, match=r"jobs: expected some of .*, got \['memry'\]"):
        run(BenchLm(jobs=("memry",)), tmp_path)


def test_bars_that_do_not_hold_are_said():
    good = {"memory.checkpoint_over_streamed.T4096.V49152": 8.0}
    good |= {f"gradient.rel_diff.{name}": 1e-14 for name in lm_gradients.OBJECTIVES}
    assert failures(good) == [] and failures({}) == []
    bad = {key: 4.9 if key.startswith("memory") else np.nan for key in good}
    bad |= {f"gradient.worst.{name}": "norm/scale" for name in lm_gradients.OBJECTIVES}
    assert len(failures(bad)) == 4


def test_the_longest_text_is_found_by_bisection():
    asked = []

    def needs(length):
        asked.append(length)
        return 10 * length

    found = lm_device.longest(needs, 1_000_000, 1024)
    assert 100_000 * 15 // 16 <= found <= 100_000 and len(asked) < 16
    assert lm_device.longest(needs, 1_000, 1024) == 0


def test_flops_by_hand():
    c = dataclasses.replace(lm_memory.TINY, layers=2)
    kernels = 2 * (2 * 48 * 48 + 2 * 48 * 16 + 3 * 48 * 96) + 5 * 48
    by_hand = 6 * (1024 * 48 + kernels) + 2 * 3 * (2 * 100 * 48)  # twice (there and back) three products' halves
    assert lm_device.flops_a_token(c, 100) == pytest.approx(by_hand)
    assert lm_device.flops_a_token(dataclasses.replace(c, tied=False), 100) == pytest.approx(by_hand)


def test_the_device_script_needs_what_the_device_does_not_say():
    with pytest.raises(ValueError, match="--limit_gb: expected a limit"):
        lm_device.main(["--jobs", "longest"])
    with pytest.raises(ValueError, match="--peak_tflops: expected a number"):
        lm_device.main(["--jobs", "mfu"])


def test_a_streamed_step_needs_less_and_runs():
    c = dataclasses.replace(lm_memory.TINY, layers=2)
    needs = [lm_device.needed_bytes(c, streamed, 512, chunk=32) for streamed in (False, True)]
    assert needs[0] > 1.5 * needs[1]
    assert lm_device.seconds_of(c, True, 128, 1, 1, chunk=32) > 0
