"""Triton model repositories. The model of the Python backend runs here with a stand-in for Triton's module;
tests/peers/test_triton.py runs it in Triton.
"""

import importlib.util
import json
import re
import sys
from types import ModuleType

import numpy as np
import onnxruntime as ort
import pytest
from checkpoints import random_checkpoint
from paths import files_of

from converters import DestinationError, TokenizerError, open_checkpoint
from gpt2x import SHAKESPEARE, ExportOptions, OnnxDecoder, Tokenizer, generate_text
from gpt2x.export.triton import export_triton

FILES = [
    "gpt2/1/model.py", "gpt2/1/tokenizer.json", "gpt2/config.pbtxt", "gpt2_step/1/model.onnx",
    "gpt2_step/1/model.onnx_data", "gpt2_step/config.pbtxt", "gpt2_stream/1/model.py", "gpt2_stream/1/tokenizer.json",
    "gpt2_stream/config.pbtxt",
]  # fmt: skip
TYPES = {"TYPE_INT64": "tensor(int64)", "TYPE_FP32": "tensor(float)", "TYPE_FP16": "tensor(float16)", "TYPE_INT8": "tensor(int8)"}  # fmt: skip


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    path = tmp_path_factory.mktemp("triton") / "repository"
    export_triton(open_checkpoint(SHAKESPEARE), path)
    return path


class Tensor:
    def __init__(self, name, array):
        self.name = name
        self.array = array

    def as_numpy(self):
        return self.array


class Sender:
    def __init__(self):
        self.sent = []
        self.ended = False

    def send(self, response=None, flags=0):
        assert not self.ended
        if response is not None:
            self.sent.append(response)
        self.ended = bool(flags)

    def is_cancelled(self):
        return False


class Request:
    def __init__(self, **values):
        self.values = values
        self.sender = Sender()

    def get_response_sender(self):
        return self.sender


def input_of(request, name):
    if name not in request.values:
        return None
    value = request.values[name]
    return Tensor(name, np.array([value.encode() if isinstance(value, str) else value]))


class Response:
    def __init__(self, tensors, error=None):
        self.error = error
        self.text = None if error else tensors[0].array[0].decode()


@pytest.fixture
def load(monkeypatch):
    """Load a model of a repository as Triton's Python backend does, to run the step itself."""
    fake = ModuleType("triton_python_backend_utils")
    parts = {
        "Tensor": Tensor,
        "InferenceResponse": Response,
        "TritonError": str,
        "get_input_tensor_by_name": input_of,
        "using_decoupled_model_transaction_policy": lambda config: config["decoupled"],
        "TRITONSERVER_RESPONSE_COMPLETE_FINAL": 1,
    }
    fake.__dict__.update(parts)
    monkeypatch.setitem(sys.modules, fake.__name__, fake)

    def loaded(repository, name="gpt2", step="onnxruntime"):
        spec = importlib.util.spec_from_file_location("a_model_of_triton", repository / name / "1/model.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        text = (repository / name / "config.pbtxt").read_text()
        found = re.findall(r'parameters { key: "(\w+)" value { string_value: "([^"]*)" } }', text)
        parameters = {key: {"string_value": value} for key, value in found} | {"step": {"string_value": step}}
        config = {"parameters": parameters, "decoupled": "decoupled: true" in text}
        model = module.TritonPythonModel()
        model.initialize(
            {
                "model_config": json.dumps(config),
                "model_repository": str(repository / name),
                "model_version": "1",
            }
        )
        return model

    return loaded


def text_of(model, **values):
    (response,) = model.execute([Request(**values)])
    assert response.error is None
    return response.text


def test_a_repository_has_the_step_and_two_text_models(repository):
    assert files_of(repository) == FILES


def test_the_configuration_of_the_step_is_that_of_its_graph(repository):
    text = (repository / "gpt2_step/config.pbtxt").read_text()
    session = ort.InferenceSession(repository / "gpt2_step/1/model.onnx")
    for kind, slots in (("input", session.get_inputs()), ("output", session.get_outputs())):
        found = re.findall(rf'^{kind} {{ name: "(.*?)" data_type: (\w+) dims: \[ (.*?) \] }}$', text, re.M)
        stated = [(name, TYPES[dtype], [int(size) for size in dims.split(", ")]) for name, dtype, dims in found]
        assert stated == [
            (slot.name, slot.type, [size if isinstance(size, int) else -1 for size in slot.shape]) for slot in slots
        ]


def test_a_greedy_text_is_that_of_gpt2x(repository, load):
    decoder = OnnxDecoder(repository / "gpt2_step/1/model.onnx")
    expected = generate_text(decoder, Tokenizer.from_pretrained(SHAKESPEARE), "ROMEO:", 30, temperature=0)
    assert "ROMEO:" + text_of(load(repository), text="ROMEO:", max_tokens=30, temperature=0.0) == expected


@pytest.mark.parametrize("controls", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 40, "top_p": 0.9}], ids=str)
def test_a_seed_gives_the_text_of_gpt2x(repository, load, controls):
    decoder = OnnxDecoder(repository / "gpt2_step/1/model.onnx")
    tokenizer = Tokenizer.from_pretrained(SHAKESPEARE)
    expected = generate_text(decoder, tokenizer, "JULIET:", 20, temperature=0.8, seed=7, **controls)
    found = text_of(load(repository), text="JULIET:", max_tokens=20, temperature=0.8, seed=7, **controls)
    assert "JULIET:" + found == expected


