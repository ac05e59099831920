"""Where a model keeps its cache: in the CPU's memory, or in that of its execution provider's device.

What a step writes on a device stays there: it is bound to the next step as it is. Rows of a cache are moved on the device,
too, by a small ONNX graph in a session of the same provider, because ONNX Runtime has no such function in Python.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from converters import FormatError

from .onnx_graphs import FLOAT16, FLOAT32, INT8, INT64, Node, graph_bytes

CPU_NAMES = ("Cpu", "CpuPinned")
# ONNX Runtime's name of an allocator -> its name of the device's type, where a tensor is bound.
DEVICE_TYPES = {"Cuda": "cuda", "WebGPU_Buf": "gpu"}
HAVE_ADDRESSES = ("cpu", "cuda")  # a tensor may begin inside another one; elsewhere its address is a handle
ELEMENTS = {"float32": FLOAT32, "float16": FLOAT16, "int8": INT8, "int64": INT64}


@dataclass(frozen=True)
class Place:
    """A device, as ONNX Runtime binds tensors to it."""

    type: str = "cpu"
    id: int = 0

    @property
    def has_addresses(self) -> bool:
        """Whether rows of a tensor can be bound as a tensor."""
        return self.type in HAVE_ADDRESSES


CPU = Place()


class DeviceTensor:
    """A tensor in a device's memory, or some of its rows.

    Args:
        value: owns the memory.
        keeper: keeps the device in use; WebGPU's memory must be freed before its last session.
        place: the device.
        dtype: of its elements.
        rows: the first of the rows, and the one after the last; by default all.
    """

    def __init__(
        self, value: ort.OrtValue, keeper: Mover, place: Place, dtype: Any, rows: tuple[int, int] | None = None
    ) -> None:
        self.value = value  # the first attribute, because attributes are freed in their order
        self.keeper = keeper
        self.place = place
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        whole: tuple[int, ...] = tuple(value.shape())
        self.start, stop = rows or (0, whole[0])
        self.shape: tuple[int, ...] = (stop - self.start, *whole[1:])
        self.is_whole = self.shape == whole

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def address(self) -> int:
        """Where it begins, on a device that has addresses."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return int(self.value.data_ptr()) + self.start * row

    def rows(self, start: int, stop: int) -> DeviceTensor:
        """Some of its rows, in the same memory."""
        return DeviceTensor(self.value, self.keeper, self.place, self.dtype, (self.start + start, self.start + stop))


Tensor = NDArray[Any] | DeviceTensor


def bind_input(binding: Any, name: str, tensor: Tensor) -> None:
    """Bind an input to a tensor, which the caller must hold while the binding is used.

    ONNX Runtime copies an input that the model needs on another device now, and not when the model runs.
    """
    _bind(binding.bind_input, binding.bind_ortvalue_input, name, tensor)


def bind_output(binding: Any, name: str, tensor: Tensor) -> None:
    """The same for an output."""
    _bind(binding.bind_output, binding.bind_ortvalue_output, name, tensor)


def _bind(bind: Callable[..., None], bind_value: Callable[..., None], name: str, tensor: Tensor) -> None:
    """Bind a tensor by its address, or a whole one of a device as the value that owns it."""
    if not isinstance(tensor, DeviceTensor):
        assert tensor.flags.c_contiguous
        bind(name, "cpu", 0, tensor.dtype.type, tensor.shape, tensor.ctypes.data)
    elif tensor.is_whole:
        bind_value(name, tensor.value)
    else:
        bind(name, tensor.place.type, tensor.place.id, tensor.dtype.type, tensor.shape, tensor.address)


