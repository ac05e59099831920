"""The pickles inside PyTorch's files, read without executing anything.

A pickle is a program for a small stack machine. This is such a machine, with the instructions that ``pickle`` writes
in protocols 0 to 5. What it would build of tensors becomes a plain description; any other object becomes an ``Opaque``:
the name of its class, and the values that it would be built from. Nothing is imported, constructed or called. Globals
that would do harm are refused (``torch_globals``). Sources: ``pickletools`` (the instruction set), PyTorch's
``torch/serialization.py``, ``torch/_utils.py`` and ``torch/_tensor.py`` (what its files hold).
"""

from __future__ import annotations

import io
import math
import pickletools
from collections.abc import Mapping
from typing import IO, Any

from ..errors import FormatError, UnsafeError, truncated
from ..tensors import DTYPES
from .container import MAX_RANK, MAX_VALUES
from .torch_globals import REBUILD, full_name, is_harmful, may_be_called
from .torch_values import Global, Opaque, OtherKey, Storage, TensorRef, UnreadTensor, describe

MAX_PICKLE = 8 << 20  # of GPT-2's 1558M: 100 KB
MAX_COPIED = 1_000_000
MAX_KEY = 2**63  # of a dict, where it is an integer
MAX_BITS = 1024  # of an integer; Python does not print very long ones

