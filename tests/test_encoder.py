"""The sentence encoder against arithmetic written out by hand, and against vectors others computed."""

import json
import math
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from deconfound_jax.models import encoder, weights
from deconfound_jax.models.encoder import Bert, BertConfig, encode, params_from_tensors

DATA = Path(__file__).parents[2] / "shared" / "data" / "upworthy"
CONFIG = BertConfig(
    vocab_size=12,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=24,
    max_position_embeddings=128,
    type_vocab_size=2,
    layer_norm_eps=1e-12,
)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "why", "the", "council", "ferry", "votes", "joy", "secret", "harbor"]
TEXTS = [
    "why the ferry",
    "council votes",
    "joy " * 20 + "ferry",
    "",
    "why the ferry",
    "secret harbor joy votes the council why ferry",
    "zebra",
]


def tensors_of(config: BertConfig) -> dict[str, np.ndarray]:
    """Random tensors under the names and in the layout of published BERT weights."""
    d, f = config.hidden_size, config.intermediate_size
    shapes = {
        "embeddings.word_embeddings.weight": (config.vocab_size, d),
        "embeddings.position_embeddings.weight": (config.max_position_embeddings, d),
        "embeddings.token_type_embeddings.weight": (config.type_vocab_size, d),
        "embeddings.LayerNorm.weight": (d,),
        "embeddings.LayerNorm.bias": (d,),
        "pooler.dense.weight": (d, d),
        "pooler.dense.bias": (d,),
    }
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layer.{i}."
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            shapes |= {f"{layer}{name}.weight": (d, d), f"{layer}{name}.bias": (d,)}
        shapes |= {f"{layer}intermediate.dense.weight": (f, d), f"{layer}intermediate.dense.bias": (f,)}
        shapes |= {f"{layer}output.dense.weight": (d, f), f"{layer}output.dense.bias": (d,)}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{layer}{name}.weight": (d,), f"{layer}{name}.bias": (d,)}
    generator = np.random.default_rng(0)
    tensors = {name: generator.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    # Scales near one, as in a trained model: else the last bias drowns the words and every text looks alike.
    return {name: t + 1 if name.endswith("LayerNorm.weight") else t for name, t in tensors.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder like the published one, with a tiny random BERT in it."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "config.json").write_text(json.dumps({**vars(CONFIG), "hidden_act": "gelu", "model_type": "bert"}))
    weights.save_safetensors(folder / "model.safetensors", tensors_of(CONFIG))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(length=32)  # published tokenizers pad, too; encode must not let them
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def by_hand(tensors: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """Hidden states (l, d) of one text in float64 NumPy, straight from the equations."""
    t = {name: value.astype(np.float64) for name, value in tensors.items()}

    def dense(name, x):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(name, x):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + CONFIG.layer_norm_eps)
        return scaled * t[f"{name}.weight"] + t[f"{name}.bias"]

    h = t["embeddings.word_embeddings.weight"][tokens] + t["embeddings.position_embeddings.weight"][: len(tokens)]
    h = norm("embeddings.LayerNorm", h + t["embeddings.token_type_embeddings.weight"][0])
    size = CONFIG.hidden_size // CONFIG.num_attention_heads
    for i in range(CONFIG.num_hidden_layers):
        layer = f"encoder.layer.{i}."
        q, k, v = (dense(f"{layer}attention.self.{name}", h) for name in ("query", "key", "value"))
        mixed = []
        for head in range(CONFIG.num_attention_heads):
            part = slice(head * size, (head + 1) * size)
            attention = np.exp(q[:, part] @ k[:, part].T / math.sqrt(size))
            mixed.append(attention / attention.sum(-1, keepdims=True) @ v[:, part])
        h = norm(f"{layer}attention.output.LayerNorm", h + dense(f"{layer}attention.output.dense", np.hstack(mixed)))
        inner = dense(f"{layer}intermediate.dense", h)
        inner = inner / 2 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
        h = norm(f"{layer}output.LayerNorm", h + dense(f"{layer}output.dense", inner))
    return h


def test_hidden_states_equal_the_equations():
    tensors = tensors_of(CONFIG)
    tokens = [2, 7, 4, 11, 9, 3]
    params = params_from_tensors(tensors, CONFIG)
    hidden_bld = Bert(CONFIG).apply({"params": params}, jnp.array([tokens]), jnp.ones((1, 6), bool))
    chex.assert_shape(hidden_bld, (1, 6, CONFIG.hidden_size))
    np.testing.assert_allclose(hidden_bld[0], by_hand(tensors, tokens), atol=2e-5)


def test_padding_changes_nothing():
    params = params_from_tensors(tensors_of(CONFIG), CONFIG)
    short = encoder.embed(params, jnp.array([[2, 5, 6, 3]]), jnp.ones((1, 4), bool), CONFIG)
    padded_tokens = jnp.array([[2, 5, 6, 3, 9, 9, 9, 9]])
    padded = encoder.embed(params, padded_tokens, jnp.arange(8)[None, :] < 4, CONFIG)
    np.testing.assert_allclose(short, padded, atol=1e-6)
    # The mask is what keeps the padding out: without it the vector moves.
    assert np.abs(encoder.embed(params, padded_tokens, jnp.ones((1, 8), bool), CONFIG) - short).max() > 1e-2


def test_encode_equals_the_equations(folder):
    vectors_nd = encode(TEXTS, folder, batch=2)
    chex.assert_shape(vectors_nd, (len(TEXTS), CONFIG.hidden_size))
    assert vectors_nd.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors_nd, axis=1), 1.0, atol=1e-6)
    for text, vector_d in zip(TEXTS, vectors_nd, strict=True):
        tokens = [2] + [WORDS.index(word) if word in WORDS else 1 for word in text.split()] + [3]
        mean_d = by_hand(tensors_of(CONFIG), tokens).mean(0)
        np.testing.assert_allclose(vector_d, mean_d / np.linalg.norm(mean_d), atol=1e-5)


