"""Scores: those of transformers' documentation, in every runtime, in windows, batches and pieces."""

import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import SMALL, gentle
from transformers import GPT2LMHeadModel

import gpt2x
from converters import CheckpointError, LazyTensor, save_checkpoint
from gpt2x import ExportOptions, InputError, OnnxDecoder, export_onnx
from gpt2x.export.torch_program import export_torchscript
from gpt2x.runtimes.opening import gpt2x_model, open_decoder
from gpt2x.runtimes.reference import ReferenceDecoder
from gpt2x.runtimes.transformers import Transformers
from gpt2x.scoring import spans
from gpt2x.scoring.logits import score_tokens
from gpt2x.scoring.score import score_texts
from gpt2x.scoring.windows import windows_of

CONTEXT = 24
CONFIG = replace(SMALL, n_ctx=CONTEXT, n_vocab=61)
STRIDES = [1, 5, 12, 23, 24, 30, 60, None]
LENGTHS = [2, 3, 13, 23, 24, 25, 48, 49, 100]


class Numbers:
    """A tokenizer of texts such as "3 5 8"."""

    eos_token_id = None

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))


def text_of(n, seed=0):
    return " ".join(map(str, np.random.default_rng(seed).integers(0, CONFIG.n_vocab, n)))


@pytest.fixture(scope="module")
def checkpoint():
    return gentle(CONFIG)


@pytest.fixture(scope="module")
def theirs(checkpoint) -> GPT2LMHeadModel:
    model: GPT2LMHeadModel = Transformers(checkpoint).model
    return model


@pytest.fixture(scope="module")
def ours(checkpoint):
    return gpt2x_model(checkpoint)


@pytest.fixture(scope="module", params=["weights", "growing", "inplace", "torchscript", "reference", "transformers"])
def decoder(request, checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    match request.param:
        case "weights":
            return gpt2x_model(checkpoint)
        case "growing" | "inplace":
            export_onnx(checkpoint, folder / "m", ExportOptions(cache=request.param), need_tokenizer=False)
            return OnnxDecoder(folder / "m")
        case "torchscript":
            export_torchscript(checkpoint, folder / "m.pt")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return open_decoder(folder / "m.pt")
        case "reference":
            return ReferenceDecoder(checkpoint)
        case _:
            return Transformers(checkpoint)


def documented_perplexity(model, ids, stride) -> float:
    """As transformers' documentation computes it, without windows that have no target, whose loss is NaN there."""
    losses, weights, previous = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + CONTEXT, len(ids))
        inputs = torch.tensor([ids[begin:end]])
        labels = inputs.clone()
        labels[:, : -(end - previous)] = -100
        with torch.no_grad():
            loss = float(model(inputs, labels=labels).loss)
        counted = int((labels != -100).sum()) - 1
        if counted or not math.isnan(loss):
            losses += loss * counted
            weights += counted
        previous = end
        if end == len(ids):
            break
    return math.exp(losses / weights)


