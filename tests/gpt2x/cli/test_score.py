"""``gpt2x score`` as users run it."""

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner
from commands import assert_refused, done
from library import open_library

from converters import open_checkpoint
from gpt2x import SHAKESPEARE, ExportOptions, OnnxDecoder, Score, export_onnx, score
from gpt2x.cli import main, texts_file
from gpt2x.scoring import logits as gpt2x_logits

TEXT = (SHAKESPEARE.parent / "coriolanus.txt").read_text(encoding="utf-8")[:3000]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(TEXT, encoding="utf-8")


@pytest.fixture(scope="module")
def library():
    return open_library()


@pytest.fixture(scope="module")
def onnx(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx") / "m"
    export_onnx(open_checkpoint(SHAKESPEARE), folder, ExportOptions(("fp32", "int8")))
    return folder


def score_of(library, text, stride=None, **options) -> Score:
    model, tokenizer = library
    return score(model, tokenizer, text, stride, **options)


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def result_of(gpt2x, *args):
    (found,) = json.loads(done(gpt2x("score", *args, "--json")).stdout)["results"]
    return found


def test_the_numbers_are_those_of_the_library(gpt2x, library):
    expected = score_of(library, TEXT)
    found = json.loads(done(gpt2x("score", SHAKESPEARE, "book.txt", "--json")).stdout)
    assert (found["file"], found["context"], found["stride"]) == ("book.txt", 256, 128)
    (one,) = found["results"]
    assert one["precision"] == "fp32"
    for name in ("tokens", "scored", "bytes", "log_likelihood", "perplexity", "bits_per_byte"):
        assert one[name] == pytest.approx(getattr(expected, name))
    table = done(gpt2x("score", SHAKESPEARE, "book.txt")).stdout.splitlines()
    assert table[0] == f"book.txt: 3000 bytes, {expected.tokens} tokens, {expected.scored} scored; stride 128 of 256"
    assert table[2].split() == [
        "fp32", f"{expected.log_likelihood:.4f}", f"{expected.perplexity:.6g}", f"{expected.bits_per_byte:.6g}",
    ]  # fmt: skip


def test_the_stride_is_passed_on(gpt2x, library):
    for stride in (64, 256):
        found = result_of(gpt2x, SHAKESPEARE, "book.txt", "--stride", stride)
        assert found["perplexity"] == pytest.approx(score_of(library, TEXT, stride).perplexity)


def test_a_stride_above_the_context_is_noted_with_the_tokens_that_it_leaves_out(gpt2x, library):
    expected = score_of(library, TEXT, 300)
    result = done(gpt2x("score", SHAKESPEARE, "book.txt", "--stride", 300))
    left = expected.tokens - expected.scored
    assert f"300 is above the context of 256: {left} of {expected.tokens} tokens were not scored" in result.stderr
    assert result.stdout.splitlines()[-1].split()[-1] == "-"
    assert done(gpt2x("score", SHAKESPEARE, "book.txt", "--stride", 256)).stderr == ""


def test_precisions_are_compared_in_one_table(gpt2x, onnx, library):
    table = done(gpt2x("score", onnx, "book.txt", "--precision", "fp32,int8")).stdout.splitlines()
    assert [line.split()[0] for line in table[1:]] == ["precision", "fp32", "int8"]
    values = [float(line.split()[2]) for line in table[2:]]
    assert values[0] == pytest.approx(score_of(library, TEXT).perplexity, rel=1e-5)
    assert values[1] == pytest.approx(values[0], rel=1e-2)
    assert values[0] != values[1]


def test_standard_input_is_a_text(gpt2x):
    from gpt2x.cli import main

    piped = CliRunner().invoke(main, ["score", str(SHAKESPEARE), "-", "--json"], input=TEXT.encode())
    (found,) = json.loads(done(piped).stdout)["results"]
    assert found == result_of(gpt2x, SHAKESPEARE, "book.txt")


def test_newlines_of_windows_are_part_of_the_text(gpt2x):
    Path("windows.txt").write_bytes(b"To be,\r\nor not\r\n")
    assert result_of(gpt2x, SHAKESPEARE, "windows.txt")["bytes"] == 16


def test_a_single_token_has_no_perplexity(gpt2x):
    Path("one.txt").write_text("a")
    found = result_of(gpt2x, SHAKESPEARE, "one.txt")
    assert (found["tokens"], found["scored"], found["perplexity"], found["bits_per_byte"]) == (1, 0, None, None)
    assert done(gpt2x("score", SHAKESPEARE, "one.txt")).stdout.splitlines()[-1].split()[-2:] == ["-", "-"]


@pytest.mark.parametrize("stride", [128, 256, 300])
def test_each_token_is_written_with_the_most_likely_ones(gpt2x, library, onnx, stride):
    done(gpt2x("score", onnx, "book.txt", "--stride", stride, "--tokens", "tokens.jsonl"))
    _, tokenizer = library
    expected = score_of(library, TEXT, stride, log_probabilities=True)
    found = lines_of("tokens.jsonl")
    assert [line["id"] for line in found] == tokenizer.encode(TEXT)
    assert [line["position"] for line in found] == list(range(len(found)))
    assert "".join(line["token"] for line in found) == TEXT
    for line, log_probability in zip(found, expected.log_probabilities, strict=True):
        if math.isnan(log_probability):
            assert line["log_probability"] is None
            assert line["top"] == []
            continue
        assert line["log_probability"] == pytest.approx(log_probability, rel=1e-4, abs=1e-5)
        others = [one["log_probability"] for one in line["top"]]
        assert len(others) == 5
        assert others == sorted(others, reverse=True)
        assert line["log_probability"] <= others[0]


def test_an_existing_file_of_tokens_is_refused_before_the_model_runs(gpt2x, monkeypatch):
    Path("tokens.jsonl").write_text("mine")
    monkeypatch.setattr(OnnxDecoder, "run", None)
    assert_refused(gpt2x("score", SHAKESPEARE, "book.txt", "--tokens", "tokens.jsonl"), "tokens.jsonl", "exists")
    assert Path("tokens.jsonl").read_text() == "mine"


def test_a_text_that_cannot_be_scored_is_refused(gpt2x):
    Path("empty.txt").write_bytes(b"")
    assert_refused(gpt2x("score", SHAKESPEARE, "empty.txt"), "empty.txt: empty")
    Path("latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert_refused(gpt2x("score", SHAKESPEARE, "latin.txt"), "latin.txt: not UTF-8 at byte 3")
    assert_refused(gpt2x("score", SHAKESPEARE, "missing.txt"), "missing.txt: No such file")


def test_a_model_with_only_the_last_logits_is_refused_in_one_line(gpt2x):
    export_onnx(open_checkpoint(SHAKESPEARE), "last", ExportOptions(last=True))
    result = gpt2x("score", "last", "book.txt")
    assert_refused(result, "last/onnx/model.onnx", "export it without --logits last")
    assert result.stderr.count("\n") == 1


def test_a_missing_precision_is_refused_before_the_first_runs(gpt2x, onnx, monkeypatch):
    monkeypatch.setattr(OnnxDecoder, "run", None)
    assert_refused(gpt2x("score", onnx, "book.txt", "--precision", "fp32,int4"), "int4")


def test_each_precision_is_opened_once(gpt2x, onnx, monkeypatch):
    opened = []
    original = OnnxDecoder.__init__

    def noted(self, path, **options):
        opened.append(options)
        original(self, path, **options)

    monkeypatch.setattr(OnnxDecoder, "__init__", noted)
    done(gpt2x("score", onnx, "book.txt", "--precision", "fp32,int8"))
    assert [options["precision"] for options in opened] == ["fp32", "int8"]


@pytest.mark.parametrize("model", ["weights", "onnx"])
def test_a_score_takes_as_many_threads_as_asked_for(gpt2x, onnx, monkeypatch, model):
    used = set()
    original = gpt2x_logits.score_tokens

    def noted(logits, tokens, k=0, threads=None):
        used.add(threads)
        return original(logits, tokens, k, threads)

    monkeypatch.setattr("gpt2x.scoring.spans.score_tokens", noted)
    done(gpt2x("score", SHAKESPEARE if model == "weights" else onnx, "book.txt", "--threads", 1))
    assert used == {1}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["book.txt", "--stride", 0], "x>=1"),
        (["book.txt", "--precision", "fp32,fp3"], "'fp3' is not one of fp32"),
        (["book.txt", "--precision", "fp32,fp32"], "twice"),
        (
            ["book.txt", "--precision", "w8a8+int4"],
            "choose w8a8 or int4. gpt2x score compares them: --precision w8a8,int4",
        ),
        (
            ["book.txt", "--precision", "fp32,w8a8+int4"],
            "w8a8+int4 is a pair of precisions, and a score is that of one",
        ),
        (["book.txt", "--output", "out.jsonl"], "for a .jsonl FILE"),
        (["book.txt", "--resume"], "for a .jsonl FILE"),
        (["in.jsonl"], "needs --output"),
        (["in.jsonl", "--output", "out.jsonl", "--json"], "for a single text"),
        (["in.jsonl", "--output", "out.jsonl", "--tokens", "t.jsonl"], "for a single text"),
        (["book.txt", "--tokens", "t.jsonl", "--precision", "fp32,int8"], "--tokens takes one precision"),
    ],
    ids=str,
)
def test_wrong_usage_is_refused(gpt2x, options, words):
    Path("in.jsonl").write_text("")
    result = gpt2x("score", SHAKESPEARE, *options)
    assert result.exit_code == 2
    assert words in result.stderr


