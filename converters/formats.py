"""Which formats there are, and which of them a path holds."""

from __future__ import annotations

import glob
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, assemble
from .config import PARSERS, from_hf, from_hparams
from .containers import safetensors, tf_bundle
from .containers.container import Container
from .containers.shard_index import open_shards
from .dialects import OPENAI
from .errors import CheckpointError, ConversionError, FormatError, TokenizerError
from .io import sstable
from .io.json import read_json
from .io.reading import File, check_name, reading
from .spec import GPT2Config
from .tokenizer import END_OF_TEXT, TokenizerFiles, find_tokenizer

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Format:
    """A format: a container, the dialects that are usual in it, and what it can hold.

    Args:
        name: the word for it: in ``--to``, and in what ``inspect`` and ``convert`` say.
        what: who writes it.
        files: what it looks like on a disk.
        dialects: names of the tables in ``dialects.py``.
        ask: what a user types to have it written.
        reads: the number formats that are read; ``Q8_0`` as the float32 it stands for.
        writes: those that are written; none where there is no writer.
        configuration: whether a file carries its own; "" is no, else which part of it.
        checksums: what protects its bytes.
        tokenizer: where the tokenizer is.
        untied: whether it can hold an output that is not the token embedding.
        opener: module and function that open one file of it.
        begins: whether a file with these first bytes, and of this size, may be one.
    """

    name: str
    what: str
    files: str
    dialects: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...] = ()
    ask: str = ""
    configuration: str = ""
    checksums: str = ""
    tokenizer: str = "beside it"
    untied: bool = True
    opener: str = ""
    begins: Callable[[bytes, int], bool] = lambda head, size: False


def _magic(*beginnings: bytes) -> Callable[[bytes, int], bool]:
    return lambda head, size: head.startswith(beginnings)


def _small_protobuf(head: bytes, size: int) -> bool:
    """Field 1, the version of ONNX's format, is a small number; another field follows."""
    return len(head) > 2 and head[0] == 0x08 and 1 <= head[1] <= 32 and head[2] & 7 in (0, 2)


def _map_of_names(head: bytes, size: int) -> bool:
    """A map of MessagePack whose first key is a string."""
    key = head[{b"\xde": 3, b"\xdf": 5}.get(head[:1], 1) :][:1]
    return (b"\x81" <= head[:1] <= b"\x8f" or head[:1] in (b"\xde", b"\xdf")) and b"\xa1" <= key <= b"\xdb"


# In the order in which a file is compared with them. The first three are asked for by name or by directory.
FORMATS = (
    Format(
        "tf", "OpenAI's TensorFlow checkpoint (V2)", "directory, prefix, `.index` or `.data`", ("openai",), FLOATS, FLOATS,
        ask="`--to tf`", configuration="`hparams.json` beside it", checksums="CRC-32C of every tensor and block", untied=False,
    ),
    Format(
        "hf", "Hugging Face's directory", "`config.json`, `model.safetensors`, tokenizer", ("hf",), FLOATS, FLOATS,
        ask="a name without a known suffix", configuration="`config.json`", tokenizer="in the directory",
    ),
    Format(
        "shards", "one checkpoint in several files", "`*.index.json`", ("hf",), FLOATS, FLOATS,
        ask="`--max-shard-size 5GB`", configuration="`config.json` beside it", checksums="those of its files",
    ),
    Format(
        "safetensors", "Hugging Face, and MLX (mlx-lm)", "`.safetensors`", ("hf", "mlx"), FLOATS, FLOATS,
        ask="`NAME.safetensors`", configuration="in its metadata", opener="containers.safetensors:open_safetensors", begins=safetensors.looks_like,
    ),
    Format(
        "bin", "PyTorch, since 1.6 (zip) and before (legacy)", "`.bin`, `.pt`, `.pth`", ("hf",), FLOATS, FLOATS,
        ask="`NAME.bin`", configuration="in a member that torch passes over", checksums="CRC-32 of every member (zip)",
        opener="containers.torch_zip:open_torch_zip", begins=_magic(b"PK\x03\x04", b"PK\x05\x06"),
    ),
    Format(
        "bin", "", "", (), (), opener="containers.torch_legacy:open_torch_legacy", begins=_magic(b"\x80\x02\x8a\x0a"),
    ),
    Format(
        "nanogpt", "nanoGPT's train.py", "`ckpt.pt`", ("nanogpt",), FLOATS, FLOATS,
        ask="`--to nanogpt`", configuration="`model_args` in it", checksums="CRC-32 of every member", untied=False,
    ),
    Format(
        "llmc", "llm.c, versions 3 and 5", "`.bin`", ("llmc",), ("F32", "BF16"), ("F32", "BF16"),
        ask="`--to llmc`", configuration="in its header", untied=False,
        opener="containers.llmc:open_llmc", begins=_magic((20240326).to_bytes(4, "little")),
    ),
    Format(
        "gguf", "llama.cpp", "`.gguf`", ("gguf",), (*FLOATS, "Q8_0"), ("F32", "F16", "BF16", "Q8_0"),
        ask="`NAME.gguf`", configuration="in its metadata", tokenizer="in its metadata", opener="containers.gguf:open_gguf", begins=_magic(b"GGUF"),
    ),
    Format(
        "hdf5", "Keras, through transformers 4", "`tf_model.h5`", ("keras",), ("F64", "F32", "F16"),
        untied=False, opener="containers.hdf5:open_hdf5", begins=_magic(b"\x89HDF\r\n\x1a\n"),
    ),
    Format(
        "onnx", "optimum, torch.onnx and gpt2x", "`.onnx`, with its data beside it", ("hf",), FLOATS,
        configuration="in its metadata (gpt2x's)", opener="containers.onnx:open_onnx", begins=_small_protobuf,
    ),
    Format(
        "msgpack", "Flax, through transformers 4", "`flax_model.msgpack`", ("flax",), FLOATS,
        opener="containers.msgpack:open_msgpack", begins=_map_of_names,
    ),
)  # fmt: skip

