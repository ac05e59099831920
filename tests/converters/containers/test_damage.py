"""A flipped byte in a file that carries checksums is always found, whatever byte: every byte of small files is tried.

What lies outside every checksum (a date in a zip archive, say) may be flipped without a word, but never changes a value.
"""

import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
from checkpoints import random_checkpoint
from commands import assert_refused
from paths import FIXTURES

from converters import ChecksumError, ConversionError, LazyTensor, save_checkpoint
from converters.containers.tf_bundle import open_bundle
from converters.containers.torch_zip import open_torch_zip, write_torch_zip
from converters.formats.torch import RECORD
from converters.io.publishing import new_file
from converters.io.sstable import FOOTER

FLIPS = (0x01, 0xFF)  # one bit, and all


def everything(container):
    """All that a file says: its tensors' bytes, its configuration, and what it is said to hold besides."""
    tensors = {name: (t.dtype, t.shape, t.read().tobytes()) for name, t in container.tensors.items()}
    return tensors, container.metadata, container.left_out


def flipped(path, places, flip):
    """Flip these bytes of a file where it lies; flipping them again restores it."""
    fd = os.open(path, os.O_RDWR)
    try:
        for place in places:
            os.pwrite(fd, bytes([os.pread(fd, 1, place)[0] ^ flip]), place)
    finally:
        os.close(fd)


def unnoticed(path, opening, flip):
    """The places where one flipped byte goes without a word; what is read is then what was there before."""
    before, whole, places = everything(opening()), path.read_bytes(), []
    for place in range(len(whole)):
        flipped(path, [place], flip)
        try:
            found = everything(opening())
        except ConversionError as error:
            assert str(path.parent) in str(error)
        else:
            assert found == before, f"byte {place} of {path.name} changes what is read"
            places.append(place)
        flipped(path, [place], flip)
    assert path.read_bytes() == whole
    return places


# ------------------------------------------------------------------------------------------------------ TensorFlow


@pytest.fixture
def bundle(tmp_path):
    return shutil.copytree(FIXTURES / "tf_plain", tmp_path / "tf") / "model.ckpt"


@pytest.mark.untraced
@pytest.mark.parametrize("flip", [*FLIPS, 0x80])  # and the one that says that a number goes on
def test_every_flipped_byte_of_tensorflows_index_is_found_or_changes_nothing(bundle, flip):
    """But for one: where a number of the footer ends, it may as well go on with a zero."""
    index = bundle.with_name("model.ckpt.index")
    found = unnoticed(index, lambda: open_bundle(bundle), flip)
    assert len(found) <= (flip == 0x80)
    assert all(place >= index.stat().st_size - FOOTER for place in found)


@pytest.mark.untraced
@pytest.mark.parametrize("flip", FLIPS)
def test_every_flipped_byte_of_tensorflows_data_is_found_in_the_tensor_that_it_is_in(bundle, flip):
    """Every tensor has a checksum of its own, so that one byte of each is flipped at once: the first, the second, ..."""
    data = bundle.with_name("model.ckpt.data-00000-of-00001")
    whole, tensors = data.read_bytes(), open_bundle(bundle).tensors
    starts, end = {}, 0
    for name, tensor in tensors.items():
        starts[name], end = end, end + tensor.nbytes
    assert end == len(whole)
    for i in range(max(tensor.nbytes for tensor in tensors.values())):
        hit = {name for name, tensor in tensors.items() if i < tensor.nbytes}
        flipped(data, [starts[name] + i for name in hit], flip)
        for name, tensor in open_bundle(bundle).tensors.items():
            if name in hit:
                with pytest.raises(ChecksumError, match=f"{name}: checksum is"):
                    tensor.read()
            else:
                assert tensor.read().tobytes() == whole[starts[name] :][: tensor.nbytes]
        flipped(data, [starts[name] + i for name in hit], flip)
    assert data.read_bytes() == whole


# ------------------------------------------------------------------------------------------------------------- zip

ARRAYS = {
    "wte.weight": np.arange(6, dtype=np.float32).reshape(3, 2) + 0.5,
    "ln_f.bias": np.array([-1.5, 2.5], np.float32),
    "h.0.ln_1.bias": np.array([3.25], np.float16),
}
LAZY = {name: LazyTensor.of(array) for name, array in ARRAYS.items()}


def by_us(path):
    with new_file(path) as out:
        write_torch_zip(out, LAZY, records={RECORD: b'{"n_head": 2}'})


def nanogpt(path):
    with new_file(path) as out:
        arguments = {"n_head": 2, "bias": True, "dropout": 0.5}
        write_torch_zip(out, LAZY, beside={"model_args": arguments, "gpt2x_config": '{"n_head": 2}'})


def by_torch(path):
    torch.save({name: torch.from_numpy(array) for name, array in ARRAYS.items()}, path)


def by_torch_in_one_storage(path):
    """Every tensor is a part of one storage, whose checksum is over all of them."""
    flat = torch.arange(9, dtype=torch.float32)
    torch.save({"a": flat[:6].view(2, 3), "b": flat[6:]}, path)


def covered(path):
    """Every byte of a member that holds numbers, the pickle or the configuration."""
    places: set = set()
    with open(path, "rb") as raw, zipfile.ZipFile(raw) as archive:
        for info in archive.infolist():
            raw.seek(info.header_offset + 26)
            name, extra = (int.from_bytes(raw.read(2), "little") for _ in range(2))
            start = info.header_offset + 30 + name + extra
            if "/data/" in info.filename or info.filename.endswith(("data.pkl", "config.json", "byteorder")):
                places |= set(range(start, start + info.file_size))
    return places


@pytest.mark.untraced
@pytest.mark.parametrize("flip", [FLIPS[0], *(pytest.param(flip, marks=pytest.mark.slow) for flip in FLIPS[1:])])
@pytest.mark.parametrize("write", [by_us, nanogpt, by_torch, by_torch_in_one_storage])
def test_every_flipped_byte_of_a_zip_is_found_or_changes_nothing(tmp_path, write, flip):
    path = tmp_path / "m.bin"
    write(path)
    assert len(covered(path)) > 250
    assert not covered(path) & set(unnoticed(path, lambda: open_torch_zip(path, (RECORD,)), flip))


def test_a_flipped_byte_of_a_number_is_a_checksum_that_differs(tmp_path):
    by_us(tmp_path / "m.bin")
    place = (tmp_path / "m.bin").read_bytes().index(ARRAYS["wte.weight"].tobytes())
    flipped(tmp_path / "m.bin", [place], 1)
    with pytest.raises(ChecksumError, match=r"m.bin: data/0: checksum is .* it is damaged"):
        everything(open_torch_zip(tmp_path / "m.bin", (RECORD,)))


# ------------------------------------------------------------------------------------------------------ a conversion


@pytest.mark.parametrize("kind", ["tf", "bin", "nanogpt"])
def test_damage_that_a_convert_meets_leaves_no_result(gpt2x, tmp_path, kind):
    tiny, source = random_checkpoint(), tmp_path / "source"
    save_checkpoint(tiny, source, kind)
    weights = source / "model.ckpt.data-00000-of-00001" if kind == "tf" else source
    flipped(weights, [weights.read_bytes().index(tiny.tensors["h.0.mlp.c_fc.bias"].read().tobytes()) + 3], 0x40)
    for target in ("out.safetensors", "out.bin", "out"):
        assert_refused(gpt2x("convert", source, tmp_path / target), "checksum is", "it is damaged")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
