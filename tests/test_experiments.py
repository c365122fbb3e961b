"""Every experiment script under its smoke preset, and what a run directory promises."""

from __future__ import annotations

import dataclasses
import json
import shutil

import chex
import jax
import numpy as np
import pytest
from small_log import write_arms

import deconfound_jax as dj
from deconfound_jax.train.loop import read_metrics
from experiments import align, evaluate_reward, logs_plan, logs_study, newsroom_study, rundir, sample, score
from experiments.cli import markdown, parse_run
from experiments.presets import PRESETS


@pytest.fixture(scope="module")
def newsroom_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("newsroom")
    return workdir, align.run(PRESETS["smoke"](), workdir)


@pytest.fixture(scope="module")
def logs_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("logs")
    arms = write_arms(workdir / "arms.parquet")
    config = PRESETS["upworthy_smoke"]()
    config = dataclasses.replace(config, logs=dataclasses.replace(config.logs, path=arms))
    return workdir, arms, align.run(config, workdir / "run")


def test_the_newsroom_study_leaves_a_whole_run_directory(newsroom_run):
    workdir, results = newsroom_run
    for method in ("sft", "naive", "covariate", "deconfounded"):
        for metric in ("true_share", "kl"):
            assert np.isfinite(results[f"policy.smoke.tokens.{method}.{metric}"])
    assert json.loads((workdir / "results.json").read_text()) == results
    counts = json.loads((workdir / "compilations.json").read_text())
    assert counts == {"sft": 1, "dpo": 1, "joint": []}, "SFT and DPO must each compile once for all methods"
    config = json.loads((workdir / "config.json").read_text())
    assert config["config"]["name"] == "smoke" and config["data"] and config["changed_from_preset"] == {}
    page = (workdir / "report.html").read_text()
    assert "popularity" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert (workdir / "truth.png").read_bytes()[:4] == b"\x89PNG"


def test_a_saved_run_scores_and_samples(newsroom_run, tmp_path):
    workdir, _ = newsroom_run
    run = dj.load(workdir)
    texts = ["harbor ferry dock tide why joy", "harbor ferry dock tide"]
    scored = run.score(texts)
    assert {k: v.shape for k, v in scored.items()} == {k: (2,) for k in ("mean", "sd", "lower", "distance")}
    assert (scored["lower"] < scored["mean"]).all() and (scored["sd"] > 0).all()
    assert len(run.sample(3)) == 3
    assert run.sample(2, ["harbor ferry"])[1].startswith("harbor ferry")
    assert run.sample(3, seed=1) == run.sample(3, seed=1)
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n\n")
    rows = score.run(score.Arguments(str(workdir), str(tmp_path / "texts.txt")))
    assert [row["text"] for row in rows] == texts
    assert rows[0]["mean"] == pytest.approx(scored["mean"][0], abs=1e-4)
    (tmp_path / "prompts.txt").write_text("harbor\nseed\n")
    assert len(sample.run(sample.Arguments(str(workdir), str(tmp_path / "prompts.txt"), n=2))) == 4
    with pytest.raises(ValueError, match="expected one of .*naive.*got 'best'"):
        run.sample(1, method="best")


def test_distance_is_zero_on_the_log_and_grows_off_it(newsroom_run):
    run = dj.load(newsroom_run[0])
    logged = newsroom_study.newsroom.simulate(run.config.simulation, run.config.seeds[0])[0].text[:5]
    near, far = run.score(logged)["distance"], run.score(["why " * 20])["distance"]
    np.testing.assert_allclose(near, 0, atol=1e-3)
    assert far[0] > 2


def test_another_config_in_the_same_directory_is_refused_by_field(newsroom_run):
    config = PRESETS["smoke"]()
    config = dataclasses.replace(config, dpo=dataclasses.replace(config.dpo, beta=0.9))
    with pytest.raises(ValueError, match=r"dpo\.beta: 0\.3 there, 0\.9 asked for"):
        align.run(config, newsroom_run[0])