def test_a_text_has_one_vector_whatever_its_batch(folder):
    together_nd = encode(TEXTS, folder, batch=4)
    for text, vector_d in zip(TEXTS, together_nd, strict=True):
        np.testing.assert_allclose(encode([text], folder, batch=1)[0], vector_d, atol=1e-5)


def test_repeated_texts_are_computed_once_and_progress_is_told(folder):
    told = []
    vectors_nd = encode(TEXTS + TEXTS[::-1], folder, batch=4, on_batch=lambda done, total: told.append((done, total)))
    assert told == [(4, 6), (6, 6)]
    np.testing.assert_array_equal(vectors_nd[: len(TEXTS)], vectors_nd[: len(TEXTS) - 1 : -1])
    np.testing.assert_array_equal(vectors_nd[0], vectors_nd[4])
    assert encode([], folder).shape == (0, CONFIG.hidden_size)


def test_one_compilation_a_bucket(folder, monkeypatch):
    traced = chex.assert_max_traces(encoder.embed.__wrapped__, n=2)
    monkeypatch.setattr(encoder, "embed", jax.jit(traced, static_argnames="config"))
    encode([" ".join(["joy"] * n) for n in range(1, 15)], folder, batch=4)  # 3 to 16 tokens: buckets 8 and 16
    with pytest.raises(AssertionError, match="traced"):
        encode([" ".join(["joy"] * 20)], folder, batch=4)


def test_long_texts_are_cut_with_their_end_mark_kept(folder):
    vectors_nd = encode(["joy " * 30, "joy " * 8], folder, max_tokens=10)
    np.testing.assert_allclose(vectors_nd[0], vectors_nd[1], atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"texts": "joy"}, TypeError, "texts: expected a sequence of str, got one str"),
        ({"texts": ["joy", None]}, TypeError, "texts: row 1: expected str, got NoneType"),
        ({"texts": ["joy"], "max_tokens": 129}, ValueError, "max_tokens: expected 3 to 128, got 129"),
        ({"texts": ["joy"], "batch": 0}, ValueError, "batch: expected at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(folder, arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        encode(folder=folder, **arguments)


def test_another_pooling_is_refused(folder, tmp_path):
    for name in weights.NEEDED:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": False}))
    with pytest.raises(ValueError, match="pooling_mode_mean_tokens: expected true"):
        encode(["joy"], tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act: expected 'gelu', got 'relu'"),
        ({"position_embedding_type": "rotary"}, "position_embedding_type: expected 'absolute', got 'rotary'"),
        ({"num_attention_heads": 5}, "hidden_size: expected a multiple of num_attention_heads = 5, got 16"),
        ({"vocab_size": None}, "expected a field 'vocab_size', missing; the nearest is 'type_vocab_size'"),
    ],
)
def test_a_config_that_is_not_this_encoder_is_refused(tmp_path, change, message):
    data = {name: value for name, value in {**vars(CONFIG), **change}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=re.escape(message)):
        BertConfig.read(tmp_path / "config.json")


