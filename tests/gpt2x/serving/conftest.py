"""Models for the tests of the server."""

from __future__ import annotations

import pytest
from live_server import in_thread

from converters import open_checkpoint
from gpt2x import SHAKESPEARE
from gpt2x.export.onnx_directory import ExportOptions, export_onnx
from gpt2x.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A directory with the model that ships with gpt2x, in two precisions."""
    folder = tmp_path_factory.mktemp("serving") / "shakespeare"
    export_onnx(open_checkpoint(SHAKESPEARE), folder, ExportOptions(("fp32", "w8a8"), "inplace"))
    return folder


@pytest.fixture(scope="session")
def tokenizer(exported):
    return Tokenizer.from_pretrained(exported)


@pytest.fixture(scope="module")
def server(models):
    """A server of the module's models."""
    with in_thread(models) as address:
        yield address