def test_the_logs_study_reports_every_score(logs_run):
    workdir, _, results = logs_run
    metrics = ("pair_accuracy", "pair_accuracy_z196", "winner_hit_rate", "lift_per_1000", "confounder_correlation")
    for log in ("one_arm", "broken_window"):
        for method in ("naive", "deconfounded"):
            for metric in metrics:
                assert np.isfinite(results[f"reward.{log}.tokens.{method}.{metric}"])
    assert len(results["reward.one_arm.tokens.naive.pair_accuracy.seeds"]) == 2
    low, gain, high = (results[f"reward.one_arm.tokens.deconfounded.gain{k}"] for k in (".low", "", ".high"))
    assert low <= gain <= high
    assert (workdir / "run" / "report.html").exists()


def test_a_run_scores_new_arms(logs_run, tmp_path):
    workdir, arms, _ = logs_run
    roles = PRESETS["upworthy_smoke"]().roles
    found = evaluate_reward.run(evaluate_reward.Arguments(str(workdir / "run"), arms, roles=roles))
    assert set(found) == {"naive", "deconfounded"}
    assert 0 <= found["naive"]["pair_accuracy"] <= 1 and found["naive"]["n_pairs"] > 100
    features = np.random.default_rng(0).normal(size=(240, 17)).astype(np.float32)
    np.save(tmp_path / "wide.npy", features)
    with pytest.raises(ValueError, match="features: expected"):
        evaluate_reward.run(
            evaluate_reward.Arguments(str(workdir / "run"), arms, str(tmp_path / "wide.npy"), roles=roles)
        )


def test_examples_none_leaves_the_log_out_of_the_report(tmp_path):
    arms = write_arms(tmp_path / "arms.parquet", tests=40)
    config = PRESETS["upworthy_smoke"]()
    config = dataclasses.replace(
        config,
        logs=dataclasses.replace(config.logs, path=arms),
        report=dataclasses.replace(config.report, examples="none"),
    )
    align.run(config, tmp_path / "run")
    texts = logs_plan.read_logs(config, tmp_path).text
    page = (tmp_path / "run" / "report.html").read_text()
    assert not any(text in page for text in texts)


def test_held_out_outcomes_change_nothing_that_is_learned(tmp_path):
    """Every judged outcome is overwritten with noise: posteriors, scales and policies stay the same bytes."""
    config = PRESETS["upworthy_smoke"]()
    learned = []
    for name, noise in (("plain", None), ("noise", 7)):
        # Fold 0's tests are judged for the first log: the plan does not read outcomes, so it names them.
        path = write_arms(tmp_path / f"{name}.parquet", noise_seed=noise, noisy_tests=learned[0][2] if learned else ())
        run = dataclasses.replace(config, logs=dataclasses.replace(config.logs, path=path))
        logs = logs_plan.read_logs(run, tmp_path)
        plan = logs_plan.make_plan(run, logs)
        plan = plan._replace(parts=plan.parts[:1])
        judged = set(logs.columns["clickability_test_id"][plan.parts[0].held_out])
        (tmp_path / name).mkdir()
        fitted = logs_study.learn(run, plan, logs, rundir.epath.Path(tmp_path / name))
        learned.append((fitted, logs.outcome_n[plan.parts[0].held_out], judged))
    (one, outcome, _), (two, noise, _) = learned
    assert (outcome != noise).mean() > 0.9
    for key, posterior in one.posteriors.items():
        for site, draws in posterior.draws.items():
            assert draws.tobytes() == two.posteriors[key].draws[site].tobytes(), (key, site)
    for method in one.policies:
        for a, b in zip(jax.tree.leaves(one.policies[method]), jax.tree.leaves(two.policies[method]), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), method


