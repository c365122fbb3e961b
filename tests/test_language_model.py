"""One front door to published models: decoder, parameters and tokenizer from one folder or file."""

import shutil

import jax
import numpy as np
import pytest
from checkpoints import FIXTURES, check_same, load

from deconfound_jax.config import Features
from deconfound_jax.models import pretrained_tokenizer
from deconfound_jax.models.encoders import encode_by
from deconfound_jax.models.language_model import load_language_model
from deconfound_jax.models.sample import generate
from deconfound_jax.models.tokenizer import PAD

tokenizers = pytest.importorskip("tokenizers", reason="published tokenizers are read by the tokenizers package")
WORDS = ["[end]", "[unknown]", *(f"w{i}" for i in range(30))]


def write_tokenizer(folder, words=WORDS):
    from tokenizers import models, pre_tokenizers

    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[unknown]")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (folder / "tokenizer.json").write_text(made.to_str())


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(FIXTURES / "qwen3", tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_opens_as_decoder_parameters_and_tokenizer(folder):
    lm = load_language_model(folder, remat="layer")
    config, params = load("qwen3")
    check_same(lm.params, params)
    assert lm.decoder.config.remat == "layer" and lm.decoder.config.width == config.width
    prompt_1l = lm.tokenizer.encode(["w3 w4"], 4, add_eos=False)
    found = generate(lm.decoder, lm.params, jax.random.key(0), prompt_1l, new_tokens=3, temperature=0.0, stop=())
    logits_blv, _ = lm.decoder.apply(lm.params, prompt_1l)
    assert found.tokens[0, 0, 0] == np.argmax(logits_blv[0, 1])


def test_a_gguf_file_opens_alone_or_in_its_folder(tmp_path, monkeypatch):
    gguf_files = pytest.importorskip("gguf_files", reason="the gguf package is not installed")
    _, params = gguf_files.model_file(tmp_path / "a.gguf", "llama")
    monkeypatch.setattr(pretrained_tokenizer, "gguf_vocabulary", _no_vocabulary)
    for place in (tmp_path, tmp_path / "a.gguf"):
        lm = load_language_model(place)
        np.testing.assert_allclose(
            lm.params["params"]["embed_tokens"]["embedding"], params["params"]["embed_tokens"]["embedding"]
        )
        assert lm.tokenizer.size == 2
    gguf_files.model_file(tmp_path / "b.gguf", "llama")
    with pytest.raises(ValueError, match=r"expected one .gguf file, found \['a.gguf', 'b.gguf'\]"):
        load_language_model(tmp_path)


def _no_vocabulary(header):
    """In place of the vocabulary that these files lack."""
    from tokenizers import models

    return tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")), False


def test_a_tokenizer_of_another_model_is_refused(folder):
    write_tokenizer(folder, [*WORDS, *(f"x{i}" for i in range(200))])
    with pytest.raises(ValueError, match="expected a tokenizer of at most 64 ids, found 232"):
        load_language_model(folder)


def test_features_are_pooled_states_whatever_a_text_is_batched_with(folder):
    config = Features(source="lm", weights=str(folder), pooling="last")
    texts = ["w1 w2 w3", "w4", "w1 w2 w3", *(f"w{i} w{i + 1}" for i in range(20)), " ".join(["w5"] * 20)]
    done = []
    features_nd = encode_by(config, texts, on_batch=lambda i, n: done.append((i, n)))
    lm = load_language_model(folder)
    for i in (0, 1, 2, len(texts) - 1):
        tokens_1l = lm.tokenizer.encode([texts[i]], 32)
        hidden = lm.decoder.apply(lm.params, tokens_1l)[1][0, (tokens_1l[0] != PAD).sum() - 1]
        np.testing.assert_allclose(features_nd[i], hidden, atol=1e-4)
    assert done[-1] == (23, 23)
    with pytest.raises(ValueError, match="features.weights: expected a folder"):
        encode_by(Features(source="lm"), texts)
