"""What many tests share: a tiny GPT-2 of which no two dimensions are alike, and the files it makes."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import pytest
from click.testing import CliRunner, Result

from converters import Checkpoint, GPT2Config, LazyTensor
from converters.containers.container import Container
from converters.opening.assemble import assemble as last_step
from converters.opening.read_configuration import Stated
from converters.opening.recognise import recognise
from converters.opening.resolve import resolve
from converters.opening.unwrap import unwrap
from gpt2x.runtimes.onnxruntime import OnnxDecoder

if importlib.util.find_spec("torch"):  # TensorFlow's environment has none
    import torch

    torch.set_num_threads(1)  # the models are small: more threads only wait for one another

# And ONNX Runtime's as well, where a test does not ask for more: nothing depends on how many cores there are.
OnnxDecoder.__init__.__kwdefaults__["threads"] = 1

# A shell that runs the tests in the background has Ctrl-C ignored, by them and by what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

FIXTURES = Path(__file__).parent / "fixtures"
RELEASE = Path(__file__).parents[2] / "shared/data/openai-117M"  # OpenAI's own; others may have a folder shared/, too
TINY = GPT2Config(n_layer=2, n_head=2, n_embd=6, n_ctx=10, n_vocab=13, bos_token_id=12, eos_token_id=12)

needs_shared = pytest.mark.skipif(not RELEASE.is_dir(), reason="the folder shared/ with OpenAI's own files is not here")


def random_checkpoint(config: GPT2Config = TINY, seed: int = 0) -> Checkpoint:
    """Every value random, biases and gains too."""
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in config.shapes().items()}
    return Checkpoint(config=config, tensors={name: LazyTensor.of(array) for name, array in arrays.items()})


def assemble(
    container: Container,
    stated: Mapping[str, Any],
    stated_in: str,
    *,
    n_head: int | None = None,
    n_vocab: int | None = None,
    tie: bool = False,
) -> Checkpoint:
    """A checkpoint of an open container and a configuration: the steps of ``open_checkpoint`` between the two."""
    parameters = recognise(unwrap(container), n_vocab)
    return last_step(parameters, resolve(parameters, Stated(stated, stated_in), n_head), tie)


def arrays_of(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in checkpoint.tensors.items()}


def assert_same_bytes(expected: Checkpoint, actual: Checkpoint) -> None:
    assert {n: (t.dtype, t.shape) for n, t in expected.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in actual.tensors.items()
    }
    for name, tensor in expected.tensors.items():
        assert tensor.read().tobytes() == actual.tensors[name].read().tobytes(), name


@pytest.fixture
def tiny() -> Checkpoint:
    return random_checkpoint()


@pytest.fixture
def gpt2x() -> Callable[..., Result]:
    """Run the command line as a user would: ``gpt2x("inspect", path)``."""
    from gpt2x.cli import main

    def run(*args: object) -> Result:
        return CliRunner().invoke(main, [str(arg) for arg in args], prog_name="gpt2x")

    return run


def done(result: Result) -> Result:
    """The result of a command that must have succeeded."""
    assert result.exit_code == 0, result.output
    return result


def assert_refused(result: Result, *words: str) -> None:
    """One clear error on stderr, exit code 1, no traceback."""
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("Error: "), result.stderr
    assert "Traceback" not in result.output
    assert "fault in gpt2x" not in result.stderr, result.stderr
    for word in words:
        assert word in result.stderr