LLMC_STATES = tuple(number.to_bytes(4, "little") for number in (20240327, 20240527))  # of its tests, of its optimizer
GUESSED = ("onnx", "msgpack")  # whose first bytes are not unlike others'

# What a directory is searched for, the first found being meant: these, then a TensorFlow checkpoint, then the others.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
OTHERS = ("ckpt.pt", "tf_model.h5", "flax_model.msgpack")
MODELS = ("model.onnx", "decoder_model.onnx", "decoder_model_merged.onnx", "onnx/model.onnx", "onnx/decoder_model.onnx")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
PADDED = 50304  # GPT-2's vocabulary of 50257, rounded up to a multiple of 64


def open_checkpoint(
    path: str | Path,
    *,
    n_head: int | None = None,
    n_vocab: int | None = None,
    activation_function: str | None = None,
    tokenizer: str | Path | None = None,
    tie: bool = False,
) -> Checkpoint:
    """Open a GPT-2 checkpoint of any known format, recognised by its content. Nothing is read but names and shapes.

    Args:
        path: a file of any of ``FORMATS``, or a directory that holds one.
        n_head: the number of attention heads, where nothing beside the weights says it.
        n_vocab: how many rows of the token embedding to keep, where padding makes it longer than the vocabulary.
        activation_function: which it is, where nothing in the file or beside it says so.
        tokenizer: a directory or a GGUF file that has the tokenizer, where it is not in the file or beside it.
        tie: drop an ``lm_head`` that differs from the token embedding.

    Raises:
        ConversionError: if it cannot be read as a GPT-2; the message says what is wrong and where.
    """
    if not str(path):
        raise FormatError("the source is an empty name")
    if "://" in str(path):
        raise FormatError(f"{path}: an address, not a path; gpt2x.fetch downloads what it names")
    path = Path(path)
    check_name(path)
    with reading(path):
        container = _open_directory(path) if path.is_dir() else _open_path(path)
        directory = _home(path)
        stated, stated_in = _configuration(container, directory, from_directory=path.is_dir())
        if activation_function:
            _agree(directory, stated, stated_in, {"activation_function": activation_function}, "--activation-function")
            stated = {**stated, "activation_function": activation_function}
        checkpoint = assemble(container, stated, stated_in, n_head=n_head, n_vocab=n_vocab, tie=tie)
        found, note = (tokenizer_in(Path(tokenizer)), []) if tokenizer else _tokenizer(container, directory)
        config = _with_ids(checkpoint, stated, found)
        notes = (*checkpoint.notes, *note, *_remarks(checkpoint, container, path))
        return replace(checkpoint, config=config, tokenizer=found, notes=notes)


