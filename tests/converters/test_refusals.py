"""What must be refused, a table for each container: how a sound file is broken, and what is then said.

Every message names the file, and says where in it something is wrong, and what.
"""

import json
import os
import re
import shutil
import struct
from dataclasses import asdict, replace
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import gguf
import h5py
import msgpack
import numpy as np
import onnx
import pytest
import safetensors.numpy
import torch
from checkpoints import TINY, arrays_of, assert_same_bytes, random_checkpoint
from commands import assert_refused, done
from kinds import KINDS, any_file, flax_array, name_in, named_by, onnx_model
from paths import FIXTURES

from converters import (
    CheckpointError,
    ConfigError,
    ConversionError,
    FormatError,
    UnsafeError,
    open_checkpoint,
    save_checkpoint,
)
from converters.config import to_hf
from converters.dialects import FLAX, GGUF, KERAS, NANOGPT
from converters.tensors import F16
from gpt2x.cli.text import printable


def table(cases):
    """A dict of sentence -> case, as pytest takes it."""
    return [pytest.param(*case, id=sentence) for sentence, case in cases.items()]


def assert_said(path, error, *words, n_head=2, file=None, **options):
    """Opening and reading all of it fails with exactly this class, and words that name the file and the fault."""
    with pytest.raises(ConversionError) as found:
        arrays_of(open_checkpoint(path, n_head=n_head, **options))
    message = str(found.value)
    assert type(found.value) is error, message
    for word in (str(file or path), *words):
        assert word in message
    return message


# ------------------------------------------------------------------------------------------------------------ GGUF

STRING, ARRAY, UINT32, INT32, UINT64, FLOAT32 = 8, 9, 4, 5, 10, 6


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def listed(kind, values, count=None):
    """An array of metadata: strings, or numbers of 32 bits."""
    items = b"".join(text(v) if kind == STRING else struct.pack("<i", v) for v in values)
    return struct.pack("<IQ", kind, len(values) if count is None else count) + items


def gguf_parts(alignment=32):
    """A sound file, in parts that a test changes."""
    data, tensors = b"", []
    for name, array in named_by(GGUF).items():
        tensors.append([name.encode(), array.shape[::-1], 0, len(data)])
        data += array.tobytes() + bytes(-array.nbytes % alignment)
    sizes = {"context_length": 10, "embedding_length": 6, "block_count": 2, "feed_forward_length": 24, "vocab_size": 13}
    metadata = {
        b"general.architecture": (STRING, text("gpt2")),
        b"gpt2.attention.head_count": (UINT32, struct.pack("<I", 2)),
        b"gpt2.attention.layer_norm_epsilon": (FLOAT32, struct.pack("<f", 1e-5)),
        **{f"gpt2.{name}".encode(): (UINT32, struct.pack("<I", n)) for name, n in sizes.items()},
    }
    if alignment != 32:
        metadata[b"general.alignment"] = (UINT32, struct.pack("<I", alignment))
    return SimpleNamespace(
        magic=b"GGUF", version=3, metadata=metadata, tensors=tensors, data=data, alignment=alignment,
        more=b"", n_more=0, n_tensors=None, n_metadata=None,
    )  # fmt: skip


def gguf_bytes(p):
    n_tensors = len(p.tensors) if p.n_tensors is None else p.n_tensors
    n_metadata = len(p.metadata) + p.n_more if p.n_metadata is None else p.n_metadata
    head = p.magic + struct.pack("<IQQ", p.version, n_tensors, n_metadata)
    head += b"".join(text(key) + struct.pack("<I", kind) + value for key, (kind, value) in p.metadata.items()) + p.more
    for name, dims, kind, offset in p.tensors:
        head += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return head + bytes(-len(head) % p.alignment) + p.data


def gguf_file(path, change=None, **options):
    parts = gguf_parts(**options)
    if change:
        change(parts)
    path.write_bytes(gguf_bytes(parts))
    return path


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
@pytest.mark.parametrize("version", [2, 3])
def test_an_unbroken_gguf_opens_here_and_in_the_library(tmp_path, tiny, alignment, version):
    path = gguf_file(tmp_path / "m.gguf", lambda p: setattr(p, "version", version), alignment=alignment)
    assert_same_bytes(tiny, open_checkpoint(path))
    theirs = {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}
    assert theirs == {name: array.tobytes() for name, array in named_by(GGUF).items()}


def says(key, kind, value):
    """A change of one key of the metadata."""
    return lambda p: p.metadata.update({key.encode(): (kind, value)})


def is_set(**fields):
    return lambda p: p.__dict__.update(fields)


def tensor(i, place, value):
    """A change of one tensor's entry: its name, sizes, type or offset."""

    def change(p):
        p.tensors[i][("name", "sizes", "type", "offset").index(place)] = value

    return change


def both(*changes):
    def change(p):
        for one in changes:
            one(p)

    return change


def again(p):
    p.more, p.n_more = text("gpt2.block_count") + struct.pack("<2I", UINT32, 2), 1


def moved(i, by):
    """Every tensor from the i-th on lies further back, in the list and in the file."""

    def change(p):
        start = p.tensors[i][3]
        for entry in p.tensors[i:]:
            entry[3] += by
        p.data = p.data[:start] + bytes(by) + p.data[start:]

    return change


N64 = struct.Struct("<Q").pack

