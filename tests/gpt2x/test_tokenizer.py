"""The tokenizer: equal to transformers', id for id, on whatever text there is."""

import json
import random
import shutil
from dataclasses import replace
from unittest.mock import patch

import pytest
from paths import RELEASE, needs_shared

from converters import ConversionError, TokenizerError, find_tokenizer, open_checkpoint, save_checkpoint
from converters.added_tokens import usual_token
from gpt2x import SHAKESPEARE, Tokenizer
from gpt2x.tokenizer import _pieces

TEXTS = {
    "prose": "O, that this too too solid flesh would melt,\nThaw and resolve itself into a dew!\n",
    "spaces": "  two  three   four    \n\n\n\ttab \r\n trailing   ",
    "contractions": "I'll we've he's they're it'd I'm don't 'tis DON'T I'LL",
    "code": 'def f(x):\n    return {\'a\': [1, 2.5e-3], "b": x**2}  # note\n\nif __name__ == "__main__":\n\tf(1)\n',
    "numbers": "3.14159 1,000,000 0x1F 12:30 ½ ² Ⅻ",
    "languages": "Zażółć gęślą jaźń. Съешь ещё этих мягких французских булок. 私はガラスを食べられます。 مرحبا नमस्ते",
    "emoji": "👍🏽 👨‍👩‍👧‍👦 🇬🇧 ☃ 🤖!",
    "combining": "e\u0301 \u0301 a\u0308\u0323 \u200b\u200d\ufeff\u00a0\u2003",
    "control": "\x00\x01\x7f\x80\x9f\x1b[0m",
    "replacement": "broken \ufffd\ufffd utf-8",
    "end": "one<|endoftext|>two <|endoftext|> three<|endoftext|><|endoftext|>",
    "nearly the end": "<|endoftext|<|endoftext |> <endoftext>",
    "empty": "",
}


def theirs(folder):
    from transformers import GPT2Tokenizer

    return GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))


@pytest.fixture(scope="module", params=["shakespeare", pytest.param("openai", marks=needs_shared)])
def pair(request, tmp_path_factory):
    """Our tokenizer and transformers' over the same files."""
    source = SHAKESPEARE if request.param == "shakespeare" else RELEASE
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copy(source / "encoder.json", folder / "vocab.json")
    shutil.copy(source / "vocab.bpe", folder / "merges.txt")
    return Tokenizer.from_pretrained(source), theirs(folder)


@pytest.mark.parametrize("name", TEXTS)
def test_ids_and_text_equal_those_of_transformers(pair, name):
    ours, other = pair
    ids = ours.encode(TEXTS[name])
    assert ids == other.encode(TEXTS[name])
    assert ours.decode(ids) == other.decode(ids, clean_up_tokenization_spaces=False) == TEXTS[name]


def test_bytes_that_are_no_utf8_decode_as_transformers_decodes_them(pair):
    ours, other = pair
    smile = ours.encode("🤖é☃")
    for broken in (smile[:1], smile[:2], smile[1:], smile[::-1], smile[:1] * 5, smile[2:] + smile[:1]):
        assert ours.decode(broken) == other.decode(broken, clean_up_tokenization_spaces=False)


def test_a_lone_surrogate_becomes_a_replacement_character(pair):
    ours, _ = pair
    assert ours.encode("a\udcffb") == ours.encode("a\ufffdb")
    assert ours.encode("a\ud83d\ude00b") == ours.encode("a😀b")


def test_the_end_of_text_is_the_last_of_the_vocabulary(pair):
    ours, other = pair
    assert ours.eos_token_id == other.eos_token_id == ours.vocab_size - 1
    assert ours.encode("<|endoftext|>") == [ours.eos_token_id]


@needs_shared
def test_the_ids_of_openais_examples_are_the_published_ones():
    ours = Tokenizer.from_pretrained(RELEASE)
    assert ours.encode("Hello, my dog is cute") == [15496, 11, 616, 3290, 318, 13779]
    assert (ours.vocab_size, ours.eos_token_id) == (50257, 50256)


# ------------------------------------------------------------------------------------------------------- files


def test_files_go_to_hugging_face_and_back_to_the_same_bytes(tmp_path):
    save_checkpoint(open_checkpoint(SHAKESPEARE), tmp_path / "hf")
    save_checkpoint(open_checkpoint(tmp_path / "hf"), tmp_path / "tf", "tf")
    for name in ("encoder.json", "vocab.bpe"):
        assert (tmp_path / "tf" / name).read_bytes() == (SHAKESPEARE / name).read_bytes()


def test_the_converted_files_load_in_transformers_and_tokenizers(tmp_path):
    import tokenizers
    from transformers import AutoTokenizer

    save_checkpoint(open_checkpoint(SHAKESPEARE), tmp_path / "hf")
    ours = Tokenizer.from_pretrained(SHAKESPEARE)
    auto = AutoTokenizer.from_pretrained(tmp_path / "hf")
    bare = tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    for text in TEXTS.values():
        assert auto.encode(text) == bare.encode(text).ids == ours.encode(text)
        assert auto.decode(ours.encode(text)) == text
    assert auto.model_max_length == 256
    assert auto.eos_token_id == ours.eos_token_id


