"""Running an ONNX model with a growing cache, or with one in place. Needs numpy and onnxruntime, and never torch.

The cache stays in ONNX Runtime's own buffers from step to step: what one step returns is bound to the next as it is. It is
in the memory of the model's execution provider (``OnnxModel.memory``); of the logits, only those that are wanted are copied
to the CPU's memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from .. import contract
from .base import FEW, Ids, InputError, Logits, as_int64, check_mask
from .kv_cache import RowCache
from .onnx_memory import DeviceMemory, Memory, bind_input, bind_output
from .onnx_model import NO_ADAPTER, TYPES, ActiveAdapter, OnnxModel
from .onnx_providers import reads_on_cpu

CHUNK = 256  # tokens of a prompt in one run: attention over T tokens computes T * T scores, and masks half of them
KEPT = 8  # tokens of a step whose logits are bound once
LOGITS = 32 << 20  # bytes of logits that a run may return where only the last are wanted
SHRINK = ort.RunOptions()  # frees the memory that only a prompt needs
SHRINK.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")


class GrownCache(list[ort.OrtValue]):
    """Key and value of each layer in turn, each (B, H, P, D), and the name of the adapter that computed them.

    Args:
        memory: where they are. It must stay until they are freed.
    """

    def __init__(self, values: Iterable[ort.OrtValue], adapter: str | None, memory: Memory) -> None:
        super().__init__(values)
        self.adapter = adapter
        self.memory = memory

    def __del__(self) -> None:
        self.clear()  # before ``memory``: attributes would be freed first


def chunk_size(model: OnnxModel, B: int) -> int:
    """How many tokens of a prompt go into one run, where only the last logits are wanted: fewer if each returns logits."""
    most = largest_chunk(model)
    if model.last_only:
        return most
    bytes_per_token = 4 * B * model.config.n_vocab
    return max(16, min(most, LOGITS // bytes_per_token))


def largest_chunk(model: OnnxModel) -> int:
    """How many tokens of a prompt go into one run at most: fewer if the cache holds 8-bit numbers."""
    return CHUNK // 2 if contract.has_int8_cache(model.cache_kind) else CHUNK


def pieces(n: int, size: int) -> Iterator[tuple[int, int]]:
    """Where each piece of n tokens begins and ends."""
    for start in range(0, n, size):
        yield start, min(start + size, n)


def _check_adapter(found: str | None, wanted: str | None) -> None:
    """Refuse to continue a cache with another adapter than computed it.

    Raises:
        InputError: naming both.
    """
    if found != wanted:
        names = ["no adapter" if name is None else f"the adapter {name}" for name in (found, wanted)]
        raise InputError(
            f"the cache was computed with {names[0]}, and this step has {names[1]}: begin with an empty cache"
        )


class GrowingRun:
    """A model that returns a longer cache from each step.

    Args:
        model: the model.
        adapter: the adapter of every run.
    """

    def __init__(self, model: OnnxModel, adapter: ActiveAdapter = NO_ADAPTER) -> None:
        self.model = model
        self.adapter = adapter

    def step(self, ids: Ids, attention_mask: Any, positions: Ids, cache: Any) -> tuple[Logits, GrownCache]:
        """The logits after the last token, (B, 1, V) or longer; a long prompt is split into chunks."""
        mask = None if attention_mask is None else as_int64(attention_mask, "attention_mask")
        B, T = ids.shape
        for start, end in pieces(T, chunk_size(self.model, B)):
            seen = None if mask is None else mask[..., : mask.shape[-1] - (T - end)]
            logits, cache = self.run(ids[:, start:end], seen, positions[:, start:end], cache, True)
        return logits, cache

    def run(
        self, ids: Ids, attention_mask: Any, positions: Ids, cache: Any, last: bool = False
    ) -> tuple[Logits, GrownCache]:
        """As ``Decoder.run``, for tokens and positions that were checked.

        Args:
            last: only the last logits are wanted. On a device, the others are not returned.
        """
        B, T = ids.shape
        past = self._empty(B) if cache is None else cache
        mask = check_mask(attention_mask, B, self._length(past, B), T)
        binding = self.model.session.io_binding()
        for name, array in {"input_ids": ids, "attention_mask": mask, "position_ids": positions}.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, value in zip(self.model.past_names, past, strict=True):
            binding.bind_ortvalue_input(name, value)
        place = self.model.memory.place
        for name in self.model.present_names:
            binding.bind_output(name, place.type, place.id)
        self.adapter.bind(binding)
        logits = _run(binding, self.model, (B, T), last=last)
        return logits, GrownCache(binding.get_outputs()[: len(past)], self.adapter.name, self.model.memory)

    def reorder(self, cache: GrownCache, rows: Ids) -> GrownCache:
        """As ``Decoder.reorder``."""
        if np.array_equal(rows, np.arange(cache[0].shape()[0])):
            return cache
        return self._moved(cache, rows, cache[0].shape()[2])

    def truncate(self, cache: GrownCache, length: int) -> GrownCache:
        """As ``Decoder.truncate``."""
        return self._moved(cache, np.arange(cache[0].shape()[0]), min(length, cache[0].shape()[2]))

    def _moved(self, cache: GrownCache, rows: Ids, tokens: int) -> GrownCache:
        """The first tokens of some rows (N,), by the same adapter."""
        adapter = cache.adapter if isinstance(cache, GrownCache) else self.adapter.name
        memory = self.model.memory
        return GrownCache([memory.moved(value, rows, tokens) for value in cache], adapter, memory)

    def _empty(self, B: int) -> list[ort.OrtValue]:
        shape = (B, self.model.config.n_head, 0, self.model.config.head_dim)
        empty = np.empty(shape, self.model.cache_dtype)
        return [ort.OrtValue.ortvalue_from_numpy(empty) for _ in self.model.past_names]

    def _length(self, past: Any, B: int) -> int:
        """How many tokens the cache holds."""
        names = self.model.past_names
        if not isinstance(past, Sequence) or not all(isinstance(value, ort.OrtValue) for value in past):
            raise InputError("the cache is not one that an earlier step returned")
        if isinstance(past, GrownCache):
            _check_adapter(past.adapter, self.adapter.name)
        if len(past) != len(names):
            raise InputError(f"the cache has {len(past)} tensors, the model takes {len(names)}")
        shapes = [tuple(value.shape()) for value in past]
        P = shapes[0][2] if len(shapes[0]) == 4 else 0
        expected = (B, self.model.config.n_head, P, self.model.config.head_dim)
        dtype = self.model.cache_dtype
        for name, value, shape in zip(names, past, shapes, strict=True):
            if shape != expected or TYPES.get(value.data_type()) != dtype:
                raise InputError(f"{name} is {value.data_type()} {shape}; {dtype} {expected} is needed")
        return int(P)


@dataclass
class _NewTokens:
    """The new tokens of one row, without padding."""

    row: int
    slots: Any  # which of the T new slots: a slice, or a mask (T,)
    ids: Ids  # (t,)
    positions: Ids  # (t,)


class InPlaceRun:
    """A model that writes new keys and values into the cache's own buffers (``--cache inplace``).

    A step is one token of every row at once, or several tokens of one row after another. Padding is removed first.

    Args:
        model: decodes.
        adapter: the adapter of every run.
        prompts: reads several tokens of a row, in another precision and with the same kind of cache; by default the same
            model.
    """

    def __init__(self, model: OnnxModel, adapter: ActiveAdapter = NO_ADAPTER, prompts: OnnxModel | None = None) -> None:
        self.model = model
        self.adapter = adapter
        self.prompts = prompts or model
        self._kind = self.new_cache(0).kind

    def new_cache(self, rows: int) -> RowCache:
        """An empty cache."""
        config = self.model.config
        cache = RowCache(
            rows,
            tensors=len(self.model.past_names),
            n_head=config.n_head,
            head_dim=config.head_dim,
            n_ctx=config.n_ctx,
            dtype=self.model.cache_dtype,
            memory=self.model.memory,
        )
        cache.adapter = self.adapter.name
        return cache

    def step(self, ids: Ids, attention_mask: Any, positions: Ids, cache: Any) -> tuple[Logits, RowCache]:
        """The logits after the last token, (B, 1, V)."""
        return self._forward(ids, attention_mask, positions, cache, last=True)

    def run(self, ids: Ids, attention_mask: Any, positions: Ids, cache: Any) -> tuple[Logits, RowCache]:
        """As ``Decoder.run``, for tokens and positions that were checked."""
        last = self.model.last_only or self.prompts.last_only
        return self._forward(ids, attention_mask, positions, cache, last=last)

    def _forward(
        self, ids: Ids, attention_mask: Any, positions: Ids, cache: Any, *, last: bool
    ) -> tuple[Logits, RowCache]:
        """The new tokens of every row. Logits (B, 1 or T, V)."""
        B, T = ids.shape
        cache = self.new_cache(B) if cache is None else self._checked(cache, B)
        real = self._real_slots(attention_mask, cache, T)
        rows = _rows_with_tokens(ids, positions, real)
        for new in rows:
            cache.check(new.row, new.positions)
        if T == 1 and len(rows) == B:
            logits = self.advance(ids[:, 0], positions[:, 0], cache)[:, None]
        else:
            logits = self._prefill_rows(rows, cache, (B, T), last)
        cache.see(real, T)
        return logits, cache

    def reorder(self, cache: RowCache, rows: Ids) -> RowCache:
        """As ``Decoder.reorder``, in the cache itself."""
        cache.reorder(rows)
        return cache

    def truncate(self, cache: RowCache, length: int) -> RowCache:
        """As ``Decoder.truncate``, in the cache itself."""
        cache.truncate(length)
        return cache

    def _checked(self, cache: Any, B: int) -> RowCache:
        if not isinstance(cache, RowCache) or cache.kind != self._kind:
            raise InputError("the cache is not one that an earlier step of this model returned")
        if len(cache.lengths) != B:
            raise InputError(f"the cache has {len(cache.lengths)} rows, input_ids {B}")
        if cache.is_empty:
            cache.adapter = self.adapter.name
        _check_adapter(cache.adapter, self.adapter.name)
        return cache

    def _real_slots(self, attention_mask: Any, cache: RowCache, T: int) -> NDArray[np.bool_] | None:
        """Which of the T new slots hold tokens, (B, T); None if all do.

        Raises:
            InputError: if a mask (B, seen + T) does not fit the cache, or differs from earlier ones in earlier slots.
        """
        if attention_mask is None:
            return None
        mask = as_int64(attention_mask, "attention_mask")
        wanted = (len(cache.lengths), cache.seen + T)
        if mask.shape != wanted:
            raise InputError(
                f"attention_mask has the shape {mask.shape}, but {cache.seen} earlier and {T} new slots need {wanted}"
            )
        real = mask != 0
        earlier = True if cache.mask is None else cache.mask
        if (real[:, : cache.seen] != earlier).any():
            raise InputError("attention_mask has changed for earlier slots: a cache in place cannot do that")
        new = real[:, cache.seen :]
        return None if new.all() else new

    def _prefill_rows(self, rows: Sequence[_NewTokens], cache: RowCache, shape: tuple[int, int], last: bool) -> Logits:
        """Several tokens of each row. Logits (B, 1 or T, V), zeros for padding."""
        B, T = shape
        if B == 1 and len(rows) == 1 and len(rows[0].ids) == T:
            new = rows[0]
            if T <= FEW and not last and cache.lengths[0]:
                return self.several(new.ids, new.positions, cache)
            return self.prefill(new.ids, new.positions, cache, new.row, last=last)[None]
        logits = np.zeros((B, 1 if last else T, self.model.config.n_vocab), np.float32)
        for new in rows:
            found = self.prefill(new.ids, new.positions, cache, new.row, last=last)
            if last:
                logits[new.row, -1] = found[-1]
            else:
                logits[new.row, new.slots] = found
        return logits

    def prefill(self, ids: Ids, positions: Ids, cache: RowCache, row: int, *, last: bool = True) -> Logits:
        """Put tokens (T,) with positions (T,) into one row of the cache, after what it holds, a chunk at a time.

        Returns:
            The logits of the last of them (1, V), or of each (T, V) if not ``last``.
        """
        ids = np.ascontiguousarray(ids)
        positions = np.ascontiguousarray(positions)
        start, end = int(positions[0]), int(positions[-1]) + 1
        cache.reserve(row + 1, end)
        buffers = cache.rows(row, row + 1)
        cache.lengths[row] = start  # until all tokens are in
        size = chunk_size(self.prompts, 1) if last else largest_chunk(self.prompts)
        several = not last and len(ids) > size
        whole: Logits = np.empty((len(ids) if several else 0, self.model.config.n_vocab), np.float32)
        for first, stop in pieces(len(ids), size):
            logits = self._prefill_chunk(ids[first:stop], positions[first:stop], start + stop, buffers, last)
            if several:
                whole[first:stop] = logits
        cache.put_rows(row, buffers)
        cache.lengths[row] = end
        if several:
            return whole
        return logits[-1:] if last else logits

    def _prefill_chunk(self, ids: Ids, positions: Ids, length: int, buffers: Sequence[Any], last: bool) -> Logits:
        """One run for one row, which then holds ``length`` tokens. Logits (1 or t, V)."""
        binding = self.prompts.session.io_binding()
        mask = np.ones((1, length), np.int64)
        bind_input(binding, "input_ids", ids[None])
        bind_input(binding, "position_ids", positions[None])
        bind_input(binding, "attention_mask", mask)
        bind_cache(binding, self.prompts, buffers)
        self.adapter.bind(binding)
        options = SHRINK if len(ids) > 1 else None
        found: Logits = _run(binding, self.prompts, (1, len(ids)), last=last, options=options)[0]
        return found

    def advance(self, ids: Ids, positions: Ids, cache: RowCache) -> Logits:
        """One more token (B,), at its position (B,), for each of the first B rows of the cache. Logits (B, V)."""
        B = len(ids)
        cache.reserve(B, int(positions.max()) + 1)
        logits = self._run_bound(cache, ids[:, None], positions[:, None])
        cache.lengths[:B] = positions + 1
        return logits[:, 0]

    def several(self, ids: Ids, positions: Ids, cache: RowCache) -> Logits:
        """A few more tokens (T,), at consecutive positions (T,), for the only row of the cache. Logits (1, T, V).

        The model that decodes runs them, and the bindings are kept: speculative decoding runs as many again and again.
        """
        length = int(positions[-1]) + 1
        cache.reserve(1, length)
        logits = self._run_bound(cache, ids[None], positions[None])
        cache.lengths[0] = length
        return logits

    def _run_bound(self, cache: RowCache, ids: Ids, positions: Ids) -> Logits:
        """Tokens (B, T) with bindings that are kept as long as the cache's buffers stay. Logits (B, 1 or T, V)."""
        key = _StepKey(id(self.model), self.model.graph, self.adapter.name, ids.shape)
        step: _Step | None = cache.bound.get(key)
        if step is None:
            cache.bound = {other: kept for other, kept in cache.bound.items() if not key.replaces(other)}
            step = _Step(self.model, self.adapter, cache, ids.shape)
            cache.bound[key] = step
        logits = step(ids, positions)
        if isinstance(self.model.memory, DeviceMemory):
            cache.put_rows(0, step.buffers)
        return logits