BROKEN_GGUF = {
    "another magic": (is_set(magic=b"GGML"), FormatError, "unknown format"),
    "version 1, whose counts are of 32 bits": (is_set(version=1), FormatError, "GGUF of version 1; 2 and 3 are read"),
    "version 4": (is_set(version=4), FormatError, "GGUF of version 4"),
    "a big-endian file": (is_set(version=3 << 24), FormatError, "big-endian GGUF"),
    "another architecture": (says("general.architecture", STRING, text("llama")), CheckpointError, "of the architecture 'llama', not 'gpt2'"),
    "an architecture that is a number": (says("general.architecture", UINT32, bytes(4)), CheckpointError, "of the architecture '0'"),
    "no architecture": (lambda p: p.metadata.pop(b"general.architecture"), CheckpointError, "of the architecture 'None'"),
    "a key there twice": (again, FormatError, "duplicate key 'gpt2.block_count'"),
    "a name there twice": (tensor(3, "name", b"token_embd.weight"), FormatError, "duplicate tensor 'token_embd.weight'"),
    "a name with NUL in it": (tensor(3, "name", b"a\0b"), FormatError, "with a proper name", r"'a\x00b'"),
    "a name that is not UTF-8": (tensor(0, "name", b"\xff\xfe"), FormatError, "is not UTF-8", "before byte"),
    "a key that is not UTF-8": (says("x", STRING, text(b"\xc3\x28")), FormatError, "is not UTF-8", "before byte"),
    "very many tensors": (is_set(n_tensors=2**60), FormatError, f"truncated: {2**60} items needed after byte"),
    "more tensors than there are": (is_set(n_tensors=29), FormatError, "'': not a tensor of 1 to 4 dimensions"),
    "fewer tensors than there are": (is_set(n_tensors=27), FormatError, "its tensors end at byte"),
    "no tensors": (is_set(n_tensors=0), FormatError, "no tensors in it, only metadata", "pass the GGUF file of the whole model"),
    "very many keys": (is_set(n_metadata=2**63), FormatError, f"truncated: {2**63} items needed after byte"),
    "a very long array": (says("x", ARRAY, listed(INT32, [], 2**61)), FormatError, f"truncated: {2**61} items needed after byte"),
    "a very long string": (says("x", STRING, N64(2**40)), FormatError, f"a string of {2**40} bytes before byte"),
    "an array of arrays": (says("x", ARRAY, struct.pack("<IQ", ARRAY, 1) + listed(INT32, [1])), FormatError, "'x' is an array of arrays"),
    "a value of an unknown type": (says("x", 13, bytes(4)), FormatError, "'x' is of an unknown type (13)"),
    "an array of an unknown type": (says("x", ARRAY, struct.pack("<IQ", 99, 1)), FormatError, "'x' is of an unknown type (99)"),
    "an alignment of 0": (says("general.alignment", UINT32, bytes(4)), FormatError, "general.alignment is 0"),
    "an alignment of 3": (says("general.alignment", UINT32, b"\3\0\0\0"), FormatError, "general.alignment is 3"),
    "an absurd alignment": (says("general.alignment", UINT64, N64(2**40)), FormatError, f"general.alignment is {2**40}"),
    "a negative alignment": (says("general.alignment", INT32, b"\xe0\xff\xff\xff"), FormatError, "general.alignment is -32"),
    "an alignment that is a text": (says("general.alignment", STRING, text("32")), FormatError, "general.alignment is '32'"),
    "an alignment that is true": (says("general.alignment", 7, b"\1"), FormatError, "general.alignment is True"),
    "another alignment than the tensors have": (says("general.alignment", UINT32, b"\0\1\0\0"), FormatError, "has the offset"),
    "a tensor out of alignment": (tensor(1, "offset", 316), FormatError, "'position_embd.weight' has the offset 316"),
    "two tensors in one place": (tensor(1, "offset", 0), FormatError, "has the offset 0, which does not follow"),
    "a tensor inside another": (tensor(1, "offset", 32), FormatError, "has the offset 32, which does not follow"),
    "a gap between tensors": (moved(2, 64), FormatError, "which does not follow the tensor before it"),
    "a gap before the first": (moved(0, 32), FormatError, "'token_embd.weight' has the offset 32"),
    "a tensor behind the end": (tensor(27, "offset", 2**40), FormatError, f"has the offset {2**40}"),
    "an offset of 64 bits": (tensor(27, "offset", 2**64 - 32), FormatError, f"has the offset {2**64 - 32}"),
    "bytes behind the end": (lambda p: setattr(p, "data", p.data + bytes(32)), FormatError, "its tensors end at byte"),
    "no dimensions": (tensor(0, "sizes", ()), FormatError, "'token_embd.weight': not a tensor of 1 to 4 dimensions"),
    "five dimensions": (tensor(0, "sizes", (6, 13, 1, 1, 1)), FormatError, "'token_embd.weight': not a tensor of 1 to 4"),
    "a size of 63 bits": (tensor(0, "sizes", (2**63, 1)), FormatError, "'token_embd.weight': invalid shape"),
    "sizes whose product overflows": (tensor(0, "sizes", (2**32, 2**32)), FormatError, "invalid shape"),
    "sizes whose product wraps to the right one": (tensor(0, "sizes", (2**62, 4, 78)), FormatError, "invalid shape"),
    "a tensor of Q8_1": (tensor(0, "type", 9), CheckpointError, "'token_embd.weight': the type Q8_1 is not supported"),
    "a tensor of Q1_0": (tensor(0, "type", 41), CheckpointError, "the type Q1_0 is not supported"),
    "a tensor of integers": (tensor(0, "type", 26), CheckpointError, "the type I32 is not supported"),
    "a tensor of no known type": (tensor(0, "type", 2**31), CheckpointError, f"the type number {2**31}"),
    "rows that blocks of Q8_0 do not fill": (tensor(0, "type", 8), FormatError, "'token_embd.weight': invalid shape, [13, 6]: Q8_0 needs rows of a multiple of 32"),
    "rows that blocks of Q4_K do not fill": (tensor(0, "type", 12), FormatError, "invalid shape, [13, 6]: Q4_K needs rows of a multiple of 256"),
    "blocks that fill the tensor, but not its rows": (both(tensor(0, "type", 8), tensor(0, "sizes", (16, 4))), FormatError, "invalid shape, [4, 16]"),
    "quantized values that the file does not have": (both(tensor(0, "type", 2), tensor(0, "sizes", (2**30, 2**9))), FormatError, "does not follow the tensor before it"),
    "a key of the model that is not known": (says("gpt2.rope.freq_base", FLOAT32, bytes(4)), ConfigError, "gpt2.rope.freq_base is 0.0: unknown to gpt2x, and it may change the arithmetic"),
    "heads by layer": (says("gpt2.attention.head_count", ARRAY, listed(INT32, [2, 3])), ConfigError, "n_head is [2, 3]"),
    "fewer heads of keys than of queries": (says("gpt2.attention.head_count_kv", UINT32, b"\1\0\0\0"), ConfigError, "gpt2.attention.head_count_kv is 1"),
    "heads that do not divide the width": (says("gpt2.attention.head_count", UINT32, b"\4\0\0\0"), ConfigError, "n_embd 6 is not divisible by n_head 4"),
    "no heads": (says("gpt2.attention.head_count", UINT32, bytes(4)), ConfigError, "n_head is 0"),
    "another width than the tensors have": (says("gpt2.embedding_length", UINT32, b"\7\0\0\0"), ConfigError, "n_embd is 6 in the tensors, 7 in its metadata"),
    "another depth than the tensors have": (says("gpt2.block_count", UINT32, b"\3\0\0\0"), ConfigError, "n_layer is 2 in the tensors, 3 in its metadata"),
    "a width that is a text": (says("gpt2.embedding_length", STRING, text("6")), ConfigError, "n_embd is 6 in the tensors, '6' in its metadata"),
    "an epsilon that is no number": (says("gpt2.attention.layer_norm_epsilon", FLOAT32, b"\0\0\xc0\x7f"), ConfigError, "layer_norm_epsilon is nan"),
}  # fmt: skip


@pytest.mark.parametrize("case", table({sentence: (case,) for sentence, case in BROKEN_GGUF.items()}))
def test_a_broken_gguf_is_refused(tmp_path, case):
    change, error, *words = case
    assert_said(gguf_file(tmp_path / "m.gguf", change), error, *words, n_head=None)


def test_a_gguf_that_ends_anywhere_too_early_is_refused(tmp_path):
    whole = gguf_bytes(gguf_parts())
    padding = -named_by(GGUF)["output_norm.bias"].nbytes % 32  # of the last tensor: nothing lies there
    for size in [*range(4, 2400, 3), *range(2400, len(whole) - padding, 101), len(whole) - padding - 1]:
        (tmp_path / "m.gguf").write_bytes(whole[:size])
        assert_said(tmp_path / "m.gguf", FormatError)
    (tmp_path / "m.gguf").write_bytes(whole[:-padding])
    assert_same_bytes(random_checkpoint(), open_checkpoint(tmp_path / "m.gguf"))


TOKENS = [*"abcdefghijk", "ab", "<|endoftext|>"]


def tokenizer_of_13(p):
    p.metadata |= {
        b"tokenizer.ggml.model": (STRING, text("gpt2")),
        b"tokenizer.ggml.tokens": (ARRAY, listed(STRING, TOKENS)),
        b"tokenizer.ggml.merges": (ARRAY, listed(STRING, ["a b"])),
        b"tokenizer.ggml.token_type": (ARRAY, listed(INT32, [1] * 12 + [3])),
    }


UNSOUND = {
    "the tokenizer of another model": ("model", STRING, text("llama"), "not a byte-level BPE"),
    "no merges": ("merges", UINT32, bytes(4), "not a byte-level BPE"),
    "kinds of fewer tokens": ("token_type", ARRAY, listed(INT32, [1]), "not a byte-level BPE"),
    "kinds that are a number": ("token_type", UINT32, bytes(4), "not a byte-level BPE"),
    "tokens that are a number": ("tokens", UINT32, bytes(4), "not a byte-level BPE"),
    "tokens that are one text": ("tokens", STRING, text("abcdefghijklm"), "not a byte-level BPE"),
    "tokens that are numbers": ("tokens", ARRAY, listed(INT32, range(13)), "invalid tokens"),
    "a token there twice": ("tokens", ARRAY, listed(STRING, [*TOKENS[:-1], "a"]), "invalid tokens"),
    "a merge of three": ("merges", ARRAY, listed(STRING, ["a b c"]), "invalid merges"),
    "merges that are numbers": ("merges", ARRAY, listed(INT32, [1]), "invalid merges"),
}


@pytest.mark.parametrize(("key", "kind", "value", "word"), table(UNSOUND))
def test_an_unsound_tokenizer_in_a_gguf_is_not_taken_over_and_that_is_said(tmp_path, key, kind, value, word):
    def change(p):
        tokenizer_of_13(p)
        p.metadata[f"tokenizer.ggml.{key}".encode()] = (kind, value)

    sound = open_checkpoint(gguf_file(tmp_path / "m.gguf", tokenizer_of_13))
    assert sound.tokenizer.vocabulary().ids == {token: i for i, token in enumerate(TOKENS)}
    unsound = open_checkpoint(gguf_file(tmp_path / "m.gguf", change))
    assert unsound.tokenizer is None
    (note,) = unsound.notes
    assert word in note
    assert str(tmp_path / "m.gguf") in note


# ----------------------------------------------------------------------------------------------------------- llm.c

FIELDS = ("magic", "version", "context", "vocabulary", "layers", "heads", "width", "padded")


def llmc_file(path, data=lambda data: data, **numbers):
    """The fixture's file with other numbers in its header, and its data changed."""
    raw = (FIXTURES / "llmc/gpt2.bin").read_bytes()
    header = list(struct.unpack("<256i", raw[:1024]))
    for name, value in numbers.items():
        header[FIELDS.index(name)] = value
    path.write_bytes(struct.pack("<256i", *header) + data(raw[1024:]))
    return path