def log_probabilities_of(model, ids, stride):
    """Of each token, from the logits of its window."""
    found = np.full(len(ids), np.nan)
    previous = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + CONTEXT, len(ids))
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin:end]])).logits[0].double().log_softmax(-1)
        for position in range(max(previous, begin + 1), end):
            found[position] = logits[position - begin - 1, ids[position]]
        previous = end
        if end == len(ids):
            break
    return found


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("n", LENGTHS)
def test_perplexity_is_that_of_the_documentation_of_transformers(ours, theirs, n, stride):
    text = text_of(n, n)
    found = gpt2x.score(ours, Numbers(), text, stride)
    expected = documented_perplexity(theirs, Numbers().encode(text), stride or CONTEXT // 2)
    assert found.perplexity == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stride", STRIDES)
def test_each_token_has_the_log_probability_of_transformers(decoder, theirs, stride):
    text = text_of(100)
    found = gpt2x.score(decoder, Numbers(), text, stride, log_probabilities=True)
    expected = log_probabilities_of(theirs, Numbers().encode(text), stride or CONTEXT // 2)
    np.testing.assert_allclose(found.log_probabilities, expected, rtol=1e-5)
    assert found.log_likelihood == pytest.approx(np.nansum(expected), rel=1e-5)
    assert found.scored == np.isfinite(expected).sum()
    assert found.tokens == 100


def test_bits_per_byte_count_the_bytes_of_utf8(ours):
    class Letters(Numbers):
        def encode(self, text):
            return [ord(letter) % CONFIG.n_vocab for letter in text]

    found = gpt2x.score(ours, Letters(), "café 日本")
    assert found.bytes == 12
    assert found.bits_per_byte == pytest.approx(-found.log_likelihood / math.log(2) / 12)


def test_where_a_part_of_the_text_is_left_out_there_are_no_bits_per_byte(ours):
    assert gpt2x.score(ours, Numbers(), text_of(100), CONTEXT).bits_per_byte
    assert gpt2x.score(ours, Numbers(), text_of(100), CONTEXT + 1).bits_per_byte is None


def test_of_a_single_token_nothing_is_scored(decoder):
    found = gpt2x.score(decoder, Numbers(), "7", log_probabilities=True)
    assert (found.log_likelihood, found.tokens, found.scored) == (0.0, 1, 0)
    assert found.perplexity is None
    assert found.bits_per_byte is None
    assert np.isnan(found.log_probabilities).all()


def test_windows_overlap_by_half_the_context_by_default(ours):
    assert gpt2x.score(ours, Numbers(), text_of(100)) == gpt2x.score(ours, Numbers(), text_of(100), CONTEXT // 2)


def test_every_token_but_the_first_is_scored_once_where_windows_overlap():
    for n in range(2, 60):
        for stride in range(1, CONTEXT):
            scored = [i for window in windows_of(n, CONTEXT, stride) for i in range(window.first, window.end)]
            assert scored == list(range(1, n))


@pytest.mark.parametrize("limits", [(1, 1, 1), (1 << 14, 16, 60), (1 << 30, 256, 4096)], ids=str)
def test_pieces_and_batches_change_nothing(decoder, theirs, monkeypatch, limits):
    for name, value in zip(("LOGITS", "PIECE", "BATCH"), limits, strict=True):
        monkeypatch.setattr(spans, name, value)
    text = text_of(150, 3)
    found = gpt2x.score(decoder, Numbers(), text, 7, log_probabilities=True)
    expected = log_probabilities_of(theirs, Numbers().encode(text), 7)
    np.testing.assert_allclose(found.log_probabilities, expected, rtol=1e-5)


def test_texts_of_any_lengths_have_together_the_scores_that_they_have_alone(decoder):
    texts = [text_of(n, n) for n in (1, 60, 2, 24, 25, 3, 100, 1, 7)]
    for found, text in zip(score_texts(decoder, Numbers(), texts), texts, strict=True):
        alone = gpt2x.score(decoder, Numbers(), text)
        assert (found.tokens, found.scored, found.bytes) == (alone.tokens, alone.scored, alone.bytes)
        assert found.log_likelihood == pytest.approx(alone.log_likelihood, rel=1e-5)
        if alone.perplexity is None:
            assert found.perplexity is None
        else:
            assert found.perplexity == pytest.approx(alone.perplexity, rel=1e-5)


def test_a_model_that_returns_only_the_last_logits_is_refused_with_the_way_out(checkpoint, tmp_path):
    export_onnx(checkpoint, tmp_path / "m", ExportOptions(last=True), need_tokenizer=False)
    with pytest.raises(InputError, match=r"m/onnx/model.onnx: .* export it without --logits last"):
        gpt2x.score(OnnxDecoder(tmp_path / "m"), Numbers(), text_of(5))


@pytest.mark.parametrize(
    ("text", "stride", "words"),
    [
        ("", None, "the text is empty"),
        ("3 61 4", None, "token id 61"),
        ("3 4", 0, "stride is 0"),
        ("3", -1, "stride is -1"),
    ],
)
def test_what_cannot_be_scored_is_refused(ours, text, stride, words):
    with pytest.raises(InputError, match=words):
        gpt2x.score(ours, Numbers(), text, stride)


def test_logits_that_are_not_finite_are_refused(checkpoint):
    tensors: dict[str, Any] = dict(checkpoint.tensors)
    tensors["ln_f.bias"] = LazyTensor.of(np.full(CONFIG.n_embd, np.nan, np.float32))
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        gpt2x.score(gpt2x_model(replace(checkpoint, tensors=tensors)), Numbers(), text_of(5))


def test_large_logits_do_not_overflow():
    logits = np.array([[3e38, -3e38, 1.0], [-200.0, 200.0, 200.0]], np.float32)
    found = score_tokens(logits, np.array([0, 2]), k=2)
    np.testing.assert_allclose(found.log_probabilities, [0, -math.log(2)], atol=1e-6)
    assert found.greedy.all()
    assert found.alternatives.ids.shape == (2, 2)


def test_the_alternatives_are_the_most_likely_tokens():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(9, 61)).astype(np.float32)
    found = score_tokens(logits, np.zeros(9, np.int64), k=5)
    expected = np.log(np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    assert (found.alternatives.ids == np.argsort(-logits, 1)[:, :5]).all()
    np.testing.assert_allclose(found.alternatives.log_probabilities, -np.sort(-expected, 1)[:, :5], rtol=1e-5)
    assert (found.greedy == (found.alternatives.ids[:, 0] == 0)).all()


@pytest.mark.slow
def test_a_million_tokens_are_scored_in_memory_that_does_not_grow(tmp_path):
    """In a process of its own, beside transformers: equal, and with less than 200 MB for a text of 10 MB."""
    import subprocess
    import sys

    config = replace(SMALL, n_ctx=64, n_vocab=2048)
    checkpoint = gentle(config)
    save_checkpoint(checkpoint, tmp_path / "hf")
    export_onnx(checkpoint, tmp_path / "onnx", need_tokenizer=False)
    program = f"""if True:
        import json, resource
        import gpt2x
        tokenizer = gpt2x.Tokenizer.from_pretrained(gpt2x.SHAKESPEARE)
        decoder = gpt2x.OnnxDecoder({str(tmp_path / "onnx")!r}, threads=1)
        part = open(gpt2x.SHAKESPEARE.parent / "coriolanus.txt", encoding="utf-8").read()
        gpt2x.score(decoder, tokenizer, part[:200_000], 64)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        text = part * (3_000_000 // len(part) + 1)
        found = gpt2x.score(decoder, tokenizer, text, 64)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps([found.tokens, found.log_likelihood, found.perplexity, (after - before) / 1024]))
    """
    import json

    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    tokens, log_likelihood, perplexity, megabytes = json.loads(run.stdout)
    assert tokens > 1_000_000
    assert megabytes < 200
    tokenizer = gpt2x.Tokenizer.from_pretrained(gpt2x.SHAKESPEARE)
    part = (gpt2x.SHAKESPEARE.parent / "coriolanus.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(part * (3_000_000 // len(part) + 1))
    total, count = _disjoint(Transformers(checkpoint).model, np.array(ids), 64)
    assert log_likelihood == pytest.approx(total, rel=1e-5)
    assert perplexity == pytest.approx(math.exp(-total / count), rel=1e-5)


def _disjoint(model, ids, context) -> tuple[float, int]:
    """The log-likelihood of windows that do not overlap, and how many tokens it counts: all windows of a size at once."""
    whole = len(ids) // context * context
    parts = [part for part in (ids[:whole].reshape(-1, context), ids[whole:][None]) if part.shape[1] > 1]
    total, count = 0.0, 0
    for part in parts:
        for rows in np.array_split(part, len(part) // 64 + 1):
            inputs = torch.tensor(rows)
            with torch.no_grad():
                logits = model(inputs).logits[:, :-1].log_softmax(-1)
            total += float(logits.gather(2, inputs[:, 1:, None]).double().sum())
            count += inputs[:, 1:].numel()
    return total, count


@pytest.mark.parametrize(("threads", "pools"), [(1, []), (3, [3]), (100, [4])])
def test_logits_are_scored_in_so_many_threads(monkeypatch, threads, pools):
    logits = np.random.default_rng(0).standard_normal((64, 9)).astype(np.float32)
    tokens = np.arange(64) % 9
    expected = score_tokens(logits, tokens)
    made = []

    def pool(count):
        made.append(count)
        return ThreadPoolExecutor(count)

    monkeypatch.setattr("gpt2x.scoring.logits.ThreadPoolExecutor", pool)
    found = score_tokens(logits, tokens, threads=threads)
    assert made == pools
    np.testing.assert_array_equal(found.log_probabilities, expected.log_probabilities)