class Memory(Protocol):
    """What a cache asks of its memory.

    A buffer is (rows, H, capacity, D). A method that returns a buffer may return the same one, changed, or another one.
    """

    place: Place

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """A new buffer."""
        ...

    def resized(self, buffer: Any, rows: int, tokens: int, used: int) -> Any:
        """A new buffer of so many rows and tokens, with the first ``used`` tokens of each row of another."""
        ...

    def gathered(self, buffer: Any, rows: NDArray[np.int64], used: int) -> Any:
        """A new buffer with the first ``used`` tokens of the given rows (N,) of another, and the same capacity."""
        ...

    def copied(self, buffer: Any, sources: NDArray[np.int64], targets: NDArray[np.int64], used: int) -> Any:
        """The buffer after the first ``used`` tokens of some rows (N,) were copied into others (N,)."""
        ...

    def rows(self, buffer: Any, start: int, stop: int) -> Any:
        """Some rows as a tensor that a model can write into; ``with_rows`` puts it back."""
        ...

    def with_rows(self, buffer: Any, start: int, tensor: Any) -> Any:
        """The buffer with what a model wrote into the tensor of ``rows``."""
        ...

    def read(self, buffer: Any, row: int, start: int, stop: int) -> NDArray[Any]:
        """Some tokens of a row, (H, stop - start, D), as a new array in the CPU's memory."""
        ...

    def written(self, buffer: Any, row: int, start: int, tensor: NDArray[Any]) -> Any:
        """The buffer after tokens (H, n, D) were written into a row."""
        ...

    def moved(self, value: ort.OrtValue, rows: NDArray[np.int64], tokens: int) -> ort.OrtValue:
        """The first tokens of the given rows (N,) of a cache that grows, (B, H, P, D)."""
        ...

    def upload(self, array: NDArray[Any]) -> Any:
        """An array in this memory, as a tensor that can be bound."""
        ...


