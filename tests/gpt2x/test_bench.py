"""``gpt2x bench``: figures that add up, in the documented form."""

from __future__ import annotations

import json
import re
import threading

import pytest
from commands import assert_refused, done

from converters import open_checkpoint
from gpt2x import SHAKESPEARE, bench
from gpt2x.export.onnx_directory import ExportOptions, export_onnx


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "d"
    export_onnx(open_checkpoint(SHAKESPEARE), folder, ExportOptions(("int8", "int4"), "inplace"))
    return folder


def test_every_model_and_batch_is_measured_and_written_as_json_and_as_a_plot(gpt2x, exported, tmp_path):
    options = ("--prompt", "8", "--new", "4", "--batch", "1,3", "--threads", "1")
    files = ("--json", tmp_path / "b.json", "--plot", tmp_path / "b.png")
    shown = done(gpt2x("bench", exported, *options, *files)).stdout.splitlines()
    result = json.loads((tmp_path / "b.json").read_text())
    assert set(result) == {"machine", "runs"}
    assert result["machine"]["threads"] == 1 and result["machine"]["cores"] >= 1 and result["machine"]["processor"]
    kinds = [(run["precision"], run["batch"]) for run in result["runs"]]
    assert kinds == [("int8", 1), ("int8", 3), ("int4", 1), ("int4", 3)]
    names = ["precision", "cache", "prompt", "new", "batch", "prefill_ms", "decode_tokens_per_s", "ttft_ms", "rss_mb", "load_s", "bandwidth_share"]  # fmt: skip
    for run in result["runs"]:
        assert list(run) == names
        assert (run["cache"], run["prompt"], run["new"]) == ("inplace", 8, 4)
        assert all(run[name] > 0 for name in names[5:])
        assert 20 < run["rss_mb"] < 2000
    assert len(shown) == 5 and re.match(r"int4 +3 ", shown[-1])
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert_refused(gpt2x("bench", exported, *options, *files), "b.json: already exists")


def test_speculative_decoding_is_measured_beside_plain_decoding(gpt2x, exported, tmp_path):
    options = ("--prompt", "20", "--new", "8", "--precision", "int8", "--threads", "1")
    for guesses in ("lookup", exported / "onnx/model_q4.onnx", SHAKESPEARE):
        head, line = done(gpt2x("bench", exported, *options, "--speculate", guesses)).stdout.splitlines()
        assert head.split("  ")[0] == "precision"
        assert re.fullmatch(r"int8 +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +\d+%", line)
    assert gpt2x("bench", exported, "--speculate", "lookup", "--batch", "2").exit_code == 2


def test_speculative_decoding_of_a_single_token_is_wrong_usage(gpt2x, exported):
    result = gpt2x("bench", exported, "--speculate", "lookup", "--new", "1")
    assert result.exit_code == 2 and "pass --new 2 or more" in result.stderr


def test_json_on_the_terminal_is_nothing_else(gpt2x, exported):
    out = done(gpt2x("bench", exported, "--prompt", "3", "--new", "2", "--precision", "int4", "--json", "-")).stdout
    assert [run["precision"] for run in json.loads(out)["runs"]] == ["int4"]


def test_what_cannot_be_measured_is_said_before_anything_is(gpt2x, exported, tmp_path):
    assert_refused(
        gpt2x("bench", exported, "--prompt", "250"), "--prompt 250 and --new 64 exceed the context of 256 tokens"
    )
    assert_refused(gpt2x("bench", exported, "--precision", "fp16"), "no fp16 model in this directory")
    assert_refused(gpt2x("bench", SHAKESPEARE), "no ONNX model in this directory")
    assert_refused(gpt2x("bench", tmp_path / "none"), "none")
    for batch in ("0", "1,x", ""):
        assert gpt2x("bench", exported, "--batch", batch).exit_code == 2


def test_no_model_is_loaded_to_learn_its_context(gpt2x, exported, monkeypatch):
    monkeypatch.setattr("onnxruntime.InferenceSession", None)
    assert_refused(gpt2x("bench", exported, "--prompt", "250"), "exceed the context of 256 tokens")


def test_a_process_that_fails_is_one_error(tmp_path):
    from converters import ConversionError

    with pytest.raises(ConversionError, match="gone.onnx"):
        bench.bench(tmp_path / "gone.onnx", [None], 4, 2, [1], 1)


@pytest.mark.parametrize("threads", [1, 2])
def test_sixteen_times_the_bytes_take_sixteen_times_as_long(monkeypatch, threads):
    """On a machine that reads a byte a second, and has a clock of its own."""
    clock, lock = [0], threading.Lock()

    def read(part):
        with lock:
            clock[0] += part.nbytes

    monkeypatch.setattr("gpt2x.bench.np.max", read)
    monkeypatch.setattr("gpt2x.bench.time.perf_counter", lambda: clock[0])
    assert bench.streaming(1 << 12, threads) == 1 << 12
    assert bench.streaming(1 << 16, threads) == 1 << 16
