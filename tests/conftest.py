"""Settings and fixtures of all tests. What they import is in ``support``."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Generator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest

# Their assertions then show values, as those of the tests do.
pytest.register_assert_rewrite("bundles", "checkpoints", "commands")

from checkpoints import random_checkpoint
from click.testing import CliRunner, Result

from converters import Checkpoint
from gpt2x.runtimes.onnxruntime import OnnxDecoder

if importlib.util.find_spec("torch"):  # TensorFlow's environment has none
    import torch

    torch.set_num_threads(1)  # the models are small: more threads only wait for one another

# And ONNX Runtime's as well, where a test does not ask for more: nothing depends on how many cores there are.
OnnxDecoder.__init__.__kwdefaults__["threads"] = 1

# A shell that runs the tests in the background has Ctrl-C ignored, by them and by what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Pause coverage in tests that are marked ``untraced``.

    pytest-cov's marker for that has no effect in the processes of pytest-xdist: there, a second measurement goes on.
    """
    if not item.get_closest_marker("untraced"):
        return (yield)
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)


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