def _with_ids(checkpoint: Checkpoint, stated: Mapping[str, Any], tokenizer: TokenizerFiles | None) -> GPT2Config:
    """The configuration with the id of the end of text, where it states none: the tokenizer's, or else OpenAI's last."""
    config = checkpoint.config
    end = config.n_vocab - 1 if checkpoint.dialect == OPENAI.name else config.eos_token_id
    end = _end_of_text(tokenizer) if tokenizer else end
    ids: dict[str, Any] = {key: end for key in ("bos_token_id", "eos_token_id") if key not in stated}
    return replace(config, **ids)


def _home(path: Path) -> Path:
    """The folder whose configuration and tokenizer are a file's: its own, or of ``onnx/model.onnx`` the one above."""
    folder = path if path.is_dir() else path.parent
    above = folder.absolute().parent
    layout = folder.absolute().name == "onnx" and path.suffix == ".onnx" and not (folder / "config.json").is_file()
    return above if layout and (above / "config.json").is_file() else folder


def _remarks(checkpoint: Checkpoint, container: Container, path: Path) -> list[str]:
    """What a user may want to know."""
    here = sorted(p.name for p in path.iterdir() if _is_weights(p)) if path.is_dir() else []
    read = {container.path.name, *(part.name for part in container.files)}
    remarks = [f"{path} also holds {name}, which was not read" for name in here if name not in read]
    if checkpoint.config.n_vocab == PADDED:
        remarks.append(
            f"the vocabulary is padded to {PADDED} rows, which take part in the softmax; --n-vocab 50257 leaves out what is no token of GPT-2's"
        )
    return remarks


def _is_weights(path: Path) -> bool:
    """Whether a file would be read as weights. (An index that names but one file, as mlx-lm writes, says nothing more.)"""
    if path.name in WEIGHTS and path.name.endswith(".index.json") and path.is_file():
        files = read_json(path).get("weight_map")
        return not isinstance(files, dict) or len(set(map(str, files.values()))) > 1
    return (path.name in (*WEIGHTS, *OTHERS) or path.suffix == ".gguf") and path.is_file()


def _open_directory(path: Path) -> Container:
    for name in WEIGHTS:
        if (path / name).is_file():
            return _open_path(path / name)
    if prefix := tf_bundle.find_prefix(path):
        return _open_bundle(prefix)
    for name in (*OTHERS, *MODELS):
        if (path / name).is_file():
            return _open_path(path / name)
    others = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if len(others) == 1:
        return _open_path(others[0])
    if others:
        raise FormatError(f"{path}: several weight files ({', '.join(p.name for p in others[:5])}); name one of them")
    looked = ", ".join((*WEIGHTS, "*.index", *OTHERS, *MODELS[:2]))
    raise FormatError(
        f"{path}: no weights in this directory (looked for {looked}, and a single file in {' '.join(SUFFIXES)})"
    )


def _open_path(path: Path) -> Container:
    if prefix := tf_bundle.prefix_of(path):
        return _open_bundle(prefix)
    file = File(path)
    head = file.read(0, min(file.size, 512))
    if path.name.endswith(".index.json"):
        return open_shards(path, _open_path)
    found = next((f for f in FORMATS if f.opener and f.begins(head, file.size)), None)
    if (found is None or found.name in GUESSED) and (fault := _not_weights(file, head)):
        raise FormatError(f"{path}: {fault}")
    if (found is None or found.name in GUESSED) and path.suffix == ".safetensors":
        return safetensors.open_safetensors(path)
    if found is None:
        raise FormatError(f"{path}: not a format that gpt2x knows; 'gpt2x formats' lists them")
    module, function = found.opener.split(":")
    container: Container = getattr(importlib.import_module(f".{module}", __package__), function)(path)
    return container


def _open_bundle(prefix: Path) -> Container:
    for path in sorted(prefix.parent.glob(f"{glob.escape(prefix.name)}.*")):
        if tf_bundle.prefix_of(path) == prefix and path.is_file():
            file = File(path)
            if fault := _page(file.read(0, min(file.size, 512))):
                raise FormatError(f"{path}: {fault}")
    return tf_bundle.open_bundle(prefix)


def _page(head: bytes) -> str | None:
    """What a download leaves in the place of a file."""
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights; run 'git lfs pull' where it came from"
    if head.lstrip()[:64].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not weights; the download went to a page that shows the file"
    return None