def test_an_unbroken_llmc_file_opens(tmp_path):
    opened = open_checkpoint(llmc_file(tmp_path / "m.bin"))
    assert opened.notes == ()
    assert_same_bytes(open_checkpoint(FIXTURES / "tf_plain"), opened)


BROKEN_LLMC = {
    "version 1": ({"version": 1}, "version 1 of llm.c's format; known are 3 (F32), 5 (BF16)"),
    "version 2": ({"version": 2}, "version 2 of llm.c's format"),
    "version 4": ({"version": 4}, "version 4 of llm.c's format"),
    "the version of bfloat16 over float32": ({"version": 5}, "8464 bytes, but its header needs 4744"),
    **{f"no {name}": ({name: 0}, "invalid header", "is 0") for name in FIELDS[2:]},
    **{f"a negative {name}": ({name: -1}, "invalid header", "is -1") for name in FIELDS[2:]},
    "a vocabulary larger than its padding": ({"vocabulary": 129}, "vocab_size is 129", "padded_vocab_size is 128"),
    "an absurd number of layers": ({"layers": 2**31 - 1}, "num_layers is 2147483647"),
    "an absurd width": ({"width": 2**31 - 1}, "8464 bytes, but its header needs"),
    "an absurd context": ({"context": 2**31 - 1}, "but its header needs"),
    "a layer more than there is": ({"layers": 3}, "but its header needs"),
    "a byte too few": ({"data": lambda data: data[:-1]}, "8463 bytes, but its header needs 8464"),
    "a byte too many": ({"data": lambda data: data + b"\0"}, "8465 bytes, but its header needs 8464"),
    "half of it": ({"data": lambda data: data[: len(data) // 2]}, "but its header needs 8464"),
    "a header only": ({"data": lambda data: b""}, "1024 bytes, but its header needs 8464"),
    "the state of a run": ({"magic": 20240327}, "llm.c", "not its weights"),
    "the state of an optimizer": ({"magic": 20240527}, "llm.c", "not its weights"),
    "another magic": ({"magic": 20240325}, "unknown format"),
}  # fmt: skip


@pytest.mark.parametrize("case", table({sentence: (case,) for sentence, case in BROKEN_LLMC.items()}))
def test_a_broken_llmc_file_is_refused(tmp_path, case):
    changes, *words = case
    assert_said(llmc_file(tmp_path / "m.bin", **changes), FormatError, *words, n_head=None)


def test_a_header_of_llmc_that_is_cut_short_is_refused(tmp_path):
    (tmp_path / "m.bin").write_bytes((FIXTURES / "llmc/gpt2.bin").read_bytes()[:1023])
    assert_said(tmp_path / "m.bin", FormatError, "truncated: llm.c's header needs 1024 bytes, the file has 1023")


def test_heads_of_llmc_that_do_not_divide_the_width_are_refused(tmp_path):
    path = llmc_file(tmp_path / "m.bin", heads=4)
    assert_said(path, ConfigError, "n_embd 6 is not divisible by n_head 4", n_head=None)


def test_padding_of_llmc_that_is_not_zero_is_left_out_and_said(tmp_path):
    place = 13 * 6 * 4  # behind the rows of the vocabulary
    path = llmc_file(tmp_path / "m.bin", lambda data: data[:place] + b"\1" + data[place + 1 :])
    opened = open_checkpoint(path)
    assert "the padding rows of the token embedding are not zero" in opened.notes[0]
    assert_same_bytes(open_checkpoint(FIXTURES / "tf_plain"), opened)


# ------------------------------------------------------------------------------------------------------------ HDF5

PREFIX = KERAS.prefixes[0]
NORM = f"{PREFIX}ln_f/gamma:0"  # of 6 numbers


def hdf5_file(path, change=lambda file: None):
    with h5py.File(path, "w", libver="earliest") as file:
        for name, array in named_by(KERAS).items():
            file.create_dataset(name, data=array)
        change(file)
    return path


def test_an_unbroken_hdf5_file_opens(tmp_path, tiny):
    assert_same_bytes(tiny, open_checkpoint(hdf5_file(tmp_path / "m.h5"), n_head=2))


def replaced(**options):
    """The last norm made anew, with these options of ``create_dataset``."""

    def change(file):
        data = {} if "shape" in options else {"data": file[NORM][()]}
        del file[NORM]
        file.create_dataset(NORM, **{**data, **options})

    return change


def linked(link, name=NORM):
    def change(file):
        if name in file:
            file.move(name, "kept")
        file[name] = link(file) if callable(link) else link

    return change


def virtual(file):
    values = file[NORM][()]
    del file[NORM]
    file["source"] = values
    layout = h5py.VirtualLayout((6,), "f4")
    layout[:] = h5py.VirtualSource(file["source"])
    file.create_virtual_dataset(NORM, layout)


def compact(file):
    del file[NORM]
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_layout(h5py.h5d.COMPACT)
    space = h5py.h5s.create_simple((6,))
    h5py.h5d.create(file[PREFIX + "ln_f"].id, b"gamma:0", h5py.h5t.IEEE_F32LE, space, plan)


def odd_float(file):
    """32 bits with the sign in the lowest: as wide as float32, and nothing like it."""
    del file[NORM]
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(0, 1, 8, 9, 23)
    made = h5py.h5d.create(file[PREFIX + "ln_f"].id, b"gamma:0", kind, h5py.h5s.create_simple((6,)))
    made.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ones(6, np.float32))


def named_type(file):
    file["a type"] = np.dtype("f4")


def deep(file):
    file.create_dataset("/".join("x" * 40), data=np.ones(3, np.float32))


BROKEN_HDF5 = {
    "a soft link": (linked(h5py.SoftLink("/kept")), "'ln_f/gamma:0' is a link to another place (SoftLink)"),
    "a soft link to nothing": (linked(h5py.SoftLink("/nothing"), "x"), "'x' is a link to another place (SoftLink)"),
    "a link to another file": (linked(h5py.ExternalLink("other.h5", "/x")), "is a link to another place (ExternalLink)"),
    "a link to a file of the system": (linked(h5py.ExternalLink("/etc/passwd", "/"), "x"), "'x' is a link to another place"),
    "a virtual data set": (virtual, "ln_f/gamma:0' is a virtual data set"),
    "data in another file": (replaced(shape=(6,), dtype="f4", external=[("/etc/passwd", 0, 24)]), "ln_f/gamma:0' keeps its data in another file"),
    "chunks": (replaced(chunks=(3,)), "is chunked, compressed or compact"),
    "compressed data": (replaced(chunks=(6,), compression="gzip"), "is chunked, compressed or compact"),
    "compressed data that would be 4 TB": (replaced(shape=(2**40,), dtype="f4", chunks=(2**20,), compression="gzip"), "is chunked, compressed or compact"),
    "data in the header": (compact, "is chunked, compressed or compact"),
    "a terabyte that was never written": (replaced(shape=(2**38,), dtype="f4"), "ln_f/gamma:0' has no data"),
    "big-endian numbers": (replaced(dtype=">f4"), "data type '>f4', which gpt2x does not read"),
    "numbers of a layout of their own": (odd_float, "ln_f/gamma:0' stores its values in a custom layout"),
    "texts": (replaced(shape=(6,), dtype=h5py.string_dtype(), data=["a"] * 6), "ln_f/gamma:0' has 96 bytes, but its shape needs 48"),
    "texts of one length": (replaced(data=np.full(6, b"abcd")), "data type '|S4', which gpt2x does not read"),
    "records": (replaced(data=np.zeros(6, [("a", "f4"), ("b", "f4")])), "data type '|V8', which gpt2x does not read"),
    "references": (replaced(shape=(6,), dtype=h5py.ref_dtype, data=[h5py.Reference()] * 6), "data type '|O', which gpt2x does not read"),
    "complex numbers": (replaced(data=np.zeros(6, "c8")), "data type '<c8', which gpt2x does not read"),
    "a type with a name": (named_type, "'a type' is neither a group nor a data set"),
    "groups nested deeply": (deep, "groups are nested more than 32 deep"),
    "a group inside itself": (linked(lambda file: file["transformer"], "transformer/again"), "'transformer/again' is another name of the same object"),
    "everything once more inside itself": (linked(lambda file: file["/"], "transformer/root"), "is another name of the same object"),
    "one data set under two names": (linked(lambda file: file[f"{PREFIX}ln_f/beta:0"], "x"), "is another name of the same object"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "word"), table(BROKEN_HDF5))
def test_a_broken_hdf5_file_is_refused(tmp_path, change, word):
    word = word.replace("'ln_f/", f"'{PREFIX}ln_f/")
    assert_said(hdf5_file(tmp_path / "m.h5", change), FormatError, word)


def test_hdf5_data_sets_in_one_place_are_refused(tmp_path):
    path = hdf5_file(tmp_path / "m.h5")
    with h5py.File(path) as file:
        gamma, beta = (struct.pack("<Q", file[f"{PREFIX}ln_f/{n}:0"].id.get_offset()) for n in ("gamma", "beta"))
    data = path.read_bytes()
    assert data.count(beta) == 1
    path.write_bytes(data.replace(beta, gamma))
    assert_said(path, FormatError, "ln_f/beta:0' and", "ln_f/gamma:0' overlap")


def test_a_hdf5_file_that_ends_too_early_or_is_none_is_refused(tmp_path):
    data = hdf5_file(tmp_path / "m.h5").read_bytes()
    for size in (8, 100, 2000, len(data) // 2, len(data) - 1):
        (tmp_path / "m.h5").write_bytes(data[:size])
        assert_said(tmp_path / "m.h5", FormatError)
    (tmp_path / "m.h5").write_bytes(data[:8] + bytes(range(256)) * 8)
    assert_said(tmp_path / "m.h5", FormatError, "not a valid HDF5 file")


# ------------------------------------------------------------------------------------------------------------ Flax


def flax_tree():
    tree: dict = {}
    for name, array in named_by(FLAX).items():
        *above, leaf = name.split("/")
        here = tree
        for key in above:
            here = here.setdefault(key, {})
        here[leaf] = flax_array(array)
    return tree


def flax_file(path, change=lambda tree: None):
    tree = flax_tree()
    change(tree)
    path.write_bytes(msgpack.packb(tree))
    return path


def leaf(value):
    """The last norm's scale is something else."""
    return lambda tree: tree["transformer"]["ln_f"].update(scale=value)


def in_chunks(**changes):
    """The last norm's scale in two chunks, of which something is changed."""
    halves = [flax_array(np.ones(3, np.float32)), flax_array(np.ones(3, np.float32))]
    whole = {"__msgpack_chunked_array__": True, "shape": {"0": 6}, "chunks": {"0": halves[0], "1": halves[1]}}
    return leaf({**whole, **changes})


def test_an_unbroken_flax_file_opens_with_an_array_whole_or_in_chunks(tmp_path, tiny):
    assert_same_bytes(tiny, open_checkpoint(flax_file(tmp_path / "m.msgpack"), n_head=2))
    ones = arrays_of(open_checkpoint(flax_file(tmp_path / "m.msgpack", in_chunks()), n_head=2))["ln_f.weight"]
    assert ones.tolist() == [1] * 6


def nested(depth):
    def change(tree):
        for _ in range(depth):
            tree["x"] = {}
            tree = tree["x"]

    return change


ONE = flax_array()
BROKEN_FLAX = {
    "an unknown extension": (leaf(flax_array(code=5)), FormatError, "extension type 5, which is not an array", "before byte"),
    "a complex number": (leaf(msgpack.ExtType(2, msgpack.packb((1.0, 2.0)))), FormatError, "extension type 2, which is not an array"),
    "a point in time": (leaf(msgpack.Timestamp(1)), FormatError, "extension type -1, which is not an array"),
    "an extension that is empty": (leaf(msgpack.ExtType(1, b"")), FormatError, "an invalid array", "before byte"),
    "an extension of four parts": (leaf(msgpack.ExtType(1, b"\x94" + ONE.data[1:] + b"\0")), FormatError, "an invalid array"),
    "an extension with more behind its array": (leaf(msgpack.ExtType(1, ONE.data + b"\0")), FormatError, "extra bytes after an array", "before byte"),
    "an extension that ends early": (leaf(msgpack.ExtType(1, ONE.data[:-1])), FormatError, "truncated: "),
    "fewer bytes than the shape asks for": (leaf(flax_array(data=bytes(20))), FormatError, "20 bytes, but shape [6] of F32", "before byte"),
    "more bytes than the shape asks for": (leaf(flax_array(data=bytes(28))), FormatError, "28 bytes, but shape [6] of F32"),
    "text in the place of bytes": (leaf(flax_array(data="x" * 24)), FormatError, "an array without bytes, before byte"),
    "a type that is a number": (leaf(flax_array(kind=3)), FormatError, "an array without a dtype", "before byte"),
    "an array of complex numbers": (leaf(flax_array(kind="complex64")), FormatError, "an array of 'complex64', which gpt2x does not read", "before byte"),
    "an array of objects": (leaf(flax_array(kind="object")), FormatError, "an array of 'object'"),
    "an array of records": (leaf(flax_array(kind="|V8")), FormatError, "an array of '|V8'"),
    "a negative size": (leaf(flax_array(shape=[-6])), FormatError, "invalid shape, [-6]", "before byte"),
    "a broken size": (leaf(flax_array(shape=[6.0])), FormatError, "invalid shape, [6.0]"),
    "a size that is true": (leaf(flax_array(shape=[6, True])), FormatError, "invalid shape, [6, True]"),
    "sizes that overflow": (leaf(flax_array(shape=[2**63, 2**63])), FormatError, "invalid shape"),
    "nine dimensions": (leaf(flax_array(shape=[1] * 8 + [6])), FormatError, "invalid shape"),
    "a shape that is a number": (leaf(flax_array(shape=6)), FormatError, "invalid shape, 6"),
    "a shape of shapes of shapes": (leaf(flax_array(shape=[[[6]]])), FormatError, "nested too deeply"),
    "maps nested deeply": (nested(20), FormatError, "nested too deeply", "before byte"),
    "lists nested deeply": (lambda tree: tree.update(x=[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]), FormatError, "nested too deeply"),
    "bytes in the place of an array": (leaf(bytes(24)), FormatError, "bytes where an array is expected, before byte"),
    "a text in the place of an array": (leaf("x"), CheckpointError, "transformer/ln_f/scale is 'x', not an array"),
    "a number in the place of an array": (leaf(1.5), CheckpointError, "transformer/ln_f/scale is '1.5', not an array"),
    "nothing in the place of an array": (leaf(None), CheckpointError, "transformer/ln_f/scale is 'None', not an array"),
    "a list in the place of an array": (leaf([1, 2]), CheckpointError, "transformer/ln_f/scale is '[1, 2]', not an array"),
    "a key that is a number": (lambda tree: tree.update({3: ONE}), FormatError, "invalid or duplicate key '3'", "before byte"),
    "a key that is a path": (lambda tree: tree.update({"a/b": ONE}), FormatError, "invalid or duplicate key 'a/b'"),
    "a very long key": (lambda tree: tree.update({"x" * 5000: ONE}), FormatError, "a string of 5000 bytes, before byte"),
    "a very long type": (leaf(flax_array(kind="x" * 5000)), FormatError, "a string of 5000 bytes, before byte"),
    "chunks of another size than the shape": (in_chunks(shape={"0": 7}), FormatError, "transformer/ln_f/scale: chunks that do not add up to shape [7]"),
    "chunks without a shape": (in_chunks(shape=None), FormatError, "transformer/ln_f/scale: the chunks of an array are not numbered"),
    "chunks of an absurd shape": (in_chunks(shape={"0": 2**62}), FormatError, "transformer/ln_f/scale: invalid shape"),
    "no chunks": (in_chunks(chunks={}), FormatError, "transformer/ln_f/scale: chunks that are not arrays of one dtype"),
    "chunks in the wrong order": (in_chunks(chunks={"1": ONE, "0": ONE}), FormatError, "the chunks of an array are not numbered"),
    "chunks of which one is missing": (in_chunks(chunks={"0": ONE, "2": ONE}), FormatError, "the chunks of an array are not numbered"),
    "chunks of two types": (in_chunks(chunks={"0": flax_array(np.ones(3, "f4")), "1": flax_array(np.ones(3, "f8"))}), FormatError, "chunks that are not arrays of one dtype"),
    "chunks that are numbers": (in_chunks(chunks={"0": 3}), FormatError, "chunks that are not arrays of one dtype"),
    "chunks that are chunked": (in_chunks(chunks={"0": {"chunks": {}}}), FormatError, "chunks that are not arrays of one dtype"),
}  # fmt: skip


@pytest.mark.parametrize("case", table({sentence: (case,) for sentence, case in BROKEN_FLAX.items()}))
def test_a_broken_flax_file_is_refused(tmp_path, case):
    change, error, *words = case
    assert_said(flax_file(tmp_path / "m.msgpack", change), error, *words)


PACKED_ARRAY = msgpack.packb(ONE)
RAW_FLAX = {
    "a key there twice": (b"\x82" + 2 * (b"\xa1a" + PACKED_ARRAY), FormatError, "invalid or duplicate key 'a'"),
    "a key that is not UTF-8": (b"\x81\xa1\xff" + PACKED_ARRAY, FormatError, "is not UTF-8"),
    "bytes behind the end": (b"\x81\xa1a" + PACKED_ARRAY + b"\0", FormatError, "1 extra bytes after the end of its data"),
    "two values": (2 * (b"\x81\xa1a" + PACKED_ARRAY), FormatError, "extra bytes after the end of its data"),
    "a map of very many": (b"\xdf\xff\xff\xff\xff\xa1a" + PACKED_ARRAY, FormatError, "4294967295 items needed after byte 5"),
    "a list of very many": (b"\x81\xa1a\xdd\xff\xff\xff\xff", FormatError, "4294967295 items needed after byte"),
    "a text of very many": (b"\x81\xa1a\xdb\xff\xff\xff\xff", FormatError, "4294967295 items needed after byte"),
    "an extension of very many": (b"\x81\xa1a\xc9\xff\xff\xff\xff\1\x93", FormatError, "truncated: an array needs"),
    "a code that is none": (b"\x81\xa1a\xc1", FormatError, "an unknown kind of value where an array is expected"),
    "maps in maps without end": (b"\x81\xa1a" * 5000, FormatError, "nested too deeply"),
    "lists in lists without end": (b"\x81\xa1a" + b"\x91" * 100_000, FormatError, "nested too deeply"),
    "maps as keys": (b"\x82\xa1a" + PACKED_ARRAY + b"\x81" * 5000, FormatError, "nested too deeply"),
    "a million numbers": (b"\x81\xa1a\xdd" + struct.pack(">I", 1_500_000) + bytes(1_500_000), FormatError, "more than 1000000 values"),
    "an empty map": (b"\x81\xa1a\x80", CheckpointError, "no tensors in it"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "error", "word"), table(RAW_FLAX))
def test_a_flax_file_made_by_hand_is_refused(tmp_path, data, error, word):
    (tmp_path / "m.msgpack").write_bytes(data)
    assert_said(tmp_path / "m.msgpack", error, word)


def test_a_flax_file_that_ends_anywhere_too_early_is_refused(tmp_path):
    whole = flax_file(tmp_path / "m.msgpack").read_bytes()
    for size in range(12, len(whole), 7):
        (tmp_path / "m.msgpack").write_bytes(whole[:size])
        assert_said(tmp_path / "m.msgpack", FormatError)


# ------------------------------------------------------------------------------------------------------------ ONNX


def onnx_file(path, change=lambda model: None, more=b""):
    model = onnx_model()
    change(model)
    path.write_bytes(model.SerializeToString() + more)
    return path


def outside(model, location="weights.bin", **other):
    """The numbers of every tensor in another file, as a model says it; gives the file's bytes."""
    data = b""
    for one in model.graph.initializer:
        said = {"location": location, "offset": len(data), "length": len(one.raw_data), **other.pop(one.name, {})}
        data += one.raw_data
        one.ClearField("raw_data")
        one.data_location = onnx.TensorProto.EXTERNAL
        for key, value in said.items():
            one.external_data.add(key=key, value=str(value))
    return data


def test_an_unbroken_onnx_file_opens_with_its_numbers_inside_or_beside(tmp_path, tiny):
    assert_same_bytes(tiny, open_checkpoint(onnx_file(tmp_path / "inside.onnx"), n_head=2))
    model = onnx_model()
    (tmp_path / "weights.bin").write_bytes(outside(model))
    onnx.save(model, tmp_path / "beside.onnx")
    assert_same_bytes(tiny, open_checkpoint(tmp_path / "beside.onnx", n_head=2))


def norm(change):
    """A change of one tensor, of 6 numbers."""
    return lambda model: change(next(t for t in model.graph.initializer if t.name == "ln_f.weight"))


def of_type(number):
    return norm(lambda t: setattr(t, "data_type", number))


def without_bytes(kind, field, values):
    def change(t):
        t.ClearField("raw_data")
        t.data_type = kind
        getattr(t, field).extend(values)

    return norm(change)


TYPE = onnx.TensorProto
BROKEN_ONNX = {
    "a name there twice": (lambda m: m.graph.initializer.append(m.graph.initializer[0]), FormatError, "duplicate initializer 'wte.weight'"),
    "fewer bytes than the shape asks for": (norm(lambda t: setattr(t, "raw_data", bytes(20))), FormatError, "'ln_f.weight': 20 bytes, but shape [6] of F32 needs 24"),
    "more bytes than the shape asks for": (norm(lambda t: setattr(t, "raw_data", bytes(28))), FormatError, "'ln_f.weight': 28 bytes"),
    "no numbers at all": (norm(lambda t: t.ClearField("raw_data")), FormatError, "'ln_f.weight': 0 bytes, but shape [6]"),
    "no shape": (norm(lambda t: t.ClearField("dims")), FormatError, "'ln_f.weight': 24 bytes, but shape [] of F32 needs 4"),
    "numbers in two fields": (norm(lambda t: t.float_data.extend([1.0] * 6)), FormatError, "'ln_f.weight' is not a valid ONNX tensor"),
    "texts": (without_bytes(TYPE.STRING, "string_data", [b"a"] * 6), FormatError, "'ln_f.weight' stores its values in field 6, which gpt2x does not read"),
    "half-precision numbers in a field of integers": (without_bytes(TYPE.FLOAT16, "int32_data", [0] * 6), FormatError, "'ln_f.weight' stores its values in field 5"),
    "numbers in a field of another type": (without_bytes(TYPE.DOUBLE, "float_data", [1.0] * 12), FormatError, "'ln_f.weight' stores its values in field 4, which is not of its dtype"),
    "a tensor without a type": (of_type(0), FormatError, "'ln_f.weight': data type 0, which gpt2x does not read"),
    "a tensor of an unknown type": (of_type(1000), FormatError, "'ln_f.weight': data type 1000"),
    "complex numbers": (of_type(TYPE.COMPLEX64), FormatError, "'ln_f.weight': data type 14"),
    "numbers of 8 bits": (of_type(TYPE.FLOAT8E4M3FN), CheckpointError, "'ln_f.weight' is quantized"),
    "numbers of 4 bits": (of_type(TYPE.INT4), CheckpointError, "'ln_f.weight' is quantized"),
    "a scale beside the weights": (lambda m: m.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(6, "f4"), "wte.weight_scale")), CheckpointError, "a quantized model (it holds wte.weight_scale)"),
    "a negative size": (norm(lambda t: t.dims.__setitem__(0, -6)), FormatError, "'ln_f.weight': invalid shape"),
    "sizes that overflow": (norm(lambda t: t.dims.extend([2**62, 2**62])), FormatError, "'ln_f.weight': invalid shape"),
    "nine dimensions": (norm(lambda t: t.dims.extend([1] * 8)), FormatError, "'ln_f.weight' is not a valid ONNX tensor"),
    "a segment of a tensor": (norm(lambda t: setattr(t.segment, "begin", 3)), FormatError, "'ln_f.weight' stores its values in field 3, which gpt2x does not read"),
    "no initializers": (lambda m: m.graph.ClearField("initializer"), CheckpointError, "an ONNX model without weights"),
    "no graph": (lambda m: m.ClearField("graph"), CheckpointError, "an ONNX model without weights"),
    "integers": (lambda m: m.graph.initializer[27].CopyFrom(onnx.numpy_helper.from_array(np.ones(6, "i4"), "ln_f.bias")), CheckpointError, "missing   ln_f.bias"),
}  # fmt: skip


@pytest.mark.parametrize("case", table({sentence: (case,) for sentence, case in BROKEN_ONNX.items()}))
def test_a_broken_onnx_file_is_refused(tmp_path, case):
    change, error, *words = case
    assert_said(onnx_file(tmp_path / "m.onnx", change), error, *words)


def message(field, data):
    """A field of protobuf that holds bytes of less than 128."""
    return bytes([field << 3 | 2, len(data)]) + data


def in_graph(*parts):
    """A tensor of these fields, behind the others of the graph."""
    return message(7, message(5, b"".join(parts)))


NAMED = message(8, b"x")
RAW_ONNX = {
    "a size that is eight bytes": (in_graph(NAMED, b"\x09" + bytes(8)), "'x': a dimension that is not an integer"),
    "a size that is four bytes": (in_graph(NAMED, b"\x0d" + bytes(4)), "'x': a dimension that is not an integer"),
    "a type that is a message": (in_graph(NAMED, message(2, b"\1")), "'x' stores its values in field 2"),
    "a type that is four bytes": (in_graph(NAMED, b"\x15" + bytes(4)), "'x' stores its values in field 2"),
    "a place that is a message": (in_graph(NAMED, message(14, b"\1")), "'x' stores its values in field 14"),
    "a name that is a number": (in_graph(b"\x40\1"), "a name that is not a string"),
    "a name that is not UTF-8": (in_graph(message(8, b"\xff")), "is not UTF-8"),
    "numbers that are one number": (in_graph(NAMED, b"\x48\1"), "'x' stores its values in field 9, which gpt2x does not read"),
    "an entry of external data that is a number": (in_graph(NAMED, b"\x68\1"), "'x': an entry that is not a message"),
    "a group": (in_graph(NAMED, b"\x0b\x0c"), "wire type 3 before byte"),
    "a kind of field that is none": (in_graph(NAMED, b"\x0f"), "wire type 7 before byte"),
    "a number without an end": (in_graph(NAMED, b"\x08" + b"\xff" * 11), "does not fit into 64 bits"),
    "a number that is cut short": (in_graph(NAMED, b"\x08\xff"), "truncated"),
    "a message that is longer than what holds it": (in_graph(NAMED, b"\x4a\x7f\0"), "truncated: "),
    "a graph behind the end": (b"\x3a\x7f", "truncated: "),
    "metadata that are numbers": (message(14, b"\x08\1"), "a name that is not a string"),
}  # fmt: skip


@pytest.mark.parametrize(("more", "word"), table(RAW_ONNX))
def test_an_onnx_file_with_fields_of_the_wrong_kind_is_refused(tmp_path, more, word):
    found = assert_said(onnx_file(tmp_path / "m.onnx", more=more), FormatError, word)
    assert "object at" not in found


def beside(**other):
    """A model whose numbers lie beside it, but for what ``other`` says of all tensors or of one."""
    return lambda model: outside(model, **other)


EXTERNAL = {
    "a path that leads out of the folder": (beside(location="../weights.bin"), UnsafeError, "points to '../weights.bin', which is not a file beside it"),
    "a path that leads out and back": (beside(location="x/../../m/weights.bin"), UnsafeError, "which is not a file beside it"),
    "an absolute path": (beside(location="/etc/passwd"), UnsafeError, "points to '/etc/passwd'"),
    "a path of Windows": (beside(location="..\\weights.bin"), UnsafeError, "which is not a file beside it"),
    "a path through a linked folder": (beside(location="linked/weights.bin"), UnsafeError, "points to 'linked/weights.bin'"),
    "no path": (beside(location=""), UnsafeError, "points to ''"),
    "a path with NUL in it": (beside(location="a\0b"), UnsafeError, "which is not a file beside it"),
    "a very long path": (beside(location="x" * 300), UnsafeError, "which is not a file beside it"),
    "a file that is not there": (beside(location="other.bin"), FormatError, "m/other.bin: no such file"),
    "a folder": (beside(location="folder"), FormatError, "m/folder: not a regular file"),
    "numbers behind the end": (beside(**{"ln_f.bias": {"offset": 10**9}}), FormatError, "'ln_f.bias': truncated: 1000000024 bytes needed", "truncated"),
    "an offset of 63 bits": (beside(**{"ln_f.bias": {"offset": 2**63 - 1}}), FormatError, "'ln_f.bias': truncated:"),
    "an offset of 80 bits": (beside(**{"ln_f.bias": {"offset": 2**80}}), FormatError, "'ln_f.bias': invalid offset or length"),
    "a negative offset": (beside(**{"ln_f.bias": {"offset": -4}}), FormatError, "'ln_f.bias': invalid offset or length"),
    "an offset that is a word": (beside(**{"ln_f.bias": {"offset": "four"}}), FormatError, "'ln_f.bias': invalid offset or length"),
    "an offset in hexadecimal": (beside(**{"ln_f.bias": {"offset": "0x10"}}), FormatError, "'ln_f.bias': invalid offset or length"),
    "an offset in other digits": (beside(**{"ln_f.bias": {"offset": "١٢"}}), FormatError, "'ln_f.bias': invalid offset or length"),
    "fewer bytes than the shape asks for": (beside(**{"ln_f.bias": {"length": 20}}), FormatError, "'ln_f.bias': 20 bytes, but shape [6]"),
    "a negative length": (beside(**{"ln_f.bias": {"length": -24}}), FormatError, "'ln_f.bias': invalid offset or length"),
    "two tensors in one place": (beside(**{"ln_f.bias": {"offset": 0}}), FormatError, "overlap in weights.bin", "'ln_f.bias'"),
}  # fmt: skip


@pytest.mark.parametrize("case", table({sentence: (case,) for sentence, case in EXTERNAL.items()}))
def test_external_data_that_cannot_be_are_refused(tmp_path, case):
    change, error, *words = case
    for name in ("m/folder", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("weights.bin", "m/weights.bin", "elsewhere/weights.bin"):
        (tmp_path / name).write_bytes(outside(onnx_model()))
    (tmp_path / "m" / "linked").symlink_to(tmp_path / "elsewhere")
    path = onnx_file(tmp_path / "m" / "m.onnx", change)
    assert_said(path, error, *words, file=path.parent if "file" in words[0] else path)


def test_external_data_that_two_entries_place_differently_are_refused(tmp_path):
    def change(model):
        outside(model)
        model.graph.initializer[27].external_data.add(key="offset", value="0")

    (tmp_path / "weights.bin").write_bytes(outside(onnx_model()))
    assert_said(
        onnx_file(tmp_path / "m.onnx", change),
        FormatError,
        "'ln_f.bias' has a duplicate key in its external data: offset",
    )


# ------------------------------------------------------------------------------------------------------ any format


every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_an_unbroken_file_of_any_kind_opens(tmp_path, tiny, kind):
    assert_same_bytes(tiny, open_checkpoint(any_file(tmp_path, kind), n_head=2))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("flax_model.msgpack", "model.npz")])
