"""llama.cpp's GGUF: what its metadata say of a GPT-2 and its tokenizer, and which dtype each tensor is written in.

Sources: ``constants.py`` of gguf-py for the keys; ``llama-model.cpp`` of llama.cpp for the dtypes that it accepts.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..added_tokens import AddedToken, usual_token
from ..checkpoint import Checkpoint
from ..config import UNSUPPORTED
from ..containers.container import Container
from ..containers.gguf_types import Q8_0, QUANTIZED
from ..dialects import GGUF as DIALECT
from ..errors import CheckpointError, ConfigError, TokenizerError
from ..io.json import parse_json
from ..io.publishing import new_file
from ..spec import GPT2Config, renamed, spelled, with_inner
from ..tensors import DTYPES, F32, DType, LazyTensor
from ..tokenizer import Vocabulary, read_pairs
from ..values import all_are
from .format import FLOATS, Codec, Embedded, Format, Job, Opener, Written, starts_with
from .notes import NO_TOKENIZER, not_stored, refuse_float64, tokenizer_notes, vocabulary_of

ARCHITECTURE = "gpt2"
HEADS, HEADS_KV = "gpt2.attention.head_count", "gpt2.attention.head_count_kv"

# Metadata -> GPT2Config
KEYS = {
    "gpt2.vocab_size": "n_vocab",
    "gpt2.context_length": "n_ctx",
    "gpt2.embedding_length": "n_embd",
    "gpt2.block_count": "n_layer",
    HEADS: "n_head",
    "gpt2.feed_forward_length": "n_inner",
    "gpt2.attention.layer_norm_epsilon": "layer_norm_epsilon",
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
KEPT_FLAGS = ("normalized", "lstrip", "rstrip", "single_word")
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # llama.cpp's general.file_type

TOKENS, MERGES, KINDS = "tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens
FLAGS = "gpt2x.added_tokens"  # JSON: token -> those of its flags that its kind does not tell
WITHOUT_TOKENIZER = {"tokenizer.ggml.model": "none"}
IDS_ONLY = "Without a tokenizer, llama.cpp accepts token ids only"


# --------------------------------------------------------------------------------------------------- configuration


def from_gguf(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The GPT2Config fields that the metadata of a GGUF file state.

    Raises:
        ConfigError: if they state something that this GPT-2 does not have.
    """
    faults = []
    for key, value in raw.items():
        is_plain_attention = key == HEADS_KV and value == raw.get(HEADS)
        if key.startswith("gpt2.") and key not in KEYS and not is_plain_attention:
            faults.append(f"{key} is {str(value)[:60]}: unknown to gpt2x, and it may change the arithmetic")
    if faults:
        raise ConfigError.listing(f"{where}: {UNSUPPORTED}", faults)
    fields = renamed(raw, KEYS)
    epsilon = fields.get("layer_norm_epsilon")
    if isinstance(epsilon, float):
        fields["layer_norm_epsilon"] = _shortest(epsilon)
    return with_inner(fields)


def to_gguf(config: GPT2Config) -> dict[str, Any]:
    """The metadata of a configuration, without the token ids that it does not have."""
    return {key: value for key, value in spelled(config, KEYS).items() if value is not None}


def _shortest(value: float) -> float:
    """The decimal number that a float32 was rounded from: 1e-05 for 9.999999747378752e-06."""
    if not math.isfinite(value) or abs(value) > 3e38:
        return value
    for digits in range(1, 10):
        candidate = float(f"{value:.{digits}g}")
        if struct.pack("<f", candidate) == struct.pack("<f", value):
            return candidate
    return value


CODEC = Codec(from_gguf, to_gguf)


def _open(path: Path) -> Container:
    from ..containers.gguf_split import open_whole

    return open_whole(path, check=_check_architecture)


def _check_architecture(metadata: Mapping[str, Any], where: str) -> None:
    kind = metadata.get("general.type", "model")
    if kind == "adapter":
        raise CheckpointError(
            f"{where}: a LoRA adapter of llama.cpp, not a whole model; merge it into its base with "
            f"'llama-export-lora -m BASE.gguf --lora {where} -o merged.gguf', and pass merged.gguf"
        )
    if kind != "model":
        raise CheckpointError(f"{where}: a GGUF file of the type {str(kind)[:60]!r}; pass the file of the model itself")
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise CheckpointError(f"{where}: a model of the architecture {str(architecture)[:60]!r}, not 'gpt2'")


def _embedded(container: Container) -> Embedded:
    return Embedded(container.metadata, CODEC)


# ------------------------------------------------------------------------------------------------------- tokenizer


def _vocabulary(container: Container) -> Callable[[], Vocabulary] | None:
    if TOKENS not in container.metadata:
        return None
    return lambda: read_vocabulary(container.metadata, str(container.path))


