"""TensorFlow's checkpoint: what TensorFlow wrote is read, and whatever is wrong with a file is said."""

import shutil
import struct

import numpy as np
import pytest
from bundles import Bundle, raw_index, refused
from checkpoints import arrays_of, assert_same_bytes, random_checkpoint
from paths import FIXTURES, RELEASE, needs_shared

from converters import ChecksumError, FormatError, open_checkpoint, save_checkpoint
from converters.containers.tf_bundle import Entry, open_bundle, slice_key
from converters.dialects import OPENAI
from converters.io.checksums import crc32c
from converters.io.protobuf import varint
from converters.io.publishing import new_file
from converters.io.reading import File
from converters.io.sstable import FOOTER, HEADER, MAGIC, mask, read_table, unmask, write_index
from converters.spec import GPT2Config

VALUES = np.load(FIXTURES / "tiny.npz")


# ------------------------------------------------------------------------------- files that TensorFlow wrote


@pytest.mark.parametrize("folder", ["tf_plain", "tf_two_shards", "tf_partitioned", "tf_training", "tf_fp16"])
def test_what_tensorflow_wrote_is_read_to_the_same_values(folder):
    checkpoint = open_checkpoint(FIXTURES / folder)
    dtype = np.float16 if folder == "tf_fp16" else np.float32
    for name, array in arrays_of(checkpoint).items():
        expected = VALUES[OPENAI.names(name)[0]].astype(dtype)
        assert array.tobytes() == expected.tobytes(), name
    assert checkpoint.checksummed == 28
    assert (checkpoint.config.n_head, checkpoint.config.n_ctx) == (2, 10)


def test_what_training_adds_is_left_out_and_listed():
    left_out = open_checkpoint(FIXTURES / "tf_training").left_out
    assert {"global_step", "beta1_power", "beta2_power", "model/wte/Adam", "model/wte/Adam_1"} <= set(left_out)
    assert len(left_out) == 3 + 2 * 28
    assert open_checkpoint(FIXTURES / "tf_plain").left_out == ()


@pytest.mark.parametrize("name", ["", "model.ckpt", "model.ckpt.index", "model.ckpt.data-00001-of-00002"])
def test_a_checkpoint_opens_by_directory_prefix_index_or_data(name):
    assert len(open_checkpoint(FIXTURES / "tf_two_shards" / name).tensors) == 28


@pytest.mark.parametrize("name", ["", "model.ckpt"])
def test_a_v1_checkpoint_is_named_and_refused(name):
    with pytest.raises(FormatError, match="V1 checkpoint"):
        open_checkpoint(FIXTURES / "tf_v1" / name)


def test_a_v1_checkpoint_called_an_index_is_named_and_refused(tmp_path):
    shutil.copy(FIXTURES / "tf_v1" / "model.ckpt", tmp_path / "model.ckpt.index")
    with pytest.raises(FormatError, match="V1 checkpoint"):
        open_checkpoint(tmp_path)


# ------------------------------------------------------------------------------------- files that we write


def test_a_written_checkpoint_reads_back_to_the_same_bytes(tmp_path, tiny):
    save_checkpoint(tiny, tmp_path / "tf", "tf")
    back = open_checkpoint(tmp_path / "tf")
    assert_same_bytes(tiny, back)
    assert back.checksummed == len(back.tensors)


def test_an_index_is_written_byte_for_byte_as_tensorflow_writes_it(tmp_path):
    save_checkpoint(open_checkpoint(FIXTURES / "tf_plain"), tmp_path / "tf", "tf")
    for name in ("model.ckpt.index", "model.ckpt.data-00000-of-00001"):
        assert (tmp_path / "tf" / name).read_bytes() == (FIXTURES / "tf_plain" / name).read_bytes()


def test_an_index_of_several_blocks_reads_back(tmp_path):
    entries = {f"name{i:06}/{'x' * 300}".encode(): bytes([i % 251]) * 50 for i in range(2000)}
    with new_file(tmp_path / "big.index") as out:
        write_index(out, entries)
    assert dict(read_table(File(tmp_path / "big.index"))) == {b"": HEADER, **entries}


