"""``torch.save`` since PyTorch 1.6: a zip archive with one pickle and one stored member a storage.

libtorch's ``OutputArchive`` writes such an archive, too, with a module in place of a dict, and its code beside it. tch-rs's
``VarStore::save`` uses it for rust-bert's ``rust_model.ot``. The code is not read.

Sources: PyTorch's ``torch/serialization.py``, ``caffe2/serialize/inline_container.cc`` and ``output-archive.cpp``; tch-rs's
``torch_api.cpp`` and ``tensor.rs``, which writes ``|`` in names for a dot.
"""

from __future__ import annotations

import io
import math
import struct
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, FormatError
from ..io.publishing import Output
from ..io.reading import File
from ..tensors import Checksum, LazyTensor
from ..values import all_are, any_ends_with
from .container import Container
from .torch_dump import dump_pickle
from .torch_entries import container_of, named_tensors
from .torch_pickle import MAX_PICKLE, load_pickle
from .torch_values import Opaque, Storage, TensorRef
from .zip_members import LOCAL, Member, check_stored, crc32, read_members

# kFieldAlignment of PyTorch's inline_container.cc.
ALIGNMENT = 64
CONSTANTS = "constants.pkl"
KERAS_WEIGHTS = "model.weights.h5"  # a member that only Keras's archives have
PROGRAMS = {  # kind -> a member that only such an archive has, and its name for people
    "pt2": ("/models/model.json", "a program of torch.export"),
    "torchscript": (f"/{CONSTANTS}", "TorchScript"),
}


OUTPUT_ARCHIVE = b"\x80\x02c__torch__\nModule\n"  # the beginning of data.pkl
MODULE = "__torch__.Module"
CODE = "code/"  # members that are compressed, and not read


def open_torch_zip(path: Path, records: Collection[str] = ()) -> Container:
    """Open a ``.bin`` or ``.pt`` in the zip format.

    Args:
        path: the file.
        records: names of small members that go into the metadata, as bytes, where the archive has them.

    Raises:
        UnsafeError: if its pickle would do harm.
        FormatError: if the archive or the pickle is invalid.
        CheckpointError: if it holds no named tensors.
    """
    file = File(path)
    members = read_members(file)
    _refuse_programs(file, members)
    members = _rooted(members, str(path))
    is_module = CONSTANTS in members
    read = {name: member for name, member in members.items() if not (is_module and name.startswith(CODE))}
    check_stored(file, read, "PyTorch stores its members uncompressed")
    if _small(file, members, "byteorder", b"little") != b"little":
        raise FormatError(f"{path}: written on a big-endian machine, which gpt2x does not read")
    pickle = io.BytesIO(_small(file, members, "data.pkl"))
    saved = load_pickle(pickle, f"{path}: data.pkl")
    if is_module:
        saved = _module_state(saved, str(path))
    if pickle.read(1):
        raise FormatError(f"{path}: data.pkl: extra bytes after the end of the pickle")
    found = named_tensors(saved, str(path))
    given = {name: _small(file, members, name) for name in records if name in members}
    return container_of(path, found, lambda ref: _tensor(file, members, ref), given)


def _module_state(saved: Any, where: str) -> dict[str, Any]:
    """The named tensors of a module, with dots in their names."""
    is_plain = isinstance(saved, Opaque) and saved.name == MODULE and saved.arguments == ()
    state = saved.state if is_plain else None
    if not isinstance(state, dict) or not all_are(state.values(), TensorRef):
        raise CheckpointError(f"{where}: a module that does not only hold tensors, which gpt2x does not read")
    result = {name.replace("|", "."): value for name, value in state.items()}
    if len(result) != len(state):
        raise FormatError(f"{where}: two tensors of one name, once | in it is a dot")
    return result


def program_in(names: Sequence[str], start: bytes = b"") -> str | None:
    """Which of ``PROGRAMS`` an archive is; None if it is none.

    Args:
        names: of its members.
        start: the first bytes of its ``data.pkl``, which tell a module of tensors alone from a program.
    """
    if start.startswith(OUTPUT_ARCHIVE):
        return None
    return next((kind for kind, (end, _) in PROGRAMS.items() if any_ends_with(names, end)), None)


def _refuse_programs(file: File, members: Mapping[str, Member]) -> None:
    pickle = next((member for name, member in members.items() if name.endswith("/data.pkl")), None)
    start = file.read(pickle.start, min(pickle.size, len(OUTPUT_ARCHIVE))) if pickle else b""
    kind = program_in(list(members), start)
    if kind:
        _, name = PROGRAMS[kind]
        raise CheckpointError(
            f"{file.path}: {name}, whose weights gpt2x does not read; run it with gpt2x generate or verify, or convert the checkpoint that it was made from"
        )


