"""Several texts of one prompt: the prompt is read once, and each text is the one that it would be alone."""

from __future__ import annotations

import numpy as np
import pytest

from converters import open_checkpoint
from gpt2x import SHAKESPEARE, Tokenizer
from gpt2x.export.onnx_directory import ExportOptions, export_onnx
from gpt2x.generation import many
from gpt2x.generation.config import GenerationConfig
from gpt2x.generation.generate import continuations
from gpt2x.generation.many import Job, continue_many
from gpt2x.runtimes.onnx_run import GrowingRun, InPlaceRun
from gpt2x.runtimes.onnxruntime import OnnxDecoder

PROMPTS = ["ROMEO:", "The king is a good man and he", "My lord, " * 20]
SEVERAL = GenerationConfig.of(max_new_tokens=8, num_return_sequences=3, seed=5)


@pytest.fixture(scope="module", params=["growing", "inplace", "inplace-int8"])
def decoder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "m"
    export_onnx(open_checkpoint(SHAKESPEARE), folder, ExportOptions(cache=request.param))
    with OnnxDecoder(folder) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(SHAKESPEARE)


@pytest.fixture
def read(monkeypatch):
    """The numbers of tokens of each run that read more than one token a row."""
    counts: list[int] = []
    grow, prefill = GrowingRun.run, InPlaceRun.prefill

    def counted_run(self, ids, *rest):
        if ids.shape[1] > 1:
            counts.append(ids.size)
        return grow(self, ids, *rest)

    def counted_prefill(self, ids, *rest, **options):
        counts.append(len(ids))
        return prefill(self, ids, *rest, **options)

    monkeypatch.setattr(GrowingRun, "run", counted_run)
    monkeypatch.setattr(InPlaceRun, "prefill", counted_prefill)
    return counts


def jobs():
    return [Job(number, prompt) for number, prompt in enumerate(PROMPTS)]


def texts_of(decoder, tokenizer, config, batch):
    found = {}
    for done in continue_many(decoder, tokenizer, jobs(), config, batch):
        assert done.error is None
        found[done.number] = [(one.text, one.tokens, one.finish) for one in done.continuations]
    return [found[number] for number in range(len(PROMPTS))]


def one_by_one(decoder, tokenizer, config):
    """Each text of each prompt from a generation of its own."""
    single = GenerationConfig.of(max_new_tokens=8, seed=5)
    found = []
    for job in jobs():
        of_prompt = []
        for seed in many._seeds(config, job.number):
            ((one,),) = continuations(decoder, tokenizer, [job.prompt], single, [np.random.default_rng(seed)])
            of_prompt.append((one.text, one.tokens, one.finish))
        found.append(of_prompt)
    return found


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_several_texts_of_a_prompt_are_those_of_reading_it_for_each(decoder, tokenizer, batch):
    found = texts_of(decoder, tokenizer, SEVERAL, batch)
    assert found == one_by_one(decoder, tokenizer, SEVERAL)
    assert all(len({text for text, _, _ in of_prompt}) > 1 for of_prompt in found)


def test_a_prompt_of_several_texts_is_read_once(decoder, tokenizer, read):
    texts_of(decoder, tokenizer, SEVERAL, 1)
    assert sum(read) == sum(len(tokenizer.encode(prompt)) for prompt in PROMPTS)


def test_a_prompt_of_several_beams_is_read_once(decoder, tokenizer, read):
    config = GenerationConfig.of(max_new_tokens=8, num_beams=4, num_return_sequences=4)
    continuations(decoder, tokenizer, PROMPTS[1:2], config)
    assert sum(read) == len(tokenizer.encode(PROMPTS[1]))


def test_rows_of_texts_that_have_ended_are_free_for_the_next_prompt(decoder, tokenizer, monkeypatch):
    if not decoder.in_place:
        pytest.skip("a batch of a growing cache ends as a whole")
    sizes = []
    advance = InPlaceRun.advance

    def counted(self, ids, positions, cache):
        sizes.append(len(ids))
        return advance(self, ids, positions, cache)

    monkeypatch.setattr(InPlaceRun, "advance", counted)
    ends = GenerationConfig.of(max_new_tokens=40, num_return_sequences=3, seed=5, stop_strings=["e"])
    texts_of(decoder, tokenizer, ends, 2)
    assert max(sizes) <= 6
    assert len(sizes) < 3 * 40