def test_a_file_of_no_tensors_is_refused(tmp_path, kind):
    """(An empty map of Flax's is a single byte, and an empty archive is anyone's: nothing that could be recognised.)"""
    path = any_file(tmp_path, kind, dict.clear)
    error = FormatError if kind == "m.gguf" else CheckpointError
    word = "an empty dict" if "torch" in kind or kind in ("legacy.bin", "ckpt.pt") else "no tensors in it"
    assert_said(path, error, "without weights" if kind == "model.onnx" else word)


@every_kind
def test_missing_tensors_are_refused_by_name_and_all_at_once(tmp_path, kind):
    names = [name_in(kind, name) for name in ("ln_f.bias", "h.1.mlp.c_fc.weight", "wpe.weight")]
    path = any_file(tmp_path, kind, lambda arrays: [arrays.pop(name) for name in names])
    assert_said(path, CheckpointError, *(f"missing   {name}" for name in names), KINDS[kind][0].name)


@every_kind
def test_an_unknown_tensor_is_refused_by_name(tmp_path, kind):
    name = KINDS[kind][0].prefixes[0] + "h.0.attn.rotary"
    path = any_file(tmp_path, kind, lambda arrays: arrays.update({name: np.ones(6, np.float32)}))
    assert_said(path, CheckpointError, f"unknown   {name}")