def _not_weights(file: File, head: bytes) -> str | None:
    """What a file is that people take for weights."""
    if not head:
        return "an empty file"
    if fault := _page(head):
        return fault
    if head[257:262] == b"ustar" or head.startswith((b"\x1f\x8b", b"BZh")):
        return "a tar or a compressed archive; unpack it first"
    if head.lstrip().startswith(b"{") and file.path.suffix == ".json":
        return "JSON, not weights; give the directory that it is in"
    if head[4:8] == b"TFL3":
        return "a TensorFlow Lite model, which is a program and not weights; convert what it was made from"
    if head[:4] in LLMC_STATES:
        return "the state of a run of llm.c, not its weights; those begin with another number (20240326)"
    if file.size >= sstable.FOOTER and file.read(file.size - 8, 8) == sstable.MAGIC.to_bytes(8, "little"):
        return tf_bundle.V1
    if head[:1] == b"\x80" and len(head) > 1 and head[1] <= 5:
        return "a pickle, but not one of torch.save: refused"
    return None


def _tokenizer(container: Container, directory: Path) -> tuple[TokenizerFiles | None, list[str]]:
    """The tokenizer in a file, or else that beside it, and what is to be said of it."""
    if container.vocabulary:
        try:
            return TokenizerFiles(directory, None, None, None, container.vocabulary()), []
        except TokenizerError as error:
            return find_tokenizer(directory), [f"the tokenizer in it is not taken over: {error}"]
    return find_tokenizer(directory), []


def _end_of_text(tokenizer: TokenizerFiles) -> int | None:
    """The id of the end of text, if a sound tokenizer has one."""
    try:
        return tokenizer.vocabulary().ids.get(END_OF_TEXT)
    except ConversionError:  # whoever needs the tokenizer will say so
        return None


def tokenizer_in(path: Path) -> TokenizerFiles:
    """The tokenizer in a directory, beside a file of weights, or in one that carries its own (GGUF).

    Raises:
        TokenizerError: if there is none.
        ConversionError: if a file that should carry one is not sound.
    """
    if not path.exists() and not Path(f"{path}.index").exists():
        raise TokenizerError(f"{path}: no such file or directory")
    found = find_tokenizer(path if path.is_dir() else path.parent)
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if len(files) == 1 and not (found and path.is_dir()) and _begins(files[0], b"GGUF"):
        found = _tokenizer(_open_path(files[0]), files[0].parent)[0]
    if found is None:
        raise TokenizerError(
            f"{path}: no tokenizer {'here' if path.is_dir() else 'in it or beside it'} (tokenizer.json, vocab.json with "
            "merges.txt, or encoder.json with vocab.bpe).\nSay where one is: --tokenizer DIR"
        )
    return found


def _begins(path: Path, magic: bytes) -> bool:
    file = File(path)
    return file.size >= len(magic) and file.read(0, len(magic)) == magic


def _configuration(container: Container, directory: Path, from_directory: bool) -> tuple[dict[str, Any], str]:
    """What is stated about the model, and where: a lone file's own word first, a directory's files first.

    nanoGPT's files say the sizes only, so that what lies beside them is read too.
    """
    parse = PARSERS[container.config_of]
    inside = parse(container.config, f"{container.path}: its metadata") if container.config else {}
    alone = inside and not from_directory and container.config_of != "nanogpt"
    beside, name = ({}, "") if alone else _beside(directory)
    _agree(directory, inside, container.path.name, beside, name)
    return {**inside, **beside}, name or ("its metadata" if inside else "")


def _beside(directory: Path) -> tuple[dict[str, Any], str]:
    stated: dict[str, Any] = {}
    names = []
    for name, parse in (("config.json", from_hf), ("hparams.json", from_hparams)):
        if (directory / name).is_file():
            here = parse(read_json(directory / name, 1 << 20), str(directory / name))
            _agree(directory, stated, "config.json", here, name)
            stated = {**here, **stated}
            names.append(name)
    return stated, " and ".join(names)


def _agree(directory: Path, a: Mapping[str, Any], name_a: str, b: Mapping[str, Any], name_b: str) -> None:
    inert = ("token_id", "pdrop")
    clash = [key for key in a if key in b and b[key] != a[key] and not key.endswith(inert)]
    if clash:
        facts = [f"{key} is {a[key]!r} in {name_a}, {b[key]!r} in {name_b}" for key in clash]
        advice = "Remove the wrong one, or convert the file alone."
        raise CheckpointError.listing(f"{directory}: two configurations that disagree", facts, advice)
