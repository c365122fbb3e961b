"""Tokenizers: round trips, marks, truncation, files."""

import json

import numpy as np
import pytest

from deconfound_jax.models import tokenizer
from deconfound_jax.models.tokenizer import BEGIN, END, PAD, UNKNOWN

TEXTS = [
    "Why the harbor town fell silent",
    "The ferry that never came home",
    "Naïve façade — 12% of readers “agree”",
    "A [pad] literal [end] in a headline",
    "  two  spaces\tand a tab ",
    "日本語 🙂",
]
WORDS = ["harbor", "ferry", "why", "joy"]


def bpe(vocabulary=300):
    return tokenizer.train_bpe(TEXTS * 3, vocabulary)


def test_special_ids():
    assert (PAD, BEGIN, END, UNKNOWN) == (-1, 1, 2, 3)


def test_closed_words_round_trip():
    words = tokenizer.closed(WORDS)
    tokens = words.encode(["why harbor", "joy storm ferry", ""], length=6)
    np.testing.assert_array_equal(tokens, [[1, 6, 4, 2, PAD, PAD], [1, 7, 3, 5, 2, PAD], [1, 2] + [PAD] * 4])
    assert tokens.dtype == np.int32
    assert words.size == 8
    assert words.decode(tokens) == ["why harbor", "joy [unknown] ferry", ""]


def test_decode_stops_at_the_first_end_and_reads_texts_without_one():
    words = tokenizer.closed(WORDS)
    assert words.decode(np.array([[1, 4, 2, 5, 2], [1, 4, 5, 6, 7]])) == ["harbor", "harbor ferry why joy"]


def test_bpe_gives_every_text_back():
    model = bpe()
    tokens = model.encode(TEXTS, length=80)
    assert model.decode(tokens) == TEXTS
    assert 260 < model.size <= 300
    assert tokens.max() < model.size
    assert not (tokens == UNKNOWN).any()


def test_text_that_spells_a_mark_is_no_mark():
    tokens = bpe().encode(["[pad][begin][end]"], length=40)[0]
    ids = tokens[1 : list(tokens).index(END)]
    assert len(ids) > 3 and ids.min() > UNKNOWN


def test_bpe_merges_and_is_deterministic():
    assert bpe().record == bpe().record
    few, many = (np.count_nonzero(bpe(v).encode(TEXTS[:1], 80) != PAD) for v in (260, 300))
    assert many < few == len(TEXTS[0]) + 2


@pytest.mark.parametrize("make", [bpe, lambda: tokenizer.closed(WORDS)])
def test_truncation_keeps_the_marks_and_is_counted(make):
    model = make()
    texts = ["harbor ferry why joy why", "joy"]
    tokens = model.encode(texts, length=5)
    assert (tokens[:, 0] == BEGIN).all() and tokens[0, -1] == END
    assert (tokens == END).any(1).all()
    assert model.count_truncated(texts, 5) == 1
    assert model.count_truncated(texts, 60) == 0
    exact = len(model.split(texts)[0]) + 2
    assert model.count_truncated(texts, exact) == 0 and model.count_truncated(texts, exact - 1) == 1


@pytest.mark.parametrize("make", [bpe, lambda: tokenizer.closed(WORDS)])
def test_a_file_holds_all_of_it(make, tmp_path):
    model = make()
    model.save(tmp_path / "tokenizer.json")
    json.loads((tmp_path / "tokenizer.json").read_text())
    again = tokenizer.load(tmp_path / "tokenizer.json")
    texts = [*TEXTS, "harbor joy"]
    np.testing.assert_array_equal(model.encode(texts, 40), again.encode(texts, 40))
    assert model.decode(model.encode(texts, 40)) == again.decode(again.encode(texts, 40))
    assert (again.size, again.record) == (model.size, model.record)


def test_errors_name_the_field(tmp_path):
    for words in (["sea", "sea"], ["two words"], [""], ["[end]"]):
        with pytest.raises(ValueError, match="words: expected distinct words"):
            tokenizer.closed(words)
    with pytest.raises(ValueError, match="vocabulary: expected at least 260 .* got 200"):
        bpe(200)
    with pytest.raises(ValueError, match="length: expected at least 3"):
        tokenizer.closed(WORDS).encode(["joy"], 2)
    (tmp_path / "t.json").write_text('{"kind": "wordpiece"}')
    with pytest.raises(ValueError, match="expected 'closed' or 'bpe', got 'wordpiece'"):
        tokenizer.load(tmp_path / "t.json")
