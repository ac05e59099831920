"""GPT-2 in ONNX Runtime, as a step of decoding. Needs numpy and onnxruntime, and never imports torch.

    decoder = OnnxDecoder("gpt2-onnx/")
    print(generate_text(decoder, Tokenizer.from_pretrained("gpt2-onnx/"), "ROMEO:", 50))

The cache stays in ONNX Runtime's own buffers from step to step: what one step returns is bound to the next as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from converters import CheckpointError, ConfigError, FormatError, GPT2Config
from converters.config import config_of
from converters.errors import short
from converters.files import File, check_name, parse_json, read_json
from converters.safetensors_file import open_safetensors

from . import contract
from .contract import Slot
from .generate import Ids, InputError, Logits

CHUNK = 256  # tokens; attention over a whole prompt costs the square of its length, half of it for nothing
SMALL = 64 << 20  # bytes; a larger ONNX file holds its weights itself
Cache = list[ort.OrtValue]  # key and value of each layer in turn, each (B, H, P, D)

TYPES = {"tensor(int64)": "int64", "tensor(float)": "float32", "tensor(float16)": "float16"}


class OnnxDecoder:
    """An ONNX model with a KV cache, for the decode loop of ``gpt2x.generate`` or for one of your own.

    Args:
        path: a directory that ``gpt2x export --onnx`` wrote, or an ``.onnx`` file of the same contract.
        threads: how many work on one operator; by default as many as there are cores.
        optimize: let ONNX Runtime rewrite the graph (``ORT_ENABLE_ALL``, its default).
        providers: ONNX Runtime's execution providers, the first wanted first.

    Raises:
        FormatError: if there is no model, it is damaged, or its file of weights is not whole.
        CheckpointError: if its inputs and outputs are not the contract's; the message lists every difference.
        ConfigError: if nothing says its context length.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int | None = None,
        optimize: bool = True,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        self.path = find_model(path)
        self.threads = threads
        self.runtime = f"{self.path.name} in ONNX Runtime {ort.__version__}"
        self._session = _open(self.path, threads, optimize, list(providers))
        self.metadata = _metadata(self.path, self._session)
        self.config = _config(self.path, self.metadata)
        self.last_only = self.metadata.get(contract.LOGITS) == "last"
        self.inputs, self.outputs = _slots(self._session.get_inputs()), _slots(self._session.get_outputs())
        _check_contract(self.path, self.config, self.last_only, self.inputs, self.outputs)
        self._past = contract.past_names(self.config.n_layer)
        self._present = contract.present_names(self.config.n_layer)
        self.n_ctx, self.n_vocab = self.config.n_ctx, self.config.n_vocab

    def run(
        self, input_ids: Ids, attention_mask: Ids | None, position_ids: Ids, cache: Cache | None
    ) -> tuple[Logits, Cache]:
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
        return self._checked(ids, attention_mask, positions, cache)

    def _checked(
        self, ids: Ids, attention_mask: Ids | None, positions: Ids, cache: Cache | None
    ) -> tuple[Logits, Cache]:
        """``run`` for tokens and positions that are known to fit."""
        B, T = ids.shape
        past = self._empty(B) if cache is None else cache
        P = self._length(past, B)
        mask = np.ones((B, P + T), np.int64) if attention_mask is None else _whole(attention_mask, "attention_mask")
        if mask.shape != (B, P + T):
            raise InputError(f"attention_mask is {mask.shape}, but {P} cached and {T} new tokens need {(B, P + T)}")
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return self._run({name: np.ascontiguousarray(array) for name, array in feed.items()}, past)

    def _run(self, feed: dict[str, Ids], past: Cache) -> tuple[Logits, Cache]:
        binding = self._session.io_binding()
        for name, array in feed.items():
            binding.bind_cpu_input(name, array)
        for name, value in zip(self._past, past, strict=True):
            binding.bind_ortvalue_input(name, value)
        B, T = feed["input_ids"].shape
        logits: Logits = np.empty((B, 1 if self.last_only else T, self.n_vocab), np.float32)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        for name in self._present:
            binding.bind_output(name, "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # what it says of itself is not what it does
            raise FormatError(f"{self.path}: ONNX Runtime cannot run it: {_plain(error)}") from None
        return logits, binding.get_outputs()[1:]

    def step(self, input_ids: Ids, attention_mask: Ids | None, position_ids: Ids, cache: Any) -> tuple[Logits, Any]:
        """As ``gpt2x.generate.Decoder.step``: the logits of the last position, (B, V). A long prompt goes in pieces."""
        ids, positions = self._tokens(input_ids, position_ids)
        mask = None if attention_mask is None else _whole(attention_mask, "attention_mask")
        T = ids.shape[1]
        for start in range(0, T, CHUNK):
            end = min(start + CHUNK, T)
            seen = None if mask is None else mask[..., : mask.shape[-1] - (T - end)]
            logits, cache = self._checked(ids[:, start:end], seen, positions[:, start:end], cache)
        return logits[:, -1], cache

    def unoptimized(self) -> OnnxDecoder:
        """The same model, its graph run as it is written."""
        return OnnxDecoder(self.path, threads=self.threads, optimize=False)

    def _empty(self, B: int) -> Cache:
        shape = (B, self.config.n_head, 0, self.config.head_dim)
        return [ort.OrtValue.ortvalue_from_numpy(np.empty(shape, np.float32)) for _ in self._past]

    def _tokens(self, input_ids: Any, position_ids: Any) -> tuple[Ids, Ids]:
        """Both checked: of one shape (B, T), and within the vocabulary and the context."""
        ids, positions = _whole(input_ids, "input_ids"), _whole(position_ids, "position_ids")
        if ids.ndim != 2:
            raise InputError(f"input_ids are {ids.shape}; (batch, tokens) is needed")
        if 0 in ids.shape:
            raise InputError("the prompt is empty: give at least one token (<|endoftext|> starts a new text)")
        if positions.shape != ids.shape:
            raise InputError(f"position_ids are {positions.shape}, input_ids {ids.shape}: they must have one shape")
        _check_range(ids, self.n_vocab, "token id", "the vocabulary")
        _check_range(positions, self.n_ctx, "position", "the context")
        return ids, positions

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
            if shape != expected or value.data_type() != "tensor(float)":
                raise InputError(f"{name} is {value.data_type()} {shape}; tensor(float) {expected} is needed")
        return int(P)


def find_model(path: str | Path) -> Path:
    """The ONNX file that a path means: itself, or the one in a directory.

    Raises:
        FormatError: if there is none.
    """
    path = Path(path)
    check_name(path)
    if not path.is_dir():
        return File(path).path
    found = next((path / name for name in contract.PLACES if (path / name).is_file()), None)
    if found is None:
        raise FormatError(f"{path}: no ONNX model in this directory (looked for {', '.join(contract.PLACES)})")
    return found


def _open(path: Path, threads: int | None, optimize: bool, providers: list[str]) -> ort.InferenceSession:
    weights = path.parent / contract.WEIGHTS
    if weights.is_file() and _names(path, contract.WEIGHTS):
        open_safetensors(weights)  # a file that is cut short is found here, with a word on where
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised
    options.intra_op_num_threads = threads or 0
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(str(path), options, providers=providers, enable_fallback=False)
    except Exception as error:  # ONNX Runtime has no base class of its own for these
        raise FormatError(f"{path}: ONNX Runtime cannot load it: {_plain(error)}") from None


def _names(path: Path, name: str) -> bool:
    """Whether a small ONNX file speaks of a file of this name."""
    file = File(path)
    return file.size < SMALL and name.encode() in file.read(0, file.size)


def _metadata(path: Path, session: ort.InferenceSession) -> dict[str, str]:
    try:
        return dict(session.get_modelmeta().custom_metadata_map)
    except UnicodeDecodeError:
        raise FormatError(f"{path}: its metadata are not UTF-8") from None


def _plain(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text.split(" : ")[-1].split("\t")[-1][:300]


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


def _check_contract(
    path: Path, config: GPT2Config, last: bool, inputs: dict[str, Slot], outputs: dict[str, Slot]
) -> None:
    faults = [
        *_differences("input", contract.inputs(config), inputs),
        *_differences("output", contract.outputs(config, last), outputs),
    ]
    if faults:
        advice = "gpt2x runs models with the inputs and outputs that gpt2x export --onnx gives them."
        raise CheckpointError.listing(f"{path}: a model of another contract", short(faults), advice)


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


def _whole(array: Any, name: str) -> Ids:
    """Whole numbers as contiguous int64."""
    try:
        found = np.asarray(array)
    except ValueError:
        raise InputError(f"{name} have rows of unequal lengths; pad them") from None
    if found.dtype.kind not in "biu" or (found.dtype == np.uint64 and (found > np.iinfo(np.int64).max).any()):
        raise InputError(f"{name} are {found.dtype} {found.shape}; whole numbers of 64 bits are needed")
    return np.ascontiguousarray(found, np.int64)


def _check_range(values: NDArray[np.int64], limit: int, what: str, of: str) -> None:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= limit:
        raise InputError(f"{what} {low if low < 0 else high} is outside {of} of {limit}")
