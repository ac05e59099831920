"""NumPy's .npz: arrays that NumPy wrote, and damaged or harmful archives."""

import struct
import zipfile

import numpy as np
import pytest
from checkpoints import assert_same_bytes
from kinds import any_file, named_by

from converters import ChecksumError, FormatError, UnsafeError, open_checkpoint
from converters.containers.npz import open_npz
from converters.dialects import HF


@pytest.mark.parametrize("dtype", ["<f8", "<f4", "<f2", "<i8", "|u1", "|b1"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 4), (0, 4), (700, 800)])
def test_an_array_is_read_as_numpy_reads_it(tmp_path, dtype, shape):
    array = (np.random.default_rng(0).random(shape) * 100).astype(dtype)
    np.savez(tmp_path / "m.npz", x=array, **{"a.b/c": array[None]})
    container = open_npz(tmp_path / "m.npz")
    assert container.tensors["x"].dtype.numpy == dtype
    for name, expected in (("x", array), ("a.b/c", array[None])):
        assert container.tensors[name].shape == expected.shape
        assert container.tensors[name].read().tobytes() == expected.tobytes()
        assert container.tensors[name].map().tobytes() == expected.tobytes()


def test_a_matrix_in_fortrans_order_is_read_as_numpy_reads_it(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.savez(tmp_path / "m.npz", x=np.asfortranarray(array), y=array.T)
    tensors = open_npz(tmp_path / "m.npz").tensors
    assert (tensors["x"].read() == array).all()
    assert (tensors["y"].read() == array.T).all()


def test_a_gpt2_is_read_with_the_configuration_beside_it(tmp_path, tiny):
    any_file(tmp_path, "model.npz")
    checkpoint = open_checkpoint(tmp_path, n_head=2)
    assert (checkpoint.format, checkpoint.dialect) == ("npz", "hf")
    assert_same_bytes(tiny, checkpoint)


def test_a_flipped_byte_is_found(tmp_path):
    path = any_file(tmp_path, "model.npz")
    data = bytearray(path.read_bytes())
    array = named_by(HF)["wte.weight"].tobytes()
    data[data.index(array) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ChecksumError, match=r"wte\.weight\.npy"):
        open_checkpoint(path, n_head=2).tensors["wte.weight"].read()


# ------------------------------------------------------------------------------------------------------------ damage


def header(text, version=1, length=None):
    data = text.encode("latin-1")
    size = len(data) if length is None else length
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", size) + data


def described(descr="'<f4'", order="False", shape="(2, 3)"):
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


SIX = bytes(24)
BROKEN = {
    "no header": (b"", FormatError, "not an array in NumPy's format"),
    "another magic": (b"\x93NUMPX\1\0\0\0\0\0\0\0", FormatError, "not an array in NumPy's format"),
    "version 9": (header(described(), version=9) + SIX, FormatError, "not an array in NumPy's format"),
    "a header behind the end": (header(described(), length=9000) + SIX, FormatError, "a header of 9000 bytes"),
    "a header of 4 GB": (header(described(), version=2, length=2**32 - 1) + SIX, FormatError, "a header of 4294967295 bytes"),
    "a header that calls a function": (header(described(shape="(__import__('os').getpid(), 3)")) + SIX, FormatError, "a header that NumPy does not write"),
    "a structure": (header(described("[('a', '<f4')]")) + SIX, FormatError, "a header that NumPy does not write"),
    "no closing brace": (header(described()[:-3]) + SIX, FormatError, "a header that NumPy does not write"),
    "objects": (header(described("'|O'")) + b"\x80\x04cos\nsystem\n", UnsafeError, "an array of Python objects"),
    "big-endian values": (header(described("'>f4'")) + SIX, FormatError, "values of the type '>f4'"),
    "bfloat16": (header(described("'|V2'", shape="(6, 2)")) + SIX, FormatError, "values of the type '|V2'"),
    "text": (header(described("'<U6'")) + SIX, FormatError, "values of the type '<U6'"),
    "too few bytes": (header(described(shape="(2, 4)")) + SIX, FormatError, "24 bytes of data, but [2, 4] of F32 needs 32"),
    "too many bytes": (header(described(shape="(2, 2)")) + SIX, FormatError, "24 bytes of data, but [2, 2] of F32 needs 16"),
    "a huge size": (header(described(shape="(1099511627776, 1)")) + SIX, FormatError, "invalid shape"),
    "sizes whose product overflows": (header(described(shape="(4294967296, 4294967296)")) + SIX, FormatError, "invalid shape"),
    "a negative size": (header(described(shape="(-2, -3)")) + SIX, FormatError, "a header that NumPy does not write"),
    "nine axes": (header(described(shape="(1, 1, 1, 1, 1, 1, 1, 2, 3)")) + SIX, FormatError, "invalid shape"),
    "three axes in Fortran's order": (header(described(order="True", shape="(1, 2, 3)")) + SIX, FormatError, "an array of 3 axes in Fortran's order"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_array_is_refused(tmp_path, case):
    member, error, words = BROKEN[case]
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive:
        archive.writestr("x.npy", member)
    with pytest.raises(error) as caught:
        open_npz(tmp_path / "m.npz")
    assert words in str(caught.value)


def test_compressed_arrays_and_other_members_are_refused(tmp_path):
    np.savez_compressed(tmp_path / "m.npz", x=np.zeros(1000, np.float32))
    with pytest.raises(FormatError, match=r"compressed or encrypted; save it with numpy\.savez,"):
        open_checkpoint(tmp_path / "m.npz")
    np.savez(tmp_path / "n.npz", x=np.zeros(1000, np.float32))
    with zipfile.ZipFile(tmp_path / "n.npz", "a") as archive:
        archive.writestr("data.pkl", b"")
    with pytest.raises(FormatError, match=r"'data\.pkl' is not an array"):
        open_checkpoint(tmp_path / "n.npz")


def test_a_file_that_ends_anywhere_too_early_is_refused(tmp_path):
    data = any_file(tmp_path, "model.npz").read_bytes()
    for size in range(4, len(data), 97):
        (tmp_path / "m.npz").write_bytes(data[:size])
        with pytest.raises(FormatError):
            open_checkpoint(tmp_path / "m.npz", n_head=2)