class CpuMemory:
    """Buffers are arrays, and rows are views of them."""

    place = CPU

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        return np.zeros(shape, dtype)

    def resized(self, buffer: NDArray[Any], rows: int, tokens: int, used: int) -> NDArray[Any]:
        new = np.zeros((rows, buffer.shape[1], tokens, buffer.shape[3]), buffer.dtype)
        new[: len(buffer), :, :used] = buffer[:rows, :, :used]
        return new

    def gathered(self, buffer: NDArray[Any], rows: NDArray[np.int64], used: int) -> NDArray[Any]:
        new = np.zeros((len(rows), *buffer.shape[1:]), buffer.dtype)
        new[:, :, :used] = buffer[rows, :, :used]
        return new

    def copied(
        self, buffer: NDArray[Any], sources: NDArray[np.int64], targets: NDArray[np.int64], used: int
    ) -> NDArray[Any]:
        # numpy copies what it reads before it writes anything.
        buffer[targets, :, :used] = buffer[sources, :, :used]
        return buffer

    def rows(self, buffer: NDArray[Any], start: int, stop: int) -> NDArray[Any]:
        return buffer[start:stop]

    def with_rows(self, buffer: NDArray[Any], start: int, tensor: NDArray[Any]) -> NDArray[Any]:
        return buffer

    def read(self, buffer: NDArray[Any], row: int, start: int, stop: int) -> NDArray[Any]:
        return buffer[row, :, start:stop].copy()

    def written(self, buffer: NDArray[Any], row: int, start: int, tensor: NDArray[Any]) -> NDArray[Any]:
        buffer[row, :, start : start + tensor.shape[1]] = tensor
        return buffer

    def moved(self, value: ort.OrtValue, rows: NDArray[np.int64], tokens: int) -> ort.OrtValue:
        array = value.numpy()[:, :, :tokens]
        if not np.array_equal(rows, np.arange(len(array))):
            array = array[rows]
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

    def upload(self, array: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(array)


class DeviceMemory:
    """Buffers are tensors of a device. Moving rows makes a new buffer; only ``read`` and ``written`` pass through the CPU.

    On a device without addresses, some of the rows are a copy, which is put back after each step.

    Args:
        place: the device.
        providers: the model's execution providers, which also move rows.
    """

    def __init__(self, place: Place, providers: Sequence[Any]) -> None:
        self.place = place
        self._mover = Mover(place, providers)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Tensor:
        rows, heads, tokens, size = shape
        if not all(shape):
            return np.zeros(shape, dtype)
        one = np.zeros((1, heads, 1, size), dtype)
        return self._mover.move(one, np.zeros(rows, np.int64), 1, tokens)

    def resized(self, buffer: Tensor, rows: int, tokens: int, used: int) -> Tensor:
        if not used:
            return self.zeros((rows, buffer.shape[1], tokens, buffer.shape[3]), buffer.dtype)
        # A new row needs any content: what is behind a row's length is never read.
        sources = np.minimum(np.arange(rows), buffer.shape[0] - 1)
        return self._mover.move(buffer, sources, used, tokens)

    def gathered(self, buffer: Tensor, rows: NDArray[np.int64], used: int) -> Tensor:
        tokens = buffer.shape[2]
        if not used:
            return self.zeros((len(rows), *buffer.shape[1:]), buffer.dtype)
        return self._mover.move(buffer, rows, used, tokens)

    def copied(self, buffer: Tensor, sources: NDArray[np.int64], targets: NDArray[np.int64], used: int) -> Tensor:
        if not used:
            return buffer
        rows = np.arange(buffer.shape[0])
        rows[targets] = sources
        return self._mover.move(buffer, rows, buffer.shape[2], buffer.shape[2])

    def rows(self, buffer: Tensor, start: int, stop: int) -> Tensor:
        if not isinstance(buffer, DeviceTensor):
            return buffer[start:stop]  # empty
        if (start, stop) == (0, buffer.shape[0]):
            return buffer
        if self.place.has_addresses:
            return buffer.rows(start, stop)
        return self._mover.move(buffer, np.arange(start, stop), buffer.shape[2], buffer.shape[2])

    def with_rows(self, buffer: Tensor, start: int, tensor: Tensor) -> Tensor:
        if isinstance(tensor, DeviceTensor) and isinstance(buffer, DeviceTensor) and tensor.value is buffer.value:
            return buffer
        had, new = buffer.shape[0], tensor.shape[0]
        rows = np.arange(had)
        rows[start : start + new] = np.arange(had, had + new)  # those of ``tensor`` follow all of the buffer's
        return self._mover.join(buffer, tensor, rows)

    def read(self, buffer: Tensor, row: int, start: int, stop: int) -> NDArray[Any]:
        found = self._mover.download(buffer, np.array([row]), stop)
        return found[0, :, start:].copy()

    def written(self, buffer: Tensor, row: int, start: int, tensor: NDArray[Any]) -> Tensor:
        tokens = buffer.shape[2]
        array = self._mover.download(buffer, np.array([row]), tokens)
        array[0, :, start : start + tensor.shape[1]] = tensor
        return self.with_rows(buffer, row, array)

    def moved(self, value: ort.OrtValue, rows: NDArray[np.int64], tokens: int) -> ort.OrtValue:
        if not tokens:
            shape = value.shape()
            return ort.OrtValue.ortvalue_from_numpy(np.zeros((len(rows), shape[1], 0, shape[3]), np_dtype(value)))
        tensor = self._mover.tensor(value, np_dtype(value))
        return self._mover.move(tensor, rows, tokens, tokens).value

    def upload(self, array: NDArray[Any]) -> DeviceTensor:
        return self._mover.upload(array)

    def last(self, logits: ort.OrtValue) -> NDArray[np.float32]:
        """The last logits (B, 1, V) of some (B, T, V) on the device, in the CPU's memory."""
        return self._mover.last(self._mover.tensor(logits, np.float32))


def np_dtype(value: ort.OrtValue) -> np.dtype[Any]:
    """numpy's dtype of a tensor of ONNX Runtime."""
    kind = value.data_type().removeprefix("tensor(").removesuffix(")")
    found: np.dtype[Any] = np.dtype("float32" if kind == "float" else kind)
    return found


@dataclass(frozen=True)
class Recipe:
    """A small graph, apart from the element type of its tensors."""

    nodes: tuple[Node, ...]
    tensors: tuple[str, ...]  # inputs of the cache's type
    numbers: tuple[str, ...] = ()  # inputs that are int64


# y = the first tokens of some rows of x, with zeros behind them
MOVE = Recipe(
    (
        Node("Gather", ("x", "rows"), "a", axis=0),
        Node("Slice", ("a", "start", "end", "axis"), "b"),
        Node("Pad", ("b", "pads"), "y"),
    ),
    ("x",),
    ("rows", "start", "end", "axis", "pads"),
)
# y = some rows of x and of what follows it
JOIN = Recipe(
    (Node("Concat", ("x", "more"), "a", axis=0), Node("Gather", ("a", "rows"), "y", axis=0)), ("x", "more"), ("rows",)
)
LAST = Recipe((Node("Gather", ("x", "index"), "y", axis=1),), ("x",), ("index",))
SAME = Recipe((Node("Identity", ("x",), "y"),), ("x",))


class Mover:
    """Sessions of small graphs, made when they are first needed; the first one at once, so that the device stays in use."""

    def __init__(self, place: Place, providers: Sequence[Any]) -> None:
        self.place = place
        self._providers = list(providers)
        self._sessions: dict[tuple[Recipe, np.dtype[Any]], ort.InferenceSession] = {}
        self._session(SAME, np.dtype("float32"))

    def tensor(self, value: ort.OrtValue, dtype: Any) -> DeviceTensor:
        """A value on the device as a tensor."""
        return DeviceTensor(value, self, self.place, dtype)

    def move(self, tensor: Tensor, rows: NDArray[np.int64], used: int, tokens: int) -> DeviceTensor:
        """The first ``used`` tokens of some rows (N,), with zeros up to ``tokens``."""
        value = self._run(MOVE, {"x": tensor}, self._numbers(rows, used, tokens), self.place)
        return self.tensor(value, tensor.dtype)

    def join(self, tensor: Tensor, more: Tensor, rows: NDArray[np.int64]) -> DeviceTensor:
        """Some rows (N,) of two tensors one after the other."""
        value = self._run(JOIN, {"x": tensor, "more": more}, {"rows": rows}, self.place)
        return self.tensor(value, tensor.dtype)

    def download(self, tensor: Tensor, rows: NDArray[np.int64], used: int) -> NDArray[Any]:
        """As ``move``, in the CPU's memory."""
        return self._run(MOVE, {"x": tensor}, self._numbers(rows, used, used), CPU).numpy()  # type: ignore[no-any-return]

    def last(self, tensor: Tensor) -> NDArray[Any]:
        """The last of the second axis, in the CPU's memory."""
        index = np.array([tensor.shape[1] - 1])
        return self._run(LAST, {"x": tensor}, {"index": index}, CPU).numpy()  # type: ignore[no-any-return]

    def upload(self, array: NDArray[Any]) -> DeviceTensor:
        """An array of the CPU's memory, on the device."""
        return self.tensor(self._run(SAME, {"x": np.ascontiguousarray(array)}, {}, self.place), array.dtype)

    @staticmethod
    def _numbers(rows: NDArray[np.int64], used: int, tokens: int) -> dict[str, NDArray[np.int64]]:
        pads = [0, 0, 0, 0, 0, 0, tokens - used, 0]
        one = {"start": [0], "end": [used], "axis": [2], "pads": pads}
        return {"rows": rows, **{name: np.array(values) for name, values in one.items()}}

    def _run(
        self, recipe: Recipe, tensors: dict[str, Tensor], numbers: dict[str, NDArray[np.int64]], place: Place
    ) -> ort.OrtValue:
        """Run a graph.

        Raises:
            FormatError: if ONNX Runtime fails, for example because the device's memory is full.
        """
        session = self._session(recipe, tensors["x"].dtype)
        binding = session.io_binding()
        for name, tensor in {**tensors, **numbers}.items():
            bind_input(binding, name, tensor)
        binding.bind_output("y", place.type, place.id)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise FormatError(f"ONNX Runtime cannot move the cache on the device: {str(error)[:500]}") from None
        return binding.get_outputs()[0]

    def _session(self, recipe: Recipe, dtype: np.dtype[Any]) -> ort.InferenceSession:
        key = recipe, dtype
        if key not in self._sessions:
            element = ELEMENTS[dtype.name]
            inputs = dict.fromkeys(recipe.tensors, element) | dict.fromkeys(recipe.numbers, INT64)
            options = ort.SessionOptions()
            options.log_severity_level = 4
            self._sessions[key] = ort.InferenceSession(
                graph_bytes(recipe.nodes, inputs, {"y": element}), options, providers=self._providers
            )
        return self._sessions[key]