def read_vocabulary(metadata: Mapping[str, Any], where: str) -> Vocabulary:
    """The tokenizer in the metadata.

    Raises:
        TokenizerError: if it is not a byte-level BPE as GPT-2's is.
    """
    tokens, merges = metadata.get(TOKENS), metadata.get(MERGES)
    kinds = metadata.get(KINDS)
    if kinds is None and isinstance(tokens, list):
        kinds = [NORMAL] * len(tokens)
    if not isinstance(tokens, list) or not isinstance(merges, list) or not isinstance(kinds, list):
        raise _not_gpt2s(where)
    if len(kinds) != len(tokens) or not _splits_text_as_gpt2(metadata):
        raise _not_gpt2s(where)
    if not all_are(tokens, str) or len(set(tokens)) != len(tokens):
        raise TokenizerError(f"{where}: invalid tokens: duplicates, or not strings")
    pairs = read_pairs(merges, where)
    ids, added = {}, []
    flags = _flags(metadata, where)
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind != UNUSED:
            ids[token] = i
        if kind in (CONTROL, USER_DEFINED):
            added.append(usual_token(token, special=kind == CONTROL).with_flags(flags.get(token, {})))
    return Vocabulary(ids, pairs, tuple(added))


def _flags(metadata: Mapping[str, Any], where: str) -> dict[str, dict[str, bool]]:
    """Token -> flags that gpt2x wrote, as llama.cpp has no key for them."""
    text = metadata.get(FLAGS, "{}")
    if not isinstance(text, str):
        raise TokenizerError(f"{where}: {FLAGS} is not text")
    tokens = parse_json(text.encode(), f"{where}: {FLAGS}")
    for flags in tokens.values():
        is_valid = isinstance(flags, dict) and flags.keys() <= set(KEPT_FLAGS)
        if not is_valid or not all_are(flags.values(), bool):
            raise TokenizerError(f"{where}: invalid {FLAGS}")
    return tokens


def _splits_text_as_gpt2(metadata: Mapping[str, Any]) -> bool:
    """Whether text is split into words, and begun and ended, as GPT-2's tokenizer does it."""
    is_bpe = metadata.get("tokenizer.ggml.model") == "gpt2"
    same_words = metadata.get("tokenizer.ggml.pre", "gpt-2") in ("gpt-2", "default")
    adds_tokens = metadata.get("tokenizer.ggml.add_bos_token") or metadata.get("tokenizer.ggml.add_eos_token")
    return is_bpe and same_words and not adds_tokens


def _not_gpt2s(where: str) -> TokenizerError:
    return TokenizerError(f"{where}: its tokenizer is not a byte-level BPE as GPT-2's is")


def tokenizer_metadata(vocabulary: Vocabulary, n_vocab: int) -> dict[str, Any]:
    """The metadata of a tokenizer. Rows of the embedding without a token get an unused one.

    Added tokens without a row of the embedding, which the model cannot use, are left out.

    Raises:
        TokenizerError: if the id of another token is not in the model's vocabulary.
    """
    without_row = set(_without_row(vocabulary, n_vocab))
    names = {i: token for token, i in vocabulary.ids.items() if token not in without_row}
    largest = max(names, default=0)
    if largest >= n_vocab:
        raise TokenizerError(
            f"the tokenizer has a token id of {largest}, but the model's n_vocab is {n_vocab}; "
            "pass --tokenizer DIR with the model's own, or --no-tokenizer"
        )
    kinds = dict.fromkeys(names, NORMAL)
    flags: dict[str, dict[str, bool]] = {}
    for token in vocabulary.added:
        if token.content not in without_row:
            kinds[vocabulary.ids[token.content]] = CONTROL if token.special else USER_DEFINED
        unusual = _unusual(token)
        if unusual:
            flags[token.content] = unusual
    return {
        **({FLAGS: json.dumps(flags)} if flags else {}),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        TOKENS: [names.get(i, f"[PAD{i}]") for i in range(n_vocab)],
        KINDS: [kinds.get(i, UNUSED) for i in range(n_vocab)],
        MERGES: list(map(" ".join, vocabulary.merges)),
        "tokenizer.ggml.add_bos_token": False,
    }


def _without_row(vocabulary: Vocabulary, n_vocab: int) -> list[str]:
    """The added tokens whose ids the model does not have."""
    return [token.content for token in vocabulary.added if vocabulary.ids[token.content] >= n_vocab]


def _unusual(token: AddedToken) -> dict[str, bool]:
    """The flags that the token's kind does not tell."""
    usual = usual_token(token.content, token.special).flags()
    return {key: value for key, value in token.flags().items() if value != usual[key]}


