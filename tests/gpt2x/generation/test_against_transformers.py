"""Controls and beam search: the same tokens as ``transformers.generate``, and the same processed logits."""

import functools
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import TINY, random_checkpoint
from transformers import GenerationConfig as TheirConfig

from gpt2x import SHAKESPEARE, Tokenizer, export_onnx, open_checkpoint
from gpt2x.export.onnx_directory import ExportOptions
from gpt2x.export.torch_program import export_torchscript
from gpt2x.generation.beams import Beams, beam_search
from gpt2x.generation.config import GenerationConfig
from gpt2x.generation.loop import Generation
from gpt2x.generation.processors import apply, log_softmax
from gpt2x.generation.prompts import as_end_tokens, left_pad
from gpt2x.generation.sampling import Sampling
from gpt2x.runtimes.onnxruntime import OnnxDecoder
from gpt2x.runtimes.opening import gpt2x_model, open_decoder
from gpt2x.runtimes.transformers import Transformers

END = 7
SMALL = replace(TINY, n_vocab=97, n_ctx=40)
PROMPTS = [[5, 6, 5, 6, 5], [11, 12], [30, 31, 32, 30, 31, 32, 30]]
CONTROLS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"bad_words_ids": [[3], [5, 6], [END]]},
    {"sequence_bias": {(3,): -2.0, (5, 6): 4.0, (END,): 1.5}},
    {"min_new_tokens": 6},
    {"min_length": 9},
    {"min_length": 18, "min_new_tokens": 0, "sequence_bias": {(END,): 3.0}},
    {"min_length": 18, "min_new_tokens": 2, "sequence_bias": {(END,): 3.0}},
    {"suppress_tokens": [1, 2, 3, 4, 5]},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "min_new_tokens": 4, "sequence_bias": {(END,): 3.0}},
]
ENDS: list[Any] = [END, [END, 3, 50], None]
BEAMS: list[dict[str, Any]] = [
    {"num_beams": 2},
    {"num_beams": 4, "early_stopping": True},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0},
    {"num_beams": 3, "length_penalty": -1.0, "early_stopping": "never"},
    {"num_beams": 5, "length_penalty": 0.3, "num_return_sequences": 5},
]


@pytest.fixture(scope="module", params=[0, pytest.param(1, marks=pytest.mark.slow)])
def checkpoint(request):
    return random_checkpoint(SMALL, request.param)


@pytest.fixture(scope="module")
def theirs(checkpoint):
    model = Transformers(checkpoint).model
    model.generation_config.eos_token_id = None  # it would stand in for None
    return model


@pytest.fixture(scope="module")
def ours(checkpoint):
    return gpt2x_model(checkpoint)


def their_tokens(model, prompts, new, controls, end):
    """What ``transformers.generate`` adds to each prompt, without end tokens."""
    if "no_repeat_ngram_size" in controls:
        # transformers counts padding as text, so that n-grams with it are ruled out: one prompt after another.
        return [tokens for prompt in prompts for tokens in _their_batch(model, [prompt], new, controls, end)]
    return _their_batch(model, prompts, new, controls, end)


def _their_batch(model, prompts, new, controls, end):
    ids, mask = left_pad(prompts)
    config = TheirConfig(max_new_tokens=new, do_sample=False, eos_token_id=end, pad_token_id=0, **controls)
    with torch.no_grad():
        found = model.generate(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), generation_config=config)
    return [_until(row[ids.shape[1] :].tolist(), as_end_tokens(end)) for row in found]


def _until(tokens, ends):
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[:i]
    return tokens


def our_tokens(decoder, prompts, new, controls, end):
    greedy = {} if "num_beams" in controls else {"temperature": 0}
    config = GenerationConfig.of(max_new_tokens=new, **greedy, **controls)
    if config.beams:
        found = beam_search(
            decoder, prompts, new, config.beams, sampling=config.sampling, end_tokens=as_end_tokens(end)
        )
        return [one.tokens for several in found for one in several[: config.num_return_sequences]]
    return tokens_of(Generation(decoder, prompts, new, config.sampling, end))


def tokens_of(generation):
    return [[token for token in row if token is not None] for row in zip(*generation, strict=True)]


@pytest.mark.parametrize("end", ENDS, ids=str)
@pytest.mark.parametrize("controls", CONTROLS, ids=str)
def test_greedy_tokens_are_those_of_transformers(ours, theirs, controls, end):
    expected = their_tokens(theirs, PROMPTS, 20, controls, end)
    assert our_tokens(ours, PROMPTS, 20, controls, end) == expected


def marks_of(number):
    """A quarter of the searches run in ``make test``, each with some of the controls. Coverage measures a quarter of these."""
    if number % 4:
        return (pytest.mark.slow,)
    return (pytest.mark.untraced,) if number % 16 else ()


SEARCHES = [
    pytest.param(controls, end, beams, marks=marks_of(number))
    for number, (controls, end, beams) in enumerate(product(CONTROLS, ENDS, BEAMS))
]


@pytest.mark.parametrize(("controls", "end", "beams"), SEARCHES, ids=str)
def test_beams_are_those_of_transformers(ours, theirs, controls, beams, end):
    expected = their_tokens(theirs, PROMPTS, 15, {**controls, **beams}, end)
    assert our_tokens(ours, PROMPTS, 15, {**controls, **beams}, end) == expected


