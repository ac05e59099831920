"""The pickles inside PyTorch's files, read without executing anything.

A pickle is a program for a small stack machine. This is such a machine with the instructions that PyTorch's files
use and a table of the few globals they name; each becomes a plain description, and nothing is imported or called.
Everything else is refused. Sources: ``pickletools`` (the instruction set), PyTorch's
``torch/serialization.py`` and ``torch/_utils.py`` (what its files hold).
"""

from __future__ import annotations

import io
import itertools
import math
import pickletools
import struct
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

from ..errors import CheckpointError, FormatError, UnsafeError
from ..tensors import DTYPES, DType

MAX_PICKLE = 8 << 20  # of GPT-2's 1558M: 100 KB
MAX_RANK = 8
MAX_COPIED = 1_000_000
MAX_BITS = 1024  # of an integer; Python does not print very long ones

STORAGES = {
    "FloatStorage": "F32", "DoubleStorage": "F64", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
    "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip
SCALARS = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


@dataclass(frozen=True)
class Global:
    """A global that the pickle names. It is never resolved."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A block of raw values that the pickle refers to by key."""

    key: str
    dtype: DType
    size: int  # values


@dataclass(frozen=True)
class TensorRef:
    """A contiguous tensor in a storage."""

    storage: Storage
    offset: int  # values
    shape: tuple[int, ...]


ALLOWED = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.Size",
    "torch.device",
    *(f"torch.{name}" for name in STORAGES),
    *(f"torch.{name}" for name in SCALARS),
}
PLAINLY = {
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
}


def load_pickle(stream: IO[bytes], where: str, storages: dict[str, Storage] | None = None) -> Any:
    """The object that one pickle describes: dicts, lists, tuples, strings, numbers, TensorRef and Global.

    ``storages`` collects every storage that the pickle refers to, by key.

    Raises:
        UnsafeError: if it names a global that is not allowed.
        FormatError: if it is invalid pickle of the kind that PyTorch writes.
    """
    try:
        return _Machine(where, {} if storages is None else storages).run(_Bounded(stream, where))
    except _UNSOUND as error:
        raise FormatError(f"{where}: invalid pickle: {type(error).__name__}: {str(error)[:200]}") from None


# What ``pickletools`` and the machine below raise for invalid pickles. The warning is of an invalid escape.
_UNSOUND = (
    IndexError, KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError, DeprecationWarning,
)  # fmt: skip


class _Bounded(io.RawIOBase):
    """A stream with a limit: pickles of weights are small."""

    def __init__(self, stream: IO[bytes], where: str) -> None:
        self.stream, self.where, self.left = stream, where, MAX_PICKLE

    def _take(self, data: bytes) -> bytes:
        self.left -= len(data)
        if self.left < 0:
            raise FormatError(f"{self.where}: a pickle of more than {MAX_PICKLE >> 20} MB")
        return data

    def read(self, n: int = -1) -> bytes:
        if not 0 <= n <= self.left:
            raise FormatError(
                f"{self.where}: a pickle with an item of {n} bytes, which exceeds the limit of {MAX_PICKLE >> 20} MB"
            )
        return self._take(self.stream.read(n))

    def readline(self, size: int | None = -1) -> bytes:
        return self._take(self.stream.readline(65536))

    def tell(self) -> int:
        return self.stream.tell()


