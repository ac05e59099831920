"""TensorFlow bundles that a test takes apart and breaks."""

from __future__ import annotations

import shutil
import struct

import pytest
from checkpoints import arrays_of
from paths import FIXTURES

from converters import FormatError, open_checkpoint
from converters.containers.tf_bundle import Entry
from converters.io.checksums import crc32c
from converters.io.protobuf import varint
from converters.io.publishing import new_file
from converters.io.reading import File
from converters.io.sstable import MAGIC, mask, read_table, write_index


class Bundle:
    """A tiny checkpoint whose index can be taken apart, changed and signed again."""

    def __init__(self, folder, source="tf_plain"):
        shutil.copytree(FIXTURES / source, folder, dirs_exist_ok=True)
        self.folder = folder
        self.index = folder / "model.ckpt.index"
        self.data = folder / "model.ckpt.data-00000-of-00001"
        table = dict(read_table(File(self.index)))
        self.header = table.pop(b"")
        self.raw = table
        self.entries = {key: Entry.parse(value, "") for key, value in table.items()}

    def write(self, **entries):
        """Write the index with other entries (name with / as __), as bytes or with changed fields."""
        self.index.unlink()
        changed = {key.replace("__", "/").encode(): value for key, value in entries.items()}
        with new_file(self.index) as out:
            write_index(out, {**self.raw, **changed}, self.header)

    def entry(self, name, **fields):
        entry = self.entries[name.encode()]
        return Entry(**{**vars(entry), **fields}).serialize()

    def open(self):
        arrays_of(open_checkpoint(self.folder))


def refused(bundle, match, error=FormatError):
    with pytest.raises(error, match=match):
        bundle.open()


def raw_index(path, block, kind=0):
    """An index file around one hand-made data block."""

    def signed(data, kind=0):
        return data + bytes([kind]) + struct.pack("<I", mask(crc32c(0, data + bytes([kind]))))

    meta = signed(struct.pack("<2I", 0, 1))
    first = signed(block, kind)
    handle = varint(0) + varint(len(block))
    index_block = b"\0\x01" + varint(len(handle)) + b"z" + handle + struct.pack("<2I", 0, 1)
    body = first + meta + signed(index_block)
    footer = varint(len(first)) + varint(8) + varint(len(first) + len(meta)) + varint(len(index_block))
    path.write_bytes(body + footer.ljust(40, b"\0") + struct.pack("<Q", MAGIC))
