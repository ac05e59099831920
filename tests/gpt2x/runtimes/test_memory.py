"""A decoder's memory does not grow over many requests of mixed lengths and batch sizes. ``benchmarks/soak.py`` runs more."""

import importlib
import sys
from typing import Any

import pytest
from checkpoints import random_checkpoint
from paths import ROOT

from converters import GPT2Config
from gpt2x import Generation, Sampling
from gpt2x.export.onnx_directory import ExportOptions, export_onnx
from gpt2x.runtimes.onnxruntime import OnnxDecoder

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")


@pytest.fixture(scope="module")
def soak():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("soak")


@pytest.mark.slow
@needs_linux
@pytest.mark.parametrize("cache", ["growing", "inplace"])
def test_memory_stays_within_a_tenth_and_below_that_of_plain_session_run(soak, tmp_path, cache):
    folder = soak.small_model(tmp_path / "m", cache)
    decoder, session = (soak.memory(folder, 80, which) for which in ("decoder", "session"))
    assert max(decoder[3:]) < 1.1 * decoder[2]  # from the 30th request on
    assert max(decoder) < 1.2 * session[-1]


@pytest.mark.parametrize("cache", ["growing", "inplace"])
def test_a_generation_gives_its_memory_back_at_its_end_even_if_it_is_abandoned(tmp_path, monkeypatch, cache):
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_ctx=32, n_vocab=50, bos_token_id=0, eos_token_id=0)
    export_onnx(random_checkpoint(config), tmp_path / "m", ExportOptions(cache=cache), need_tokenizer=False)
    decoder, given = OnnxDecoder(tmp_path / "m"), []
    monkeypatch.setattr("gpt2x.generation.loop.give_back", lambda: given.append(1))
    assert len(list(Generation(decoder, [[1, 2], [3]], 4, Sampling(temperature=0)))) == 4
    assert given == [1]
    steps: Any = iter(Generation(decoder, [[1, 2]], 4, Sampling(temperature=0)))
    next(steps)
    steps.close()
    assert given == [1, 1]
