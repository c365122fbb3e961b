"""Published tokenizers: texts to padded rows of ids and back, as their models were trained to read them.

    tokenizer = load("SmolLM2-135M-Instruct.Q4_1.gguf")  # or a folder with tokenizer.json
    prompt = tokenizer.chat([{"role": "user", "content": "Name a sea."}])
    tokens_nl, completion_nl, cut_n = tokenizer.encode_pairs([prompt], ["The Baltic."], length=64)

A row is the begin mark where the model has one, the text, the end mark, then PAD (-1) to the right. Methods have the
names of `models.tokenizer.Tokenizer`'s. `models.gguf_tokenizer` reads the vocabulary of a GGUF file.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from deconfound_jax.models import chat
from deconfound_jax.models.gguf_header import read_header
from deconfound_jax.models.gguf_tokenizer import gguf_vocabulary
from deconfound_jax.models.tokenizer import PAD

TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")  # end an answer, whatever a file calls its end of text


class EncodedPairs(NamedTuple):
    """Prompts and completions in rows.

    tokens_nl: int32, PAD to the right. completion_nl: bool, true at the completion's tokens and its end mark.
    cut_n: bool, the completion did not fit and was cut.
    """

    tokens_nl: np.ndarray
    completion_nl: np.ndarray
    cut_n: np.ndarray


@dataclasses.dataclass(frozen=True)
class PretrainedTokenizer:
    """A tokenizer of the `tokenizers` package and what its files say beside it.

    size is the number of ids, marks counted; the model's embedding may have more rows. bos and eos are ids or None,
    `stop` the ids that end a generation, `add_bos` whether the model's texts begin with bos. chat_template is jinja2's
    source, "" where there is none.
    """

    size: int
    bos: int | None
    eos: int | None
    stop: tuple[int, ...]
    add_bos: bool
    chat_template: str = dataclasses.field(repr=False)
    model: Any = dataclasses.field(repr=False)

    def encode(
        self, texts: Sequence[str], length: int, *, add_bos: bool | None = None, add_eos: bool = True,
        marks: bool = False,
    ) -> np.ndarray:  # fmt: skip
        """Ids (n, length) int32; a text too long is cut, its marks stay (see `count_truncated`).

        Args:
          add_bos: None: as the model was trained.
          marks: whether a mark spelled out in a text is that mark, as in what `chat` renders; otherwise it is text.
        """
        before, after = self._marks(add_bos, add_eos)
        room = _room(length, len(before) + len(after))
        tokens_nl = np.full((len(texts), length), PAD, np.int32)
        for row, ids in zip(tokens_nl, self._split(texts, marks, before), strict=True):
            ids = [*before, *ids[:room], *after]
            row[: len(ids)] = ids
        return tokens_nl

    def count_truncated(
        self, texts: Sequence[str], length: int, *, add_bos: bool | None = None, add_eos: bool = True,
        marks: bool = False,
    ) -> int:  # fmt: skip
        """How many of the texts `encode` would cut at this length."""
        before, after = self._marks(add_bos, add_eos)
        room = _room(length, len(before) + len(after))
        return sum(len(ids) > room for ids in self._split(texts, marks, before))

    def encode_pairs(
        self, prompts: Sequence[str], completions: Sequence[str], length: int, *, add_bos: bool | None = None,
        add_eos: bool = True, marks: bool = True,
    ) -> EncodedPairs:  # fmt: skip
        """Prompt then completion, each split by itself as in generation, where the prompt's tokens stand already.

        Too long a prompt loses its beginning (but the begin mark), so that the completion fits; a completion that
        fits in no way is cut and named in `cut_n`. At least one token of the prompt stays: the first token of a
        row is never predicted.

        Args:
          marks: whether marks spelled out in a prompt are marks, as in what `chat` renders; in completions never.
        """
        before, after = self._marks(add_bos, add_eos)
        room = _room(length, 1 + len(after))
        tokens_nl = np.full((len(prompts), length), PAD, np.int32)
        completion_nl, cut_n = np.zeros(tokens_nl.shape, bool), np.zeros(len(prompts), bool)
        rows = zip(self._split(prompts, marks, before), self._split(completions, False, []), strict=True)
        for i, (asked, answer) in enumerate(rows):
            asked, cut_n[i] = [*before, *asked], len(answer) > room
            if not asked:
                raise ValueError(f"prompts: expected a token before each completion, got none in row {i}; add_bos?")
            answer = [*answer[:room], *after]
            kept = min(len(asked), length - len(answer))
            first = before if kept > 1 else []
            asked = [*first, *asked[len(asked) - kept + len(first) :]]
            tokens_nl[i, : kept + len(answer)] = [*asked, *answer]
            completion_nl[i, kept : kept + len(answer)] = True
        return EncodedPairs(tokens_nl, completion_nl, cut_n)

    def decode(self, tokens_nl: np.ndarray) -> list[str]:
        """The texts of rows (n, l), each read from after its begin mark up to its first stop id."""
        texts = []
        for row in np.asarray(tokens_nl).tolist():
            ids = [i for i in row if i != PAD]
            ids = ids[1:] if ids[:1] == [self.bos] else ids
            end = next((place for place, i in enumerate(ids) if i in self.stop), len(ids))
            texts.append(self.model.decode(ids[:end], skip_special_tokens=False))
        return texts

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Messages ({"role": ..., "content": ...}) in the model's own format; see `models.chat.render`."""
        if not self.chat_template:
            raise ValueError("chat_template: expected a tokenizer that has one, got none: not a chat model?")
        bos, eos = ("" if i is None else self.model.id_to_token(i) for i in (self.bos, self.eos))
        return chat.render(self.chat_template, messages, add_generation_prompt, bos_token=bos, eos_token=eos)

    def save(self, path) -> None:
        """Writes JSON that `load` reads back."""
        record = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        record |= {"kind": "pretrained", "model": self.model.to_str()}
        epath.Path(path).write_text(json.dumps(record, sort_keys=True))

    def _marks(self, add_bos: bool | None, add_eos: bool) -> tuple[list[int], list[int]]:
        add_bos = self.add_bos if add_bos is None else add_bos
        for name, asked, mark in (("add_bos", add_bos, self.bos), ("add_eos", add_eos, self.eos)):
            if asked and mark is None:
                raise ValueError(f"{name}: expected False, this tokenizer has no such mark; got True")
        return [self.bos] * add_bos, [self.eos] * add_eos

    def _split(self, texts: Sequence[str], marks: bool, before: list[int]) -> list[list[int]]:
        # The package's own setting of the whole tokenizer, set anew at each call.
        self.model.encode_special_tokens = not marks
        rows = [row.ids for row in self.model.encode_batch(list(texts), add_special_tokens=False)]
        # Some chat templates write the begin mark themselves: it must not stand there twice.
        return [ids[1:] if before and ids[:1] == before else ids for ids in rows]


