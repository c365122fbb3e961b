"""The alignment benchmark: its jobs are put together, kept, and judged by their bars."""

import json

import pytest

from experiments import bench_align, bench_mesh, bench_resume, recipes_study

TINY = bench_align.BenchAlign(jobs=("time", "newsroom", "resume", "mesh"), time="tiny")


@pytest.fixture
def others(monkeypatch):
    """The three studies, which have tests of their own, as counters of their calls."""
    calls = []
    shares = {"naive": 0.4, "covariate": 0.5, "odin": 0.1, "deconfounded": 0.6}
    newsroom = {"newsroom.dpo.kl": 1.0, "newsroom.dpo.joint_minus_two_stage": 0.04}
    newsroom |= {f"newsroom.dpo.{m}.true_share": share for m, share in shares.items()}

    def counted(name, found):
        return lambda config, workdir: calls.append(name) or dict(found)

    monkeypatch.setattr(recipes_study, "run", counted("newsroom", newsroom))
    monkeypatch.setattr(bench_resume, "run", counted("resume", {"resume.kills_survived": 3, "failed": []}))
    mesh = {"mesh.max_rel_loss_difference.fp64": 1e-15, "failed": ["2x2x2.dpo.fp64: sends too much"]}
    monkeypatch.setattr(bench_mesh, "run", counted("mesh", mesh))
    return calls


def test_jobs_are_put_together_kept_and_judged(tmp_path, others, monkeypatch):
    newsroom = recipes_study.Recipes(recipes=("dpo",))
    config = bench_align.dataclasses.replace(TINY, newsroom=newsroom)
    said = []
    results = bench_align.run(config, tmp_path, said.append)
    assert said == ["time: done", "newsroom: done", "resume: done", "mesh: done"]
    # The causal update is not free: the compiler counts more operations in the joint step, and both take time.
    assert results["joint_over_dpo.flops.joint"] > results["joint_over_dpo.flops.dpo"] > 0
    assert results["joint_over_dpo.seconds.joint"] > 0 and results["joint_over_dpo.time"] > 0
    assert results["failed"] == [
        "2x2x2.dpo.fp64: sends too much",
        "newsroom.dpo: joint minus two stages +0.040, bar 0.03",
    ]
    assert json.loads((tmp_path / "results.json").read_text())["resume.kills_survived"] == 3

    monkeypatch.setattr(bench_align, "joint_over_dpo", lambda shapes: pytest.fail("measured twice"))
    assert bench_align.run(config, tmp_path) == results
    assert others == ["newsroom", "resume", "mesh"]
    other = bench_align.dataclasses.replace(config, resume=bench_resume.BenchResume(kills=2))
    bench_align.run(other, tmp_path)
    assert others == ["newsroom", "resume", "mesh", "resume"]


def test_the_bar_of_time_is_for_the_shapes_it_was_set_for():
    config = bench_align.BenchAlign(jobs=("time",))
    assert bench_align.failures(config, {"joint_over_dpo.time": 1.06}) == ["joint_over_dpo.time: 1.060, bar 1.05"]
    assert not bench_align.failures(config, {"joint_over_dpo.time": 1.04})
    tiny = bench_align.dataclasses.replace(config, time="tiny")
    assert not bench_align.failures(tiny, {"joint_over_dpo.time": 3.0})