# --------------------------------------------------------------------------------------------- the shipped model, runtimes


@pytest.fixture(scope="module")
def shipped():
    return open_checkpoint(SHAKESPEARE)


@pytest.fixture(scope="module")
def texts():
    tokenizer = Tokenizer.from_pretrained(SHAKESPEARE)
    return [tokenizer.encode(text) for text in ("ROMEO:", "To be, or not to be,", "What light")]


@pytest.fixture(scope="module", params=["torch", "growing", "inplace", "torchscript", "transformers"])
def runtime(request, shipped, tmp_path_factory):
    """Every runtime, with the shipped model."""
    kind = request.param
    if kind == "torch":
        return gpt2x_model(shipped)
    if kind == "transformers":
        return Transformers(shipped)
    folder = tmp_path_factory.mktemp(kind)
    if kind == "torchscript":
        export_torchscript(shipped, folder / "m.pt")
        return open_decoder(folder / "m.pt")
    export_onnx(shipped, folder / "m", ExportOptions(cache=kind))
    return OnnxDecoder(folder / "m")


SHIPPED: list[dict[str, Any]] = [
    {"repetition_penalty": 1.2},
    {"no_repeat_ngram_size": 3},
    {"num_beams": 4, "early_stopping": True},
    {"num_beams": 3, "num_return_sequences": 3, "no_repeat_ngram_size": 2, "length_penalty": 0.5},
]


@pytest.fixture(scope="module")
def wanted(shipped, texts):
    """``wanted(i)``: the tokens of transformers with ``SHIPPED[i]``, which every runtime is compared with."""
    model = Transformers(shipped).model
    model.generation_config.eos_token_id = None
    return functools.cache(lambda i: their_tokens(model, texts, 24, SHIPPED[i], None))


@pytest.mark.parametrize("i", range(len(SHIPPED)), ids=lambda i: str(SHIPPED[i]))
def test_every_runtime_gives_the_tokens_of_transformers(runtime, texts, wanted, i):
    assert our_tokens(runtime, texts, 24, SHIPPED[i], None) == wanted(i)


def test_a_beams_score_is_that_of_its_text_read_at_once(shipped, texts, tmp_path):
    """Also with an 8-bit cache: what a beam has in its row is its own text."""
    export_onnx(shipped, tmp_path / "m", ExportOptions(cache="inplace-int8"))
    with OnnxDecoder(tmp_path / "m") as decoder:
        for prompt, found in zip(texts, beam_search(decoder, texts, 24, Beams(4, length_penalty=0)), strict=True):
            for one in found:
                ids = np.array([prompt + one.tokens])
                logits, _ = decoder.run(ids, None, np.arange(ids.size)[None], None)
                chosen = log_softmax(logits[0, len(prompt) - 1 : -1])[np.arange(24), one.tokens]
                assert one.score == pytest.approx(chosen.sum(), abs=0.05)


# ------------------------------------------------------------------------------------------------------- sampling


WARPED: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"typical_p": 0.7},
    {"temperature": 1.4, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.9},
    {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "temperature": 0.6, "top_p": 0.7},
    {"bad_words_ids": [[4], [5, 6]], "sequence_bias": {(6, 5): 3.0}, "typical_p": 0.5, "min_length": 12},
]


@pytest.mark.parametrize("controls", WARPED, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_processed_logits_are_those_of_transformers(theirs, controls, seed):
    rng = np.random.default_rng(seed)
    logits = (3 * rng.normal(size=97)).astype(np.float32)
    tokens = rng.integers(0, 12, 10)
    config = TheirConfig(do_sample=True, eos_token_id=[END, 3], **controls)
    theirs._prepare_special_tokens(config, torch.tensor(True), torch.device("cpu"))
    processors = theirs._get_logits_processor(config, input_ids_seq_length=8, encoder_input_ids=None, device="cpu")
    expected = processors(torch.tensor(tokens)[None], torch.tensor(logits)[None])[0].softmax(-1).numpy()
    sampling = GenerationConfig.of(**controls).sampling
    found = sampling.probabilities(apply(sampling.penalties(8, (END, 3)), tokens, logits))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.untraced
def test_samples_follow_the_processed_distribution():
    """Chi-squared, at a level that one seed in ten thousand exceeds by chance."""
    logits = np.log(np.array([0.4, 0.2, 0.2, 0.1, 0.06, 0.04], np.float32))
    sampling = Sampling(seed=5, repetition_penalty=1.3, logit_bias={3: 1.0}, min_p=0.15)
    tokens = np.array([0, 3])
    expected = sampling.probabilities(apply(sampling.penalties(), tokens, logits))
    assert 1 < (expected > 0).sum() < 6
    (generator,) = sampling.generators(1)
    counts = np.bincount([sampling.choose(logits, generator, tokens) for _ in range(8000)], minlength=6)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = ((counts - 8000 * expected)[possible] ** 2 / (8000 * expected[possible])).sum()
    assert statistic < {1: 15.1, 2: 18.4, 3: 21.1, 4: 23.5}[int(possible.sum()) - 1]