@every_kind
def test_a_gap_in_the_layers_of_any_format_is_refused(tmp_path, kind):
    def change(arrays):
        for canonical in [n for n in TINY.shapes() if n.startswith("h.1.")]:
            arrays[name_in(kind, canonical.replace("h.1.", "h.7."))] = arrays.pop(name_in(kind, canonical))

    assert_said(
        any_file(tmp_path, kind, change), CheckpointError, "gap       layer 1 is missing, but there is a layer 7"
    )


@every_kind
def test_layers_that_do_not_begin_at_0_are_refused(tmp_path, kind):
    def change(arrays):
        for i in (1, 0):
            for canonical in [n for n in TINY.shapes() if n.startswith(f"h.{i}.")]:
                arrays[name_in(kind, canonical.replace(f"h.{i}.", f"h.{i + 1}."))] = arrays.pop(
                    name_in(kind, canonical)
                )

    assert_said(
        any_file(tmp_path, kind, change), CheckpointError, "gap       layer 0 is missing, but there is a layer 2"
    )


@every_kind
@pytest.mark.parametrize("matrix", ["attn.c_attn", "mlp.c_fc"])
def test_one_matrix_the_other_way_round_is_refused(tmp_path, kind, matrix):
    """Of two layers, one c_attn each way: nothing says which is right, and of a nanoGPT its width then contradicts it."""

    def change(arrays):
        name = name_in(kind, f"h.1.{matrix}.weight")
        arrays[name] = np.swapaxes(arrays[name], -1, -2)

    if (kind, matrix) == ("ckpt.pt", "attn.c_attn"):
        assert_said(any_file(tmp_path, kind, change), ConfigError, "n_inner is 6 in the tensors, 24 in its metadata")
    else:
        assert_said(any_file(tmp_path, kind, change), CheckpointError, f"shape     h.1.{matrix}.weight is")