def _rooted(members: Mapping[str, Member], where: str) -> dict[str, Member]:
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if KERAS_WEIGHTS in members:
        raise FormatError(f"{where}: a .keras archive; unzip it, and pass the folder")
    if len(pickles) != 1:
        raise FormatError(f"{where}: a zip archive without PyTorch's data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    for name in members:
        if not name.startswith(root):
            raise FormatError(f"{where}: the member {name!r} is outside {root!r}")
    return {name.removeprefix(root): member for name, member in members.items()}


def _small(file: File, members: Mapping[str, Member], name: str, default: bytes | None = None) -> bytes:
    """A small member's bytes; their checksum is verified."""
    if name not in members:
        if default is None:
            raise FormatError(f"{file.path}: no {name} in it")
        return default
    member = members[name]
    if member.size > MAX_PICKLE:
        raise FormatError(f"{file.path}: {name} has {member.size} bytes, which exceeds the limit of {MAX_PICKLE}")
    return member.tensor(file, name).read().tobytes()


def _tensor(file: File, members: Mapping[str, Member], ref: TensorRef) -> LazyTensor:
    name = f"data/{ref.storage.key}"
    where = f"{file.path}: {name}"
    if name not in members:
        raise FormatError(f"{where}: missing from the archive")
    member = members[name]
    storage = ref.storage
    if member.size != storage.size * storage.dtype.itemsize:
        raise FormatError(
            f"{where}: {member.size} bytes, but the pickle states {storage.size} values of {storage.dtype}"
        )
    checksum = Checksum(crc32, member.crc, where)
    whole = LazyTensor.in_file(file, member.start, storage.dtype, (storage.size,), checksum)
    return part_of(whole, ref)


def part_of(storage: LazyTensor, ref: TensorRef) -> LazyTensor:
    """The tensor in a storage: all of it, or a part (the checksum covers all of it)."""
    if ref.offset == 0 and math.prod(ref.shape) == storage.size:
        return storage.reshape(ref.shape)
    begin = ref.offset * ref.storage.dtype.itemsize
    end = begin + math.prod(ref.shape) * ref.storage.dtype.itemsize

    def stream() -> Any:
        position = 0
        for chunk in storage.chunks():
            low, high = max(begin - position, 0), min(end - position, len(chunk))
            if low < high:
                yield chunk[low:high]
            position += len(chunk)

    def mapped() -> Any:
        assert storage.mapped
        return storage.mapped()[begin:end]

    return LazyTensor(storage.dtype, ref.shape, stream, mapped, storage.checksummed)


def write_torch_zip(
    out: Output,
    tensors: Mapping[str, LazyTensor],
    *,
    beside: Mapping[str, Any] | None = None,
    records: Mapping[str, bytes] | None = None,
) -> None:
    """Write what ``torch.load(weights_only=True)`` reads: an OrderedDict of tensors in a zip archive.

    One tensor under two names is stored once.

    Args:
        out: the file.
        tensors: name -> tensor.
        beside: what lies beside the tensors. With it the result is a dict that has the tensors under ``model``, as in
            a training checkpoint.
        records: name -> contents of members that torch ignores.
    """
    writer = _ZipWriter(out, "pytorch_model" if beside is None else "ckpt")
    storages = {id(tensor): tensor for tensor in tensors.values()}
    keys = {one: str(i) for i, one in enumerate(storages)}
    refs = OrderedDict(
        (name, TensorRef(Storage(keys[id(t)], t.dtype, t.size, t.size), 0, t.shape)) for name, t in tensors.items()
    )
    saved = refs if beside is None else {"model": refs, **beside}
    # Members in PyTorch's order.
    writer.add("data.pkl", LazyTensor.of_bytes(dump_pickle(saved)))
    writer.add("byteorder", LazyTensor.of_bytes(b"little"))
    for name, data in (records or {}).items():
        writer.add(name, LazyTensor.of_bytes(data))
    for one, tensor in storages.items():
        writer.add(f"data/{keys[one]}", tensor)
    writer.add("version", LazyTensor.of_bytes(b"3\n"))
    writer.finish()


class _ZipWriter:
    """Writes stored members, each aligned. Checksums are patched in after the data; zip64 is used where needed."""

    def __init__(self, out: Output, root: str) -> None:
        self.out, self.root = out, root
        self.directory: list[bytes] = []

    def add(self, name: str, data: LazyTensor) -> None:
        path = f"{self.root}/{name}".encode()
        header, size = self.out.position, data.nbytes
        large = size >= 2**32 - 1
        short = 2**32 - 1 if large else size
        wide = struct.pack("<2H2Q", 1, 16, size, size) if large else b""
        gap = -(header + LOCAL.size + len(path) + len(wide) + 4) % ALIGNMENT
        extra = wide + struct.pack("<2H", 0x4246, gap) + b"Z" * gap  # PyTorch's own padding field
        # The version of the zip format that a reader needs: 4.5 has zip64. The date 0x21 is 1 January 1980, the first
        # that the format has, so that equal models give equal files.
        version = 45 if large else 20
        self.out.write(
            LOCAL.pack(b"PK\x03\x04", version, 0, 0, 0, 0x21, 0, short, short, len(path), len(extra)) + path + extra
        )
        crc = 0
        for chunk in data.chunks():
            crc = crc32(crc, chunk)
            self.out.write(chunk)
        self.out.patch(header + 14, struct.pack("<L", crc))
        places = [size, size] if large else []
        far = header >= 2**32 - 1
        places += [header] if far else []
        wide = struct.pack(f"<2H{len(places)}Q", 1, 8 * len(places), *places) if places else b""
        self.directory.append(
            struct.pack(
                "<4s6H3L5H2L", b"PK\x01\x02", 45, 45 if places else 20, 0, 0, 0, 0x21, crc, short, short,
                len(path), len(wide), 0, 0, 0, 0, 2**32 - 1 if far else header,
            ) + path + wide
        )  # fmt: skip

    def finish(self) -> None:
        start, count = self.out.position, len(self.directory)
        self.out.write(b"".join(self.directory))
        end = self.out.position
        size = end - start
        if start >= 2**32 - 1 or count >= 2**16 - 1:
            self.out.write(struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start))
            self.out.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1))
        entries, place = min(count, 2**16 - 1), min(start, 2**32 - 1)
        self.out.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, entries, entries, size, place, 0))
