"""The vocabulary inside a GGUF file -> a tokenizer of the `tokenizers` package.

Two kinds are known: "gpt2", byte-level byte-pair encoding with its merges, whose way of cutting a text into words is
named by `tokenizer.ggml.pre`; and "llama", SentencePiece's byte-pair encoding, which keeps a score for each piece in
place of the merges: the merges are the pairs of pieces that make a piece, the highest score first.
"""

from __future__ import annotations

from typing import Any

from deconfound_jax.models.gguf_header import Header

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # the format's types of tokens; 5 is unused, 6 a byte

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# What `tokenizer.ggml.pre` names, as the models' own tokenizer.json has it: pattern of a word, where it is not GPT-2's.
WORDS = {"gpt-2": "", "smollm": "", "llama-bpe": _WORDS % r"\p{N}{1,3}", "qwen2": _WORDS % r"\p{N}"}
_SPACE = "\u2581"  # SentencePiece's mark of a space


def gguf_vocabulary(header: Header) -> tuple[Any, bool]:
    """The file's tokenizer, and whether its texts begin with the begin mark.

    Raises ValueError naming the key that is missing or not known.
    """
    get = header.get
    tokens, kind = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.model")
    types = get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) < len(tokens) or len(types) != len(tokens):
        found = f"{len(tokens)} with {len(ids)} distinct and {len(types)} types"
        raise ValueError(f"{header.path}: tokenizer.ggml.tokens: expected distinct tokens, a type each; found {found}")
    if kind == "gpt2":
        pre = get("tokenizer.ggml.pre", "none")
        if pre not in WORDS:
            raise ValueError(f"{header.path}: tokenizer.ggml.pre: expected one of {sorted(WORDS)}, found {pre!r}")
        model, begins = _byte_level(header, ids, pre), pre == "llama-bpe"
    elif kind == "llama":
        model, begins = _sentencepiece(header, ids, types), True
    else:
        raise ValueError(f"{header.path}: tokenizer.ggml.model: expected 'gpt2' or 'llama', found {kind!r}")
    _add_marks(model, tokens, types)
    return model, get("tokenizer.ggml.add_bos_token", begins)


def _byte_level(header: Header, ids: dict[str, int], pre: str):
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    merges = [tuple(merge.split(" ", 1)) for merge in header.get("tokenizer.ggml.merges")]
    # Llama 3 takes a word that is a token as it is, whatever its merges would make of it.
    model = _bpe(header, ids, merges, ignore_merges=pre == "llama-bpe")
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not WORDS[pre])]
    if WORDS[pre]:
        steps.insert(0, pre_tokenizers.Split(Regex(WORDS[pre]), "isolated"))
    if pre == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    if pre == "qwen2":
        model.normalizer = normalizers.NFC()
    model.pre_tokenizer = pre_tokenizers.Sequence(steps)
    model.decoder = decoders.ByteLevel()
    return model


def _sentencepiece(header: Header, ids: dict[str, int], types: list[int]):
    from tokenizers import decoders, normalizers

    scores = header.get("tokenizer.ggml.scores")
    unknown = {i: token for token, i in ids.items()}.get(header.get("tokenizer.ggml.unknown_token_id", 0))
    merges = []
    for piece, i in ids.items():
        if types[i] == NORMAL:
            pairs = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
            merges += [(scores[i], left, right) for left, right in pairs if left in ids and right in ids]
    merges.sort(key=lambda merge: -merge[0])
    model = _bpe(header, ids, [merge[1:] for merge in merges], byte_fallback=True, fuse_unk=True, unk_token=unknown)
    # Before a text and after each mark inside it, as llama.cpp and Llama 2's own tokenizer.json have it.
    prefix = header.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    model.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    undo = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    model.decoder = decoders.Sequence([*undo, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return model


def _bpe(header: Header, ids: dict[str, int], merges: list[tuple[str, ...]], **options):
    from tokenizers import Tokenizer, models

    try:
        return Tokenizer(models.BPE(vocab=ids, merges=merges, **options))
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(
            f"{header.path}: tokenizer.ggml.merges: expected merges of its tokens, found {error}"
        ) from error


def _add_marks(model, tokens: list[str], types: list[int]) -> None:
    """Control tokens are marks, user-defined ones whole words that no merge cuts; ids are those of the vocabulary."""
    from tokenizers import AddedToken

    by_type = {kind: [t for t, own in zip(tokens, types, strict=True) if own == kind] for kind in set(types)}
    marks = by_type.get(CONTROL, []) + by_type.get(UNKNOWN, [])
    model.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in marks])
    model.add_tokens([AddedToken(token, normalized=False) for token in by_type.get(USER_DEFINED, [])])