def test_a_missing_tensor_is_named():
    tensors = tensors_of(CONFIG)
    tensors["encoder.layer.1.output.dens.bias"] = tensors.pop("encoder.layer.1.output.dense.bias")
    message = "missing; the nearest is 'encoder.layer.1.output.dens.bias'"
    with pytest.raises(ValueError, match=f"expected a tensor 'encoder.layer.1.output.dense.bias', {message}"):
        params_from_tensors(tensors, CONFIG)


def test_an_unexpected_tensor_is_named():
    tensors = tensors_of(CONFIG) | {"encoder.layer.2.output.dense.bias": np.zeros(16, np.float32)}
    with pytest.raises(ValueError, match="unexpected tensor 'encoder.layer.2.output.dense.bias'; the nearest is"):
        params_from_tensors(tensors, CONFIG)


def test_a_tensor_of_wrong_shape_is_named():
    tensors = tensors_of(CONFIG) | {"encoder.layer.0.intermediate.dense.weight": np.zeros((16, 24), np.float32)}
    message = "'encoder.layer.0.intermediate.dense.weight': expected shape (24, 16), got (16, 24)"
    with pytest.raises(ValueError, match=re.escape(message)):
        params_from_tensors(tensors, CONFIG)


def test_tensors_survive_the_file(tmp_path):
    tensors = {
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "half": np.array([0.1, -2.0], np.float16),
        "brain": np.array([[1.5], [-3.0]], jnp.bfloat16),
        "rows": np.array([3, 1], np.int32),
        "scalar": np.array(2.5),
    }
    weights.save_safetensors(tmp_path / "x.safetensors", tensors)
    read = weights.load_safetensors(tmp_path / "x.safetensors")
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        np.testing.assert_array_equal(read[name], tensor)


def test_files_that_are_not_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.safetensors: expected a safetensors file, found none"):
        weights.load_safetensors(tmp_path / "absent.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(ValueError, match="bad.safetensors: expected a safetensors file, got one that cannot be read"):
        weights.load_safetensors(tmp_path / "bad.safetensors")


def test_without_weights_the_error_says_how_to_get_them(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="missing model.safetensors, tokenizer.json; `make minilm`"):
        weights.minilm_folder(tmp_path)
    monkeypatch.setattr(weights, "PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError) as caught:
        weights.minilm_folder()
    for way in ("make minilm", "--features.weights FOLDER", "--features.source FILE.npz"):
        assert way in str(caught.value)


def test_real_headlines_have_the_given_vectors():
    duckdb = pytest.importorskip("duckdb")
    if not (DATA / "minilm_features.npz").exists():
        pytest.skip("the Upworthy data are absent")
    try:
        folder = weights.minilm_folder()
    except FileNotFoundError:
        pytest.skip("the encoder's weights are absent (make minilm)")
    rows = duckdb.sql(f"SELECT headline FROM '{DATA / 'packages.parquet'}'").fetchall()
    sample = np.random.default_rng(0).choice(len(rows), 200, replace=False)
    with np.load(DATA / "minilm_features.npz") as given:
        expected_nd = given["headline"][given["headline_row"][sample]].astype(np.float32)
    vectors_nd = encode([rows[i][0] for i in sample], folder)
    # Given in half precision: entries below 1/4 in size carry a rounding of up to 2^-14 (6.1e-5).
    np.testing.assert_allclose(vectors_nd, expected_nd, atol=7e-5)