def test_the_same_command_goes_on_with_a_run(newsroom_run, tmp_path, capsys, monkeypatch):
    """The last policy's state and rows are lost, and all that is written at the end: it ends as the unbroken run."""

    def forbidden(*_):
        raise AssertionError("the posteriors are there")

    monkeypatch.setattr(newsroom_study, "fit_prepared", forbidden)
    whole, results = newsroom_run
    workdir, lost = tmp_path / "run", "seed0-deconfounded"
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "checkpoints" / lost)
    rows = (whole / "metrics.jsonl").read_text().splitlines()
    (workdir / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows if lost not in row))
    for name in ("results.json", "report.html", "policies/deconfounded.npz"):
        (workdir / name).unlink()
    align.main(["--preset", "smoke", "--workdir", str(workdir)])
    assert json.loads((workdir / "results.json").read_text()) == results
    again, before = ([row | {"clock": 0} for row in read_metrics(place)] for place in (workdir, whole))
    assert again == before and any(row["name"] == lost for row in again)
    assert json.loads((workdir / "compilations.json").read_text()) == {"sft": 0, "dpo": 1, "joint": []}
    for name in ("deconfounded", "sft"):
        one, two = (dj.load(place).policy(name) for place in (workdir, whole))
        chex.assert_trees_all_equal(one, two)
    printed = capsys.readouterr().out
    assert newsroom_study.verdict(PRESETS["smoke"](), results) in printed and "| deconfounded |" in printed


def test_presets_parse_and_short_logs_flag():
    config, preset, known = parse_run(["--preset", "upworthy", "--logs", "a.parquet", "--dpo.beta", "0.7"], "x")
    assert (config.logs.path, config.dpo.beta, known.workdir) == ("a.parquet", 0.7, "runs/upworthy")
    assert preset == PRESETS["upworthy"]()
    for name, make in PRESETS.items():
        stored = json.loads(json.dumps(dataclasses.asdict(make())))
        from deconfound_jax.saved import config_from_json

        assert config_from_json(stored) == make(), name


def test_difference_names_nested_fields():
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "d": 4}
    assert rundir.difference(old, new) == {"a.c": (2, 5), "d": (3, 4)}


def test_markdown_table():
    assert markdown([{"a": 1, "b": 0.12345}, {"a": 22, "b": None}]).splitlines()[2:] == [
        "| 1  | 0.123 |",
        "| 22 | -     |",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"roles.group": ""}, r"roles\.group: expected a column"),
        ({"roles.exposure": ""}, r"roles\.exposure: expected a column"),
        ({"methods": ("joint",)}, r"methods: expected naive, covariate or deconfounded on real logs, got \['joint'\]"),
        ({"logs.split.by": "time"}, r"logs\.split\.by: .* got 'time'"),
        ({"causal.design": "category(eyecatcher_id)"}, r"roles\.confounders: \['test_week'\] have no term"),
    ],
)
def test_what_could_only_fail_later_is_refused_first(tmp_path, change, message):
    config = PRESETS["upworthy_smoke"]()
    config = dataclasses.replace(config, logs=dataclasses.replace(config.logs, path=str(tmp_path / "absent.parquet")))
    for name, value in change.items():
        config = replaced(config, name.split("."), value)
    with pytest.raises(ValueError, match=message):
        align.run(config, tmp_path / "run")


def test_own_logs_with_few_roles_run_to_the_end(tmp_path):
    """No confounders named, one plain split, no context: the README's command for a stranger's file."""
    config = dataclasses.replace(PRESETS["upworthy_smoke"](), name="logs")
    roles = dataclasses.replace(config.roles, confounders=(), context=())
    logs = type(config.logs)(path=write_arms(tmp_path / "arms.parquet", tests=30))
    causal = dataclasses.replace(config.causal, design="category(test_week)")
    results = align.run(dataclasses.replace(config, roles=roles, logs=logs, causal=causal), tmp_path / "run")
    assert 0 <= results["reward.log.tokens.deconfounded.pair_accuracy"] <= 1
    assert np.isfinite(results["policy.logs.tokens.deconfounded.kl"])
    assert logs_study.tables(config, results)


def replaced(config, names, value):
    """The config with one nested field changed."""
    if len(names) == 1:
        return dataclasses.replace(config, **{names[0]: value})
    return dataclasses.replace(config, **{names[0]: replaced(getattr(config, names[0]), names[1:], value)})