@pytest.mark.parametrize(
    ("precision", "cache", "last"), [("fp16", "growing", True), ("int8", "inplace", False), ("w8a8", "inplace-int8", True)]
)  # fmt: skip
def test_every_kind_of_cache_gives_the_text_of_gpt2x(load, tmp_path, precision, cache, last):
    export_triton(open_checkpoint(SHAKESPEARE), tmp_path / "r", ExportOptions((precision,), cache=cache, last=last))
    decoder = OnnxDecoder(tmp_path / "r/gpt2_step/1/model.onnx")
    expected = generate_text(decoder, Tokenizer.from_pretrained(SHAKESPEARE), "ROMEO:", 12, temperature=0)
    assert "ROMEO:" + text_of(load(tmp_path / "r"), text="ROMEO:", max_tokens=12, temperature=0.0) == expected


def test_a_stream_has_the_text_in_pieces_of_whole_characters(repository, load):
    request = Request(text="caf\u00e9 \u65e5\u672c", max_tokens=40, temperature=1.5, seed=3)
    assert load(repository, "gpt2_stream").execute([request]) is None
    pieces = [response.text for response in request.sender.sent]
    assert request.sender.ended
    assert len(pieces) > 10
    assert "".join(pieces) == text_of(load(repository), **request.values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": ""}, "text is empty: it must have at least one token"),
        ({"text": "a", "max_tokens": 256}, "text has 1 tokens and max_tokens is 256; together they exceed"),
        ({"text": "a", "max_tokens": 0}, "max_tokens is 0; it must be 1 or more"),
        ({"text": "a", "temperature": -1.0}, "temperature is -1.0; it must be a finite number of 0 or more"),
        ({"text": "a", "temperature": float("nan")}, "temperature is nan"),
        ({"text": "a", "top_k": -1}, "top_k is -1"),
        ({"text": "a", "top_p": 1.5}, "top_p is 1.5; it must be between 0 and 1"),
        ({"text": "a", "seed": -1}, "seed is -1; it must be 0 or more"),
    ],
    ids=str,
)
def test_what_is_out_of_range_is_refused(repository, load, values, message):
    (response,) = load(repository).execute([Request(**values)])
    assert response.error.startswith(message)
    request = Request(**values)
    load(repository, "gpt2_stream").execute([request])
    assert [response.error.startswith(message) for response in request.sender.sent] == [True]
    assert request.sender.ended


def test_an_unknown_step_is_refused(repository, load):
    with pytest.raises(ValueError, match="the parameter step is 'other'; it must be triton or onnxruntime"):
        load(repository, step="other")


def test_the_command_writes_verifies_and_replaces_a_repository(gpt2x, tmp_path):
    done = gpt2x("export", SHAKESPEARE, "--triton", tmp_path / "r", "--precision", "int4")
    assert done.exit_code == 0, done.output
    assert "gpt2_step/1/model.onnx" in done.stdout
    again = gpt2x("export", SHAKESPEARE, "--triton", tmp_path / "r", "--no-verify")
    assert again.exit_code == 1
    assert "already exists; pass --force to replace it" in again.stderr
    assert gpt2x("export", SHAKESPEARE, "--triton", tmp_path / "r", "--no-verify", "--force").exit_code == 0
    assert files_of(tmp_path / "r") == FILES  # the weights of int4 are gone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "fp32,int8"], "--triton takes one --precision"),
        (["--no-tokenizer"], "--triton needs the tokenizer: remove --no-tokenizer"),
        (["--safetensors"], "--safetensors applies to --onnx only"),
        (["--push", "me/gpt2"], "--push applies to --onnx only"),
    ],
)
def test_options_that_do_not_fit_are_refused(gpt2x, tmp_path, options, message):
    done = gpt2x("export", SHAKESPEARE, "--triton", tmp_path / "r", *options)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "r").exists()


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match="needs a tokenizer; say where one is: --tokenizer DIR"):
        export_triton(random_checkpoint(), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_several_precisions_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has one precision"):
        export_triton(open_checkpoint(SHAKESPEARE), tmp_path / "r", ExportOptions(("fp32", "int8")))


def test_a_later_version_that_triton_would_serve_instead_is_refused(tmp_path):
    (tmp_path / "r/gpt2/2").mkdir(parents=True)
    (tmp_path / "r/gpt2/2/model.py").write_text("")
    with pytest.raises(
        DestinationError, match="holds gpt2/2/model.py, which would be read together with the new files"
    ):
        export_triton(open_checkpoint(SHAKESPEARE), tmp_path / "r", force=True)
    assert files_of(tmp_path / "r") == ["gpt2/2/model.py"]