def load(path: str | os.PathLike) -> PretrainedTokenizer:
    """Reads a folder with tokenizer.json or one GGUF file, a GGUF file, or what `PretrainedTokenizer.save` wrote.

    Raises FileNotFoundError, or ValueError that names the file and what is wrong in it.
    """
    path = Path(path)
    if not path.is_dir():
        return _of_gguf(path) if path.suffix == ".gguf" else of_record(_json(path), str(path))
    if (path / "tokenizer.json").is_file():
        return _of_folder(path)
    if len(found := sorted(path.glob("*.gguf"))) == 1:
        return _of_gguf(found[0])
    raise FileNotFoundError(f"{path}: expected tokenizer.json or one .gguf file, found {[f.name for f in found]}")


def of_record(record: Mapping[str, Any], place: str = "record") -> PretrainedTokenizer:
    """The tokenizer that `PretrainedTokenizer.save` wrote, from its parsed JSON."""
    if record.get("kind") != "pretrained":
        raise ValueError(f"{place}: kind: expected 'pretrained', got {record.get('kind')!r}")
    fields = {key: value for key, value in record.items() if key != "kind"}
    return PretrainedTokenizer(**fields | {"stop": tuple(record["stop"]), "model": _parsed(record["model"], place)})


def _of_folder(folder: Path) -> PretrainedTokenizer:
    model = _parsed((folder / "tokenizer.json").read_text(encoding="utf-8"), str(folder / "tokenizer.json"))
    model.no_truncation()
    model.no_padding()
    files = ("special_tokens_map.json", "tokenizer_config.json")
    said = {key: value for name in files for key, value in _json(folder / name, {}).items()}
    of_model = _json(folder / "config.json", {}) | _json(folder / "generation_config.json", {})

    def mark(name: str) -> int | None:
        if f"{name}_token" not in said:
            ids = _listed(of_model.get(f"{name}_token_id"))
            return ids[0] if ids else None
        token = said[f"{name}_token"]
        token = token["content"] if isinstance(token, dict) else token
        return None if token is None else model.token_to_id(token)

    bos, eos = mark("bos"), mark("eos")
    stop = _stop(model, [eos, *_listed(of_model.get("eos_token_id"))])
    # What the published tokenizer itself puts before a text, whatever its config says beside.
    add_bos = bos is not None and model.encode("").ids[:1] == [bos]
    return PretrainedTokenizer(
        model.get_vocab_size(), bos, eos, stop, add_bos, _chat_template(folder, said.get("chat_template")), model
    )


def _chat_template(folder: Path, said: Any) -> str:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    said = _json(folder / "chat_template.json", {}).get("chat_template", said) or ""
    if isinstance(said, list):  # several by name
        said = {entry["name"]: entry["template"] for entry in said}.get("default", "")
    return said


def _of_gguf(path: Path) -> PretrainedTokenizer:
    header = read_header(path)
    model, add_bos = gguf_vocabulary(header)
    said = {name: header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom")}
    add_bos = bool(said["bos"] is not None and add_bos)
    stop = _stop(model, [said["eos"], said["eot"], said["eom"]])
    template = header.metadata.get("tokenizer.chat_template", "")
    return PretrainedTokenizer(model.get_vocab_size(), said["bos"], said["eos"], stop, add_bos, template, model)


def _stop(model, ids: Sequence[int | None]) -> tuple[int, ...]:
    special = {token.content for token in model.get_added_tokens_decoder().values() if token.special}
    found = [*ids, *(model.token_to_id(name) for name in TURN_ENDS if name in special)]
    return tuple(sorted({i for i in found if i is not None}))


def _parsed(text: str, place: str):
    from tokenizers import Tokenizer as Parsed  # here: the core runs without it

    try:
        return Parsed.from_str(text)
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"{place}: expected a tokenizer of the `tokenizers` package, found {error}") from error


def _json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if default is not None and not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, found {error}") from error


def _listed(ids: Any) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _room(length: int, marks: int) -> int:
    if length <= marks:
        raise ValueError(f"length: expected at least {marks + 1} (a token and {marks} beside it), got {length}")
    return length - marks