def test_a_tokenizer_json_alone_is_enough_even_for_openais_layout(tmp_path):
    save_checkpoint(open_checkpoint(SHAKESPEARE), tmp_path / "hf")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "hf" / name).unlink()
    save_checkpoint(open_checkpoint(tmp_path / "hf"), tmp_path / "tf", "tf")
    ours = Tokenizer.from_pretrained(tmp_path / "tf")
    for text in TEXTS.values():
        assert ours.encode(text) == Tokenizer.from_pretrained(SHAKESPEARE).encode(text)
    assert (tmp_path / "tf" / "vocab.bpe").read_text() == (SHAKESPEARE / "vocab.bpe").read_text()


def test_a_tokenizer_is_found_beside_a_file(tmp_path):
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(SHAKESPEARE / name, tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert (
        Tokenizer.from_pretrained(tmp_path / "model.safetensors").vocab_size
        == Tokenizer.from_pretrained(SHAKESPEARE).vocab_size
    )


def test_where_there_is_none_the_option_is_named(tmp_path):
    assert find_tokenizer(tmp_path) is None
    with pytest.raises(TokenizerError, match="--tokenizer DIR"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"vocab.json": "[]", "merges.txt": ""}, "expected a JSON object"),
        ({"vocab.json": "{}", "merges.txt": ""}, "not a valid table of tokens"),
        ({"vocab.json": '{"a": "b"}', "merges.txt": ""}, "not a valid table of tokens"),
        ({"vocab.json": '{"a": 1, "b": 1}', "merges.txt": ""}, "duplicate token id"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b c\n"}, "not a merge of two tokens"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b\n"}, "do not match"),
        ({"tokenizer.json": "{}"}, "not a byte-level BPE"),
        ({"tokenizer.json": "nonsense"}, "invalid JSON"),
    ],
)
def test_a_broken_tokenizer_is_refused(tmp_path, files, match):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConversionError, match=match):
        Tokenizer.from_pretrained(tmp_path)


def test_a_tokenizer_of_another_kind_is_not_written_as_openais(tmp_path):
    raw = {"model": {"type": "WordPiece", "vocab": {"a": 0}}, "pre_tokenizer": None, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(TokenizerError, match="not a byte-level BPE"):
        find_tokenizer(tmp_path).vocabulary()


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_a_long_text_is_encoded_in_pieces_as_it_is_at_once(pair, monkeypatch, size):
    ours, other = pair
    text = " ".join([*TEXTS.values(), *TEXTS.values()]) + "\n\n \n x\n" + "\x1c \x1d\n\x85 \u2028\n a"
    monkeypatch.setattr("gpt2x.tokenizer.PIECE", size)
    pieces = list(_pieces(text, ours._boundary))
    assert "".join(pieces) == text
    assert len(pieces) > len(text) / (size + 40)
    assert ours.encode(text) == other.encode(text)


def changed(**changes):
    """The shipped tokenizer with other settings."""
    vocabulary = find_tokenizer(SHAKESPEARE).vocabulary()
    tokenizer = Tokenizer.from_pretrained(SHAKESPEARE)
    tokenizer._use(replace(vocabulary, **changes))
    return tokenizer


@pytest.mark.parametrize("add_prefix_space", [False, True])
def test_no_division_into_pieces_changes_the_ids(add_prefix_space):
    tokenizer = changed(add_prefix_space=add_prefix_space)
    parts = [" ", "\n", "\t", "\r", "\u00a0", "\u2003", "\x1c", "'s", "a", "b1", ".", "é", "日", "<|endoftext|>"]
    rng = random.Random(0)
    for size in range(1, 8):
        for _ in range(200):
            text = "".join(rng.choices(parts, k=30))
            with patch("gpt2x.tokenizer.PIECE", 1 << 16):
                whole = tokenizer.encode(text)
            with patch("gpt2x.tokenizer.PIECE", size):
                assert tokenizer.encode(text) == whole, text


def test_an_added_token_with_a_space_is_never_divided(monkeypatch):
    monkeypatch.setattr("gpt2x.tokenizer.PIECE", 1)
    ids = find_tokenizer(SHAKESPEARE).vocabulary().ids
    added = (usual_token("two words", special=False),)
    tokenizer = changed(added=added, ids={**ids, "two words": len(ids)})
    assert tokenizer.encode("of two words") == [*tokenizer.encode("of "), len(ids)]


def test_an_added_token_keeps_the_spaces_after_it(monkeypatch):
    monkeypatch.setattr("gpt2x.tokenizer.PIECE", 1)
    ids = find_tokenizer(SHAKESPEARE).vocabulary().ids
    added = (replace(usual_token("<sep>", special=False), rstrip=True),)
    tokenizer = changed(added=added, ids={**ids, "<sep>": len(ids)})
    assert tokenizer.encode("of<sep>  love") == [*tokenizer.encode("of"), len(ids), *tokenizer.encode("love")]
