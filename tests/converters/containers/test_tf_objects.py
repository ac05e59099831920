"""Object-based checkpoints, which TensorFlow 2 and Keras wrote of transformers' TFGPT2LMHeadModel: read by the variables' names."""

import shutil
import struct

import pytest
from checkpoints import assert_same_bytes
from paths import FIXTURES

from converters import CheckpointError, ConversionError, FormatError, open_checkpoint
from converters.containers.tf_bundle import Entry
from converters.containers.tf_objects import KEY, MAX_NAME, variable_names
from converters.io.checksums import crc32c
from converters.io.protobuf import field_bytes, varint
from converters.io.reading import File
from converters.io.sstable import mask, read_table

OBJECTS = FIXTURES / "keras_objects"
KINDS = {
    "weights": "model.ckpt",
    "saved_model": "saved_model/1/variables/variables",
    "opt": "ckpt-1",
    "slots": "ckpt-1",
}


@pytest.mark.parametrize("name", ["weights", "opt", "slots"])
def test_the_weights_of_keras_are_read_by_the_names_of_their_variables(name):
    found = open_checkpoint(OBJECTS / name)
    assert (found.format, found.dialect) == ("tf", "keras")
    assert_same_bytes(open_checkpoint(FIXTURES / "tf_plain"), found)
    assert found.config.n_head == 2


@pytest.mark.parametrize("path", ["saved_model/1", "saved_model/1/variables/variables.index"])
def test_the_variables_of_a_saved_model_are_read(path):
    heads = None if path.endswith("1") else 2
    found = open_checkpoint(OBJECTS / "saved_model" / path, n_head=heads)
    assert_same_bytes(open_checkpoint(FIXTURES / "tf_plain"), found)


def test_a_saved_model_has_the_configuration_of_the_folder_that_it_was_saved_into(tmp_path):
    folder = shutil.copytree(OBJECTS / "saved_model", tmp_path / "model")
    assert open_checkpoint(folder / "saved_model/1").config.n_head == 2
    (folder / "config.json").unlink()
    with pytest.raises(ConversionError, match="number of attention heads"):
        open_checkpoint(folder / "saved_model/1")


@pytest.mark.parametrize(("name", "moment"), [("opt", "opt/_variables/"), ("slots", ".OPTIMIZER_SLOT/opt/m/")])
def test_the_moments_of_an_optimizer_are_left_out_and_listed(name, moment):
    left_out = open_checkpoint(OBJECTS / name).left_out
    assert sum(moment in key for key in left_out) >= 28
    assert KEY.decode() not in left_out


# ------------------------------------------------------------------------------------------------------------ the graph


def stored_graph(name: str) -> tuple[bytes, int, list[bytes]]:
    """The tensor of the graph in a fixture, its checksum, and the keys of all tensors."""
    prefix = OBJECTS / name / KINDS[name]
    table = dict(read_table(File(prefix.with_name(prefix.name + ".index"))))
    entry = Entry.parse(table[KEY], "x")
    data = prefix.with_name(prefix.name + ".data-00000-of-00001").read_bytes()
    return data[entry.offset : entry.offset + entry.size], entry.crc, list(table)


def test_each_key_has_the_name_of_its_variable():
    names = variable_names(*stored_graph("saved_model"), "x")
    assert names[b"variables/0/.ATTRIBUTES/VARIABLE_VALUE"] == "tfgpt2lm_head_model/transformer/wte/embeddings:0"
    assert len(names) == len(set(names.values())) == 28


@pytest.mark.parametrize("at", [0, 1, 2, 5, 6, 100, -1])
def test_a_changed_byte_of_the_graph_is_detected(at):
    data, crc, keys = stored_graph("weights")
    changed = bytearray(data)
    changed[at] ^= 1
    with pytest.raises(FormatError):
        variable_names(bytes(changed), crc, keys, "x")


@pytest.mark.parametrize("end", [0, 1, 2, 5, 6, 100, -1])
def test_a_truncated_graph_is_refused(end):
    data, crc, keys = stored_graph("weights")
    with pytest.raises(FormatError):
        variable_names(data[:end], crc, keys, "x")


def graph(*variables: tuple[bytes, bytes]) -> tuple[bytes, int]:
    """A graph of variables (key, name), as TensorFlow stores it."""
    nodes = b""
    for key, name in variables:
        attribute = field_bytes(1, b"VARIABLE_VALUE") + field_bytes(2, name) + field_bytes(3, key)
        nodes += field_bytes(1, field_bytes(2, attribute))
    length = crc32c(0, struct.pack("<I", len(nodes)))
    check = struct.pack("<I", mask(length))
    return varint(len(nodes)) + check + nodes, mask(crc32c(crc32c(length, check), nodes))


def test_variables_with_the_same_name_are_refused_with_what_to_do():
    with pytest.raises(FormatError, match=r"several variables have the same name. Save .* tf_model.h5"):
        variable_names(*graph((b"a", b"kernel"), (b"b", b"kernel")), [b"a", b"b"], "x")


def test_a_variable_under_two_attributes_has_one_name():
    assert variable_names(*graph((b"a", b"v"), (b"a", b"v"), (b"gone", b"v")), [b"a"], "x") == {b"a": "v:0"}


@pytest.mark.parametrize("name", [b"\xff", b"n" * (MAX_NAME + 1)])
def test_a_name_that_is_no_name_is_refused(name):
    with pytest.raises(FormatError, match="a name of a variable"):
        variable_names(*graph((b"a", name)), [b"a"], "x")


def test_a_checkpoint_of_other_variables_is_refused():
    with pytest.raises(CheckpointError, match="none of its 2 tensors has a name of a GPT-2 parameter"):
        open_checkpoint(FIXTURES / "tf_object_based")
