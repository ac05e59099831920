"""Prompts that are read in pieces between steps of a running batch, and sequences that are copied."""

from __future__ import annotations

import numpy as np
import pytest

from converters import open_checkpoint
from gpt2x import SHAKESPEARE
from gpt2x.export.onnx_directory import ExportOptions, export_onnx
from gpt2x.runtimes.base import InputError
from gpt2x.runtimes.batching import RunningBatch
from gpt2x.runtimes.onnxruntime import OnnxDecoder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batching") / "shakespeare"
    export_onnx(open_checkpoint(SHAKESPEARE), folder, ExportOptions(cache="inplace"))
    return OnnxDecoder(folder)


def prompt(n, seed=0):
    return np.random.default_rng(seed).integers(2048, size=n).tolist()


def read(batch, ids, size):
    """Read a prompt in pieces of some size. Returns the sequence, and the logits of every token."""
    reading = batch.begin()
    parts = [reading.read(ids[start : start + size], every=True) for start in range(0, len(ids), size)]
    return batch.finish(reading), np.concatenate(parts)


def test_a_prompt_that_is_read_in_pieces_between_steps_of_others(decoder):
    ids = prompt(100)
    batch = RunningBatch(decoder)
    other, _ = batch.join(prompt(5, 1))
    leaver, _ = batch.join(prompt(9, 2))
    reading = batch.begin()
    reading.read(ids[:40])
    batch.step({other: 1, leaver: 2})
    batch.leave(other)  # the row before it becomes free while it is read
    reading.read(ids[40:80])
    batch.step({leaver: 3})
    last = reading.read(ids[80:])[-1]
    sequence = batch.finish(reading)
    after = batch.step({sequence: 7, leaver: 4})
    alone = RunningBatch(decoder)
    expected_sequence, every = read(alone, ids, 40)
    np.testing.assert_array_equal(last, every[-1])
    np.testing.assert_array_equal(after[sequence], alone.step({expected_sequence: 7})[expected_sequence])
    assert (batch.length(sequence), batch.length(leaver)) == (101, 12)


def test_keys_and_values_that_were_kept_are_the_same_as_those_of_reading_again(decoder):
    ids = prompt(96)
    batch = RunningBatch(decoder)
    reading = batch.begin()
    reading.read(ids[:64])
    kept = reading.copy(0, 64)
    batch.abandon(reading)
    again = batch.begin()
    again.restore(kept)
    assert again.length == 64
    found = again.read(ids[64:])[-1]
    batch.finish(again)
    _, expected = read(RunningBatch(decoder), ids, 64)
    np.testing.assert_array_equal(found, expected[-1])


def test_a_copy_of_a_sequence_continues_as_the_sequence_does(decoder):
    batch = RunningBatch(decoder)
    first, _ = batch.join(prompt(20))
    batch.step({first: 5})
    second = batch.fork(first)
    after = batch.step({first: 6, second: 6})
    np.testing.assert_array_equal(after[first], after[second])
    batch.leave(first)
    assert batch.length(second) == 22


def test_room_that_was_made_before_does_not_grow(decoder):
    batch = RunningBatch(decoder)
    batch.reserve(4, 128)
    size = batch.cache.nbytes
    for seed in range(4):
        batch.join(prompt(100, seed))
    assert batch.cache.nbytes == size


def test_what_does_not_fit_the_prompt_that_is_being_read(decoder):
    batch = RunningBatch(decoder)
    reading = batch.begin()
    with pytest.raises(InputError, match="the prompt is empty"):
        batch.finish(reading)
    for join in (lambda: batch.join(prompt(3)), batch.begin, lambda: batch.fork(0)):
        with pytest.raises(InputError, match="a prompt is being read"):
            join()
    with pytest.raises(InputError, match="token id 2048 is outside the vocabulary"):
        reading.read([2048])
    reading.read(prompt(256))
    with pytest.raises(InputError, match="position 256 is outside the context"):
        reading.read([1])
    batch.finish(reading)
    with pytest.raises(InputError, match="this prompt is not being read"):
        batch.finish(reading)
