"""Texts to padded rows of ids and back: a closed word list, or a trained byte-level BPE.

A row is BEGIN, the text, END, then PAD to the right. PAD is no id of any vocabulary: a position that holds no token.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

PAD = -1
BEGIN, END, UNKNOWN = 1, 2, 3
SPECIAL = ("[pad]", "[begin]", "[end]", "[unknown]")
_BYTES = 256


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Two functions, texts -> ids and ids -> text, with the marks put around them.

    size is the number of ids; `split` and `join` know nothing of PAD, BEGIN and END; `record` is what `save` writes.
    """

    size: int
    split: Callable[[Sequence[str]], list[list[int]]]
    join: Callable[[Sequence[int]], str]
    record: dict[str, Any]

    def encode(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Ids (n, length) int32; a text too long is cut, its BEGIN and END stay (see `count_truncated`)."""
        room = _room(length)
        tokens_nl = np.full((len(texts), length), PAD, np.int32)
        for row, ids in zip(tokens_nl, self.split(list(texts)), strict=True):
            ids = [BEGIN, *ids[:room], END]
            row[: len(ids)] = ids
        return tokens_nl

    def count_truncated(self, texts: Sequence[str], length: int) -> int:
        """How many of the texts `encode` would cut at this length."""
        room = _room(length)
        return sum(len(ids) > room for ids in self.split(list(texts)))

    def decode(self, tokens_nl: np.ndarray) -> list[str]:
        """The texts of rows (n, l), each read up to its first END."""
        texts = []
        for row in np.asarray(tokens_nl).tolist():
            ids = row[: row.index(END)] if END in row else row
            texts.append(self.join([i for i in ids if i not in (PAD, BEGIN)]))
        return texts

    def save(self, path) -> None:
        """Writes JSON that `load` reads back."""
        epath.Path(path).write_text(json.dumps(self.record, sort_keys=True))


def closed(words: Sequence[str]) -> Tokenizer:
    """Whitespace words of a closed list; any other word becomes UNKNOWN.

    Raises ValueError naming words that repeat, hold white space or are a special token's name.

        closed(["sea", "ship"]).encode(["ship sea"], length=5)  # [[1, 5, 4, 2, -1]]
    """
    words = list(words)
    names = [*SPECIAL, *words]
    wrong = sorted({w for w in words if names.count(w) > 1 or w.split() != [w]})
    if wrong:
        raise ValueError(f"words: expected distinct words without white space, none of {SPECIAL}; got {wrong[:5]}")
    ids = {word: i for i, word in enumerate(names) if i > UNKNOWN}
    return Tokenizer(
        size=len(names),
        split=lambda texts: [[ids.get(word, UNKNOWN) for word in text.split()] for text in texts],
        join=lambda row: " ".join(names[i] for i in row),
        record={"kind": "closed", "words": words},
    )


def train_bpe(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Byte-level byte-pair encoding with at most `vocabulary` ids, the four special ones and 256 bytes among them.

    Any text can be encoded and comes back byte for byte. Training is deterministic.

    Source: Sennrich et al. 2016 (1508.07909); bytes as in Radford et al. 2019.
    """
    # Imported here: an accelerator image may lack the library, and closed vocabularies do without.
    from tokenizers import Tokenizer as Bpe
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocabulary < len(SPECIAL) + _BYTES:
        least = len(SPECIAL) + _BYTES
        raise ValueError(f"vocabulary: expected at least {least} (special ids and bytes), got {vocabulary}")
    bpe = Bpe(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return _of_bpe(bpe)


def load(path) -> Tokenizer:
    """Reads what `Tokenizer.save` wrote."""
    record = json.loads(epath.Path(path).read_text())
    if record.get("kind") == "closed":
        return closed(record["words"])
    if record.get("kind") == "bpe":
        from tokenizers import Tokenizer as Bpe

        return _of_bpe(Bpe.from_str(record["model"]))
    raise ValueError(f"{path}: kind: expected 'closed' or 'bpe', got {record.get('kind')!r}")


def _of_bpe(bpe) -> Tokenizer:
    # The special ids lie before the library's own, unknown to it: no text, whatever it says, can encode to one.
    def split(texts):
        return [[i + len(SPECIAL) for i in row.ids] for row in bpe.encode_batch(texts)]

    def join(row):
        return bpe.decode([i - len(SPECIAL) for i in row if i > UNKNOWN])

    return Tokenizer(bpe.get_vocab_size() + len(SPECIAL), split, join, {"kind": "bpe", "model": bpe.to_str()})


def _room(length: int) -> int:
    if length < 3:
        raise ValueError(f"length: expected at least 3 (BEGIN, a token, END), got {length}")
    return length - 2
