"""A published model as the policy of a real log: adapters trained, judged, saved, opened again."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
from checkpoints import FIXTURES, check_same
from small_log import WORDS, write_arms

import deconfound_jax as dj
from deconfound_jax.config import Lora, Policy
from deconfound_jax.evaluate import ab
from deconfound_jax.models.language_model import load_language_model
from deconfound_jax.models.tokenizer import PAD
from deconfound_jax.recipes.reference import text_logprobs
from deconfound_jax.train.loop import read_metrics
from experiments import align, rundir, sample, score, start
from experiments.logs_plan import make_plan, read_logs
from experiments.presets import PRESETS

tokenizers = pytest.importorskip("tokenizers", reason="published tokenizers are read by the tokenizers package")
LENGTH = 12


def write_model(folder, family="qwen3"):
    """A published folder: a tiny checkpoint, and a tokenizer of the log's words whose ids are the checkpoint's."""
    from tokenizers import models, pre_tokenizers, processors

    shutil.copytree(FIXTURES / family, folder)
    words = ["[pad]", "[begin]", "[end]", "[unknown]", "Headline:", *WORDS]
    made = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[unknown]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(words[:4])
    made.post_processor = processors.TemplateProcessing("[begin] $A", special_tokens=[("[begin]", 1)])
    (folder / "tokenizer.json").write_text(made.to_str())
    return str(folder)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A run of the logs study whose policies are adapters of a published model."""
    folder = tmp_path_factory.mktemp("published")
    config = PRESETS["upworthy_smoke"]()
    config = dataclasses.replace(
        config,
        logs=dataclasses.replace(config.logs, path=write_arms(folder / "arms.parquet")),
        policy=Policy(source=write_model(folder / "model"), length=LENGTH),
        align=dataclasses.replace(config.align, lora=Lora(rank=2)),
        dpo=dataclasses.replace(config.dpo, learning_rate=3e-3),
        methods=("deconfounded",),
    )
    return folder / "run", config, align.run(config, folder / "run")


@pytest.fixture(scope="module")
def tuned(published, tmp_path_factory):
    """The same run, the model trained on the log's texts first; and the rows whose texts were read for it."""
    _, config, _ = published
    policy, workdir = dataclasses.replace(config.policy, sft=True), tmp_path_factory.mktemp("tuned") / "run"
    config, read = dataclasses.replace(config, policy=policy), []
    with pytest.MonkeyPatch.context() as patch:
        keep = start.tune_reference
        patch.setattr(start, "tune_reference", lambda *a: read.append(a[3].keys_n) or keep(*a))
        results = align.run(config, workdir)
    return workdir, config, results, read[0]


def test_adapters_of_a_published_model_are_trained_and_judged(published):
    workdir, config, results = published
    key = f"policy.{config.name}.tokens.deconfounded"
    assert results[f"{key}.kl"] > 0.1 and 0 <= results[f"{key}.pair_accuracy"] <= 1
    assert [path.name for path in (workdir / "policies").iterdir()] == ["deconfounded.npz"], "the reference is not ours"
    with np.load(workdir / "policies" / "deconfounded.npz") as saved:
        assert saved.files and all(name.startswith("lora") for name in saved.files)
    rows = read_metrics(workdir, "dpo-deconfounded")
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5), "new adapters are the reference"
    assert not read_metrics(workdir, "sft"), "a published model is not trained on the log's texts"
    assert "Headline:" in (workdir / "report.html").read_text()


def test_the_run_opens_again(published, tmp_path):
    workdir, config, _ = published
    run, model = dj.load(workdir), load_language_model(config.policy.source)
    check_same(run.policy("sft")["params"], model.params["params"])
    drawn = run.sample(4, seed=1)
    assert drawn == run.sample(4, [config.policy.prompt], seed=1) and drawn != run.sample(4, seed=1, method="sft")
    (tmp_path / "prompts.txt").write_text("Headline:\n\nHeadline: why this\n")
    texts = sample.run(sample.Arguments(str(workdir), str(tmp_path / "prompts.txt"), n=4, seed=1))
    assert texts[:4] == drawn and len(texts) == 8
    with pytest.raises(ValueError, match=r"policy: expected one of \['deconfounded'\], got 'naive'"):
        run.policy("naive")


