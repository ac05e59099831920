"""What others do with a ``.pt2``: decompose it, compile it with AOTInductor, lower it to ExecuTorch.

The programs are those of ``docs/export.md``, run on a tiny model. ``make test-executorch`` runs the last.
"""

import importlib.util
import os
import re
import shutil
import sys

import pytest
import torch
from checkpoints import random_checkpoint
from paths import ROOT

from gpt2x.export.torch_program import export_pt2
from gpt2x.load import model_of

PAGE = ROOT / "docs" / "export.md"
DECOMPOSE, COMPILE, EXECUTORCH = re.findall(r"```py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
COMPILER = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # AOTInductor's own choice

# Rows, tokens of a first step on an empty cache, tokens of a second step (if any) on the cache of the first.
SIZES = [(1, 1, 0), (1, 1, 1), (1, 6, 1), (1, 1, 5), (1, 5, 4), (2, 3, 2), (3, 1, 1), (5, 7, 3)]

# torch and ExecuTorch call what torch and Python deprecate; ExecuTorch calls its Python runtime experimental.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.* is deprecated. Use files:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This API is experimental"),
]
needs_executorch = pytest.mark.skipif(
    not importlib.util.find_spec("executorch"), reason="ExecuTorch is not installed (make test-executorch installs it)"
)


@pytest.fixture
def tiny_pt2(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export_pt2(random_checkpoint(), "gpt2.pt2")


def names_after(program):
    """Run a program of the documents, and return its variables."""
    names = {}
    exec(compile(program, PAGE.name, "exec"), names)
    return names


def assert_same_as_the_model(run, sizes):
    """Compare logits and cache with the model's, which reads all tokens in one step. Batches contain a token of padding."""
    model = model_of(random_checkpoint()).eval()
    for B, first, second in sizes:
        ids = torch.arange(B * (first + second)).reshape(B, -1) % 13
        mask = torch.ones_like(ids)
        mask[-1, 0] = 0 if B > 1 else 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        past = [(torch.zeros(B, 2, 0, 3), torch.zeros(B, 2, 0, 3)) for _ in range(2)]
        with torch.no_grad():
            expected, expected_cache = model(ids, mask, positions)
            logits, past = run(ids[:, :first].clone(), mask[:, :first].clone(), positions[:, :first].clone(), past)
            if second:
                more, past = run(ids[:, first:].clone(), mask, positions[:, first:].clone(), past)
                logits = torch.cat((logits, more), 1)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)
        assert len(past) == len(expected_cache)
        for layer, expected_layer in zip(past, expected_cache, strict=True):
            torch.testing.assert_close(tuple(layer), expected_layer, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_a_loaded_program_can_be_decomposed_for_any_batch_and_any_lengths(tiny_pt2):
    names = names_after(DECOMPOSE)
    assert_same_as_the_model(names["program"].module(), SIZES)
    assert_same_as_the_model(names["core"].module(), SIZES)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(COMPILER), reason=f"AOTInductor needs a C++ compiler; {COMPILER} is not here")
def test_a_loaded_program_can_be_compiled_for_any_batch_and_any_lengths(tiny_pt2, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    assert_same_as_the_model(names_after(COMPILE)["model"], SIZES)


@needs_executorch
def test_executorch_accepts_a_loaded_program_as_it_is(tiny_pt2):
    from executorch.exir import to_edge

    edge = to_edge(torch.export.load("gpt2.pt2"))
    assert edge.methods == {"forward"}


@needs_executorch
def test_executorch_runs_a_bounded_program_for_any_lengths(tiny_pt2):
    method = names_after(EXECUTORCH)["method"]

    def run(ids, mask, positions, past):
        caches = [tensor for layer in past for tensor in layer]
        logits, *caches = method.execute([ids, mask, positions, *caches])
        return logits, list(zip(caches[::2], caches[1::2], strict=True))

    assert_same_as_the_model(run, [size for size in SIZES if size[0] == 1])
