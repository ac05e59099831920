"""Regression tests for faults that fuzzing and code review found. Each file must be read or refused, quickly."""

import io
import json
import struct
import subprocess
import time
from pathlib import Path

import pytest
import torch
from checkpoints import TINY, arrays_of, assemble, random_checkpoint
from guard import MEMORY, status

from converters import (
    CheckpointError,
    ConversionError,
    FormatError,
    LazyTensor,
    TokenizerError,
    open_checkpoint,
    save_checkpoint,
)
from converters.config import to_hf
from converters.containers.container import Container
from converters.containers.onnx import open_onnx
from converters.containers.tf_bundle import open_bundle
from converters.containers.torch_pickle import load_pickle
from converters.dtypes import F32
from converters.formats.gguf import read_vocabulary
from converters.io.checksums import crc32c
from converters.io.json import parse_json
from converters.io.protobuf import varint
from converters.io.sstable import MAGIC, mask


@pytest.fixture(autouse=True)
def quickly():
    """Limit each test to a minute of CPU time (a second is enough) and 256 MB."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak memory
    start, before = time.process_time(), status("VmHWM")
    yield
    assert time.process_time() - start < 60
    assert status("VmHWM") - before < MEMORY


def block(entries):
    """Return an index block with its checksum. entries: (length of the shared key prefix, rest of the key, value)."""
    data = b"".join(varint(s) + varint(len(k)) + varint(len(v)) + k + v for s, k, v in entries) + struct.pack(
        "<2I", 0, 1
    )
    return data + b"\0" + struct.pack("<I", mask(crc32c(0, data + b"\0")))


def field(number, data):
    """Return a length-delimited protobuf field."""
    return varint(number << 3 | 2) + varint(len(data)) + data


# ------------------------------------------------------------------------------------------------------ memory and time


def test_long_names_that_share_a_prefix_take_no_memory(tmp_path):
    names = [(0, b"a" * 4000 + struct.pack(">I", 0), b"")]
    names += [(4000, struct.pack(">I", i), b"") for i in range(1, 90_000)]
    data, meta = block(names), block([])
    handle = varint(0) + varint(len(data) - 5)
    index = block([(0, b"b", handle)])
    places = varint(len(data)) + varint(len(meta) - 5) + varint(len(data) + len(meta)) + varint(len(index) - 5)
    (tmp_path / "m.index").write_bytes(data + meta + index + places.ljust(40, b"\0") + struct.pack("<Q", MAGIC))
    with pytest.raises(FormatError, match="the names exceed the limit of"):
        open_bundle(tmp_path / "m")


@pytest.mark.untraced
def test_very_many_keras_prefixes_are_not_all_tried(tmp_path):
    none = LazyTensor.zeros(F32, (0,))
    tensors = {f"{i}/ln_f/gamma:0": none for i in range(20_000)}
    with pytest.raises(CheckpointError):
        assemble(Container("hdf5", tmp_path, tensors), {"n_head": 2}, "x")


@pytest.mark.untraced
def test_very_many_names_of_one_tensor_are_counted_quickly(tmp_path):
    one = torch.zeros(1)
    torch.save(
        {f"{i}lm_head.weight": one for i in range(40_000)}, tmp_path / "m.bin", _use_new_zipfile_serialization=False
    )
    with pytest.raises(ConversionError):
        open_checkpoint(tmp_path / "m.bin")


@pytest.mark.untraced
@pytest.mark.parametrize("count", [19_000, pytest.param(66_000, marks=pytest.mark.slow)])
def test_very_many_initializers_in_onnx_are_handled_quickly(tmp_path, count):
    tensors = (field(8, b"%x" % i) + b"\x10\x01\x08\x00" for i in range(count))
    (tmp_path / "m.onnx").write_bytes(b"\x08\x07" + field(7, b"".join(field(5, tensor) for tensor in tensors)))
    with pytest.raises(ConversionError, match="no tensors|duplicate initializer"):
        open_checkpoint(tmp_path / "m.onnx")


def test_a_name_with_thousands_of_prefixes_is_not_unwrapped(tmp_path):
    tensors = {"module." * 9000 + name: tensor for name, tensor in random_checkpoint().tensors.items()}
    with pytest.raises(CheckpointError, match="not a GPT-2"):
        assemble(Container("msgpack", tmp_path, tensors), {"n_head": 2}, "x")


DOUBLING = b"".join(b"q%ch%c\x86" % (i, i) for i in range(40))


@pytest.mark.parametrize("value", [b")" + DOUBLING, b")" + b"\x85" * 5000, b"\x8b\x00\x10\x00\x00" + b"\x01" * 4096], ids=["doubled", "nested", "long"])  # fmt: skip
def test_a_model_argument_that_is_not_a_plain_value_is_refused(tmp_path, value):
    torch.save({"model": {n: torch.from_numpy(a) for n, a in arrays_of(random_checkpoint()).items()}, "model_args": {"n_head": 12345}}, tmp_path / "m.pt", _use_new_zipfile_serialization=False)  # fmt: skip
    data = (tmp_path / "m.pt").read_bytes()
    assert data.count(b"M90") == 1
    (tmp_path / "m.pt").write_bytes(data.replace(b"M90", value))
    with pytest.raises(FormatError):
        open_checkpoint(tmp_path / "m.pt")


@pytest.mark.parametrize("body", [rb"cos\nsys\stem" + b"\n.", rb"S'\s'" + b"\n."])
def test_a_bad_escape_in_a_pickle_is_refused_where_warnings_are_errors(body):
    with pytest.raises(FormatError):
        load_pickle(io.BytesIO(b"\x80\x02" + body), "x")


def test_a_number_of_thousands_of_digits_in_a_pickle_is_refused():
    with pytest.raises(FormatError, match="a number"):
        load_pickle(io.BytesIO(b"\x80\x02\x8b\x00\x10\x00\x00" + b"\x01" * 4096 + b"."), "x")


# ----------------------------------------------------------------------------------------------------- text and numbers


@pytest.mark.parametrize(
    "printed",
    [
        b"", b"\xff", b"\0\0\0{", b"5", b"[]", b"{}", b'{"datasets": 5}', b'{"datasets": [5]}', b'{"datasets": [["x", "<f4", [2]]]}',
        b'{"datasets": [[5, "<f4", [2], 0]]}', b'{"datasets": [["x", 4, [2], 0]]}', b'{"datasets": [["x", "<f4", null, 0]]}',
        b'{"datasets": [["x", "<f4", ["2"], 0]]}', b'{"datasets": [["x", "<f4", [2.0], 0]]}', b'{"datasets": [["x", "<f4", [2], true]]}',
        b'{"datasets": [["x", "<f4", [-2], -4]]}', b'{"datasets": [["x", "<f4", [1' + b"0" * 4000 + b'], 0]]}', b"[" * 100_000,
    ],
    ids=lambda printed: printed[:40].decode("latin-1"),
)  # fmt: skip
def test_a_listing_of_hdf5_data_sets_that_is_malformed_is_refused(tmp_path, monkeypatch, printed):
    done = subprocess.CompletedProcess([], 0, printed, b"")
    monkeypatch.setattr("converters.containers.hdf5.subprocess.run", lambda *args, **options: done)
    (tmp_path / "m.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(FormatError, match="cannot list its data sets"):
        open_checkpoint(tmp_path / "m.h5")


@pytest.mark.parametrize("key", ["n_embd", "n_head", "n_positions", "n_inner", "eos_token_id"])
def test_a_number_of_thousands_of_digits_is_refused(tmp_path, key):
    save_checkpoint(random_checkpoint(), tmp_path / "hf")
    (tmp_path / "hf/config.json").write_text(json.dumps({**to_hf(TINY), key: 9 * 10**4299}))
    with pytest.raises(FormatError, match="a number of 4300 digits"):
        open_checkpoint(tmp_path / "hf")


@pytest.mark.parametrize("text", ["5", "-1.5", "null", "true", '"text"', "[]", "[5]", "NaN"])
def test_json_that_is_not_an_object_is_refused(tmp_path, text):
    with pytest.raises(FormatError, match="expected a JSON object"):
        parse_json(text.encode(), "x")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FormatError, match="expected a JSON object"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("depth", [70, 500, *range(900, 1000, 7), 100_000])
def test_values_nested_deeply_are_refused(depth):
    with pytest.raises(FormatError, match=r"nested|recursion"):
        parse_json(b'{"n_head": ' + b"[" * depth + b"]" * depth + b"}", "x")


@pytest.mark.parametrize("number", [1, 8, 13])
def test_an_onnx_tensor_field_with_a_wrong_wire_type_is_refused(tmp_path, number):
    wrong = varint(number << 3 | 1) + bytes(8)
    tensor = wrong + field(8, b"wte.weight") + b"\x10\x01"
    (tmp_path / "m.onnx").write_bytes(b"\x08\x07" + field(7, field(5, tensor)))
    with pytest.raises(FormatError):
        open_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "changes",
    [{"tokens": 5}, {"tokens": "abc"}, {"tokens": 0.5}, {"token_type": 1}, {"token_type": [1]}, {"merges": 3}, {"tokens": [1, 2, 3]}],
    ids=str,
)  # fmt: skip
def test_a_gguf_vocabulary_that_is_not_a_list_is_refused(changes):
    sound = {"model": "gpt2", "tokens": ["a", "b", "ab"], "merges": ["a b"], "token_type": [1, 1, 1]}
    vocabulary = {f"tokenizer.ggml.{key}": value for key, value in sound.items()}
    assert read_vocabulary(vocabulary, "x").ids == {"a": 0, "b": 1, "ab": 2}
    with pytest.raises(TokenizerError):
        read_vocabulary({**vocabulary, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}}, "x")


@pytest.mark.parametrize("value", [["gpt2"], {"a": 1}, 3])
def test_a_model_type_that_is_no_text_is_refused(tmp_path, value):
    save_checkpoint(random_checkpoint(), tmp_path / "hf")
    (tmp_path / "hf/config.json").write_text(json.dumps({**to_hf(TINY), "model_type": value}))
    with pytest.raises(ConversionError, match="model_type"):
        open_checkpoint(tmp_path / "hf")
