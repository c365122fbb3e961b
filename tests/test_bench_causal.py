"""The benchmark at a small size, in this process; its bars and warnings on made-up numbers."""

import json
import sys
import types

import numpy as np
import pytest

from experiments import bench_causal, bench_jobs, bench_peers
from experiments.bench_causal import BenchCausal, failures, run, straightness, table


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    jobs = ("wide", "narrow", "parquet")
    return run(BenchCausal(jobs=jobs, isolate=False), folder), folder


def test_a_small_run_writes_what_it_found(results):
    found, folder = results
    assert json.loads((folder / "results.json").read_text()) == found
    assert found["failed"] == [] and found["skipped"] == []
    for key in ("iv_4k_by_8.seconds", "iv_3k_by_8.seconds", "parquet_6k_by_8.seconds_per_million"):
        assert found[key] > 0 or "per_million" in key
    assert len(found["parquet_2k_by_8.memory_gb"]) == len(found["parquet_2k_by_8.memory_seconds"]) > 0
    assert (folder / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "parquet").exists()
    assert {row["job"] for row in table(found)} >= {"iv_4k_by_8", "iv_3k_by_8", "parquet_2k_by_8"}


def test_estimates_tighten_with_rows_around_the_truth(results):
    found, _ = results
    sds = [found[f"parquet_{n}k_by_8.gamma_sd"] for n in (2, 4, 6)]
    np.testing.assert_allclose(np.asarray(sds) * np.sqrt([2, 4, 6]) / sds[0] / np.sqrt(2), 1.0, atol=0.2)


def test_a_job_in_a_child_says_its_peak_or_why_it_failed(tmp_path):
    arguments = {"job": "write_parquet", "rows": 200, "width": 4, "levels": 3, "seed": 0, "folder": str(tmp_path)}
    found = bench_jobs.in_child(arguments)
    assert 0.05 < found["peak_gb"] < 2.0
    assert (tmp_path / "0000000000.parquet").exists()
    with pytest.raises(RuntimeError, match="write_parquet: .*No module named experiments.nothing"):
        bench_jobs.in_child(arguments, "experiments.nothing")


def test_bars_that_do_not_hold_are_said():
    good = {"iv_1m_by_384.seconds": 10.0, "iv_1m_by_384.peak_gb": 2.7, "iv_1m_by_64.ratio_to_fastest_peer": 6.0}
    good |= {"iv_1m_by_384.gamma": 3.001, "iv_1m_by_384.gamma_sd": 0.001, "iv_1m_by_384.converged": True}
    assert failures(good) == []
    bad = {"iv_1m_by_384.seconds": 61.0, "iv_1m_by_384.peak_gb": 4.5, "iv_1m_by_64.ratio_to_fastest_peer": 4.9}
    bad |= {"iv_1m_by_384.gamma": 3.1, "iv_1m_by_384.gamma_sd": 0.001, "iv_1m_by_384.converged": False}
    bad |= {"parquet_10m_by_64.growth_gb": 0.5, "parquet_10m_by_64.off_the_line": 0.3}
    assert len(failures(bad)) == 7


def test_time_is_held_against_a_line():
    fixed, slope, off = straightness((1e6, 2e6, 5e6, 10e6), (3.0, 5.0, 11.0, 21.0))
    np.testing.assert_allclose((fixed, slope, off), (1.0, 2.0, 0.0), atol=1e-9)
    assert straightness((1e6, 2e6, 5e6, 10e6), (1.0, 4.0, 25.0, 100.0))[2] > bench_causal.CROOKED


def test_the_canary_warns(tmp_path, monkeypatch):
    for ratio, warned in ((2.0, 0), (200.0, 1)):
        monkeypatch.setitem(bench_jobs.JOBS, "canary", lambda ratio=ratio, **_: {"ratio": ratio})
        found = run(BenchCausal(jobs=("canary",), isolate=False), tmp_path)
        assert len(found["warnings"]) == warned and found["canary.ratio"] == ratio


def test_svi_is_given_clicks(monkeypatch):
    seen = {}

    def fit(logs, features_nd, config):
        seen.update(logs=logs, width=features_nd.shape[1], config=config)
        return types.SimpleNamespace(converged=True)

    monkeypatch.setattr(bench_jobs, "fit", fit)
    found = bench_jobs.svi(rows=300, width=4, seed=0)
    assert found["rows_per_second"] == 300 / found["seconds"]
    assert set(seen["logs"].outcome_n) == {0.0, 1.0} and seen["width"] == 4
    assert (seen["config"].fit, seen["config"].family) == ("svi", "bernoulli")


def test_peers_are_skipped_with_a_reason_or_compared(tmp_path, monkeypatch):
    slow = {"first_call_seconds": 1.0, "gamma": 3.0, "gamma_se": 0.1, "version": "x 1", "peak_gb": 1.0}

    def in_child(arguments, module, python, env):
        if arguments["job"] == "pyfixest":
            raise RuntimeError("pyfixest: killed, as for memory")
        return slow | {"seconds": {"econml_2sls": 4.0, "econml_ortho_iv": 13.0}[arguments["job"]]}

    monkeypatch.setattr(bench_jobs, "in_child", in_child)
    monkeypatch.setattr(bench_causal, "python_with", lambda package: sys.executable)
    monkeypatch.setattr(bench_peers, "needed_gb", lambda name, rows, width: 1e9 if name == "linearmodels" else 0.0)
    results = {"skipped": [], "iv_3k_by_8.seconds": 0.5, "iv_3k_by_8.first_call_seconds": 2.0}
    found = bench_causal._peers(BenchCausal(), bench_causal.SIZES["small"], results, tmp_path)
    assert found["iv_3k_by_8.ratio_to_fastest_peer"] == 8.0 and found["iv_3k_by_8.ratio_with_first_calls"] == 2.0
    assert sorted(why.split(":")[0] for why in results["skipped"]) == ["linearmodels", "pyfixest"]
    monkeypatch.setattr(bench_causal, "python_with", lambda package: None)
    assert bench_causal._peers(BenchCausal(), bench_causal.SIZES["small"], results, tmp_path) == {}
    assert "not installed (make peers)" in results["skipped"][-1]


@pytest.mark.parametrize("name", bench_peers.PEERS)
def test_a_peer_agrees_with_two_stage_least_squares(name):
    pytest.importorskip(bench_peers.PEERS[name].package)
    data = bench_jobs.simulate(2000, 4, 1, 0)
    one, c = np.ones((2000, 1)), data.columns
    instruments, regressors = (np.column_stack([c[v], one, data.features_nd]) for v in ("z", "p"))
    fitted = instruments @ np.linalg.lstsq(instruments, regressors, rcond=None)[0]
    gamma = np.linalg.lstsq(fitted, c["outcome"], rcond=None)[0][0]
    found, se = bench_peers.PEERS[name].estimate(data.features_nd.astype(float), c["z"], c["p"], c["outcome"])
    np.testing.assert_allclose(found, gamma, atol=0.3 * se if name == "econml_ortho_iv" else 1e-6)


def test_an_unknown_job_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"jobs: expected some of .*, got \['wid'\]"):
        run(BenchCausal(jobs=("wid",)), tmp_path)