@dataclass(frozen=True)
class _StepKey:
    """What a step was bound for."""

    model: int
    graph: Path
    adapter: str | None
    shape: tuple[int, ...]

    def replaces(self, other: _StepKey) -> bool:
        """Whether the model of another step has loaded another graph since: the one with inputs for adapters."""
        return self.model == other.model and self.graph != other.graph


class _Step:
    """New tokens (B, T) for the first B rows of a cache. Most is bound once, as long as the cache's buffers stay."""

    def __init__(self, model: OnnxModel, adapter: ActiveAdapter, cache: RowCache, shape: tuple[int, ...]) -> None:
        B, T = shape
        self.binding = model.session.io_binding()  # the first attribute: it must be freed before the model
        self.model = model
        self.adapter = adapter  # held while its factors are bound
        self.ids = np.zeros((B, T), np.int64)
        self.positions = np.zeros((B, T), np.int64)
        self.slots = np.arange(cache.capacity)
        self.ones = np.ones((1, cache.capacity), np.int64)
        self.buffers = cache.rows(0, B)  # held while they are bound
        self.stays_bound = reads_on_cpu(model.session, ("input_ids", "position_ids"))
        bind_cache(self.binding, model, self.buffers)
        adapter.bind(self.binding)
        self._bind_tokens()
        # Binding new logits takes longer than a copy. Those of many rows would take much memory: there is a step for each
        # number of rows.
        self.logits = _bind_logits(self.binding, model, shape) if B * T <= KEPT else None

    def _bind_tokens(self) -> None:
        bind_input(self.binding, "input_ids", self.ids)
        bind_input(self.binding, "position_ids", self.positions)

    def __call__(self, ids: Ids, positions: Ids) -> Logits:
        """Tokens (B, T) at positions (B, T). Returns the logits (B, 1 or T, V)."""
        self.ids[:] = ids
        self.positions[:] = positions
        mask = self._mask(int(positions.max()) + 1)
        if not self.stays_bound:
            self._bind_tokens()  # binding copies them to the device
        bind_input(self.binding, "attention_mask", mask)
        if self.logits is None:
            return _run(self.binding, self.model, ids.shape)
        self.model.run(self.binding, None)
        return self.logits.copy()

    def _mask(self, length: int) -> Ids:
        """The mask (B, S) of rows up to the last new token of each."""
        if len(self.ids) == 1:
            return self.ones[:, :length]
        seen = self.slots[:length] <= self.positions[:, -1:]
        return seen.astype(np.int64)