@needs_shared
def test_the_index_of_openais_release_is_read_and_written_to_the_same_bytes(tmp_path):
    real = RELEASE / "model.ckpt.index"
    table = dict(read_table(File(real)))
    entries = {key: Entry.parse(value, str(key)) for key, value in table.items() if key}
    assert len(entries) == 148
    assert table[b""] == HEADER
    with new_file(tmp_path / "index") as out:
        write_index(out, {key: entry.serialize() for key, entry in entries.items()})
    assert (tmp_path / "index").read_bytes() == real.read_bytes()


@needs_shared
def test_the_real_index_lists_gpt2_small_and_its_148_checksums():
    from gpt2x.verify.weights import release_checksums

    real = RELEASE / "model.ckpt.index"
    entries = {key: Entry.parse(value, "") for key, value in read_table(File(real)) if key}
    table = release_checksums()
    assert {name: facts["shape"] for name, facts in table.items()} == GPT2Config().shapes()
    for name, facts in table.items():
        entry = entries[OPENAI.names(name)[0].encode()]
        assert unmask(entry.crc) == facts["crc32c"]
        assert entry.shape in (facts["shape"], (1, *facts["shape"]))


@needs_shared
def test_the_release_without_its_data_file_is_refused():
    with pytest.raises(FormatError, match="data-00000-of-00001: no such file"):
        open_checkpoint(RELEASE)


def test_the_crc_and_its_mask_are_those_of_the_standard():
    assert crc32c(0, b"123456789") == 0xE3069283  # the check value of CRC-32C
    assert unmask(mask(0x12345678)) == 0x12345678
    assert mask(crc32c(0, b"foo")) != crc32c(0, b"foo")


# --------------------------------------------------------------------------------------------- broken files


@pytest.fixture
def bundle(tmp_path):
    return Bundle(tmp_path / "tf")


def test_the_bundles_that_the_tests_write_are_sound(bundle):
    bundle.write()
    bundle.open()


@pytest.mark.parametrize("size", [0, 1, 47])
def test_an_index_shorter_than_its_footer_is_refused(bundle, size):
    bundle.index.write_bytes(bundle.index.read_bytes()[-size:] if size else b"")
    refused(bundle, "truncated")


def test_a_bad_magic_is_refused(bundle):
    data = bundle.index.read_bytes()
    bundle.index.write_bytes(data[:-1] + b"\0")
    refused(bundle, "no table magic")


def test_padding_in_the_footer_that_is_not_zero_is_refused(bundle):
    data = bytearray(bundle.index.read_bytes())
    data[-9] = 1
    bundle.index.write_bytes(data)
    refused(bundle, "padding")


def test_a_handle_past_the_end_is_refused(bundle):
    data = bundle.index.read_bytes()[:-FOOTER]
    footer = varint(10_000) + varint(8) + varint(0) + varint(8)
    bundle.index.write_bytes(data + footer.ljust(40, b"\0") + struct.pack("<Q", MAGIC))
    refused(bundle, "ends after the file")


def test_an_overlong_number_is_refused(bundle):
    data = bundle.index.read_bytes()[:-FOOTER]
    bundle.index.write_bytes(data + (b"\xff" * 10 + b"\x01").ljust(40, b"\0") + struct.pack("<Q", MAGIC))
    refused(bundle, "does not fit into 64 bits")


@pytest.mark.untraced
def test_every_flipped_byte_of_an_index_is_refused(bundle):
    data = bundle.index.read_bytes()
    for i in range(len(data)):
        bundle.index.write_bytes(data[:i] + bytes([data[i] ^ 0x55]) + data[i + 1 :])
        with pytest.raises(FormatError):
            bundle.open()


@pytest.mark.untraced
def test_every_flipped_byte_of_the_data_is_refused(bundle):
    data = bundle.data.read_bytes()
    for i in range(0, len(data), 29):
        bundle.data.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        refused(bundle, "checksum is", ChecksumError)


