"""Published weights in: sharded, renamed, narrow and half files, and the hub."""

import json
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import FIXTURES, check_same, load, tensors_of

from deconfound_jax.models import pretrained
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.pretrained import load_pretrained
from deconfound_jax.models.weights import load_safetensors, save_safetensors

EMBEDDING, DOWN = "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"


def write(folder, name, tensors, **fields):
    """A checkpoint with a fixture's config.json, some fields changed."""
    folder.mkdir(exist_ok=True)
    record = json.loads((FIXTURES / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | fields))
    save_safetensors(folder / "model.safetensors", tensors)
    return folder


def write_shards(folder, name):
    """A fixture as two shards and their index."""
    tensors = tensors_of(name)
    files = {tensor: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, tensor in enumerate(tensors)}
    for file in set(files.values()):
        save_safetensors(folder / file, {tensor: tensors[tensor] for tensor in tensors if files[tensor] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    shutil.copy(FIXTURES / name / "config.json", folder)
    return files


def test_the_parameters_are_what_init_returns():
    small, params = load("llama_untied")
    shapes = jax.eval_shape(Decoder(small, small.vocabulary).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)


def test_shards_are_one_model(tmp_path):
    assert len(set(write_shards(tmp_path, "gpt2").values())) == 2
    check_same(load("gpt2")[1], load_pretrained(tmp_path)[1])


@pytest.mark.parametrize(
    ("name", "rename", "extra"),
    [
        ("gpt2", lambda n: n.removeprefix("transformer."), {"h.0.attn.bias": (1, 1, 8, 8), "h.1.attn.masked_bias": ()}),
        ("llama_scaled", lambda n: n.removeprefix("model."), {"layers.0.self_attn.rotary_emb.inv_freq": (2,)}),
        ("gemma3_text", lambda n: f"language_model.{n}", {"vision_tower.x": (3,), "multi_modal_projector.y": (2, 2)}),
        ("gemma3_text", lambda n: n.replace("model.", "model.language_model."), {"model.vision_tower.x": (3,)}),
    ],
)
def test_other_names_of_the_same_tensors(name, rename, extra, tmp_path):
    tensors = {rename(tensor): value for tensor, value in tensors_of(name).items()}
    tensors |= {tensor: np.zeros(shape, np.float32) for tensor, shape in extra.items()}
    check_same(load(name)[1], load_pretrained(write(tmp_path, name, tensors))[1])


def test_the_file_may_be_narrow_and_the_parameters_too(tmp_path):
    narrow = {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors_of("qwen3").items()}
    folder = write(tmp_path, "qwen3", narrow)
    (_, wide), (_, kept) = load_pretrained(folder), load_pretrained(folder, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {jnp.dtype("float32")}
    check_same(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), wide), kept)
    with pytest.raises(ValueError, match="dtype: expected one of float32, bfloat16, got 'int8'"):
        load_pretrained(folder, "int8")


def test_a_tied_head_may_be_repeated_but_not_differ(tmp_path):
    tensors = tensors_of("llama_scaled")
    again = tensors | {"lm_head.weight": tensors[EMBEDDING]}
    check_same(load("llama_scaled")[1], load_pretrained(write(tmp_path, "llama_scaled", again))[1])
    other = tensors | {"lm_head.weight": tensors[EMBEDDING] + 1}
    with pytest.raises(ValueError, match=r"model.safetensors: tensor 'lm_head.weight': expected the embedding again"):
        load_pretrained(write(tmp_path, "llama_scaled", other))


def test_nothing_is_read_before_everything_is_checked(tmp_path, monkeypatch):
    tensors = tensors_of("llama_scaled")
    both = tensors | {"lm_head.weight": tensors[EMBEDDING], DOWN: tensors[DOWN].T}
    monkeypatch.setattr(pretrained, "read_tensor", lambda tensor: pytest.fail(f"{tensor} was read"))
    with pytest.raises(ValueError, match=f"tensor '{DOWN}': expected shape"):
        load_pretrained(write(tmp_path, "llama_scaled", both))
    with pytest.raises(ValueError, match=r"tensor 'lm_head.weight': expected shape \(64, 16\), found \(3,\)"):
        load_pretrained(write(tmp_path, "llama_scaled", tensors | {"lm_head.weight": np.zeros(3, np.float32)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(DOWN), rf"tensor '{DOWN}': expected shape \(16, 24\), found no such tensor$"),
        (lambda t: t.update({DOWN: t[DOWN].T}), rf"tensor '{DOWN}': expected shape \(16, 24\), found \(24, 16\)"),
        (lambda t: t.update({"model.x": t[DOWN]}), r"tensor 'model.x': expected none .* llama, found \(16, 24\)"),
        (lambda t: t.update({DOWN: t[DOWN].astype(np.int8)}), f"tensor '{DOWN}': expected one of .*BF16, found I8"),
        (lambda t: [t.pop(n) for n in list(t)[:2]], f"tensor '{EMBEDDING}': .* found no such tensor, nor 1 others"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path, change, message):
    tensors = tensors_of("llama_scaled")
    change(tensors)
    with pytest.raises(ValueError, match=rf"model\.safetensors: {message}"):
        load_pretrained(write(tmp_path, "llama_scaled", tensors))


def test_a_config_of_another_size_is_seen(tmp_path):
    with pytest.raises(ValueError, match=rf"tensor '{EMBEDDING}': expected shape \(65, 16\), found \(64, 16\)"):
        load_pretrained(write(tmp_path, "llama_scaled", tensors_of("llama_scaled"), vocab_size=65))
    with pytest.raises(ValueError, match="tensor 'lm_head.weight': expected shape .* found no such tensor"):
        load_pretrained(write(tmp_path, "llama_scaled", tensors_of("llama_scaled"), tie_word_embeddings=False))
    with pytest.raises(ValueError, match=rf"{tmp_path.name}: config.json: model_type: expected one of .* 'bert'"):
        load_pretrained(write(tmp_path, "llama_scaled", {}, model_type="bert"))


def test_a_half_written_folder_does_not_load(tmp_path):
    folder = write(tmp_path / "a", "llama_scaled", tensors_of("llama_scaled"))
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-10])
    with pytest.raises(
        ValueError, match=r"model.safetensors: .*cannot be read \(tensor '.*': expected shape .* found the file's end"
    ):
        load_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ValueError, match="a/config.json: expected JSON"):
        load_pretrained(folder)
    (folder / "config.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="a/config.json: expected JSON"):
        load_pretrained(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="a/config.json: expected a JSON object, found list"):
        load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json: expected a file, found none"):
        load_pretrained(folder)


def test_wrong_shards_are_named(tmp_path):
    files = write_shards(tmp_path, "gpt2")
    index, (name, file) = tmp_path / "model.safetensors.index.json", next(iter(files.items()))
    index.write_text(json.dumps({"weight_map": files | {name: "../" + file}}))
    with pytest.raises(ValueError, match=f"tensor '{name}': expected a safetensors file beside it, found '../{file}'"):
        load_pretrained(tmp_path)
    index.write_text(json.dumps({"weight_map": files | {name: 3}}))
    with pytest.raises(ValueError, match=f"index.json: tensor '{name}': expected a safetensors file .*, found 3"):
        load_pretrained(tmp_path)
    index.write_text(json.dumps({"weight_map": files | {"more": file}}))
    with pytest.raises(ValueError, match=rf"{file}: tensor 'more': expected, as .*index.json says, found none"):
        load_pretrained(tmp_path)
    other = next(f for f in files.values() if f != file)
    save_safetensors(tmp_path / other, load_safetensors(tmp_path / other) | {name: np.zeros(3, np.float32)})
    index.write_text(json.dumps({"weight_map": files}))
    with pytest.raises(ValueError, match=f"{other}: tensor '{name}': expected once, found in .*{file} too"):
        load_pretrained(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file}: expected a safetensors file, found none"):
        load_pretrained(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="weight_map: expected tensors' names and files, found None"):
        load_pretrained(tmp_path)


def test_a_pickle_is_refused_by_name(tmp_path):
    shutil.copy(FIXTURES / "gpt2" / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="expected model.safetensors or .* found neither$"):
        load_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="found pytorch_model.bin; a pickle can run code"):
        load_pretrained(tmp_path)


def test_a_repository_comes_from_the_hub(monkeypatch):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        if name == "org/absent":
            raise OSError("no network")
        return str(FIXTURES / "gpt2")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    check_same(load("gpt2")[1], load_pretrained("org/gpt2", revision="abc")[1])
    assert (asked["name"], asked["revision"]) == ("org/gpt2", "abc")
    assert not [pattern for pattern in asked["allow_patterns"] if "py" in pattern or "bin" in pattern]
    with pytest.raises(FileNotFoundError, match="org/absent: no folder .* the hub did not give it .*no network.*copy"):
        load_pretrained("org/absent")
    with pytest.raises(FileNotFoundError, match="/no/such/folder: expected a folder with config.json"):
        load_pretrained("/no/such/folder")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="org/gpt2: .*pip install huggingface_hub"):
        load_pretrained("org/gpt2")