def _rows_with_tokens(ids: Ids, positions: Ids, real: NDArray[np.bool_] | None) -> list[_NewTokens]:
    """The tokens of each row that has any; ``real`` is a mask (B, T) of the slots without padding."""
    rows = []
    for row in range(len(ids)):
        slots = slice(None) if real is None else real[row]
        new = _NewTokens(row, slots, ids[row, slots], positions[row, slots])
        if len(new.ids):
            rows.append(new)
    return rows


def bind_cache(binding: Any, model: OnnxModel, buffers: Sequence[Any]) -> None:
    """Bind past and present of each layer to the same memory."""
    for past, present, buffer in zip(model.past_names, model.present_names, buffers, strict=True):
        bind_input(binding, past, buffer)
        bind_output(binding, present, buffer)


def _run(
    binding: Any, model: OnnxModel, shape: tuple[int, ...], *, last: bool = False, options: ort.RunOptions | None = None
) -> Logits:
    """Run a model for tokens (B, T), after its inputs and the cache were bound.

    Args:
        last: only the last logits are wanted: those of a device stay there, but for the last.

    Returns:
        The logits (B, 1 or T, V).
    """
    memory = model.memory
    has_logits = "logits" in model.outputs  # else it only fills a cache
    if last and isinstance(memory, DeviceMemory) and has_logits and shape[1] > 1 and not model.last_only:
        binding.bind_output("logits", memory.place.type, memory.place.id)
        model.run(binding, options)
        return memory.last(binding.get_outputs()[-1])
    logits = _bind_logits(binding, model, shape)
    model.run(binding, options)
    return logits


def _bind_logits(binding: Any, model: OnnxModel, shape: tuple[int, ...]) -> Logits:
    """New logits (B, 1 or T, V) of tokens (B, T), which the model writes if it has that output."""
    B, T = shape
    logits: Logits = np.empty((B, 1 if model.last_only else T, model.config.n_vocab), np.float32)
    if "logits" in model.outputs:  # else it only fills a cache
        bind_output(binding, "logits", logits)
    return logits