class _Machine:
    def __init__(self, where: str, storages: dict[str, Storage]) -> None:
        self.where = where
        self.storages = storages
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.copied = 0
        self.memo: dict[int, Any] = {}

    def run(self, stream: Any) -> Any:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                if len(self.stack) != 1:
                    raise FormatError(f"{self.where}: a pickle that ends with {len(self.stack)} objects instead of one")
                return self.stack.pop()
            if opcode.name in _CONSTANTS:
                self.stack.append(_CONSTANTS[opcode.name]())
            elif opcode.name in _LITERALS:
                if isinstance(argument, str):
                    argument.encode()  # raises for a lone surrogate, which is not valid Unicode
                if isinstance(argument, int) and argument.bit_length() > MAX_BITS:
                    raise FormatError(f"{self.where}: a number of {argument.bit_length()} bits in a pickle")
                self.stack.append(argument)
            else:
                handler = getattr(self, f"op_{opcode.name}", None)
                if handler is None:
                    raise UnsafeError(
                        f"{self.where}: the pickle uses the instruction {opcode.name}, which no weight file needs: refused"
                    )
                handler(argument)
        raise FormatError(f"{self.where}: truncated: a pickle without its STOP instruction")

    def _since_mark(self) -> list[Any]:
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def op_PROTO(self, version: int) -> None:
        if version > 5:
            raise FormatError(f"{self.where}: pickle protocol {version}")

    def op_FRAME(self, _: int) -> None:
        pass

    def op_MARK(self, _: None) -> None:
        self.marks.append(len(self.stack))

    # the memo

    def op_BINPUT(self, key: int) -> None:
        if not 0 <= key < 2**32:
            raise FormatError(f"{self.where}: a pickle with an invalid memo key")
        self.memo[key] = self.stack[-1]

    op_LONG_BINPUT = op_PUT = op_BINPUT

    def op_MEMOIZE(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def op_BINGET(self, key: int) -> None:
        self.stack.append(self.memo[key])

    op_LONG_BINGET = op_GET = op_BINGET

    # tuples, lists, dicts

    def op_TUPLE(self, _: None) -> None:
        self.stack.append(tuple(self._since_mark()))

    def op_TUPLE1(self, _: None) -> None:
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def op_TUPLE2(self, _: None) -> None:
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def op_TUPLE3(self, _: None) -> None:
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def op_LIST(self, _: None) -> None:
        self.stack.append(self._since_mark())

    def op_APPEND(self, _: None) -> None:
        value = self.stack.pop()
        self._top(list).append(value)

    def op_APPENDS(self, _: None) -> None:
        values = self._since_mark()
        self._top(list).extend(values)

    def op_DICT(self, _: None) -> None:
        self.stack.append(self._fill({}, self._since_mark()))

    def op_SETITEM(self, _: None) -> None:
        pair = [self.stack.pop(-2), self.stack.pop(-1)]
        self._fill(self._top(dict), pair)

    def op_SETITEMS(self, _: None) -> None:
        items = self._since_mark()
        self._fill(self._top(dict), items)

    def _top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise FormatError(
                f"{self.where}: a pickle that fills a {type(self.stack[-1]).__name__} like a {kind.__name__}"
            )
        return self.stack[-1]

    def _fill(self, target: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not (key is None or isinstance(key, str) or (isinstance(key, int) and abs(key) < 2**31)):
                raise FormatError(f"{self.where}: a pickle with a {type(key).__name__} as a key")
            if key in target:
                raise FormatError(f"{self.where}: duplicate key {key!r}")
            target[key] = value
        return target

    # globals, calls and storages: descriptions only

    def op_GLOBAL(self, argument: str) -> None:
        name = argument.replace(" ", ".", 1)
        if name.startswith("__builtin__."):
            name = name.replace("__builtin__", "builtins", 1)
        if name in PLAINLY:
            raise FormatError(f"{self.where}: holds {PLAINLY[name]}, which gpt2x does not read")
        if name not in ALLOWED:
            raise UnsafeError(
                f"{self.where}: the pickle refers to {name[:200]}, which weights never need: refused, nothing was executed"
            )
        self.stack.append(Global(name))

    def op_STACK_GLOBAL(self, _: None) -> None:
        name = self.stack.pop()
        module = self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise FormatError(f"{self.where}: a global without a valid name")
        self.op_GLOBAL(f"{module} {name}")

    def op_BINPERSID(self, _: None) -> None:
        self.stack.append(self._storage(self.stack.pop()))

    def _storage(self, pid: Any) -> Storage:
        tag, kind, key, _location, size = pid[:5]
        name = kind.name.removeprefix("torch.") if isinstance(kind, Global) else ""
        if tag != "storage" or name not in STORAGES or not isinstance(key, str) or not _is_natural(size):
            raise FormatError(f"{self.where}: an invalid reference to a storage")
        if len(pid) > 5 and pid[5] is not None:
            raise FormatError(f"{self.where}: a view of a storage, as PyTorch before 0.4 wrote it")
        storage = Storage(key, DTYPES[STORAGES[name]], size)
        if self.storages.setdefault(key, storage) != storage:
            raise FormatError(f"{self.where}: contradicting descriptions of the storage {key}")
        return storage

    def op_REDUCE(self, _: None) -> None:
        arguments = self.stack.pop()
        function = self.stack.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise UnsafeError(f"{self.where}: the pickle calls an unknown function: refused")
        self.stack.append(self._call(function.name, arguments))

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name == "collections.OrderedDict":
            pairs = arguments[0] if arguments else []
            self._charge(len(pairs))
            return self._fill({}, [item for key, value in pairs for item in (key, value)])
        if name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
            return self._tensor(*self._plain(arguments))
        if name == "torch._utils._rebuild_parameter":
            return arguments[0]
        if name == "torch.Size":
            self._charge(len(arguments[0]))
            return tuple(arguments[0])
        if name == "torch.device":
            return Global(name)
        raise UnsafeError(f"{self.where}: the pickle calls {name}: refused")

    def _charge(self, items: int) -> None:
        # A few bytes of a pickle can copy a long list many times.
        self.copied += items
        if self.copied > MAX_COPIED:
            raise FormatError(f"{self.where}: a pickle that copies more than {MAX_COPIED} items")

    def _plain(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Storage, offset, shape and stride. Hooks may follow, and flags that change the values, which are refused."""
        if len(arguments) > 7 or (len(arguments) == 7 and arguments[6]):
            raise FormatError(f"{self.where}: a negated or conjugated tensor view, which gpt2x does not read")
        return arguments[:4]

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any) -> TensorRef:
        if (
            not isinstance(storage, Storage)
            or not all(map(_is_natural, (offset, *shape, *stride)))
            or len(shape) != len(stride)
        ):
            raise FormatError(f"{self.where}: an invalid tensor")
        if len(shape) > MAX_RANK or math.prod(shape) >= 2**40:
            raise FormatError(f"{self.where}: invalid shape, {list(shape)[:9]}")
        if not _is_contiguous(shape, stride):
            raise FormatError(
                f"{self.where}: a tensor of shape {list(shape)} with strides {list(stride)}: not contiguous; call .contiguous() and save it again"
            )
        if offset + math.prod(shape) > storage.size:
            raise FormatError(
                f"{self.where}: a tensor of shape {list(shape)} at offset {offset} does not fit into a storage of {storage.size} values"
            )
        return TensorRef(storage, offset, tuple(shape))

    def op_BUILD(self, _: None) -> None:
        self.stack.pop()  # the _metadata of a state dict, which weights do not need
        self._top(dict)


_CONSTANTS: Mapping[str, Any] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict,
}  # fmt: skip
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINSTRING", "SHORT_BINSTRING", "STRING",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip


def _is_natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for n, step in zip(reversed(shape), reversed(stride), strict=True):
        if n != 1 and step != expected:
            return math.prod(shape) == 0
        expected *= n
    return True


WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
)  # of Lightning, PyTorch's tutorials, nanoGPT, DeepSpeed


@dataclass(frozen=True)
class StateDict:
    """The named tensors of a saved object, and what it holds beside them."""

    tensors: dict[str, TensorRef]
    beside: dict[Any, Any]


def state_dict(value: Any, where: str) -> StateDict:
    """Find the named tensors of a saved object.

    Raises:
        CheckpointError: if it is neither a dict of tensors nor a known wrapper of one.
    """
    others: dict[Any, Any] = {}
    if isinstance(value, dict):
        for key in WRAPPERS:
            if isinstance(value.get(key), dict):
                others = {other: item for other, item in value.items() if other != key}
                for other, item in others.items():
                    if _holds_tensors(other, item):
                        raise CheckpointError(
                            f"{where}: {other!r} and {key!r} both hold tensors of a model; save only one of them"
                        )
                value = value[key]
                break
    if not isinstance(value, dict) or not value:
        raise CheckpointError(f"{where}: holds {_describe(value)}, not a dict of tensors")
    if wrong := [key for key, item in value.items() if not isinstance(key, str) or not isinstance(item, TensorRef)]:
        raise CheckpointError(
            f"{where}: {str(wrong[0])[:100]!r} is {_describe(value[wrong[0]])}, not a tensor: not a dict of tensors"
        )
    return StateDict(value, others)


def _holds_tensors(key: Any, value: Any) -> bool:
    """Whether a value beside a wrapped state dict may hold weights, too, and not an optimizer's state or a loss."""
    return (isinstance(value, TensorRef) and math.prod(value.shape) > 1) or (
        key in WRAPPERS and isinstance(value, dict)
    )


def _describe(value: Any) -> str:
    if isinstance(value, TensorRef):
        return "a tensor"
    return "an empty dict" if value == {} else f"a {type(value).__name__}"


def check_overlaps(tensors: Mapping[str, TensorRef], where: str) -> None:
    """Refuse tensors that share a part of their values. One tensor may have several names."""
    spans = sorted(
        (ref.storage.key, ref.offset, ref.offset + math.prod(ref.shape))
        for ref in set(tensors.values())
        if math.prod(ref.shape)
    )
    for (key, _, end), (other, start, _) in itertools.pairwise(spans):
        if key == other and start < end:
            names = [n for n, t in tensors.items() if t.storage.key == key]
            raise FormatError(f"{where}: {' and '.join(names[:3])} overlap in one storage")


# ---------------------------------------------------------------------------------------------------- writing


def dump_pickle(value: Any) -> bytes:
    """The pickle of dicts, OrderedDicts, str, bool, int, float and TensorRef, as ``torch.save`` writes it."""
    return b"\x80\x02" + _pickled(value) + b"."


def _pickled(value: Any) -> bytes:
    if isinstance(value, TensorRef):
        return _rebuilt(value)
    if isinstance(value, dict):
        empty = b"ccollections\nOrderedDict\n)R" if isinstance(value, OrderedDict) else b"}"
        return empty + b"(" + b"".join(_str(key) + _pickled(item) for key, item in value.items()) + b"u"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    return _str(value) if isinstance(value, str) else _int(value)


def _rebuilt(ref: TensorRef) -> bytes:
    storage, kinds = ref.storage, {dtype: name for name, dtype in STORAGES.items()}
    strides = [math.prod(ref.shape[i + 1 :]) for i in range(len(ref.shape))]
    kind = f"ctorch\n{kinds[storage.dtype.name]}\n".encode()
    pid = b"(" + _str("storage") + kind + _str(storage.key) + _str("cpu") + _int(storage.size) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = pid + _int(ref.offset) + _ints(ref.shape) + _ints(strides) + b"\x89" + hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def _str(text: str) -> bytes:
    data = text.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def _int(value: int) -> bytes:
    if value < 2**31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def _ints(values: Any) -> bytes:
    return b"(" + b"".join(_int(v) for v in values) + b"t"
