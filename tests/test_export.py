"""The decoder out again: a round trip changes no bit, no half folder, and transformers loads what is written."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import FIXTURES, NAMES, TOLERANCE, check_same, family_of, load, tensors_of

from deconfound_jax import config
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.export import export_pretrained, export_reward_model, find_tokenizer_files
from deconfound_jax.models.pretrained import load_pretrained, load_reward_model
from deconfound_jax.models.weights import load_safetensors


@functools.partial(jax.jit, static_argnames="small")
def hidden(small, params, tokens_bl):
    return Decoder(small, small.vocabulary).apply(params, tokens_bl, method="hidden")


@pytest.mark.parametrize("name", NAMES)
def test_a_round_trip_changes_no_bit(name, tmp_path):
    small, params = load(name)
    export_pretrained(tmp_path / "out", family_of(name), small, params)
    again, others = load_pretrained(tmp_path / "out")
    assert again == small
    check_same(params, others)
    written, theirs = load_safetensors(tmp_path / "out" / "model.safetensors"), tensors_of(name)
    assert set(written) == set(theirs)
    for tensor, value in theirs.items():
        np.testing.assert_array_equal(written[tensor], value, err_msg=tensor)


def test_narrow_parameters_make_a_narrow_file(tmp_path):
    small, params = load("qwen3")
    export_pretrained(tmp_path / "out", "qwen3", small, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    for name, tensor in load_safetensors(tmp_path / "out" / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, tensors_of("qwen3")[name].astype(jnp.bfloat16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_an_export_is_whole_or_absent(tmp_path, monkeypatch):
    small, params = load("qwen2")
    shutil.copy(FIXTURES / "qwen2" / "config.json", tmp_path / "tokenizer.json")
    files = find_tokenizer_files(tmp_path)
    assert [file.name for file in files] == ["tokenizer.json"]

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr("deconfound_jax.models.export.write_safetensors", fail)
        export_pretrained(tmp_path / "out", "qwen2", small, params, files)
    assert not (tmp_path / "out").exists()
    export_pretrained(tmp_path / "out", "qwen2", small, params, files, {"eos_token_id": 2})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tokenizer.json"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json"
    ]  # fmt: skip
    record = json.loads((tmp_path / "out" / "config.json").read_text())
    # null, where transformers' class would have an id of its own
    assert (record["eos_token_id"], record["bos_token_id"]) == (2, None)
    with pytest.raises(FileExistsError, match="out: expected no folder or an empty one"):
        export_pretrained(tmp_path / "out", "qwen2", small, params)
    with pytest.raises(ValueError, match="tokenizer_files: expected a file beside config.json .* got .*absent.json"):
        export_pretrained(tmp_path / "new", "qwen2", small, params, [tmp_path / "absent.json"])


def test_an_export_of_what_does_not_fit_is_refused(tmp_path):
    small, params = load("qwen2")
    with pytest.raises(ValueError, match="Decoder.qkv_bias: expected False, all that 'mistral' can hold, got True"):
        export_pretrained(tmp_path / "out", "mistral", dataclasses.replace(small, global_every=0), params)
    with pytest.raises(ValueError, match=r"layers/attention_norm/scale: expected shape \(4, 16\), got \(3, 16\)"):
        export_pretrained(tmp_path / "out", "qwen2", dataclasses.replace(small, layers=4), params)
    with pytest.raises(ValueError, match="params: expected the collection 'params' alone, .*merge 'lora' first"):
        export_pretrained(tmp_path / "out", "qwen2", small, {**params, "lora": {}})
    with pytest.raises(ValueError, match="token_ids: expected some of bos_token_id, .*, got unk_token_id"):
        export_pretrained(tmp_path / "out", "qwen2", small, params, (), {"unk_token_id": 1})
    assert not list(tmp_path.iterdir())


def test_an_own_decoder_is_a_gpt2(tmp_path):
    small = config.Decoder(width=16, heads=2, length=8, vocabulary=50, forbidden=())
    init = jax.jit(Decoder(small, 20).init)  # fewer rows than the config's bound
    params = init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    export_pretrained(tmp_path / "out", "gpt2", small, params)
    again, others = load_pretrained(tmp_path / "out")
    assert again.vocabulary == 20
    check_same(params, others)


@pytest.mark.parametrize("name", ["gpt2", "llama_untied", "gemma3_text"])
def test_a_reward_model_is_a_classifier(name, tmp_path):
    small, params = load(name)
    head_d1 = np.random.default_rng(0).normal(size=(small.width, 1)).astype(np.float32)
    export_reward_model(tmp_path / "out", family_of(name), small, params, head_d1, pad_token_id=0)
    again, others, head_d = load_reward_model(tmp_path / "out")
    assert again == dataclasses.replace(small, tied=True)
    check_same({"params": {k: v for k, v in params["params"].items() if k != "lm_head"}}, others)
    np.testing.assert_array_equal(head_d, head_d1[:, 0])
    with pytest.raises(ValueError, match="tensor '(score.weight|lm_head.weight)': expected"):
        load_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match=r"tensor 'score.weight': expected shape \(1, 16\), found no such tensor"):
        load_reward_model(FIXTURES / name)


def test_a_reward_model_that_is_no_classifier_is_refused(tmp_path):
    small, params = load("gpt2")
    args = tmp_path / "out", "gpt2", small, params
    with pytest.raises(ValueError, match="pooling: expected 'last', all that a sequence classifier .* got 'mean'"):
        export_reward_model(*args, np.zeros(16, np.float32), 0, pooling="mean")
    with pytest.raises(ValueError, match=r"head: expected shape \(16,\) or \(16, 1\), got \(16, 2\)"):
        export_reward_model(*args, np.zeros((16, 2), np.float32), 0)
    with pytest.raises(ValueError, match="pad_token_id: expected an id below 64, got -1"):
        export_reward_model(*args, np.zeros(16, np.float32), -1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_the_export(name, tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    small, params = load(name)
    export_pretrained(tmp_path / "out", family_of(name), small, params)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    expected = load_safetensors(FIXTURES / name / "expected.safetensors")
    with torch.no_grad():
        logits_blv = model(torch.tensor(np.array(expected["tokens"])).long()).logits.numpy()
    np.testing.assert_allclose(logits_blv, expected["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_the_reward_model(name, tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    small, params = load(name)
    head_d = np.random.default_rng(0).normal(size=small.width).astype(np.float32)
    export_reward_model(tmp_path / "out", family_of(name), small, params, head_d, pad_token_id=0)
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    tokens_bl = np.array(load_safetensors(FIXTURES / name / "expected.safetensors")["tokens"])
    tokens_bl = np.where(tokens_bl == 0, 5, tokens_bl)  # no text ends with the id of padding
    length_b = np.array([12, 7])
    absent_bl = np.arange(12)[None] >= length_b[:, None]
    hidden_bld = hidden(small, params, np.where(absent_bl, -1, tokens_bl))
    ours_b = hidden_bld[np.arange(2), length_b - 1] @ head_d
    with torch.no_grad():
        ids_bl = torch.tensor(np.where(absent_bl, 0, tokens_bl)).long()
        theirs_b1 = model(ids_bl, attention_mask=torch.tensor(~absent_bl).long()).logits.numpy()
    np.testing.assert_allclose(ours_b, theirs_b1[:, 0], atol=TOLERANCE, rtol=0)
    assert abs(ours_b[0] - ours_b[1]) > 0.1
