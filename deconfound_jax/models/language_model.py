"""A published language model, whatever its files: decoder, parameters and tokenizer together.

lm = load_language_model("HuggingFaceTB/SmolLM2-135M-Instruct")  # a hub's name, a folder, or a .gguf file
prompt_1l = lm.tokenizer.encode([lm.tokenizer.chat([{"role": "user", "content": "Name a sea."}])], 64,
                                add_eos=False, marks=True)
out = generate(lm.decoder, lm.params, key, prompt_1l, new_tokens=32, stop=lm.tokenizer.stop)
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from deconfound_jax.models import pretrained_tokenizer
from deconfound_jax.models.decoder import Decoder
from deconfound_jax.models.features import pool
from deconfound_jax.models.gguf import load_gguf
from deconfound_jax.models.pretrained import Precision, find_folder, load_pretrained
from deconfound_jax.models.pretrained_tokenizer import PretrainedTokenizer
from deconfound_jax.models.sample import bucket, generate, pad_prompts
from deconfound_jax.models.tokenizer import PAD

_LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)  # of batches of texts: one compilation each


class LanguageModel(NamedTuple):
    """What a recipe needs of a policy or of an encoder."""

    decoder: Decoder
    params: dict[str, Any]
    tokenizer: PretrainedTokenizer


def load_language_model(
    source: str | os.PathLike,
    dtype: Precision = "float32",
    revision: str | None = None,
    **changes: Any,
) -> LanguageModel:
    """Reads a model and its tokenizer.

    Args:
      source: a folder with config.json, safetensors and tokenizer.json; a .gguf file, or a folder that holds one and
        no safetensors; "organisation/name" on the hub.
      dtype: of the parameters.
      revision: of a hub's repository.
      changes: fields of `config.Decoder` that are the caller's to choose: dtype (of computation), remat, chunk,
        attention.

    Raises FileNotFoundError or ValueError, as `load_pretrained` and `load_gguf` do; ValueError for a tokenizer with
    more ids than the model's embedding has rows.
    """
    path = Path(source).expanduser()
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if files and not (path / "config.json").exists():
        if len(files) > 1:
            raise ValueError(
                f"{path}: expected one .gguf file, found {[file.name for file in files]}; name one of them"
            )
        place = files[0]
        config, params = load_gguf(place, dtype)
    else:
        place = Path(find_folder(source, revision))
        config, params = load_pretrained(place, dtype)
    tokenizer = pretrained_tokenizer.load(place)
    if tokenizer.size > config.vocabulary:
        raise ValueError(f"{place}: expected a tokenizer of at most {config.vocabulary} ids, found {tokenizer.size}")
    return LanguageModel(Decoder(dataclasses.replace(config, **changes), config.vocabulary), params, tokenizer)


def encode_texts(
    lm: LanguageModel,
    texts: Sequence[str],
    pooling: str = "mean",
    max_tokens: int = 128,
    batch: int = 32,
    on_batch: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Features of texts: pooled last hidden states, (n, d) float32 (one more with "sum+length").

    Texts that repeat are read once; texts of about one length share a batch, so that little padding is read.

    Args:
      pooling: of `features.pool`.
      max_tokens: longer texts are cut; the end mark counts, and is read.
      on_batch: hears (done, total), in distinct texts.
    """
    if not texts:
        raise ValueError("encode_texts: expected at least one text, got none")
    max_tokens = min(max_tokens, lm.decoder.config.length)
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    tokens_ul = lm.tokenizer.encode(list(place), max_tokens)
    lengths = [*(length for length in _LENGTHS if length < max_tokens), max_tokens]
    order = np.argsort((tokens_ul != PAD).sum(1), kind="stable")
    pieces = []
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        length = bucket(int((tokens_ul[rows] != PAD).sum(1).max()), lengths)
        filled = np.concatenate([rows, np.repeat(rows[:1], batch - len(rows))])  # one shape a bucket
        found = _pooled(lm.decoder, pooling, lm.params, tokens_ul[filled, :length])
        pieces.append(np.asarray(found)[: len(rows)])
        if on_batch is not None:
            on_batch(start + len(rows), len(order))
    features_ud = np.concatenate(pieces)[np.argsort(order)]
    return features_ud[[place[text] for text in texts]]


def continue_prompts(lm: LanguageModel, params: Any, prompts: Sequence[str], samples: int, new_tokens: int,
                     seed: int = 0, temperature: float = 1.0) -> list[list[str]]:  # fmt: skip
    """What the model writes behind each prompt, `samples` texts each.

    Args:
      params: in place of the model's own: a policy that started from it, with or without adapters.
      prompts: marks spelled out in them are marks, as in what `tokenizer.chat` renders.
    """
    length = lm.decoder.config.length
    prompt_bl = lm.tokenizer.encode(list(prompts), length, add_eos=False, marks=True)
    prompt_bl = pad_prompts(prompt_bl, [*(size for size in _LENGTHS if size < length), length])
    drawn = generate(lm.decoder, params, jax.random.key(seed), prompt_bl, new_tokens, samples, temperature,
                     stop=lm.tokenizer.stop)  # fmt: skip
    return [lm.tokenizer.decode(np.asarray(tokens_nl)) for tokens_nl in drawn.tokens]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pooled(decoder: Decoder, pooling: str, params, tokens_bl):
    return pool(decoder.apply(params, tokens_bl, method="hidden"), tokens_bl != PAD, pooling)
