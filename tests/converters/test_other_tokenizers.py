"""Tokenizers of other kinds than GPT-2's, which most GPT-2 models have that are not English; and padded vocabularies."""

import json
from typing import Any

import pytest
from commands import assert_refused, done
from paths import FIXTURES
from tokenizer_folders import CONFIG, END, MERGES, N, logits_of, pair, save_model, stated, tokenizer_json, write

from converters import open_checkpoint, save_checkpoint

ROWS = 300
IDS = [3, 299, 7, 0, 150, 41]


def metaspace_bpe():
    """skt/kogpt2's kind: BPE over characters, in a tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<s>", "</s>", "<unk>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox"] * 9, trainer)
    return tokenizer.to_str()


def character_bpe():
    """GPT-1's kind, whose files have the names of GPT-2's: the last character of a word is marked."""
    vocab = {token: i for i, token in enumerate(["t", "h", "e", "e</w>", "th", "the</w>", "<unk>"])}
    return {"vocab.json": vocab, "merges.txt": "#version: 0.2\nt h\nth e</w>\n"}


WORD_PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef", *(f"##{c}" for c in "abcdef")]

# Files, and what inspect calls them.
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    # ggml#33: rinna's SentencePiece model.
    "rinna": (
        {
            "spiece.model": (FIXTURES / "sentencepiece/spiece.model").read_bytes(),
            "tokenizer_config.json": {"eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "T5Tokenizer"},
            "chat_template.jinja": "{{ messages }}",
        },
        "SentencePiece (spiece.model)",
    ),
    # Morizeyao/GPT2-Chinese#89; uer's and ckiplab's: BERT's vocabulary.
    "uer": (
        {
            "vocab.txt": "\n".join(WORD_PIECES) + "\n",
            "tokenizer_config.json": {"do_lower_case": False, "tokenizer_class": "BertTokenizer"},
            "special_tokens_map.json": {"unk_token": "[UNK]", "pad_token": "[PAD]"},
            "added_tokens.json": {"[EOS]": 17},
        },
        "WordPiece (vocab.txt)",
    ),
    "kogpt2": ({"tokenizer.json": metaspace_bpe(), "tokenizer_config.json": {"bos_token": "<s>"}}, "BPE (tokenizer.json)"),
    "GPT-1": (
        {**character_bpe(), "tokenizer_config.json": {"tokenizer_class": "OpenAIGPTTokenizer"}},
        "character-level BPE (vocab.json)",
    ),
    # Both a SentencePiece model and what transformers made of it.
    "both": (
        {
            "tokenizer.model": (FIXTURES / "sentencepiece/spiece.model").read_bytes(),
            "tokenizer.json": json.dumps(
                {"model": {"type": "Unigram", "vocab": [["<unk>", 0.0]], "unk_id": 0}, "added_tokens": []}
            ),
        },
        "Unigram (tokenizer.json)",
    ),
}  # fmt: skip


@pytest.fixture
def model(request, tmp_path):
    folder = write(tmp_path / "source", KINDS[request.param][0])
    save_model(folder, ROWS, end=0)
    return folder


every_kind = pytest.mark.parametrize("model", KINDS, indirect=True)


def copied(folder, to):
    """Whether each file of the tokenizer is there, with the same bytes, and none besides."""
    made = {"config.json", "generation_config.json", "model.safetensors"}
    names = {file.name for file in folder.iterdir()} - made
    assert names
    assert names == {file.name for file in to.iterdir() if file.is_file()} - made - {"README.md", "genai_config.json"}
    return all((to / name).read_bytes() == (folder / name).read_bytes() for name in names)


@every_kind
def test_hugging_face_to_hugging_face_copies_each_file_and_keeps_the_logits(gpt2x, tmp_path, model):
    """Shared generator 06."""
    output = done(gpt2x("convert", model, tmp_path / "hf")).output
    assert "the tokenizer is copied as it is" in output
    assert copied(model, tmp_path / "hf")
    assert (logits_of(tmp_path / "hf", IDS) == logits_of(model, IDS)).all()
    assert "the same files" in done(gpt2x("verify", model, tmp_path / "hf")).output


@every_kind
@pytest.mark.parametrize(("name", "options"), [("m.gguf", ()), ("m.pt", ("--to", "nanogpt")), ("tf", ("--to", "tf"))])
def test_a_format_that_cannot_hold_it_gets_the_weights_and_a_note(gpt2x, tmp_path, model, name, options):
    kind = find_kind(model)
    output = done(gpt2x("convert", model, tmp_path / name, *options)).output
    assert "the tokenizer is not written" in output
    assert kind in output
    save_checkpoint(open_checkpoint(tmp_path / name), tmp_path / "back")
    assert (logits_of(tmp_path / "back", IDS) == logits_of(model, IDS)).all()


def find_kind(model):
    tokenizer = open_checkpoint(model).tokenizer
    assert tokenizer is not None
    return tokenizer.kind


@pytest.mark.parametrize("name", KINDS)
def test_inspect_shows_the_kind(gpt2x, tmp_path, name):
    files, kind = KINDS[name]
    folder = write(tmp_path / "source", files)
    save_model(folder, ROWS, end=0)
    assert f"tokenizer  {kind}; {folder}" in done(gpt2x("inspect", folder)).output
    assert json.loads(done(gpt2x("inspect", folder, "--json")).stdout)["tokenizer_kind"] == kind


@every_kind
def test_generate_refuses_in_one_sentence_and_says_how(gpt2x, model):
    refused = gpt2x("generate", model, "x")
    assert_refused(refused, "not a byte-level BPE", "generate_text", "--tokenizer DIR")
    assert len(refused.stderr.strip().split("\n")) == 1


@pytest.mark.parametrize("model", ["rinna", "kogpt2"], indirect=True)
def test_an_onnx_directory_has_the_same_files_and_is_verified(gpt2x, tmp_path, model):
    done(gpt2x("export", model, "--onnx", tmp_path / "onnx"))
    assert copied(model, tmp_path / "onnx")
    done(gpt2x("export", model, "--onnx", model))
    assert_refused(gpt2x("generate", tmp_path / "onnx", "x"), "not a byte-level BPE")
    card = (tmp_path / "onnx/README.md").read_text()
    assert ('Tokenizer.from_file("tokenizer.json")' in card) == (model / "tokenizer.json").is_file()


@pytest.mark.parametrize("model", ["uer"], indirect=True)
def test_files_of_another_tokenizer_that_would_stay_are_refused(gpt2x, tmp_path, model):
    done(gpt2x("convert", model, tmp_path / "hf"))
    done(gpt2x("convert", model, tmp_path / "m.gguf"))
    for name in ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"):
        (tmp_path / "hf" / name).unlink()
    assert_refused(gpt2x("convert", tmp_path / "m.gguf", tmp_path / "hf", "--force"), "vocab.txt")


@pytest.mark.parametrize("model", ["rinna"], indirect=True)
def test_convert_can_leave_a_tokenizer_out(gpt2x, tmp_path, model):
    done(gpt2x("convert", model, tmp_path / "hf", "--no-tokenizer"))
    assert not (tmp_path / "hf/spiece.model").exists()
    both = gpt2x("convert", model, tmp_path / "x", "--no-tokenizer", "--tokenizer", model)
    assert both.exit_code == 2
    assert "exclude each other" in both.output


def test_merges_with_the_line_ends_of_windows_are_read(tmp_path):
    from gpt2x import Tokenizer

    folder = write(tmp_path, pair())
    (folder / "merges.txt").write_bytes((folder / "merges.txt").read_bytes().replace(b"\n", b"\r\n"))
    assert Tokenizer.from_pretrained(folder).encode("the") == [256 + MERGES.index(("th", "e"))]


# --------------------------------------------------------------------------------------------------- padded vocabulary


def chat_model(folder, rows):
    """Shared generator 07, smaller: two chat tokens added, and the embedding padded."""
    special = [{"id": N + i, **stated(t, special=True)} for i, t in enumerate(("<|im_start|>", "<|im_end|>"))]
    end = {"id": N - 1, **stated(END, special=True)}
    write(folder, {"tokenizer.json": tokenizer_json(end, *special), "tokenizer_config.json": CONFIG})
    save_model(folder, rows)
    return folder


def test_the_advice_on_a_padded_vocabulary_keeps_the_added_tokens(gpt2x, tmp_path):
    """transformers#25729, ggml#371: 262 tokens in 320 rows. The rows of the chat tokens stay, and so do their logits."""
    folder = chat_model(tmp_path / "chat", 320)
    ids = [N, 5, 6, N + 1, N, 8]
    expected = logits_of(folder, ids)
    for command in (("inspect", folder), ("convert", folder, tmp_path / "m.gguf")):
        assert f"pass --n-vocab {N + 2} to truncate" in done(gpt2x(*command)).output
    done(gpt2x("convert", folder, tmp_path / "hf", "--n-vocab", N + 2))
    assert (logits_of(tmp_path / "hf", ids) == expected[..., : N + 2]).all()
    assert "--n-vocab" not in done(gpt2x("inspect", tmp_path / "hf")).output
    assert "--n-vocab" in done(gpt2x("inspect", tmp_path / "m.gguf")).output


def test_the_advice_keeps_the_rows_of_ids_in_the_configuration(gpt2x, tmp_path):
    """A padding token that only config.json knows (transformers#29899)."""
    folder = chat_model(tmp_path / "chat", 320)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": 300}))
    assert "--n-vocab 301" in done(gpt2x("inspect", folder)).output


def test_inspect_counts_the_added_tokens_apart(gpt2x, tmp_path):
    assert f"byte-level BPE, {N} tokens + 2 added;" in done(gpt2x("inspect", chat_model(tmp_path / "chat", 320))).output
