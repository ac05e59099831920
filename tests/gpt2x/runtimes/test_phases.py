"""Two models of one directory that share a cache in place: one reads prompts, the other decodes."""

import numpy as np
import pytest
from commands import assert_refused, done

from converters import CheckpointError, open_checkpoint
from gpt2x import SHAKESPEARE, ExportOptions, OnnxDecoder, Tokenizer, export_onnx, score
from gpt2x.runtimes.base import InputError
from gpt2x.runtimes.batching import RunningBatch
from gpt2x.runtimes.processor import TILES_OFF
from gpt2x.verify.running import bounds_of

PROMPT = np.arange(300, 340)[None]
POSITIONS = np.arange(40)[None]


def export(folder, cache, *precisions):
    export_onnx(open_checkpoint(SHAKESPEARE), folder, ExportOptions(precisions, cache))
    return folder


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return export(tmp_path_factory.mktemp("phases") / "m", "inplace", "fp32", "fp16", "int8", "w8a8", "int4")


def test_prompts_are_read_in_one_precision_and_decoded_in_another(directory, monkeypatch):
    monkeypatch.delenv(TILES_OFF, raising=False)
    pair = OnnxDecoder(directory, prefill="w8a8", decode="int4")
    # Only the model that decodes has tiled attention, which rounds differently.
    monkeypatch.setenv(TILES_OFF, "1")
    prefill = OnnxDecoder(directory, precision="w8a8")
    monkeypatch.setenv(TILES_OFF, "0")
    decode = OnnxDecoder(directory, precision="int4")
    expected, cache = prefill.step(PROMPT, None, POSITIONS, None)
    found, own = pair.step(PROMPT, None, POSITIONS, None)
    np.testing.assert_array_equal(found, expected)
    for number in range(3):
        token, position = np.array([[7 + number]]), np.array([[40 + number]])
        expected, cache = decode.step(token, None, position, cache)
        found, own = pair.step(token, None, position, own)
        np.testing.assert_array_equal(found, expected)
    assert pair.precision == "w8a8+int4"
    assert "model_int8.onnx and model_q4.onnx" in pair.runtime
    assert bounds_of(pair) == bounds_of(decode)  # the wider ones


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "w8a8", "int4", "w8a8+int4"])
@pytest.mark.parametrize("onnx", [True, False])
def test_context_fills_the_cache_without_logits(directory, monkeypatch, precision, onnx):
    if not onnx:
        monkeypatch.setattr("gpt2x.runtimes.onnx_context.MOST_TWICE", 0)
    decoder = OnnxDecoder(directory, precision=precision)
    cache = decoder.extend(PROMPT, None, POSITIONS, None)
    context = decoder._context.model
    assert (context is not None) == onnx
    if context:
        assert "logits" not in context.outputs
    found, _ = decoder.step(PROMPT[:, :1], None, POSITIONS[:, :1] + 40, cache)
    _, cache = decoder.step(PROMPT, None, POSITIONS, None)
    expected, _ = decoder.step(PROMPT[:, :1], None, POSITIONS[:, :1] + 40, cache)
    # The other graph is fused differently, and a last bit may change how an activation is rounded.
    np.testing.assert_allclose(found, expected, atol=1e-4 if precision == "fp32" else 0.1)
    decoder.close()


def test_a_running_batch_takes_a_pair(directory):
    # One of float32 decodes: a product of two rows in int4 may use other instructions than one of a single row.
    with RunningBatch(OnnxDecoder(directory, precision="w8a8+fp32")) as batch:
        sequences = [batch.join(PROMPT[0, :20].tolist())[0], batch.join(PROMPT[0].tolist())[0]]
        logits = batch.step({sequences[0]: 5, sequences[1]: 6})
    alone = OnnxDecoder(directory, precision="w8a8+fp32")
    _, cache = alone.step(PROMPT, None, POSITIONS, None)
    expected, _ = alone.step(np.array([[6]]), None, np.array([[40]]), cache)
    np.testing.assert_allclose(logits[sequences[1]], expected[0], atol=1e-4)


def test_a_pair_is_refused_where_a_text_is_scored(directory):
    decoder = OnnxDecoder(directory, prefill="w8a8", decode="int4")
    with pytest.raises(InputError, match="choose w8a8 or int4"):
        score(decoder, Tokenizer.from_pretrained(SHAKESPEARE), "My lord")


def test_closing_closes_both(directory):

    decoder = OnnxDecoder(directory, precision="int8+int4")
    decoder.close()
    with pytest.raises(InputError, match="closed"):
        decoder.step(PROMPT, None, POSITIONS, None)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"precision": "int8+int8"}, "not a pair"),
        ({"precision": "int8+int4+w8a8"}, "not a pair"),
        ({"precision": "int8+int3"}, "not one of"),
        ({"prefill": "int8"}, "pass either precision, or prefill and decode"),
        ({"precision": "int8", "prefill": "int8", "decode": "int4"}, "pass either precision, or prefill and decode"),
    ],
    ids=str,
)
def test_what_is_no_pair_is_an_error(directory, given, words):
    with pytest.raises(ValueError, match=words):
        OnnxDecoder(directory, **given)


def test_the_same_precision_for_both_is_one_model(directory):
    assert OnnxDecoder(directory, prefill="int4", decode="int4").precision == "int4"


def test_models_that_cannot_share_a_cache_are_refused(directory, tmp_path):
    with pytest.raises(CheckpointError, match="one keeps its cache in float32, the other in float16"):
        OnnxDecoder(directory, precision="int8+fp16")
    growing = export(tmp_path / "growing", "growing", "fp32", "int8")
    with pytest.raises(CheckpointError, match="export with --cache inplace"):
        OnnxDecoder(growing, precision="fp32+int8")


def test_a_cache_of_8_bits_is_shared_too(tmp_path):
    directory = export(tmp_path / "m", "inplace-int8", "w8a8", "int4")
    pair, decode = OnnxDecoder(directory, precision="w8a8+int4"), OnnxDecoder(directory, precision="int4")
    found, _ = pair.step(PROMPT, None, POSITIONS, None)
    expected, _ = decode.step(PROMPT, None, POSITIONS, None)
    assert np.abs(found - expected).max() < 0.3 * np.abs(expected).max()


def test_commands_take_a_pair(gpt2x, directory):
    pair = ["--precision", "w8a8+int4"]
    done(gpt2x("generate", directory, "ROMEO:", "--max-new-tokens", 5, *pair))
    report = done(gpt2x("verify", SHAKESPEARE, directory, *pair)).stdout
    assert "weights, w8a8" in report and "weights, int4" in report
    assert done(gpt2x("bench", directory, "--new", 2, *pair)).stdout.splitlines()[-1].startswith("w8a8+int4")
    for command in (["generate", directory, "ROMEO:"], ["bench", directory], ["verify", SHAKESPEARE, directory]):
        result = gpt2x(*command, "--precision", "w8a8+none")
        assert result.exit_code == 2 and "nor a pair of them such as w8a8+int4" in result.stderr
    one = next(directory.rglob("model_q4.onnx"))
    assert_refused(gpt2x("generate", one, "ROMEO:", *pair), "model_q4.onnx: its metadata says int4, not w8a8")
