"""``.onnx_adapter`` files: ONNX Runtime reads what gpt2x writes, and the reverse; damaged ones get one line."""

import random
import struct

import numpy as np
import onnxruntime as ort
import pytest

from converters import ConversionError, FormatError
from converters.containers.onnx_adapter import open_onnx_adapter, write_onnx_adapter
from converters.io.publishing import new_file
from converters.tensors import LazyTensor


def arrays():
    """Parameters of several shapes, with names of several lengths."""
    rng = np.random.default_rng(1)
    shapes = {"a": (3, 5), "layer.0.lora_B.weight": (1, 7), "é": (2,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(path, tensors):
    with new_file(path) as out:
        write_onnx_adapter(out, {name: LazyTensor.of(array) for name, array in tensors.items()})
    return path


@pytest.fixture
def theirs(tmp_path):
    """The same parameters in a file that ONNX Runtime wrote."""
    adapter = ort.AdapterFormat()
    adapter.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays().items()})
    adapter.export_adapter(str(tmp_path / "theirs.onnx_adapter"))
    return tmp_path / "theirs.onnx_adapter"


def test_onnx_runtime_reads_what_gpt2x_writes(tmp_path):
    path = write(tmp_path / "ours.onnx_adapter", arrays())
    file = ort.AdapterFormat.read_adapter(str(path))  # it owns the memory of the parameters
    found = file.get_parameters()
    assert found.keys() == arrays().keys()
    for name, array in arrays().items():
        assert np.array_equal(found[name].numpy(), array) and found[name].numpy().shape == array.shape
    ort.LoraAdapter().Load(str(path))


def test_gpt2x_reads_what_onnx_runtime_writes(theirs):
    found = open_onnx_adapter(theirs).tensors
    assert found.keys() == arrays().keys()
    for name, array in arrays().items():
        assert np.array_equal(found[name].read(), array) and found[name].shape == array.shape


def test_equal_parameters_give_equal_bytes(tmp_path):
    first = write(tmp_path / "1.onnx_adapter", arrays())
    assert first.read_bytes() == write(tmp_path / "2.onnx_adapter", arrays()).read_bytes()


def test_data_begins_at_multiples_of_16(tmp_path):
    path = write(tmp_path / "ours.onnx_adapter", arrays())
    data = path.read_bytes()
    for array in arrays().values():
        assert data.index(array.tobytes()) % 16 == 0


def test_an_adapter_without_parameters_is_written_and_read(tmp_path):
    path = write(tmp_path / "empty.onnx_adapter", {})
    assert not open_onnx_adapter(path).tensors
    assert not ort.AdapterFormat.read_adapter(str(path)).get_parameters()


@pytest.mark.parametrize("end", [0, 4, 7, 12, 30, 60, 200, -20])
def test_a_truncated_file_is_refused(theirs, end):
    theirs.write_bytes(theirs.read_bytes()[:end])
    with pytest.raises(FormatError):
        open_onnx_adapter(theirs)


def test_another_programs_file_is_named(tmp_path):
    path = tmp_path / "x.onnx_adapter"
    path.write_bytes(b"not an adapter of anything")
    with pytest.raises(FormatError, match="not an adapter of ONNX Runtime"):
        open_onnx_adapter(path)


def changed(path, old, new):
    """Replace bytes that occur once."""
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    return path


SHAPE = struct.pack("<2q", 3, 5)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (
            (3, 1 << 20),
            "60 bytes, but shape [3, 1048576] of F32 needs 12582912",
        ),  # ONNX Runtime 1.24 reads beyond the file
        ((3, 4), "60 bytes, but shape [3, 4] of F32 needs 48"),
        ((-3, -5), "invalid shape"),
        ((1 << 39, 1 << 39), "invalid shape"),
    ],
)
def test_a_shape_that_is_not_that_of_the_data_is_refused(theirs, shape, said):
    with pytest.raises(FormatError) as raised:
        open_onnx_adapter(changed(theirs, SHAPE, struct.pack("<2q", *shape)))
    assert said in str(raised.value) and "'a'" in str(raised.value)


def test_two_parameters_of_one_name_are_refused(tmp_path):
    path = write(tmp_path / "x.onnx_adapter", {"one": np.ones(2, np.float32), "two": np.ones(2, np.float32)})
    with pytest.raises(FormatError, match="duplicate parameter 'one'"):
        open_onnx_adapter(changed(path, b"two\0", b"one\0"))


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    path = write(tmp_path / "x.onnx_adapter", {"name": np.ones(2, np.float32)})
    with pytest.raises(FormatError, match="not UTF-8"):
        open_onnx_adapter(changed(path, b"name\0", b"n\xff\xfee\0"))


def test_another_version_of_the_format_is_refused(tmp_path):
    path = write(tmp_path / "x.onnx_adapter", {"name": np.ones(2, np.float32)})
    data = bytearray(path.read_bytes())
    struct.pack_into("<i", data, 24, 2)
    path.write_bytes(data)
    with pytest.raises(FormatError, match="version 2 of the format"):
        open_onnx_adapter(path)


def test_parameters_that_share_their_data_are_refused(tmp_path):
    """A small file could otherwise ask for any amount of memory."""
    arrays = {f"p{i}": np.full(100, i + 1, np.float32) for i in range(4)}
    path = write(tmp_path / "x.onnx_adapter", arrays)
    data = bytearray(path.read_bytes())
    first = data.index(arrays["p0"].tobytes()) - 4
    for i in range(4):
        table = 40 + 4 + 4 * 4 + 20 * i  # root, vector of parameters, tables
        struct.pack_into("<I", data, table + 16, first - (table + 16))
    path.write_bytes(data[: first + 4 + 400])
    with pytest.raises(FormatError, match="overlap"):
        open_onnx_adapter(path)


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_file_is_read_or_refused_in_one_line(theirs, seed):
    whole = theirs.read_bytes()
    chance = random.Random(seed)
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.choice([0, 1, 4, 127, 128, 255, chance.randrange(256)])
        theirs.write_bytes(data)
        try:
            for tensor in open_onnx_adapter(theirs).tensors.values():
                tensor.read()
        except ConversionError as error:
            assert "\n" not in str(error)


def test_an_adapter_larger_than_the_format_allows_is_refused_before_it_is_written(tmp_path):
    from converters.dtypes import F32

    with pytest.raises(FormatError, match="one .onnx_adapter file holds 2147483647"), new_file(tmp_path / "x") as out:
        write_onnx_adapter(out, {"huge": LazyTensor.zeros(F32, (1 << 30, 1))})
    assert not list(tmp_path.iterdir())