# --------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class _Plan:
    """Which tensors are written, under GGUF's names; ``quantized`` are rounded to Q8_0."""

    tensors: dict[str, LazyTensor]
    matrices: list[str]
    quantized: list[str]
    file_type: str


def _plan(checkpoint: Checkpoint, dtype: str | None) -> _Plan:
    """Choose each tensor's dtype. llama.cpp requires positions, biases and norms in float32."""
    tensors: dict[str, LazyTensor] = {}
    matrices = []
    for name, tensor in checkpoint.tensors.items():
        is_matrix = len(tensor.shape) == 2 and name != "wpe.weight"
        tensors[name] = tensor.cast(_matrix_dtype(tensor, dtype) if is_matrix else F32, name)
        if is_matrix:
            matrices.append(DIALECT.names(name)[0])
    written = DIALECT.write(tensors, checkpoint.config)
    quantized = []
    if dtype == "Q8_0":
        quantized = [name for name in matrices if written[name].shape[-1] % Q8_0.values == 0]
    file_type = "Q8_0" if quantized else tensors["wte.weight"].dtype.name
    return _Plan(written, matrices, quantized, file_type)


def _matrix_dtype(tensor: LazyTensor, dtype: str | None) -> DType:
    """A matrix keeps its dtype by default; Q8_0 is rounded from float32."""
    if dtype is None:
        return tensor.dtype
    return DTYPES.get(dtype, F32)


def _metadata(plan: _Plan, config: GPT2Config, vocabulary: Vocabulary | None) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "general.architecture": ARCHITECTURE,
        "general.file_type": FILE_TYPES[plan.file_type],
    }
    if plan.quantized:
        metadata["general.quantization_version"] = 2
    tokenizer = tokenizer_metadata(vocabulary, config.n_vocab) if vocabulary else WITHOUT_TOKENIZER
    return {**metadata, **to_gguf(config), **tokenizer}


def _write(job: Job) -> Written:
    from ..containers.gguf import write_gguf

    checkpoint = job.checkpoint
    if not job.dtype:
        refuse_float64(checkpoint, "gguf")
    plan = _plan(checkpoint, job.dtype)
    vocabulary = vocabulary_of(checkpoint.tokenizer)
    metadata = _metadata(plan, checkpoint.config, vocabulary)
    with new_file(job.path, job.force) as out:
        write_gguf(out, plan.tensors, metadata, plan.quantized)
    return Written([job.path], _notes(checkpoint, plan, job.dtype))


def _notes(checkpoint: Checkpoint, plan: _Plan, dtype: str | None) -> list[str]:
    notes = _tokenizer_notes(checkpoint)
    if dtype is None and any(tensor.stored for tensor in plan.tensors.values()):
        notes.append("the quantized tensors are written as F32; llama.cpp's llama-quantize can quantize the file again")
    if dtype == "Q8_0":
        note = f"Q8_0 is lossy: {len(plan.quantized)} matrices are rounded to 8 bits"
        kept = len(plan.matrices) - len(plan.quantized)
        if kept:
            note += f"; {kept} whose row length is not a multiple of 32 are written as F32"
        notes.append(note)
    return notes


def _tokenizer_notes(checkpoint: Checkpoint) -> list[str]:
    if checkpoint.tokenizer is None:
        return [f"{NO_TOKENIZER}. {IDS_ONLY}"]
    if checkpoint.tokenizer.fault:
        return [f"{not_stored(checkpoint.tokenizer, 'a GGUF file of GPT-2')}. {IDS_ONLY}"]
    notes = tokenizer_notes(checkpoint, keeps_prefix_space=False)
    vocabulary = checkpoint.tokenizer.vocabulary()
    without_row = _without_row(vocabulary, checkpoint.config.n_vocab)
    if without_row:
        names = ", ".join(without_row)
        notes.append(f"added tokens without a row of the embedding are left out: {names}")
    stripping = [token.content for token in vocabulary.added if token.lstrip or token.rstrip or token.single_word]
    if stripping:
        names = ", ".join(stripping)
        notes.append(f"llama.cpp does not know lstrip, rstrip and single_word of added tokens: {names}")
    return notes


GGUF = Format(
    name="gguf",
    what="llama.cpp",
    files="`.gguf`, also split (`-00001-of-00003.gguf`)",
    dialect="gguf",
    reads=(*FLOATS, *(kind.name for kind in QUANTIZED)),
    writes=("F32", "F16", "BF16", "Q8_0"),
    ask="`NAME.gguf`",
    configuration="in its metadata",
    tokenizer="in its metadata",
    openers=(Opener(starts_with(b"GGUF"), _open),),
    suffixes=(".gguf",),
    codec=CODEC,
    embedded=_embedded,
    vocabulary=_vocabulary,
    write=_write,
    write_suffixes=(".gguf",),
    casts=True,
)