@every_kind
@pytest.mark.parametrize("prefix", ["transformer.", "x"])
def test_mixed_prefixes_in_any_format_are_refused(tmp_path, kind, prefix):
    mine = KINDS[kind][0].prefixes[0]
    name = name_in(kind, "ln_f.weight")
    other = name.removeprefix(mine) if mine == prefix else prefix + name
    path = any_file(tmp_path, kind, lambda arrays: arrays.update({other: arrays.pop(name)}))
    assert_said(path, CheckpointError, f"unknown   {other}" if kind != "tf_model.h5" else "unknown   ")


@every_kind
def test_one_parameter_under_two_names_is_refused(tmp_path, kind):
    """With and without its prefix; of Keras, by its two names for one embedding."""
    mine = KINDS[kind][0].prefixes[0]
    name = name_in(kind, "wte.weight")
    other = "transformer." + name if not mine else name.removeprefix(mine)
    other = mine + "wte/embeddings:0" if kind == "tf_model.h5" else other
    path = any_file(tmp_path, kind, lambda arrays: arrays.update({other: arrays[name]}))
    if kind == "tf_model.h5":
        assert_said(path, CheckpointError, f"duplicate {name} is wte.weight, and so is another tensor")
    else:
        assert_said(path, CheckpointError, f"unknown   {other}")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("m.gguf", "model.onnx")])
