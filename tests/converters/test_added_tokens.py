"""Added tokens keep their flags on every road, and transformers reads the same on both ends."""

import json
from typing import Any

import pytest
from checkpoints import random_checkpoint
from commands import assert_refused, done
from tokenizer_folders import (
    END,
    ENDS,
    SITUATIONS,
    TEXTS,
    N,
    logits_of,
    pair,
    save_model,
    stated,
    tokenizer_json,
    write,
)

from converters import GPT2Config, TokenizerError, find_tokenizer, open_checkpoint, save_checkpoint
from converters.formats.gguf import CONTROL, KINDS, USER_DEFINED
from gpt2x import Tokenizer, export_onnx


def rows_of(folder):
    return find_tokenizer(folder).vocabulary().rows


@pytest.fixture
def source(request, tmp_path):
    """A directory with one situation's tokenizer, and weights that have a row for each token."""
    folder = write(tmp_path / "source", SITUATIONS[request.param])
    config = GPT2Config(n_layer=1, n_head=1, n_embd=2, n_ctx=4, n_vocab=rows_of(folder))
    save_checkpoint(random_checkpoint(config), tmp_path / "weights")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "weights" / name).rename(folder / name)
    return folder


def theirs(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def meaning(tokenizer):
    """What a tokenizer makes of the texts: ids, and text with and without special tokens."""
    ids = [tokenizer.encode(text) for text in TEXTS]
    return [(i, tokenizer.decode(i), tokenizer.decode(i, skip_special_tokens=True)) for i in ids]


every_situation = pytest.mark.parametrize("source", SITUATIONS, indirect=True)


@every_situation
def test_gpt2x_encodes_and_decodes_as_transformers_does(source):
    assert meaning(Tokenizer.from_pretrained(source)) == meaning(theirs(source))


@every_situation
@pytest.mark.parametrize("road", ["hf", "gguf", "tf"])
def test_what_transformers_reads_is_the_same_on_both_ends(source, tmp_path, road):
    names = {"hf": "between", "gguf": "m.gguf", "tf": "between"}
    save_checkpoint(open_checkpoint(source), tmp_path / names[road], road)
    save_checkpoint(open_checkpoint(tmp_path / names[road]), tmp_path / "hf")
    expected = meaning(theirs(source))
    assert meaning(theirs(tmp_path / "hf")) == expected
    assert meaning(Tokenizer.from_pretrained(tmp_path / names[road])) == expected
    assert meaning(Tokenizer.from_pretrained(tmp_path / "hf")) == expected


@every_situation
def test_the_flags_that_are_read_are_those_of_transformers(source):
    """``normalized`` of ``<|endoftext|>`` excepted, which OpenAI's tokenizer.json and transformers state differently."""
    vocabulary = find_tokenizer(source).vocabulary()
    found = {vocabulary.ids[token.content]: (token.content, token.flags()) for token in vocabulary.added}
    expected = {}
    for id, token in theirs(source).added_tokens_decoder.items():
        expected[id] = (token.content, {flag: getattr(token, flag) for flag in found[id][1]})
    for id, (content, flags) in found.items():
        if content == END:
            flags["normalized"] = expected[id][1]["normalized"]
    assert found == expected


@pytest.mark.parametrize("source", ["added_tokens.json", "all flags"], indirect=True)
def test_an_onnx_directory_has_the_same_tokenizer(source, tmp_path):
    export_onnx(open_checkpoint(source), tmp_path / "onnx")
    assert meaning(theirs(tmp_path / "onnx")) == meaning(theirs(source))


@pytest.mark.parametrize("source", ["added_tokens.json", "tokenizer.json"], indirect=True)
def test_in_a_gguf_an_ordinary_added_token_is_user_defined_and_a_special_one_is_control(source, tmp_path):
    import gguf

    save_checkpoint(open_checkpoint(source), tmp_path / "m.gguf")
    kinds = gguf.GGUFReader(tmp_path / "m.gguf").fields[KINDS].contents()
    assert kinds[N - 1 : N + 3] == [CONTROL, USER_DEFINED, USER_DEFINED, CONTROL]


@pytest.mark.parametrize("source", ["all flags"], indirect=True)
def test_what_llama_cpp_cannot_know_of_a_token_is_said(source, tmp_path):
    (note,) = save_checkpoint(open_checkpoint(source), tmp_path / "m.gguf").notes
    assert (
        note == "llama.cpp does not know lstrip, rstrip and single_word of added tokens: <mask>, <sep>, covid, New York"
    )


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer.json"])
def test_the_ids_of_words_added_to_a_model_select_the_same_logits_on_both_ends(tmp_path, where):
    """Ids and logits of shared generator 30: "the covid <sep> remdesivir"."""
    ids = [257, 220, N, 220, N + 2, 220, N + 1]
    folder = write(tmp_path / "source", SITUATIONS[where])
    save_model(folder, N + 3)
    expected = logits_of(folder, ids)
    assert theirs(folder).decode(ids, skip_special_tokens=True) == "the covid  remdesivir"
    for name in ("m.gguf", "hf"):
        save_checkpoint(open_checkpoint(folder), tmp_path / name)
    save_checkpoint(open_checkpoint(tmp_path / "m.gguf"), tmp_path / "back")
    for name in ("hf", "back"):
        assert (logits_of(tmp_path / name, ids) == expected).all()
        assert theirs(tmp_path / name).decode(ids, skip_special_tokens=True) == "the covid  remdesivir"


def test_ids_are_those_that_the_files_state_even_with_gaps(tmp_path):
    """tokenizers#1528: the library numbers the tokens anew, and warns. The rows of the model are those of the file."""
    folder = write(tmp_path, {**pair(), "added_tokens.json": {"covid": N + 4, "<sep>": N + 9}})
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.encode("a covid<sep>") == [64, 220, N + 4, N + 9]
    assert find_tokenizer(folder).vocabulary().rows == N + 10


def test_a_token_that_is_listed_as_special_is_special(tmp_path):
    """tokenizers#376: additional_special_tokens, as saved before transformers 4.34."""
    files = {"added_tokens.json": {"covid": N}, "special_tokens_map.json": {"additional_special_tokens": ["covid"]}}
    tokenizer = Tokenizer.from_pretrained(write(tmp_path, {**pair(), **files}))
    assert tokenizer.decode(tokenizer.encode("a covid"), skip_special_tokens=True) == "a "


def test_added_tokens_without_a_row_are_left_out_of_a_gguf_and_that_is_said(tmp_path):
    """transformers#9542: [PAD] was added, and the model was not resized."""
    folder = write(tmp_path / "source", SITUATIONS["a padding token without an id"])
    save_model(folder, N)
    notes = save_checkpoint(open_checkpoint(folder), tmp_path / "m.gguf").notes
    assert any("left out: [PAD]" in note for note in notes)
    assert Tokenizer.from_pretrained(tmp_path / "m.gguf").vocab_size == N


# ----------------------------------------------------------------------------------------------------- what is refused

BROKEN: dict[str, dict[str, Any]] = {
    "an id that is text": {"tokenizer.json": tokenizer_json({**ENDS, "id": "7"})},
    "an id below zero": {**pair(), "added_tokens.json": {"a": -1}},
    "an id that is too large": {**pair(), "added_tokens.json": {"covid": 10**9}},
    "added tokens that are no list": {"tokenizer.json": {**tokenizer_json(), "added_tokens": {"a": 1}}},
    "a token without text": {"tokenizer.json": tokenizer_json({"id": 1})},
    "one id for two tokens": {"tokenizer.json": tokenizer_json(ENDS, {"id": N, **stated("a b")}, {"id": N, **stated("c d")})},
    "a key that is no id": {**pair(), "tokenizer_config.json": {"added_tokens_decoder": {"x": stated("a")}}},
    "a token that is a number": {**pair(), "tokenizer_config.json": {"added_tokens_decoder": {"260": 3}}},
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_added_tokens_that_are_not_valid_are_refused_and_the_weights_can_go_without(gpt2x, tmp_path, name):
    folder = write(tmp_path / "source", BROKEN[name])
    save_model(folder, N)
    with pytest.raises(TokenizerError):
        find_tokenizer(folder).vocabulary()
    assert_refused(gpt2x("convert", folder, tmp_path / "m.gguf"), "--no-tokenizer")
    assert_refused(gpt2x("convert", folder, tmp_path / "hf"), "--no-tokenizer")
    done(gpt2x("convert", folder, tmp_path / "m.gguf", "--no-tokenizer"))
    assert open_checkpoint(tmp_path / "m.gguf").tokenizer is None
    assert "damaged" in done(gpt2x("inspect", folder)).output


@pytest.mark.parametrize(
    "text", ["nonsense", "[]", '{"<sep>": {"color": true}}', '{"<sep>": {"lstrip": 1}}', '{"<sep>": 3}']
)
def test_flags_in_a_gguf_that_are_not_valid_are_not_used(tmp_path, text):
    from converters.formats.gguf import FLAGS, read_vocabulary, tokenizer_metadata

    vocabulary = find_tokenizer(write(tmp_path, SITUATIONS["added_tokens.json"])).vocabulary()
    metadata = tokenizer_metadata(vocabulary, N + 3)
    assert FLAGS not in metadata
    assert read_vocabulary(metadata, "x") == vocabulary
    with pytest.raises(Exception, match=r"gpt2x\.added_tokens"):
        read_vocabulary({**metadata, FLAGS: text}, "x")


def test_a_file_of_flags_states_what_the_kind_does_not_tell(tmp_path):
    from converters.formats.gguf import FLAGS, tokenizer_metadata

    metadata = tokenizer_metadata(find_tokenizer(write(tmp_path, SITUATIONS["all flags"])).vocabulary(), N + 4)
    assert json.loads(metadata[FLAGS])["<mask>"] == {"lstrip": True}