ONE = b"\0\x00" + varint(len(HEADER)) + HEADER
RESTART = struct.pack("<2I", 0, 1)


@pytest.mark.parametrize(
    ("block", "kind", "match"),
    [
        (ONE + RESTART, 1, "compressed"),
        (ONE, 0, "restart points"),
        (b"\x01", 0, "truncated"),
        (ONE + struct.pack("<I", 0), 0, "restart points"),
        (ONE + struct.pack("<I", 10_000), 0, "restart points"),
        (ONE + struct.pack("<2I", 3, 1), 0, "restart points"),
        (ONE + struct.pack("<3I", 0, 5, 2), 0, "restart point that is not an entry"),
        (ONE + b"\x05\x01\0a" + RESTART, 0, "invalid entry"),
        (ONE + b"\0\x7f\0a" + RESTART, 0, "invalid entry"),
        (ONE + b"\0\x01\x7fa" + RESTART, 0, "invalid entry"),
        (ONE + b"\0\x01\0b\0\x01\0a" + RESTART, 0, "out of order"),
        (ONE + b"\0\x01\0b\0\x01\0b" + RESTART, 0, "duplicate"),
        (ONE + b"\x80" + RESTART, 0, "invalid entry"),
        (ONE + b"\xff" * 11 + RESTART, 0, "does not fit into 64 bits"),
    ],
)  # fmt: skip
def test_a_block_that_is_not_as_the_format_says_is_refused(bundle, block, kind, match):
    raw_index(bundle.index, block, kind)
    refused(bundle, match)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (b"\x08\x01\x10\x01\x1a\x02\x08\x01", "big-endian"),
        (b"\x08\x01\x1a\x04\x08\x01\x10\x02", "readers of version 2"),
        (b"\x08\x01\x1a\x04\x08\x01\x18\x01", "readers of version"),
        (b"\x1a\x02\x08\x01", "invalid shard count: 0"),
        (b"\x08" + varint(2**64 - 1) + b"\x1a\x02\x08\x01", "invalid shard count: -1"),
        (
            b"\x08\x02\x1a\x02\x08\x01",
            "data-00000-of-00002: no such file; it holds values of the checkpoint: download or copy it again",
        ),
    ],
)
def test_a_header_that_cannot_be_read_is_refused(bundle, header, match):
    bundle.header = header
    bundle.write()
    refused(bundle, match)


def test_an_index_without_a_header_is_refused(bundle):
    raw_index(bundle.index, b"\0\x01\0a" + RESTART)
    refused(bundle, "no header")


NAME = "model/ln_f/b"


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"shard": 1}, "invalid shard: data file 2 of 1"),
        ({"shard": -1}, "negative"),
        ({"offset": -4}, "negative"),
        ({"size": -24}, "negative"),
        ({"size": 20}, "20 bytes, but shape"),
        ({"shape": (7,)}, "24 bytes, but shape"),
        ({"shape": (2**62, 2**62)}, "invalid shape"),
        ({"shape": (-1,)}, "invalid shape"),
        ({"shape": (1,) * 9}, "invalid shape"),
        ({"dtype": 99}, "data type 99"),
        ({"offset": 2**62}, "truncated"),
        ({"offset": 0}, "overlaps"),
        ({"crc": 1}, "checksum is"),
    ],
)
def test_an_entry_that_cannot_be_is_refused(bundle, fields, match):
    entry = bundle.entries[NAME.encode()]
    values = {**vars(entry), **fields}
    negative = {k: v % 2**64 for k, v in values.items() if isinstance(v, int)}
    shape = tuple(n % 2**64 for n in values["shape"])
    bundle.write(model__ln_f__b=Entry(**{**values, **negative, "shape": shape}).serialize())
    refused(bundle, match)


def test_a_shape_of_unknown_rank_is_refused(bundle):
    bundle.write(model__ln_f__b=bundle.raw[NAME.encode()].replace(b"\x12\x04\x12\x02\x08\x06", b"\x12\x02\x18\x01"))
    refused(bundle, "unknown rank")