@pytest.mark.parametrize("dtype", [np.int32, np.uint8])
def test_integers_are_refused_by_name(tmp_path, kind, dtype):
    """(GGUF and ONNX have their own rows above.)"""
    name = name_in(kind, "h.0.ln_1.bias")
    path = any_file(tmp_path, kind, lambda arrays: arrays.update({name: np.ones(arrays[name].shape, dtype)}))
    assert_said(path, CheckpointError, f"integers  {name} is")


@every_kind
def test_heads_that_do_not_divide_the_width_are_refused(tmp_path, kind):
    if kind == "ckpt.pt":  # which says how many it has
        assert_said(any_file(tmp_path, kind), ConfigError, "n_head is 2 in its metadata, but --n-head is 4", n_head=4)
    else:
        assert_said(any_file(tmp_path, kind), ConfigError, "n_embd 6 is not divisible by n_head 4", n_head=4)


@every_kind
@pytest.mark.parametrize(("key", "value"), [("n_positions", 11), ("n_layer", 3), ("n_inner", 25)])
def test_a_configuration_that_the_shapes_contradict_is_refused(tmp_path, kind, key, value):
    path = any_file(tmp_path, kind)
    said = {k: v for k, v in to_hf(TINY).items() if k != "n_ctx"}
    if kind == "ckpt.pt":
        said["activation_function"] = "gelu"
    (tmp_path / "config.json").write_text(json.dumps(said))
    open_checkpoint(path)
    (tmp_path / "config.json").write_text(json.dumps({**said, key: value}))
    error = CheckpointError if kind == "ckpt.pt" else ConfigError  # where the file itself says another
    with pytest.raises(error, match=rf"(?s){re.escape(str(tmp_path))}.*config.json.*{value}|{value}.*config.json"):
        open_checkpoint(path)


@every_kind
def test_what_does_not_fit_into_float16_is_refused_by_name(tmp_path, kind):
    name = name_in(kind, "h.1.ln_2.bias")
    checkpoint = open_checkpoint(any_file(tmp_path, kind, lambda arrays: arrays[name].__imul__(1e6)), n_head=2)
    with pytest.raises(ConversionError, match=r"h.1.ln_2.bias: .* does not fit into F16"):
        save_checkpoint(checkpoint.cast(F16), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    save_checkpoint(checkpoint, tmp_path / "out.safetensors")


@every_kind
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_what_is_not_finite_in_any_file_format_is_warned_of_by_name(tmp_path, kind, value):
    name = name_in(kind, "h.1.mlp.c_fc.weight")
    checkpoint = open_checkpoint(
        any_file(tmp_path, kind, lambda arrays: arrays[name].flat.__setitem__(3, value)), n_head=2
    )
    for target in ("out.safetensors", "out.bin", "out"):
        warnings: list = []
        save_checkpoint(checkpoint, tmp_path / target, warn=warnings.append)
        assert warnings == ["h.1.mlp.c_fc.weight holds NaN or infinity"]


NO_WEIGHTS = {
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 548105171\n", "Git LFS pointer"),
    "a web page": (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>" + b" " * 500, "a web page"),
    "an answer in XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page"),
    "a model of TensorFlow Lite": (b"\x1c\0\0\0TFL3" + bytes(500), "TensorFlow Lite"),
    "a compressed archive": (b"\x1f\x8b\x08" + bytes(500), "compressed archive"),
    "nothing": (b"", "an empty file"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "word"), table(NO_WEIGHTS))
@pytest.mark.parametrize("name", [*(kind for kind in KINDS if kind != "model.ckpt.index"), "m.bin", "m.pth"])
def test_what_people_take_for_weights_is_named_under_any_name(tmp_path, name, content, word):
    if name in KINDS:
        any_file(tmp_path, name)
    (tmp_path / name).write_bytes(content)
    assert_said(tmp_path / name, FormatError, f"{name}: ", word)


@pytest.mark.parametrize(("content", "word"), table({s: c for s, c in NO_WEIGHTS.items() if "Git" in s or "page" in s}))
@pytest.mark.parametrize("name", ["model.ckpt.index", "model.ckpt.data-00000-of-00001"])
def test_what_a_download_leaves_in_the_place_of_a_file_of_tensorflow_is_named(tmp_path, name, content, word):
    path = any_file(tmp_path, "model.ckpt.index")
    (tmp_path / name).write_bytes(content)
    for way in (path, tmp_path / name, tmp_path):
        assert_said(way, FormatError, f"{name}: ", word)


def test_a_pointer_in_the_place_of_a_shard_is_named(tmp_path):
    save_checkpoint(random_checkpoint(), tmp_path / "hf", max_shard_size="2KB")
    shard = sorted((tmp_path / "hf").glob("model-*.safetensors"))[1]
    shard.write_bytes(NO_WEIGHTS["a pointer of Git LFS"][0])
    with pytest.raises(FormatError, match=f"{shard.name}: a Git LFS pointer"):
        open_checkpoint(tmp_path / "hf")


# ------------------------------------------------------------------------------ names that mean harm where they are shown

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a'onmouseover='x",
    "`code` **bold** [link](javascript:alert(1))",
    "one | two | three",
    "first\n# second\n\n---\nthird",
    "red\x1b[31m\x1b]0;title\x07",
    "{version} {0} %s $(id)",
    "&lt;b&gt; &amp;",
    "-->]]><!--",
    "right\u202eleft\u2028line",
    "```\nfence\n```",
]


