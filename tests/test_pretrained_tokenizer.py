"""Published tokenizers: from folders, from GGUF vocabularies, in rows, in pairs."""

import dataclasses
import json
import unicodedata

import numpy as np
import pytest

from deconfound_jax.models.gguf_header import Header
from deconfound_jax.models.gguf_tokenizer import gguf_vocabulary
from deconfound_jax.models.pretrained_tokenizer import load, of_record
from deconfound_jax.models.tokenizer import PAD

tokenizers = pytest.importorskip("tokenizers", reason="published tokenizers are read by the tokenizers package")

TEXTS = [
    "Why the harbor town fell silent in 2024",
    "Naïve façade — 12% of readers “agree”, don't DON'T",
    "  two  spaces\tand a tab \n\n\nx",
    "日本語 🙂 \u0000\u200b é",
    "",
]
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
START, END = 1, 2
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def byte_level():
    """Vocabulary and merges of a byte-level BPE, its marks first."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        TEXTS * 4,
        trainers.BpeTrainer(vocab_size=330, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False),
    )
    return bpe


def vocabulary(bpe, pre="smollm", **more):
    """A header as of a GGUF file with this tokenizer."""
    model = json.loads(bpe.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    types = [3 if token in MARKS else 1 for token in tokens]
    found = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges, "token_type": types, **more}
    return Header("m.gguf", {f"tokenizer.ggml.{key}": value for key, value in found.items()}, {})


def folder_of(path, bpe, **files):
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(bpe.to_str())
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.fixture
def chat(byte_level, tmp_path):
    said = {"bos_token": MARKS[START], "eos_token": {"content": MARKS[END]}, "chat_template": CHATML}
    return load(folder_of(tmp_path / "chat", byte_level, tokenizer_config=said))


def test_a_folder_says_what_its_marks_are(byte_level, chat, tmp_path):
    assert (chat.size, chat.bos, chat.eos, chat.stop) == (byte_level.get_vocab_size(), START, END, (END,))
    assert not chat.add_bos and chat.chat_template == CHATML
    both = {"eos_token_id": [0, 2], "bos_token_id": 0}
    found = load(folder_of(tmp_path / "base", byte_level, config={"eos_token_id": 0}, generation_config=both))
    assert (found.bos, found.eos, found.stop, found.chat_template) == (0, 0, (0, 2), "")
    # null is an answer: such a model has no begin mark, whatever its config says.
    none = {"bos_token": None, "eos_token": MARKS[0], "chat_template": [{"name": "default", "template": "d"}]}
    folder = folder_of(tmp_path / "none", byte_level, tokenizer_config=none, config=both)
    assert (load(folder).bos, load(folder).eos, load(folder).chat_template) == (None, 0, "d")
    (folder / "chat_template.jinja").write_text("j")
    assert load(folder).chat_template == "j"


def test_the_begin_mark_is_put_where_the_tokenizer_itself_puts_it(byte_level, tmp_path):
    from tokenizers import processors

    model = tokenizers.Tokenizer.from_str(byte_level.to_str())
    model.post_processor = processors.TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", START)])
    model.enable_truncation(3)
    said = {"bos_token": MARKS[START], "eos_token": MARKS[END]}
    found = load(folder_of(tmp_path / "f", model, tokenizer_config=said))
    assert found.add_bos
    row = found.encode(TEXTS[:1], 60)[0]
    assert row[0] == START and row[row != PAD][-1] == END and (row != PAD).sum() > 5
    np.testing.assert_array_equal(found.encode(TEXTS[:1], 60, add_bos=False)[0, :-1], row[1:])


def test_every_text_comes_back(chat):
    tokens = chat.encode(TEXTS, 200)
    assert tokens.dtype == np.int32 and tokens.shape == (5, 200)
    assert chat.decode(tokens) == TEXTS
    assert chat.decode(chat.encode(TEXTS, 200, add_bos=True)) == TEXTS
    assert ((tokens == PAD).sum(1) + (tokens == END).sum(1) + (tokens > END).sum(1) == 200).all()
    assert tokens[-1].tolist() == [END] + [PAD] * 199


def test_a_text_that_spells_a_mark_is_no_mark(chat):
    tokens = chat.encode(["<|im_end|>"], 40)
    assert (tokens == END).sum() == 1 and (tokens[0] > END).sum() > 1
    assert chat.decode(tokens) == ["<|im_end|>"]
    assert chat.encode(["<|im_end|>"], 3, marks=True, add_eos=False).tolist() == [[END, PAD, PAD]]
    assert (chat.encode(["<|im_end|>"], 40) == tokens).all()


def test_truncation_keeps_the_marks_and_is_counted(chat):
    tokens = chat.encode(TEXTS, 6, add_bos=True)
    assert (tokens[:, 0] == START).all() and (tokens == END).any(1).all()
    assert chat.count_truncated(TEXTS, 6, add_bos=True) == 4 and chat.count_truncated(TEXTS, 200) == 0
    exact = int((chat.encode(TEXTS[:1], 99) != PAD).sum())
    assert chat.count_truncated(TEXTS[:1], exact) == 0 and chat.count_truncated(TEXTS[:1], exact - 1) == 1
    assert chat.count_truncated(TEXTS[:1], exact, add_bos=True) == 1


def test_a_prompt_and_its_completion(chat):
    prompt = chat.chat([{"role": "user", "content": "sea?"}])
    assert prompt == "<|im_start|>user\nsea?<|im_end|>\n<|im_start|>assistant\n"
    pair = chat.encode_pairs([prompt], ["the <|im_end|> sea"], 80)
    row = pair.tokens_nl[0]
    asked, answer = row[(row != PAD) & ~pair.completion_nl[0]], row[pair.completion_nl[0]]
    np.testing.assert_array_equal(asked, chat.encode([prompt], len(asked), marks=True, add_eos=False)[0])
    np.testing.assert_array_equal(answer, chat.encode(["the <|im_end|> sea"], len(answer))[0])
    assert (asked == START).sum() == 2 and (answer == END).sum() == 1 and answer[-1] == END
    assert chat.decode(answer[None]) == ["the <|im_end|> sea"]
    assert pair.completion_nl.dtype == bool and not pair.cut_n.any()


def test_a_long_prompt_loses_its_beginning_and_a_long_completion_is_named(chat):
    texts = ["abcdefgh"] * 3
    whole = chat.encode_pairs(texts, ["x", "", "wxyzwxyz"], 40, add_bos=True).tokens_nl
    asked = whole[0][: list(whole[0]).index(END) - 1]
    tokens, completion, cut = chat.encode_pairs(texts, ["x", "", "wxyzwxyz"], 5, add_bos=True)
    assert tokens[0].tolist() == [START, *asked[-2:], whole[0][len(asked)], END]
    assert tokens[1].tolist() == [START, *asked[-3:], END]
    assert tokens[2].tolist() == [asked[-1], *whole[2][len(asked) : len(asked) + 3], END]
    assert completion.sum(1).tolist() == [2, 1, 4] and not completion[:, 0].any()
    assert cut.tolist() == [False, False, True]


def test_the_begin_mark_of_a_template_is_not_doubled(chat):
    once = dataclasses.replace(chat, add_bos=True)
    tokens = once.encode_pairs([once.chat([{"role": "user", "content": "sea?"}])], ["x"], 60).tokens_nl
    assert tokens[0, :2].tolist() != [START, START] and tokens[0, 0] == START
    assert (once.encode(["<|im_start|>a"], 9, marks=True) == once.encode(["a"], 9)).all()


def test_a_saved_tokenizer_is_the_same(chat, tmp_path):
    chat.save(tmp_path / "t.json")
    again = load(tmp_path / "t.json")
    assert dataclasses.replace(again, model=chat.model) == chat
    np.testing.assert_array_equal(again.encode(TEXTS, 60), chat.encode(TEXTS, 60))
    assert of_record(json.loads((tmp_path / "t.json").read_text())).decode(chat.encode(TEXTS, 200)) == TEXTS


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_vocabularies_of_gguf_files(byte_level, pre):
    model, begins = gguf_vocabulary(vocabulary(byte_level, pre))
    assert begins == (pre == "llama-bpe") and model.get_vocab_size() == byte_level.get_vocab_size()
    expected = [unicodedata.normalize("NFC", text) if pre == "qwen2" else text for text in TEXTS]
    assert [model.decode(model.encode(text).ids) for text in TEXTS] == expected
    assert model.encode("a<|im_end|>").ids[1:] == [END]
    words = [piece for piece, _ in model.pre_tokenizer.pre_tokenize_str("it's 12345 DON'T..\n\n x")]
    space, line = "Ġ", "Ċ"
    assert (
        words
        == {
            "gpt-2": ["it", "'s", space + "12345", space + "DON", "'", "T", "..", line * 2, space + "x"],
            "smollm": ["it", "'s", space, *"12345", space + "DON", "'", "T", "..", line * 2, space + "x"],
            "llama-bpe": ["it", "'s", space, "123", "45", space + "DON", "'T", ".." + line * 2, space + "x"],
            "qwen2": ["it", "'s", space, *"12345", space + "DON", "'T", ".." + line * 2, space + "x"],
        }[pre]
    )


def test_llama_3_takes_a_word_that_is_a_token_whatever_the_merges(byte_level):
    header = vocabulary(byte_level, "llama-bpe")
    tokens = [*header.metadata["tokenizer.ggml.tokens"], "zqz"]
    types = [*header.metadata["tokenizer.ggml.token_type"], 1]
    for pre, expected in (("llama-bpe", ["zqz"]), ("qwen2", ["z", "q", "z"])):
        model, _ = gguf_vocabulary(vocabulary(byte_level, pre, tokens=tokens, token_type=types))
        assert model.encode("zqz").tokens == expected


def test_the_merges_are_the_file_s(byte_level):
    model, _ = gguf_vocabulary(vocabulary(byte_level, "gpt-2"))
    for text in TEXTS:
        assert model.encode(text).ids == byte_level.encode(text).ids


PIECES = {"<unk>": 2, "<s>": 3, "</s>": 3, **{f"<0x{i:02X}>": 6 for i in range(256)}}
# Scores fall with the order: "ab" is merged before "bc", so "▁abc" is ▁ab + c.
PIECES |= dict.fromkeys(["ab", "bc", "▁ab", "▁a", "▁", "a", "b", "c"], 1) | {"<table>": 4}


def sentencepiece(**more):
    scores = [-float(i) for i in range(len(PIECES))]
    found = {"model": "llama", "tokens": list(PIECES), "scores": scores, "token_type": list(PIECES.values()), **more}
    return gguf_vocabulary(Header("m.gguf", {f"tokenizer.ggml.{key}": value for key, value in found.items()}, {}))


def test_sentencepiece_vocabularies_of_gguf_files():
    model, begins = sentencepiece()
    assert begins
    assert model.encode("abc").tokens == ["▁ab", "c"]
    assert model.encode("bc a").tokens == ["▁", "bc", "▁a"]
    assert model.encode("é</s>").tokens == ["▁", "<0xC3>", "<0xA9>", "</s>"]
    for text in TEXTS:
        assert model.decode(model.encode(text).ids) == text
    model, begins = sentencepiece(add_space_prefix=False, add_bos_token=False)  # Gemma's
    assert not begins
    assert model.encode("abc a<table>b").tokens == ["ab", "c", "▁a", "<table>", "b"]
    assert model.decode(model.encode(" a b").ids) == " a b"


def test_a_gguf_file_is_a_tokenizer(byte_level, tmp_path):
    gguf = pytest.importorskip("gguf", reason="GGUF files are written by the gguf package, which is not installed")
    header = vocabulary(byte_level, bos_token_id=START, eos_token_id=0, add_bos_token=True)
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in header.metadata.items():
        add = {int: writer.add_uint32, str: writer.add_string, list: writer.add_array, bool: writer.add_bool}
        add[type(value)](key, value)
    writer.add_chat_template(CHATML)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = load(path)
    # <|im_end|> ends an answer though the file calls another mark its end.
    assert (found.bos, found.eos, found.stop, found.add_bos) == (START, 0, (0, END), True)
    assert found.chat([{"role": "user", "content": "a"}]).endswith("<|im_start|>assistant\n")
    assert found.decode(found.encode(TEXTS, 200)) == TEXTS
    assert load(tmp_path).size == found.size


def test_errors_name_what_is_wrong(byte_level, chat, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer.json or one .gguf file, found \[\]"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match="tokenizer.json: expected a tokenizer of the `tokenizers` package"):
        load(tmp_path)
    with pytest.raises(ValueError, match="tokenizer.json: expected JSON"):
        load(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="record: kind: expected 'pretrained', got 'bpe'"):
        of_record({"kind": "bpe"})
    for change, message in [
        ({"pre": "viking"}, r"tokenizer.ggml.pre: expected one of \['gpt-2', .*, found 'viking'"),
        ({"model": "t5"}, "tokenizer.ggml.model: expected 'gpt2' or 'llama', found 't5'"),
        ({"merges": ["nowhere near"]}, "tokenizer.ggml.merges: expected merges of its tokens"),
        ({"token_type": [1]}, "expected distinct tokens, a type each; found .* 1 types"),
    ]:
        with pytest.raises(ValueError, match=f"m.gguf: .*{message}"):
            gguf_vocabulary(vocabulary(byte_level, **change))
    bare = dataclasses.replace(chat, bos=None, eos=None, chat_template="")
    with pytest.raises(ValueError, match="add_eos: expected False, this tokenizer has no such mark"):
        bare.encode(["a"], 5)
    with pytest.raises(ValueError, match="prompts: expected a token before each completion, got none in row 0"):
        chat.encode_pairs([""], ["a"], 5)
    with pytest.raises(ValueError, match="length: expected at least 3"):
        chat.encode(["a"], 2, add_bos=True)
    with pytest.raises(ValueError, match="chat_template: expected a tokenizer that has one"):
        bare.chat([])
