"""GPT-2 in ONNX Runtime, as a step of decoding. Needs numpy and onnxruntime, and never imports torch.

    decoder = OnnxDecoder("gpt2-onnx/")
    print(generate_text(decoder, Tokenizer.from_pretrained("gpt2-onnx/"), "ROMEO:", 50))

The cache stays in ONNX Runtime's own buffers from step to step: what one step returns is bound to the next as it is.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from converters import CheckpointError, ConfigError, FormatError, GPT2Config
from converters.config import config_of
from converters.containers.onnx import external_files, read_metadata
from converters.containers.safetensors import open_safetensors
from converters.errors import short
from converters.io.json import parse_json, read_json
from converters.io.reading import File, check_name

from .. import contract
from ..contract import Slot
from ..memory import give_back
from ..precisions import DEFAULT, PRECISIONS, Precision
from .base import Ids, InputError, Logits, check_mask, check_tokens, whole
from .kv_cache import RowCache

CHUNK = 256  # tokens; attention over a whole prompt costs the square of its length, half of it for nothing
LOGITS = 32 << 20  # bytes of logits that a run may give, where only the last are wanted
MAX_THREADS = 1024
MAX_MESSAGE = 2000  # characters of an error of ONNX Runtime's
EXACT = "session.x64quantprecision"  # products of uint8 and int8 by an exact kernel, where the usual one saturates
# An ONNX model: y = MatMulInteger(a, b); a is uint8 (1, 2), b int8 (2, 1), both 127.
PRODUCT = bytes.fromhex(
    "08043a560a180a01610a0162120179220d4d61744d756c496e74656765721201672a0d0802080110034201624a027f7f"
    "5a130a0161120e0a0c080212080a0208010a02080262130a0179120e0a0c080612080a0208010a02080142040a00100a"
)
TILES_OFF = "ORT_GQA_DISABLE_FLASH_ATTENTION"  # where ONNX Runtime is told so: the environment
ENVIRONMENT = threading.Lock()
SHRINK = ort.RunOptions()  # for prompts: their work takes room that decoding does not need
SHRINK.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
NOT_UTF8 = "{path}: ONNX Runtime opens only paths in UTF-8: rename it"
Provider = str | tuple[str, dict[str, Any]]
Cache = list[ort.OrtValue]  # key and value of each layer in turn, each (B, H, P, D)

TYPES = {
    "tensor(int64)": "int64",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int8)": "int8",
}


class OnnxDecoder:
    """An ONNX model with a KV cache, for the decode loop of ``gpt2x.generation`` or for one of your own.

    A model whose cache stays in place (``--cache inplace``) has a ``RowCache``, which each step changes: what an earlier
    step returned is no longer as it was. Padding on either side is taken out of what it is given.

    It is a context manager, too: ``with OnnxDecoder(path) as decoder`` frees the model at the end, as ``close`` does.

    Args:
        path: a directory that ``gpt2x export --onnx`` wrote, or an ``.onnx`` file of the same contract.
        precision: which model of a directory; by default fp32, or else the only one there.
        threads: how many work on one operator; by default as many as there are cores.
        optimize: let ONNX Runtime rewrite the graph (``ORT_ENABLE_ALL``, its default).
        providers: ONNX Runtime's execution providers, the first wanted first; each a name, or a name and its options.

    Raises:
        FormatError: if there is no model, it is damaged, or its file of weights is not whole.
        CheckpointError: if its inputs and outputs are not the contract's; the message lists every difference.
        ConfigError: if nothing says its context length.
        ValueError: if there cannot be so many threads, or this ONNX Runtime has no such provider.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        precision: str | None = None,
        threads: int | None = None,
        optimize: bool = True,
        providers: Sequence[Provider] = ("CPUExecutionProvider",),
    ) -> None:
        if threads is not None and threads not in range(1, MAX_THREADS + 1):
            raise ValueError(f"threads is {threads!r}; it can be 1 to {MAX_THREADS}")
        names = [given if isinstance(given, str) else given[0] for given in providers]
        if unknown := [name for name in names if name not in ort.get_available_providers()]:
            here = ", ".join(ort.get_available_providers())
            raise ValueError(f"this ONNX Runtime has no {unknown[0]}; it has {here}")
        self.path = find_model(path, precision)
        self.threads, self.providers = None if threads is None else int(threads), tuple(providers)
        self.metadata = read_metadata(self.path)
        check_runtime(self.path, self.metadata)
        self._session: Any = _open(self.path, self.metadata, self.threads, optimize, list(providers))
        give_back()  # what loading took for a while: a third of the memory, where weights are packed anew
        self.config = _config(self.path, self.metadata)
        self.last_only = self.metadata.get(contract.LOGITS) == "last"
        self.needs_optimizing = _needs_exact_products(self.metadata)  # the exact kernel comes with them
        self.precision = self.metadata.get(contract.PRECISION, DEFAULT)
        if precision not in (None, self.precision):
            raise FormatError(f"{self.path}: its metadata say it is {self.precision[:50]}, not {precision}")
        self.cache_kind = self.metadata.get(contract.CACHE, "growing")
        self.runtime = f"{self.path.name} in ONNX Runtime {ort.__version__}"
        self.inputs, self.outputs = _slots(self._session.get_inputs()), _slots(self._session.get_outputs())
        _check_contract(self)
        self._past = contract.past_names(self.config.n_layer)
        self._present = contract.present_names(self.config.n_layer)
        self._dtype = np.dtype(contract.cache_type(self.precision, self.cache_kind))
        self.in_place = contract.stays(self.cache_kind)
        self._cache_shape = self.row_cache(0).kind
        self.n_ctx, self.n_vocab = self.config.n_ctx, self.config.n_vocab

    def run(self, input_ids: Ids, attention_mask: Ids | None, position_ids: Ids, cache: Any) -> tuple[Logits, Any]:
        """One run of the model.

        Args:
            input_ids: (B, T), at least one of each.
            attention_mask: (B, P + T), 0 for padding; None where there is none.
            position_ids: (B, T), from 0 to below ``n_ctx``.
            cache: what an earlier run returned, holding P tokens; None at first.

        Returns:
            The logits (B, T, V), or (B, 1, V) of a model exported with ``--logits last``; and the cache of P + T.

        Raises:
            InputError: if these do not fit the model or one another.
        """
        ids, positions = self._tokens(input_ids, position_ids)
        if self.in_place:
            return self._in_place(ids, attention_mask, positions, cache, last=self.last_only)
        return self._checked(ids, attention_mask, positions, cache)

    def step(self, input_ids: Ids, attention_mask: Ids | None, position_ids: Ids, cache: Any) -> tuple[Logits, Any]:
        """As ``gpt2x.runtimes.base.Decoder.step``: the logits of the last position, (B, V). A long prompt goes in pieces."""
        ids, positions = self._tokens(input_ids, position_ids)
        if self.in_place:
            logits, cache = self._in_place(ids, attention_mask, positions, cache, last=True)
        else:
            logits, cache = self._growing(ids, attention_mask, positions, cache)
        return logits[:, -1], cache

    def _growing(self, ids: Ids, attention_mask: Ids | None, positions: Ids, cache: Any) -> tuple[Logits, Cache]:
        """The logits after the last piece of a prompt, which goes in pieces."""
        mask = None if attention_mask is None else whole(attention_mask, "attention_mask")
        B, T = ids.shape
        for start, end in _pieces(T, self._chunk(B)):
            seen = None if mask is None else mask[..., : mask.shape[-1] - (T - end)]
            logits, cache = self._checked(ids[:, start:end], seen, positions[:, start:end], cache)
        return logits, cache

    def close(self) -> None:
        """Free the model's memory. The decoder cannot be used after that; closing it twice does nothing."""
        self._session = None
        give_back()

    def __enter__(self) -> OnnxDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def unoptimized(self) -> OnnxDecoder:
        """The same model, its graph run as it is written."""
        return OnnxDecoder(self.path, threads=self.threads, optimize=False, providers=self.providers)

    def row_cache(self, rows: int) -> RowCache:
        """An empty cache of so many rows, for a model whose cache stays in place."""
        config = self.config
        sizes = {"n_head": config.n_head, "head_dim": config.head_dim, "n_ctx": config.n_ctx}
        return RowCache(rows, tensors=len(self._past), dtype=self._dtype, **sizes)

    def _chunk(self, B: int) -> int:
        """How many tokens of a prompt go into one run: fewer where each gives logits, or attention reads 8-bit numbers."""
        most = CHUNK // 2 if contract.has_int8_cache(self.cache_kind) else CHUNK
        return most if self.last_only else max(16, min(most, LOGITS // (4 * B * self.n_vocab)))

    # -------------------------------------------------------------------------------------------- a growing cache

    def _checked(
        self, ids: Ids, attention_mask: Ids | None, positions: Ids, cache: Cache | None
    ) -> tuple[Logits, Cache]:
        """``run`` for tokens and positions that are known to fit."""
        B, T = ids.shape
        past = self._empty(B) if cache is None else cache
        P = self._length(past, B)
        mask = check_mask(attention_mask, B, P, T)
        binding = self._session.io_binding()
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        for name, array in feed.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, value in zip(self._past, past, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in self._present:
            binding.bind_output(name, "cpu")
        logits = self._run(binding, B, T)
        return logits, binding.get_outputs()[:-1]

    def _run(self, binding: Any, B: int, T: int) -> Logits:
        """Run what is bound, but for the logits, which are the last output."""
        logits: Logits = np.empty((B, 1 if self.last_only else T, self.n_vocab), np.float32)
        _bind_output(binding, "logits", logits)
        try:
            self._session.run_with_iobinding(binding, SHRINK if T > 1 and self.in_place else None)
        except Exception as error:  # what it says of itself is not what it does
            raise FormatError(f"{self.path}: ONNX Runtime cannot run it: {_plain(error)}") from None
        return logits

    def _empty(self, B: int) -> Cache:
        shape = (B, self.config.n_head, 0, self.config.head_dim)
        return [ort.OrtValue.ortvalue_from_numpy(np.empty(shape, self._dtype)) for _ in self._past]

    def _length(self, past: Cache, B: int) -> int:
        """How many tokens the cache holds."""
        if not isinstance(past, Sequence) or not all(isinstance(value, ort.OrtValue) for value in past):
            raise InputError("the cache is not one that an earlier step returned")
        if len(past) != len(self._past):
            raise InputError(f"the cache has {len(past)} tensors, the model takes {len(self._past)}")
        shapes = [tuple(value.shape()) for value in past]
        P = shapes[0][2] if len(shapes[0]) == 4 else 0
        expected = (B, self.config.n_head, P, self.config.head_dim)
        for name, value, shape in zip(self._past, past, shapes, strict=True):
            if shape != expected or TYPES.get(value.data_type()) != self._dtype:
                wanted = f"{self._dtype} {expected}"
                raise InputError(f"{name} is {value.data_type()} {shape}; {wanted} is needed")
        return int(P)

    # ------------------------------------------------------------------------------------- a cache that stays in place

    def _in_place(
        self, ids: Ids, attention_mask: Ids | None, positions: Ids, cache: Any, last: bool
    ) -> tuple[Logits, RowCache]:
        """``run`` for a cache in place: one token of every row at once, or several of one row after another."""
        B, T = ids.shape
        cache = self.row_cache(B) if cache is None else self._known(cache, B)
        real = None if attention_mask is None else _new_slots(whole(attention_mask, "attention_mask"), cache, T)
        rows = (
            [(row, slice(None)) for row in range(B)]
            if real is None
            else [(row, kept) for row, kept in enumerate(real) if kept.any()]
        )
        for row, kept in rows:
            cache.check(row, positions[row, kept])
        if T == 1 and len(rows) == B:
            logits = self._advance(ids[:, 0], positions[:, 0], cache)[:, None]
        else:
            logits = np.zeros((B, 1 if last else T, self.n_vocab), np.float32)
            for row, kept in rows:
                found = self._prefill(ids[row, kept], positions[row, kept], cache, row, last=last)
                logits[row, [-1] if last else kept] = found
        cache.see(real, T)
        return logits, cache

    def _prefill(self, ids: Ids, positions: Ids, cache: RowCache, row: int, *, last: bool = True) -> Logits:
        """Put tokens (T,) with positions (T,) into one row of a cache in place, a chunk at a time. They follow what it holds.

        Returns:
            The logits of the last of them (1, V), or of each (T, V) if not ``last``.
        """
        ids, positions = np.ascontiguousarray(ids), np.ascontiguousarray(positions)
        start, end = int(positions[0]), int(positions[-1]) + 1
        cache.reserve(row + 1, end)
        cache.lengths[row] = start  # until all is in
        logits: Logits = np.empty((0 if last else len(ids), self.n_vocab), np.float32)
        for first, stop in _pieces(len(ids), self._chunk(1)):
            binding, mask = self._session.io_binding(), np.ones((1, start + stop), np.int64)
            _bind(binding, "input_ids", ids[None, first:stop])
            _bind(binding, "position_ids", positions[None, first:stop])
            _bind(binding, "attention_mask", mask)
            self._bind_cache(binding, [buffer[row : row + 1] for buffer in cache.buffers])
            found = self._run(binding, 1, stop - first)[0]
            if last:
                logits = found[-1:]
            else:
                logits[first:stop] = found
        cache.lengths[row] = end
        return logits

    def _advance(self, ids: Ids, positions: Ids, cache: RowCache) -> Logits:
        """One more token (B,), at its position (B,), for each of the first B rows of a cache in place. Logits (B, V)."""
        cache.reserve(len(ids), int(positions.max()) + 1)
        bound = cache.bound
        if not isinstance(bound, _Step) or bound.decoder is not self or len(bound.ids) != len(ids):
            bound = cache.bound = _Step(self, cache, len(ids))
        logits = bound(ids, positions)
        cache.lengths[: len(ids)] = positions + 1
        return logits

    def _bind_cache(self, binding: Any, buffers: Sequence[NDArray[Any]]) -> None:
        """Past and present of each layer are one and the same memory."""
        for past, present, buffer in zip(self._past, self._present, buffers, strict=True):
            _bind(binding, past, buffer)
            _bind_output(binding, present, buffer)

    def _known(self, cache: Any, B: int) -> RowCache:
        if not isinstance(cache, RowCache) or cache.kind != self._cache_shape:
            raise InputError("the cache is not one that an earlier step of this model returned")
        if len(cache.lengths) != B:
            raise InputError(f"the cache has {len(cache.lengths)} rows, input_ids {B}")
        return cache

    def _tokens(self, input_ids: Any, position_ids: Any) -> tuple[Ids, Ids]:
        if self._session is None:
            raise InputError(f"{self.path}: this decoder is closed")
        return check_tokens(input_ids, position_ids, self.n_vocab, self.n_ctx)


class _Step:
    """One more token for each of the first B rows of a cache, as long as its buffers stay: most is bound once."""

    def __init__(self, decoder: OnnxDecoder, cache: RowCache, B: int) -> None:
        self.decoder = decoder
        self.ids, self.positions = np.zeros((B, 1), np.int64), np.zeros((B, 1), np.int64)
        self.slots = np.arange(cache.capacity)
        self.buffers = [buffer[:B] for buffer in cache.buffers]  # held while they are bound
        self.binding = decoder._session.io_binding()
        _bind(self.binding, "input_ids", self.ids)
        _bind(self.binding, "position_ids", self.positions)
        decoder._bind_cache(self.binding, self.buffers)

    def __call__(self, ids: Ids, positions: Ids) -> Logits:
        """Tokens (B,) at positions (B,). Gives the logits (B, V)."""
        self.ids[:, 0], self.positions[:, 0] = ids, positions
        mask = (self.slots[: int(positions.max()) + 1] <= self.positions).astype(np.int64)
        _bind(self.binding, "attention_mask", mask)
        return self.decoder._run(self.binding, len(ids), 1)[:, 0]


def find_model(path: str | Path, precision: str | None = None) -> Path:
    """The ONNX file that a path means: itself, or the one in a directory of a precision; fp32 where none is asked for.

    Raises:
        FormatError: if there is none, or there are several and none is meant.
    """
    path = Path(path)
    check_name(path)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise FormatError(NOT_UTF8.format(path=path)) from None
    if not path.is_dir():
        return File(path).path
    found = contract.models_in(path)
    if not found:
        wanted = ", ".join((contract.model_file(), "model.onnx"))
        raise FormatError(
            f"{path}: no ONNX model in this directory (looked for {wanted}, and models of other precisions): gpt2x export --onnx makes one"
        )
    if precision is None and (DEFAULT in found or len(found) == 1):
        return found.get(DEFAULT) or next(iter(found.values()))
    if precision not in found:
        here = ", ".join(found)
        said = f"no {precision} model in this directory" if precision else "several models in this directory"
        raise FormatError(
            f"{path}: {said}; it holds {here}" + ("" if precision else ": say which (--precision, or precision=)")
        )
    return found[precision]


def check_runtime(path: Path, metadata: Mapping[str, str]) -> None:
    """Refuse a model that says it needs a newer ONNX Runtime than the one here.

    Raises:
        FormatError: naming both versions.
    """
    needed = metadata.get(contract.RUNTIME, "")
    if contract.VERSION.fullmatch(needed) and _numbers(ort.__version__) < _numbers(needed):
        raise FormatError(
            f"{path}: needs ONNX Runtime {needed} or newer; {ort.__version__} is installed. "
            f"Upgrade it: pip install 'onnxruntime>={needed}'. Or export the model again for this one: "
            "gpt2x export --help shows --cache, --precision and --opset"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _open(
    path: Path, metadata: Mapping[str, str], threads: int | None, optimize: bool, providers: list[Provider]
) -> ort.InferenceSession:
    precision = _precision_of(metadata)
    if precision is not None and precision.keeps_source:
        _check_weights(path)
    kind = metadata.get(contract.CACHE, "growing")
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised
    options.intra_op_num_threads = threads or 0
    options.enable_cpu_mem_arena = contract.stays(kind)  # it never gives back what a growing cache took
    if _needs_exact_products(metadata):
        options.add_session_config_entry(EXACT, "1")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        with _without_tiles() if kind == "inplace" else nullcontext():
            return ort.InferenceSession(str(path), options, providers=providers, enable_fallback=False)
    except Exception as error:  # ONNX Runtime has no base class of its own for these
        raise FormatError(f"{path}: ONNX Runtime {ort.__version__} cannot load it: {_plain(error)}") from None


def _needs_exact_products(metadata: Mapping[str, str]) -> bool:
    """Whether integer products of a model that gpt2x 0.1.0 wrote would saturate here. (Since then, none can: ``PAIRS``.)"""
    precision = _precision_of(metadata)
    return precision is not None and precision.integer_products and contract.PAIRS not in metadata and saturates()


def _precision_of(metadata: Mapping[str, str]) -> Precision | None:
    """The precision that a model names. None if it names none, or an unknown one."""
    return PRECISIONS.get(metadata.get(contract.PRECISION, ""))


@cache
def saturates() -> bool:
    """Whether ONNX Runtime's products of uint8 and int8 saturate at 16 bits on this processor (x86-64 without VNNI)."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(PRODUCT, options, providers=["CPUExecutionProvider"])
    (product,) = session.run(None, {"a": np.full((1, 2), 255, np.uint8)})
    return int(product.item()) != 2 * 255 * 127


def _check_weights(path: Path) -> None:
    """Find a file of float32 weights that is truncated here, with a word on where: it is a safetensors file."""
    for name in external_files(path) & {contract.data_file(), contract.OLD_WEIGHTS}:
        if (weights := path.with_name(name)).is_file():
            open_safetensors(weights)


@contextmanager
def _without_tiles() -> Iterator[None]:
    """Let a session that is made meanwhile attend to prompts without cutting them into tiles: at GPT-2's sizes, in float32,
    that takes half the time (of 8-bit numbers, it does not). What the user says in the environment stays.
    """
    with ENVIRONMENT:
        if TILES_OFF in os.environ:
            yield
            return
        os.environ[TILES_OFF] = "1"
        try:
            yield
        finally:
            del os.environ[TILES_OFF]


def _plain(error: Exception) -> str:
    """What ONNX Runtime says, in one line, without its own prefix."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(" : ")[-1][:MAX_MESSAGE]


def _slots(arguments: Any) -> dict[str, Slot]:
    return {a.name: Slot(TYPES.get(a.type, a.type), tuple(a.shape)) for a in arguments}


def _config(path: Path, metadata: dict[str, str]) -> GPT2Config:
    """What the model says of itself, else the ``config.json`` beside it or above it."""
    if contract.CONFIG in metadata:
        where = f"{path}: its metadata"
        return config_of(parse_json(metadata[contract.CONFIG].encode(), where), where)
    for file in (path.parent / "config.json", path.parent.parent / "config.json"):
        if file.is_file():
            return config_of(read_json(file, 1 << 20), str(file))
    raise ConfigError(f"{path}: neither its metadata nor a config.json beside it says what model it is")


def block_size(metadata: Mapping[str, str]) -> int | None:
    """How many weights share a scale, by a model's metadata.

    Raises:
        FormatError: if what they say makes no sense.
    """
    text = metadata.get(contract.BLOCK)
    if text is not None and not (text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 1 << 16):
        raise FormatError(f"the model's metadata: {contract.BLOCK} is {text[:50]!r}")
    return int(text) if text else None


def _check_contract(model: OnnxDecoder) -> None:
    version = model.metadata.get(contract.CONTRACT, contract.CACHES.get(model.cache_kind))
    known = model.metadata.get(contract.LOGITS, "all") in ("all", "last") and version in contract.CACHES.values()
    if not known or model.precision not in PRECISIONS or model.cache_kind not in contract.CACHES:
        said = f"contract {version}, {model.precision}, {model.cache_kind} cache"[:100]
        raise CheckpointError(f"{model.path}: of a kind that this gpt2x does not know ({said}); is it a newer one's?")
    block_size(model.metadata)
    kind = model.precision, model.cache_kind
    faults = [
        *_differences("input", contract.inputs(model.config, *kind), model.inputs),
        *_differences("output", contract.outputs(model.config, model.last_only, *kind), model.outputs),
    ]
    if faults:
        advice = "gpt2x runs models with the inputs and outputs that gpt2x export --onnx gives them."
        raise CheckpointError.listing(f"{model.path}: a model of another contract", short(faults), advice)


def _differences(kind: str, expected: dict[str, Slot], found: dict[str, Slot]) -> Iterator[str]:
    yield from (f"missing   {kind} {name}" for name in expected if name not in found)
    yield from (f"extra     {kind} {name[:100]}" for name in found if name not in expected)
    for name in expected:
        if name in found and not _fits(expected[name], found[name]):
            yield f"{kind:<9} {name} is {_words(found[name])}, not {_words(expected[name])}"


def _fits(expected: Slot, found: Slot) -> bool:
    """Whether types agree and each size that is a number is that number; what varies may have any name."""
    pairs = list(zip(expected.shape, found.shape, strict=False))
    return (
        expected.dtype == found.dtype
        and len(expected.shape) == len(found.shape)
        and all(a == b if isinstance(a, int) else not isinstance(b, int) for a, b in pairs)
    )


def _words(slot: Slot) -> str:
    return f"{slot.dtype} [{', '.join(map(str, slot.shape))}]"


def _new_slots(mask: Ids, cache: RowCache, T: int) -> NDArray[np.bool_] | None:
    """Which of T new slots hold tokens, (B, T); None if all do.

    Raises:
        InputError: if a mask (B, seen + T) does not fit the cache, or says of earlier slots what it did not say before.
    """
    wanted = (len(cache.lengths), cache.seen + T)
    if mask.shape != wanted:
        raise InputError(f"attention_mask is {mask.shape}, but {cache.seen} earlier and {T} new slots need {wanted}")
    real = mask != 0
    earlier = True if cache.mask is None else cache.mask
    if (real[:, : cache.seen] != earlier).any():
        raise InputError("attention_mask has changed for earlier slots, which a cache that stays in place cannot")
    return None if real[:, cache.seen :].all() else real[:, cache.seen :]


def _pieces(n: int, size: int) -> Iterator[tuple[int, int]]:
    """Where each piece of n begins and ends."""
    return ((start, min(start + size, n)) for start in range(0, n, size))


def _bind(binding: Any, name: str, array: NDArray[Any]) -> None:
    """Let an input be this memory, which somebody must hold while the binding is used."""
    assert array.flags.c_contiguous
    binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _bind_output(binding: Any, name: str, array: NDArray[Any]) -> None:
    """The same for an output."""
    assert array.flags.c_contiguous
    binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