class Page(HTMLParser):
    """The elements and attributes of a page, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.seen = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data):
        self.seen += data


def report_page(name):
    """The page of a report that brings a name wherever it can."""
    from gpt2x.verify.checks import Check
    from gpt2x.verify.metrics import FP32, measure
    from gpt2x.verify.report import Report
    from gpt2x.verify.report_page import page

    logits = np.random.default_rng(0).normal(size=(9, 13)).astype(np.float32)
    metrics = measure(logits, logits + 1e-7)
    details = {**asdict(metrics), "limits": metrics.limits(FP32), "failures": [name]}
    return page(Report(name, name, [Check("full context", True, name, details), Check(name, None, name)]))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_report_shows_whatever_names_as_text_and_nothing_else(monkeypatch, name):
    monkeypatch.setattr(
        "gpt2x.verify.report_page._svg", lambda plot: ""
    )  # the plots take their time, and bring no names
    plain, found = (Page(report_page(n)) for n in ("plain", name))
    assert (found.tags, found.attributes) == (plain.tags, plain.attributes)
    assert plain.seen.count("plain") == found.seen.count(printable(name).replace("\n", "\\n")) == 5
    assert "\x1b" not in report_page(name)


def test_a_report_of_a_name_that_is_no_text_is_written():
    assert b"\\udcff" in report_page("\udcff").encode()


CARD: dict[str, Any] = {
    "last": False,
    "tokenizer": False,
    "runtimes": {"fp32": "1.18"},
    "locations": {"fp32": "model.onnx_data"},
}


@pytest.mark.parametrize("name", [n.replace("/", "") for n in HOSTILE])
def test_a_hostile_file_name_reaches_neither_terminal_nor_page_nor_card(gpt2x, tmp_path, name):
    from gpt2x.export.model_card import model_card

    path = tmp_path / f"{name}.safetensors"
    save_checkpoint(random_checkpoint(), path)
    for result in (gpt2x("inspect", path), gpt2x("convert", path, tmp_path / "out.bin", "--force")):
        assert "\x1b" not in done(result).output
    assert json.loads(done(gpt2x("inspect", path, "--json")).stdout)["path"] == str(path)
    card = model_card(TINY, **CARD, source=path.name)
    plain = model_card(TINY, **CARD, source="plain")
    assert card.count("\n") == plain.count("\n")
    assert card.count("|") == plain.count("|")
    assert card.count("`") == plain.count("`")
    (line,) = (line for line in card.splitlines() if line.startswith("Written by"))
    inside = re.search(r"from `([^`]*)`\. The ONNX", line)[1]
    assert inside.isprintable()
    assert not set("<>\"'`|") & set(inside)


def test_a_file_name_of_nothing_but_marks_still_leaves_a_card_in_shape():
    from gpt2x.export.model_card import model_card

    plain = model_card(TINY, **CARD, source="plain")
    for source in ("", "```", "|||", "\n\n", "\x1b"):
        card = model_card(TINY, **CARD, source=source)
        assert card.count("`") == plain.count("`")
        assert "``." not in card


def hostile_tensors(folder, name):
    arrays = {**arrays_of(random_checkpoint()), name: np.ones(1, np.float32)}
    safetensors.numpy.save_file(arrays, folder / "m.safetensors")
    return folder / "m.safetensors"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_of_a_tensor_is_refused_on_one_printable_line(gpt2x, tmp_path, name):
    result = gpt2x("inspect", hostile_tensors(tmp_path, name))
    assert_refused(result, "unknown   ")
    assert len(result.stderr.splitlines()) == 2  # what is wrong, and which tensor
    assert result.stderr.replace("\n", "").isprintable()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_of_what_is_left_out_stay_on_their_line(gpt2x, tmp_path, name):
    state = {n: torch.from_numpy(a) for n, a in named_by(NANOGPT).items()}
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 6, "block_size": 10, "vocab_size": 13, "bias": True}
    plain, found = [], []
    for key, lines in (("plain", plain), (name, found)):
        torch.save({"model": state, "model_args": sizes, key: 1}, tmp_path / "ckpt.pt")
        for command in (
            ("inspect", tmp_path / "ckpt.pt"),
            ("convert", tmp_path / "ckpt.pt", tmp_path / "o", "--force"),
        ):
            output = done(gpt2x(*command)).output
            lines += output.splitlines()
            assert output.replace("\n", "").isprintable()
    assert len(found) == len(plain)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tokens_are_text_wherever_they_are_shown(gpt2x, tmp_path, name):
    def change(p):
        tokenizer_of_13(p)
        p.metadata[b"tokenizer.ggml.tokens"] = (ARRAY, listed(STRING, [*TOKENS[:9], "x", name, *TOKENS[11:]]))
        p.metadata[b"tokenizer.ggml.token_type"] = (ARRAY, listed(INT32, [1] * 10 + [3, 1, 3]))

    path = gguf_file(tmp_path / "m.gguf", change)
    done(gpt2x("inspect", path))
    output = done(gpt2x("convert", path, tmp_path / "tf", "--to", "tf")).output  # which says what it cannot mark
    assert printable(name).replace("\n", "\\n") in output
    assert output.replace("\n", "").isprintable()
    assert open_checkpoint(tmp_path / "tf").tokenizer.vocabulary().ids[name] == 10


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    from gpt2x import export_onnx

    folder = tmp_path_factory.mktemp("exported")
    save_checkpoint(random_checkpoint(), folder / "m.safetensors")
    export_onnx(open_checkpoint(folder / "m.safetensors"), folder / "d", need_tokenizer=False)
    return folder / "d"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_metadata_of_an_onnx_model_are_shown_on_their_line(gpt2x, tmp_path, exported, name):
    shutil.copytree(exported, tmp_path / "d")
    model = onnx.load(tmp_path / "d/onnx/model.onnx", load_external_data=False)
    for entry in model.metadata_props:
        if entry.key == "gpt2x.source":
            entry.value = name
        if entry.key == "gpt2x.source_sha256":
            entry.value = json.dumps({name: name})
    onnx.save(model, tmp_path / "d/onnx/model.onnx")
    output = done(gpt2x("inspect", tmp_path / "d")).output
    assert output.replace("\n", "").isprintable()
    rows = [line for line in output.splitlines() if line.startswith(("  written by", "  sha256"))]
    assert len(rows) == 2
    assert all(line.startswith("  ") for line in output.splitlines()[1:])


def test_a_file_name_that_is_not_utf8_goes_everywhere_a_name_goes(gpt2x, tmp_path):
    source = os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.safetensors")
    save_checkpoint(random_checkpoint(), source)
    target = os.fsdecode(os.fsencode(tmp_path) + b"/n\xfe.bin")
    done(gpt2x("convert", source, target))
    done(gpt2x("verify", source, target, "--report", tmp_path / "r.html", "--json", tmp_path / "r.json"))
    done(gpt2x("export", source, "--onnx", tmp_path / "d", "--no-tokenizer", "--no-verify"))
    assert "fault" not in done(gpt2x("inspect", tmp_path / "d")).output


@pytest.mark.parametrize(
    ("kind", "match"), [("adapter", "llama-export-lora -m BASE.gguf --lora"), ("imatrix", "pass the file of the model")]
)
def test_a_gguf_file_that_holds_no_model_says_what_to_do(tmp_path, kind, match):
    """``convert_lora_to_gguf.py`` and ``llama-imatrix`` of llama.cpp write files of these types."""
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "gpt2")
    writer.add_type(kind)
    writer.add_tensor("blk.0.attn_qkv.weight.lora_a", np.ones((4, 16), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(tmp_path / "m.gguf")


CUT = [
    "gguf/F32.gguf", "gguf/Q8_0.gguf", "keras/tf_model.h5", "flax/flax_model.msgpack", "onnx_optimum/model.onnx",
    "rust_bert/rust_model.ot", "tiny.npz", "build_nanogpt/model_19072.pt",
]  # fmt: skip


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.99])
def test_a_file_that_is_cut_short_is_refused_with_what_to_do(tmp_path, name, share):
    data = (FIXTURES / name).read_bytes()
    path = tmp_path / name.split("/")[-1]
    path.write_bytes(data[: int(share * len(data))])
    assert assert_said(path, FormatError).endswith("; download or copy it again")


@pytest.mark.parametrize("name", ["m.safetensors", "m.bin", "m.gguf", "llm.c.bin", "nanogpt.pt"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_a_file_of_gpt2x_that_is_cut_short_is_refused_with_what_to_do(tmp_path, name, share):
    writer = {"llm.c.bin": "llmc", "nanogpt.pt": "nanogpt"}.get(name, "")
    activation = "gelu" if writer == "nanogpt" else "gelu_new"
    path = tmp_path / name
    save_checkpoint(random_checkpoint(replace(TINY, activation_function=activation)), path, writer or None)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert assert_said(path, FormatError).endswith("; download or copy it again")


def test_a_file_without_tensors_is_refused_with_what_to_do(tmp_path):
    path = tmp_path / "m.safetensors"
    safetensors.numpy.save_file({}, path)
    said = assert_said(path, CheckpointError, "no tensors in it")
    assert said.endswith("pass the file that holds the weights of the model")


def test_an_onnx_model_without_its_data_is_refused_with_what_to_do(gpt2x, tmp_path):
    save_checkpoint(random_checkpoint(), tmp_path / "m.safetensors")
    done(gpt2x("export", tmp_path / "m.safetensors", "--onnx", tmp_path / "d", "--no-tokenizer", "--no-verify"))
    model = tmp_path / "d/onnx/model.onnx"
    data = model.with_name("model.onnx_data")
    data.unlink()
    assert_said(model, FormatError, "no such file; it holds values of the model: download or copy it again", file=data)