def test_a_published_model_is_trained_on_the_texts_that_are_not_held_out(published, tuned):
    workdir, config, results, read_n = tuned
    logs = read_logs(config, rundir.epath.Path(workdir))
    first = make_plan(config, logs).parts[0]
    assert len(read_n) and not np.intersect1d(read_n, first.held_out).size
    assert len({logs.text[i] for i in read_n}) == len(read_n), "each text once"
    assert sorted(p.name for p in (workdir / "policies").iterdir()) == ["deconfounded.npz", "sft.npz"]
    with np.load(workdir / "policies" / "sft.npz") as saved:
        assert saved.files and all(name.startswith("lora") for name in saved.files)
    rows = read_metrics(workdir, "sft")
    assert len(rows) == config.sft.steps and rows[-1]["loss"] < 0.95 * rows[0]["loss"]
    assert read_metrics(workdir, "dpo-deconfounded")[0]["kl"] == pytest.approx(0, abs=1e-5), "it is the reference"
    # Headlines are likelier under it than under the model as it was published.
    begun = start.published(published[1], logs, read_n, workdir)
    prompts_nq = begun.prompts(len(first.held_out))
    own_n, old_n = (text_logprobs(begun.decoder, p, begun.tokens_nl[first.held_out], prompts_nq)
                    for p in (dj.load(workdir).policy("sft"), begun.reference))  # fmt: skip
    assert own_n.mean() > old_n.mean() + 1


def test_all_of_a_published_model_is_trained_without_a_rank(published, tmp_path):
    _, config, _ = published
    logs = read_logs(config, rundir.epath.Path(tmp_path))
    align_whole = dataclasses.replace(config.align, lora=Lora())
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, sft=True), align=align_whole)
    begun = start.published(config, logs, np.arange(len(logs)), rundir.epath.Path(tmp_path))
    assert begun.reference is begun.trained and list(begun.trained) == ["params"]
    rows = read_metrics(tmp_path, "sft")
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("fixture", ["published", "tuned"])
def test_the_saved_policy_is_the_one_that_was_judged(fixture, request):
    """Its implicit reward on the held-out arms, read again from the folder, scores what the results say."""
    workdir, config, results, *_ = request.getfixturevalue(fixture)
    run, logs = dj.load(workdir), read_logs(config, rundir.epath.Path(workdir))
    plan = make_plan(config, logs)
    held = plan.parts[0].held_out
    token = run.tokenizer.model.token_to_id
    tokens_nl = np.full((len(held), LENGTH), PAD, np.int32)
    for row, text in zip(tokens_nl, (logs.text[i] for i in held), strict=True):
        found = [token(word) or token("[unknown]") for word in text.split()]
        row[: len(found) + 1] = [*found, token("[end]")]  # behind a prompt a text has no begin mark of its own
    prompt_nq = np.tile(np.array([token("[begin]"), token("Headline:")], np.int32), (len(held), 1))
    own, reference = (text_logprobs(run.decoder, run.policy(m), tokens_nl, prompt_nq) for m in ("deconfounded", "sft"))
    arms = ab.arms_of(logs.take(held), plan.component_n[held])
    scored = ab.scores(own - reference, arms)["pair_accuracy"]
    assert scored == pytest.approx(results[f"policy.{config.name}.tokens.deconfounded.pair_accuracy"])


def test_texts_are_scored_as_the_fit_saw_them(published, tmp_path):
    workdir, config, _ = published
    logs = read_logs(config, rundir.epath.Path(workdir))
    train = make_plan(config, logs).parts[0].train
    texts = [logs.text[i] for i in train]
    with (workdir / "log_features.npy").open("rb") as file:
        fitted_nd = np.load(file)
    np.testing.assert_allclose(dj.load(workdir).features(texts), fitted_nd, atol=1e-5)
    (tmp_path / "texts.txt").write_text("\n".join(texts[:3]))
    rows = score.run(score.Arguments(str(workdir), str(tmp_path / "texts.txt")))
    assert [row["text"] for row in rows] == texts[:3] and all(row["sd"] > 0 for row in rows)
    assert [row["distance"] for row in rows] == pytest.approx([0, 0, 0], abs=1e-3)


def test_texts_that_do_not_fit_are_counted_and_a_missing_model_is_named(published, tmp_path, caplog):
    workdir, config, _ = published
    logs = read_logs(config, rundir.epath.Path(workdir))
    short = dataclasses.replace(config, policy=dataclasses.replace(config.policy, length=6))
    begun = start.published(short, logs, np.arange(len(logs)), rundir.epath.Path(tmp_path))
    cut = sum(len(text.split()) > 5 for text in logs.text)  # five words and the end mark
    assert f"policy.length=6 cuts {cut} of {len(logs)} texts short" in caplog.text and cut
    assert (begun.tokens_nl[:, -1] != PAD).sum() >= cut and begun.tokens_nl.shape == (len(logs), 6)
    np.testing.assert_array_equal(begun.prompts(3), [[1, 4]] * 3)
    absent = dataclasses.replace(config, policy=Policy(source=str(tmp_path / "absent")))
    with pytest.raises((FileNotFoundError, ValueError), match="absent"):
        align.run(absent, tmp_path / "run")