@pytest.mark.parametrize("source", ["a file", "standard input"])
def test_a_text_longer_than_memory_is_refused_before_the_model_is_opened(gpt2x, monkeypatch, source):
    monkeypatch.setattr("gpt2x.memory.machine_memory", lambda: 8000)
    monkeypatch.setattr("gpt2x.cli.running.Running.open", None)
    name, given = ("book.txt", None) if source == "a file" else ("-", TEXT)
    refused = CliRunner().invoke(main, ["score", str(SHAKESPEARE), name], input=given)
    shown = "book.txt" if source == "a file" else "standard input"
    assert_refused(refused, f"{shown}: more than 1000 bytes", "memory: split it")


# ---------------------------------------------------------------------------------------------------- JSON Lines

LINES = [
    json.dumps({"text": TEXT[:2000], "id": 7}),
    "nonsense",
    '{"text": "To be, or not to be: caf\\u00e9"}',
    '{"text": ""}',
    '{"prompt": "no text"}',
    '["a list"]',
    '{"text": "a"}',
    json.dumps({"text": TEXT[500:900]}),
]


@pytest.fixture
def texts():
    Path("in.jsonl").write_text("\n".join(LINES) + "\n")


@pytest.mark.parametrize("size", [1, 3, 16])
def test_each_text_has_the_score_that_it_has_alone(gpt2x, onnx, library, texts, size):
    result = done(gpt2x("score", onnx, "in.jsonl", "--output", "out.jsonl", "--batch-size", size))
    found = lines_of("out.jsonl")
    assert [line["line"] for line in found] == [1, 3, 7, 8]
    assert found[0]["id"] == 7
    for line in found:
        expected = score_of(library, line["text"])
        assert line["log_likelihood"] == pytest.approx(expected.log_likelihood, rel=1e-5)
        assert (line["tokens"], line["scored"], line["bytes"]) == (expected.tokens, expected.scored, expected.bytes)
        if expected.perplexity is not None:
            assert line["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert found[2]["perplexity"] is None
    for number, words in {2: "not JSON", 4: "empty", 5: 'under the key "text"', 6: "not an object"}.items():
        assert any(said.startswith(f"in.jsonl:{number}: ") and words in said for said in result.stderr.splitlines())
    assert "Skipped 4 of 8 lines" in result.stderr


def test_an_interrupted_output_is_continued(gpt2x, onnx, texts):
    options = ["in.jsonl", "--batch-size", 1]  # so that a text runs with the same others, here none, each time
    done(gpt2x("score", onnx, *options, "--output", "whole.jsonl"))
    whole = Path("whole.jsonl").read_bytes()
    for end in (0, 40, len(whole) // 2, len(whole) - 1, len(whole)):
        Path("part.jsonl").write_bytes(whole[:end])
        done(gpt2x("score", onnx, *options, "--output", "part.jsonl", "--resume"))
        assert Path("part.jsonl").read_bytes() == whole


def test_an_output_is_never_overwritten(gpt2x, onnx, texts):
    Path("out.jsonl").write_text("mine\n")
    assert_refused(gpt2x("score", onnx, "in.jsonl", "--output", "out.jsonl"), "out.jsonl exists", "--resume")
    refused = gpt2x("score", onnx, "in.jsonl", "--output", "out.jsonl", "--resume")
    assert_refused(refused, "does not hold results of gpt2x score")
    done(gpt2x("score", onnx, "in.jsonl", "--output", "first.jsonl"))
    Path("in.jsonl").write_text('{"text": "another"}\n' * 8)
    refused = gpt2x("score", onnx, "in.jsonl", "--output", "first.jsonl", "--resume")
    assert_refused(refused, "its line 8 scores another text than in.jsonl")


def test_a_line_at_the_limit_of_size_has_a_result_that_is_continued(gpt2x, onnx, monkeypatch):
    """The result is longer than the line, as it has the scores, too."""
    line = json.dumps({"text": "a" * 100}) + "\n"
    monkeypatch.setattr("gpt2x.cli.jsonl.MAX_LINE", len(line))
    Path("in.jsonl").write_text(line * 2)
    command = ["score", onnx, "in.jsonl", "--output", "out.jsonl", "--batch-size", 1]
    done(gpt2x(*command))
    first = Path("out.jsonl").read_bytes().splitlines(keepends=True)[0]
    Path("out.jsonl").write_bytes(first)
    scored = []
    original = texts_file._scores

    def noted(decoder, tokenizer, group, stride):
        scored.extend(number for number, _ in group)
        return original(decoder, tokenizer, group, stride)

    monkeypatch.setattr(texts_file, "_scores", noted)
    done(gpt2x(*command, "--resume"))
    assert scored == [2]
    assert Path("out.jsonl").read_bytes().startswith(first)