STORAGES = {
    "FloatStorage": "F32", "DoubleStorage": "F64", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
    "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip
# Kinds of storages that gpt2x does not read -> bytes of a value. They may lie beside the weights.
UNREAD_STORAGES = {
    "ComplexHalfStorage": 4, "ComplexFloatStorage": 8, "ComplexDoubleStorage": 16, "QInt8Storage": 1, "QUInt8Storage": 1,
    "QInt32Storage": 4, "QUInt4x2Storage": 1, "QUInt2x4Storage": 1, "UntypedStorage": 1, "storage.UntypedStorage": 1,
}  # fmt: skip
UNREAD_TENSORS = {
    "_rebuild_qtensor": "a quantized tensor",
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor of the device 'meta', which has no values",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_device_tensor_from_numpy": "a tensor of another kind of device; move it to the CPU and save it again",
    "_rebuild_wrapper_subclass": "a tensor of a subclass of torch.Tensor, such as a shard of a distributed one",
}
TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
SUBCLASSES = ("torch._tensor._rebuild_from_type", "torch._tensor._rebuild_from_type_v2")
# Functions that return an object of the class that is their first argument.
CLASS_FIRST = ("copyreg._reconstructor", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
DICTS = ("collections.OrderedDict", "collections.defaultdict", "collections.Counter")


def load_pickle(stream: IO[bytes], where: str, storages: dict[str, Storage] | None = None) -> Any:
    """The object that one pickle describes: dicts, lists, tuples, strings, numbers, TensorRef, Global and Opaque.

    ``storages`` collects every storage that the pickle refers to, by key.

    Raises:
        UnsafeError: if it names a global that would do harm, or uses an instruction that ``pickle`` does not write.
        FormatError: if it is not a valid pickle.
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
        # Some instructions of protocol 0 end with a newline; pickletools reads these by lines.
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
        # genops parses instructions, and neither imports nor builds anything.
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
        raise truncated(self.where, "a pickle without its STOP instruction")

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

    def op_POP(self, _: None) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def op_POP_MARK(self, _: None) -> None:
        self._since_mark()

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
        self._list_on_top().append(value)

    def op_APPENDS(self, _: None) -> None:
        values = self._since_mark()
        self._list_on_top().extend(values)

    op_ADDITEMS = op_APPENDS

    def op_EMPTY_SET(self, _: None) -> None:
        self.stack.append(Opaque("builtins.set"))

    def op_FROZENSET(self, _: None) -> None:
        self.stack.append(Opaque("builtins.frozenset", (self._since_mark(),)))

    def op_DICT(self, _: None) -> None:
        self.stack.append(self._fill({}, self._since_mark()))

    def op_SETITEM(self, _: None) -> None:
        pair = [self.stack.pop(-2), self.stack.pop(-1)]
        self._fill(self._dict_on_top(), pair)

    def op_SETITEMS(self, _: None) -> None:
        items = self._since_mark()
        self._fill(self._dict_on_top(), items)

    def _list_on_top(self) -> list[Any]:
        top = self.stack[-1]
        if isinstance(top, Opaque):
            if top.items is None:
                top.items = []
            return top.items
        items: list[Any] = self._expected(top, list)
        return items

    def _dict_on_top(self) -> dict[Any, Any]:
        top = self.stack[-1]
        if isinstance(top, Opaque):
            if top.pairs is None:
                top.pairs = {}
            return top.pairs
        pairs: dict[Any, Any] = self._expected(top, dict)
        return pairs

    def _expected(self, value: Any, kind: type) -> Any:
        if type(value) is not kind:
            raise FormatError(f"{self.where}: a pickle that fills a {type(value).__name__} like a {kind.__name__}")
        return value

    def _fill(self, target: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
        for given, value in zip(items[::2], items[1::2], strict=True):
            key = self._key(given)
            if key in target:
                raise FormatError(f"{self.where}: duplicate key {key!r}")
            target[key] = value
        return target

    def _key(self, key: Any) -> Any:
        """A key that is hashed at once: a string, a number, None, or what stands for any other."""
        if key is None or isinstance(key, str):
            return key
        # Optimizers of old versions of torch have the ids of parameters as keys. Larger ones can be made to collide.
        if isinstance(key, int) and abs(key) < MAX_KEY:
            return key
        if isinstance(key, int | list | dict):
            raise FormatError(f"{self.where}: a pickle with a {type(key).__name__} as a key")
        return OtherKey(describe(key))

    # globals, calls and storages: descriptions only

    def op_GLOBAL(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(self._global(module, name))

    def _global(self, module: str, name: str) -> Global:
        full = full_name(module, name)
        if is_harmful(module, name):
            raise UnsafeError(
                f"{self.where}: the pickle refers to {full[:200]}, which weights never need: refused, nothing was executed"
            )
        return Global(full)

    def op_STACK_GLOBAL(self, _: None) -> None:
        name = self.stack.pop()
        module = self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise FormatError(f"{self.where}: a global without a valid name")
        self.stack.append(self._global(module, name))

    def op_BINPERSID(self, _: None) -> None:
        pid = self.stack.pop()
        # Before PyTorch 1.6, a class of modules is stored with its source code, which is not read.
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module" and isinstance(pid[1], Global):
            self.stack.append(pid[1])
        else:
            self.stack.append(self._storage(pid))

    def _storage(self, pid: Any) -> Storage:
        tag, kind, key, _location, count = pid[:5]
        name = kind.name.removeprefix("torch.") if isinstance(kind, Global) else ""
        is_known = name in STORAGES or name in UNREAD_STORAGES
        if tag != "storage" or not is_known or not isinstance(key, str) or not _is_natural(count):
            raise FormatError(f"{self.where}: an invalid reference to a storage")
        if len(pid) > 5 and pid[5] is not None:
            raise FormatError(f"{self.where}: a view of a storage, as PyTorch before 0.4 wrote it")
        if name in STORAGES:
            storage = Storage(key, DTYPES[STORAGES[name]], count, count)
        else:
            storage = Storage(key, DTYPES["U8"], count * UNREAD_STORAGES[name], count, unread=name)
        if self.storages.setdefault(key, storage) != storage:
            raise FormatError(f"{self.where}: contradicting descriptions of the storage {key}")
        return storage

    def op_REDUCE(self, _: None) -> None:
        arguments = self.stack.pop()
        function = self.stack.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise UnsafeError(f"{self.where}: the pickle calls an unknown function: refused")
        self.stack.append(self._call(function.name, arguments))

    def op_NEWOBJ(self, _: None) -> None:
        arguments = self.stack.pop()
        self._object(self.stack.pop(), arguments)

    def op_NEWOBJ_EX(self, _: None) -> None:
        self._expected(self.stack.pop(), dict)  # of arguments by name
        self.op_NEWOBJ(None)

    def op_INST(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        arguments = tuple(self._since_mark())
        self._object(self._global(module, name), arguments)

    def op_OBJ(self, _: None) -> None:
        kind, *arguments = self._since_mark()
        self._object(kind, tuple(arguments))

    def _object(self, kind: Any, arguments: Any) -> None:
        """Describe an object of a class."""
        if not isinstance(kind, Global) or not isinstance(arguments, tuple):
            raise FormatError(
                f"{self.where}: a pickle with an object of {describe(kind)}, which is not a class (NEWOBJ)"
            )
        self.stack.append(Opaque(kind.name, arguments))

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name in DICTS:
            return self._dict(name, arguments)
        if name in TENSORS:
            return self._tensor(arguments)
        if name in PARAMETERS:
            return arguments[0]
        if name in SUBCLASSES and isinstance(arguments[0], Global) and arguments[0].name in (*TENSORS, *PARAMETERS):
            return self._call(arguments[0].name, arguments[2])  # after the function and the class
        if name.startswith(REBUILD):
            end = name.removeprefix("torch._utils.")
            return UnreadTensor(UNREAD_TENSORS.get(end, f"a tensor that {name[:100]} would build"))
        if name == "torch.Size":
            self._charge(len(arguments[0]))
            return tuple(arguments[0])
        if name in CLASS_FIRST and isinstance(arguments[0], Global):
            return Opaque(arguments[0].name, arguments[1:])
        is_storage = name.removeprefix("torch.") in (*STORAGES, *UNREAD_STORAGES)
        if is_storage or not may_be_called(name) or not _is_plain_call(name, arguments):
            raise UnsafeError(f"{self.where}: the pickle calls {name[:200]}: refused, nothing was executed")
        return Opaque(name, arguments)

    def _dict(self, name: str, arguments: tuple[Any, ...]) -> dict[Any, Any]:
        """An OrderedDict of pairs, a defaultdict of a function for what is missing, a Counter of a dict."""
        if not arguments or name == "collections.defaultdict":
            return {}
        given = arguments[0]
        self._charge(len(given))
        pairs = given.items() if isinstance(given, dict) else given
        items = []
        for key, value in pairs:
            items += [key, value]
        return self._fill({}, items)

    def _charge(self, items: int) -> None:
        # A few bytes of a pickle can copy a long list many times.
        self.copied += items
        if self.copied > MAX_COPIED:
            raise FormatError(f"{self.where}: a pickle that copies more than {MAX_COPIED} items")

    def _tensor(self, arguments: tuple[Any, ...]) -> TensorRef | UnreadTensor:
        """A tensor of a storage, an offset, a shape and strides. Hooks may follow, and flags that change the values."""
        storage, offset, shape, stride = arguments[:4]
        if (
            not isinstance(storage, Storage)
            or not all(map(_is_natural, (offset, *shape, *stride)))
            or len(shape) != len(stride)
        ):
            raise FormatError(f"{self.where}: an invalid tensor")
        if len(shape) > MAX_RANK or math.prod(shape) >= MAX_VALUES:
            raise FormatError(f"{self.where}: invalid shape, {list(shape)[:9]}")
        if len(arguments) > 7 or (len(arguments) == 7 and arguments[6]):
            return UnreadTensor("a negated or conjugated tensor view")
        if storage.unread:
            return UnreadTensor(f"a tensor in a {storage.unread}")
        is_transposed = not _is_contiguous(shape, stride)
        if is_transposed and not (len(shape) == 2 and _is_contiguous(shape[::-1], stride[::-1])):
            return UnreadTensor(
                f"not contiguous (shape {list(shape)}, strides {list(stride)}; call .contiguous() before it is saved)"
            )
        if offset + math.prod(shape) > storage.size:
            raise FormatError(
                f"{self.where}: a tensor of shape {list(shape)} at offset {offset} does not fit into a storage of {storage.size} values"
            )
        return TensorRef(storage, offset, tuple(shape), is_transposed)

    def op_BUILD(self, _: None) -> None:
        state = self.stack.pop()
        top = self.stack[-1]
        if isinstance(top, Opaque):
            top.state = state
        else:
            self._expected(top, dict)  # the state is the _metadata of a state dict, which weights do not need


_CONSTANTS: Mapping[str, Any] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict,
}  # fmt: skip
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "BINFLOAT", "FLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINSTRING", "SHORT_BINSTRING", "STRING",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip


def _is_plain_call(name: str, arguments: tuple[Any, ...]) -> bool:
    """Whether two functions of Python, if the pickle calls one, do what ``pickle`` writes them for.

    ``getattr`` finds a method of an object or a member of an enumeration; ``type`` is that of None.
    """
    if name == "builtins.type":
        return arguments == (None,)
    if name != "builtins.getattr":
        return True
    if len(arguments) != 2:
        return False
    owner, attribute = arguments
    is_public = isinstance(attribute, str) and attribute.isidentifier() and not attribute.startswith("__")
    return is_public and isinstance(owner, Opaque | Global)


def _is_natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for n, step in zip(reversed(shape), reversed(stride), strict=True):
        if n != 1 and step != expected:
            return math.prod(shape) == 0
        expected *= n
    return True
