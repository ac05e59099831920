"""GGUF files in several parts, which gguf-py wrote: read whole from any part, or refused with what is wrong."""

import shutil
import struct

import pytest
from checkpoints import assert_same_bytes
from paths import FIXTURES

from converters import CheckpointError, FormatError, open_checkpoint, save_checkpoint
from converters.opening.tokenizer import tokenizer_in

WHOLE = FIXTURES / "gguf/Q8_0.gguf"
SETS = {"plain": 3, "no_tensor_first": 4}  # how it was split -> number of parts
NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"


def part(folder, number, count=3):
    return folder / f"wide-{number:05d}-of-{count:05d}.gguf"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FIXTURES / "gguf_split/plain", tmp_path / "parts")


def patch(file, key, value, kind=None):
    """Change a number in the metadata, and the number of its type."""
    data = bytearray(file.read_bytes())
    at = data.index(key.encode()) + len(key)
    if kind is not None:
        struct.pack_into("<I", data, at, kind)
    struct.pack_into("<i" if key == TENSORS else "<H", data, at + 4, value)
    file.write_bytes(data)


@pytest.mark.parametrize("name", SETS)
def test_all_parts_are_read_from_any_of_them_and_from_their_folder(name):
    expected = open_checkpoint(WHOLE)
    folder = FIXTURES / "gguf_split" / name
    parts = [part(folder, number, SETS[name]) for number in range(1, SETS[name] + 1)]
    for path in (folder, *parts):
        found = open_checkpoint(path)
        assert_same_bytes(expected, found)
        assert found.config == expected.config
        assert found.files == tuple(parts)
        assert found.notes == expected.notes
        assert found.tokenizer.vocabulary() == expected.tokenizer.vocabulary()


def test_parts_are_converted_to_one_file_with_the_tensors_of_all(folder, tmp_path):
    save_checkpoint(open_checkpoint(folder), tmp_path / "whole.gguf", dtype="q8_0")
    assert_same_bytes(open_checkpoint(WHOLE), open_checkpoint(tmp_path / "whole.gguf"))
    assert b"split." not in (tmp_path / "whole.gguf").read_bytes()


def test_the_tokenizer_of_parts_is_that_of_the_first(folder):
    assert tokenizer_in(folder).vocabulary() == open_checkpoint(WHOLE).tokenizer.vocabulary()


@pytest.mark.parametrize("gone", [1, 2, 3])
def test_missing_parts_are_named(folder, gone):
    part(folder, gone).unlink()
    for path in (folder, *folder.iterdir()):
        with pytest.raises(FormatError, match=rf"1 of 3 parts missing \({part(folder, gone).name}\); copy or download"):
            open_checkpoint(path)


def test_at_most_five_missing_parts_are_named(folder):
    first = part(folder, 1)
    patch(first, COUNT, 9)
    renamed = first.rename(part(folder, 1, 9))
    with pytest.raises(FormatError) as raised:
        open_checkpoint(renamed)
    assert "8 of 9 parts missing (wide-00002-of-00009.gguf, " in str(raised.value)
    assert "wide-00006-of-00009.gguf, ...)" in str(raised.value)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_part_under_another_name_is_refused_with_its_proper_name(folder, number):
    renamed = part(folder, number).rename(folder / "other.gguf")
    with pytest.raises(
        FormatError, match=f"part {number} of 3 of a GGUF .* rename it to NAME-{number:05d}-of-00003.gguf"
    ):
        open_checkpoint(renamed)


@pytest.mark.parametrize(
    ("number", "key", "value", "said"),
    [
        (1, NUMBER, 1, "part 2 of 3 of a GGUF file that was split, under another name"),
        (2, NUMBER, 2, "wide-00002-of-00003.gguf: not part 2 of 3, as its name states"),
        (2, COUNT, 4, "wide-00002-of-00003.gguf: not part 2 of 3, as its name states"),
        (3, COUNT, 1, "wide-00003-of-00003.gguf: not part 3 of 3, as its name states"),
        (3, NUMBER, 3, "split.no is 3, and split.count is 3"),
        (1, COUNT, 0, "split.no is 0, and split.count is 0"),
        (1, TENSORS, 17, "split.tensors.count is 17, but the parts hold 16"),
        (3, TENSORS, 15, "split.tensors.count is 15, but the parts hold 16"),
        (2, TENSORS, -1, "split.tensors.count is -1"),
    ],
)
def test_parts_that_contradict_one_another_are_refused(folder, number, key, value, said):
    patch(part(folder, number), key, value)
    with pytest.raises(FormatError) as raised:
        open_checkpoint(part(folder, 1))
    assert said in str(raised.value)


def test_a_number_of_parts_that_is_not_an_integer_is_refused(folder):
    patch(part(folder, 1), TENSORS, 1, kind=6)  # a float32
    with pytest.raises(FormatError, match="split.tensors.count is 1.4"):
        open_checkpoint(folder)


def test_a_tensor_in_two_parts_is_refused(folder):
    shutil.copy(part(folder, 2), part(folder, 3))
    patch(part(folder, 3), NUMBER, 2)
    with pytest.raises(FormatError, match=r"wide-00003-of-00003.gguf: duplicate tensor: 'blk.0"):
        open_checkpoint(folder)


def test_a_truncated_part_is_refused_by_its_name(folder):
    file = part(folder, 2)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(FormatError, match="wide-00002-of-00003.gguf"):
        open_checkpoint(part(folder, 1))


def test_parts_of_another_architecture_are_refused_as_the_whole_is(folder):
    first = part(folder, 1)
    first.write_bytes(first.read_bytes().replace(b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0bert", 1))
    for number in (1, 3):
        with pytest.raises(CheckpointError, match="architecture 'bert', not 'gpt2'"):
            open_checkpoint(part(folder, number))


def test_a_folder_with_another_file_beside_the_parts_is_ambiguous(folder):
    shutil.copy(WHOLE, folder)
    with pytest.raises(
        FormatError, match=r"several weight files \(Q8_0.gguf, wide-00001-of-00003.gguf\); pass one of them"
    ):
        open_checkpoint(folder)


def test_a_single_part_is_a_whole_file(folder):
    file = folder / "wide-00001-of-00001.gguf"
    shutil.copy(part(folder, 1), file)
    patch(file, COUNT, 1)
    with pytest.raises(CheckpointError, match="missing"):
        open_checkpoint(file)