def test_an_entry_that_is_no_message_is_refused(bundle):
    bundle.write(model__ln_f__b=b"\x0b")
    refused(bundle, "unknown wire type")


def test_a_name_that_is_not_utf8_is_refused(bundle):
    bundle.raw[b"model/\xff"] = bundle.raw.pop(NAME.encode())
    bundle.write()
    refused(bundle, "not UTF-8")


def test_a_missing_data_file_is_refused(bundle):
    bundle.data.unlink()
    refused(bundle, "no such file")


def test_a_data_file_that_is_cut_short_is_refused(bundle):
    bundle.data.write_bytes(bundle.data.read_bytes()[:-1])
    refused(bundle, "truncated")


@pytest.fixture
def sliced(tmp_path):
    return Bundle(tmp_path / "tf", "tf_partitioned")


def whole(dims, *slices):
    """The entry of a partitioned float variable."""

    def message(field, data):
        return bytes([field << 3 | 2]) + varint(len(data)) + data

    shape = b"".join(message(2, b"\x08" + varint(n)) for n in dims)
    parts = [
        b"".join(message(1, (b"\x08" + varint(s) if s else b"") + b"\x10" + varint(n)) for s, n in e) for e in slices
    ]
    return b"\x08\x01" + message(2, shape) + b"".join(message(7, part) for part in parts)


A, B, C = ((0, 5), (0, 6)), ((5, 4), (0, 6)), ((9, 4), (0, 6))


def test_the_slices_of_a_partitioned_variable_are_found_by_their_keys(sliced):
    assert all(slice_key(b"model/wte", extents) in sliced.raw for extents in (A, B, C))
    sliced.write(model__wte=whole((13, 6), A, B, C))
    sliced.open()


@pytest.mark.parametrize(
    ("slices", "match"),
    [
        ((A, B), "leave a gap"),
        ((A, B, C, C), "overlap"),
        ((A, B, ((9, 3), (0, 6))), "missing or has another shape"),
        ((A, B, ((9, 5), (0, 6))), "outside the shape"),
        ((A, B, ((9, 4),)), "outside the shape"),
    ],
)
def test_slices_that_do_not_make_a_whole_are_refused(sliced, slices, match):
    sliced.write(model__wte=whole((13, 6), *slices))
    refused(sliced, match)


# ----------------------------------------------------------------------------------- the file "checkpoint"


def test_the_name_in_the_state_file_is_looked_for_here_and_never_followed(bundle, tmp_path):
    elsewhere = Bundle(tmp_path / "elsewhere")
    (bundle.folder / "checkpoint").write_text(f'model_checkpoint_path: "{elsewhere.folder}/model.ckpt"\n')
    elsewhere.data.write_bytes(b"")
    bundle.open()  # reads its own data file, not the one that the name points to


@pytest.mark.parametrize("name", ["../elsewhere/model.ckpt2", "/etc/passwd", "other"])
def test_a_state_file_that_names_something_else_is_refused(bundle, name):
    (bundle.folder / "checkpoint").write_text(f'model_checkpoint_path: "{name}"\n')
    refused(bundle, "which is not here")


def test_of_several_checkpoints_the_state_file_chooses(bundle):
    for path in list(bundle.folder.glob("model.ckpt.*")):
        shutil.copy(path, bundle.folder / path.name.replace("model.ckpt", "model.ckpt-2"))
    bundle.data.write_bytes(b"")
    (bundle.folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-2"\n')
    bundle.open()
    (bundle.folder / "checkpoint").unlink()
    refused(bundle, "several checkpoints")


def test_many_layers_are_in_order(tmp_path):
    deep = random_checkpoint(GPT2Config(n_layer=12, n_head=1, n_embd=2, n_ctx=3, n_vocab=5))
    save_checkpoint(deep, tmp_path / "tf", "tf")
    names = [name for name in open_bundle(tmp_path / "tf" / "model.ckpt").tensors if name.endswith("ln_1/b")]
    assert names[:4] == [f"model/h{i}/ln_1/b" for i in (0, 1, 10, 11)]
    assert_same_bytes(deep, open_checkpoint(tmp_path / "tf"))
