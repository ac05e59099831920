"""What people have in the place of a GPT-2's weights, and what each of them can do: one sentence for each situation.

Opening consults the table when it refuses a path. A row never keeps a file from being read.
"""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import re
import shlex
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config import SAME_FUNCTION
from ..containers.container import Container
from ..containers.tf_bundle import V1
from ..errors import ChecksumError, ConversionError, DestinationError, TokenizerError, UnknownHeadsError, UnsafeError
from ..formats import MODELS as EXPORTED_NAMES
from ..formats import OTHERS, WEIGHTS
from ..io import sstable
from ..io.json import MAX_CONFIG, parse_json, read_json
from ..io.reading import File
from ..spec import ACTIVATIONS
from ..values import any_ends_with

HEAD = 512  # bytes that tell the format
MAX_ENTRIES = 10_000  # of a folder
MAX_MEMBERS = 1000  # of an archive
MAX_HEADER = 16 << 20  # of a safetensors file
MAX_ANSWER = 500  # bytes of a server's answer in plain text
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(\.safetensors|\.bin)$")
DOWNLOAD = "'gpt2x inspect hf://OWNER/NAME'"
ORIGIN = "convert the model that it was made from, for example with 'gpt2x convert hf://OWNER/NAME model.safetensors'"
LINKS = "copy the whole folder of the cache, or copy it with 'cp -rL', which copies files in place of links"
LLMC_STATES = (20240327, 20240527)  # of its tests, of its optimizer
ANSWERS = (b"Entry not found", b"Invalid username", b"Repository not found", b"Access to model", b"Not Found", b"404: Not Found", b'{"error"')  # fmt: skip

# First bytes of a compressed archive -> the command that unpacks it and keeps it.
ARCHIVES = {
    b"\x1f\x8b": "gunzip -k",
    b"BZh": "bunzip2 -k",
    b"\xfd7zXZ\0": "unxz -k",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"7z\xbc\xaf\x27\x1c": "7z x",
    b"Rar!": "unrar x",
}

# Files of a training run that hold no weights, and those that macOS stores beside a file.
TRAINING_STATE = re.compile(
    r"(optimizer|scheduler|scaler|sampler|dl_state_dict)(_\d+)?\.(pt|bin)$|rng_state(_\d+)?\.pth$"
    r"|random_states_\d+\.pkl$|training_args\.bin$"
)
NO_MODEL = ("adapter_model.", "optimizer", "scheduler", "recipe_state")  # how their names begin
SUFFIXES = (".ckpt", ".gguf", ".safetensors", ".pt", ".pth")  # of weights, whatever their name
ORBAX = ("_METADATA", "manifest.ocdbt")
MAX_DIGITS = 16  # of the number of a step
NO_WEIGHTS = re.compile(rf"\._|.*zero_pp_rank_\d+_mp_rank_\d+_\w+_states\.pt$|{TRAINING_STATE.pattern}")


@dataclass(frozen=True)
class Evidence:
    """What is seen of a path that is not read.

    Args:
        path: the folder or the file; of a TensorFlow checkpoint, its prefix.
        names: the names in the folder, or beside the file.
        below: the subfolders that hold weights, relative to the folder.
        head: the first bytes of the file.
        tail: its last eight bytes.
        index: the first bytes of the index, if the path is the prefix of a TensorFlow checkpoint.
        size: its size; None if there is no such file.
        members: the names in a zip archive.
        tensors: name -> dtype, as far as the file could be opened.
        config: what ``config.json`` beside it states.
    """

    path: Path
    names: frozenset[str] = frozenset()
    below: tuple[str, ...] = ()
    head: bytes = b""
    tail: bytes = b""
    index: bytes = b""
    size: int | None = None
    members: tuple[str, ...] = ()
    tensors: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


Test = Callable[[Evidence], bool]


@dataclass(frozen=True)
class Situation:
    """One row of the table.

    Args:
        what: what the user has, for the documentation.
        test: whether a path is in this situation.
        sentence: what it is, and what to do next. The fields of ``_fields`` are filled in.
        command: a command that makes weights of it; its paths are quoted for a shell.
        result: the path that the command writes, which gpt2x reads.
    """

    what: str
    test: Test
    sentence: str
    command: str = ""
    result: str = ""


# ----------------------------------------------------------------------------------------------------- kinds of tests


def _holds(*patterns: str) -> Test:
    """Whether the folder holds a name for each pattern."""
    return lambda seen: all(fnmatch.filter(seen.names, pattern) for pattern in patterns)


def _named(*patterns: str) -> Test:
    """Whether the name of the file matches one of the patterns."""
    return lambda seen: any(fnmatch.fnmatch(seen.path.name, pattern) for pattern in patterns)


def _begins(*beginnings: bytes) -> Test:
    """Whether the file begins with one of these bytes."""
    return lambda seen: seen.head.startswith(beginnings)


def _has_tensor(*endings: str) -> Test:
    """Whether there is a tensor for each of these ends of names."""
    return lambda seen: all(any_ends_with(seen.tensors, end) for end in endings)


def _both(*tests: Test) -> Test:
    return lambda seen: all(test(seen) for test in tests)


def _either(*tests: Test) -> Test:
    return lambda seen: any(test(seen) for test in tests)


def _lacks(pattern: str) -> Test:
    """Whether no name beside the file is that of the path in this pattern."""
    return lambda seen: not fnmatch.filter(seen.names, pattern.format(_literal(seen.path.name)))


def _has_beside(pattern: str) -> Test:
    return lambda seen: not _lacks(pattern)(seen)


def _literal(name: str) -> str:
    """A pattern of ``fnmatch`` that matches this name only."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _is_web_page(seen: Evidence) -> bool:
    return seen.head.lstrip()[:64].lower().startswith((b"<!doctype", b"<html", b"<?xml"))


def _is_answer(seen: Evidence) -> bool:
    """Whether it is a short line of text, as a server sends it in place of a file."""
    return seen.size is not None and seen.size <= MAX_ANSWER and seen.head.startswith(ANSWERS)


def _is_json(seen: Evidence) -> bool:
    is_index = seen.path.name.endswith((".index.json", ".weights.json"))
    return seen.path.suffix == ".json" and seen.head.lstrip().startswith(b"{") and not is_index


def _is_v1(seen: Evidence) -> bool:
    """Whether the file ends as a table of LevelDB's does, which a TensorFlow V1 checkpoint is."""
    return seen.tail == sstable.MAGIC.to_bytes(8, "little") and seen.path.suffix != ".index"


def _is_v2_index(seen: Evidence) -> bool:
    """Whether the first entry of the index has no name, and begins with a number: the header of V2, which V1 has not."""
    return seen.index[:2] == b"\0\0" and seen.index[2:3] < b"\x80" and seen.index[3:4] == b"\x08"


def _is_zip(seen: Evidence) -> bool:
    """Whether it is a zip archive, but not one that PyTorch, Keras or NumPy writes."""
    is_torch = any_ends_with(seen.members, ("/data.pkl", "/models/model.json", "/constants.pkl"))
    is_keras = "model.weights.h5" in seen.members
    is_numpy = any_ends_with(seen.members, ".npy")
    return bool(seen.members) and not (is_torch or is_keras or is_numpy)


def _is_ctranslate2(seen: Evidence) -> bool:
    """Whether it begins with a version, and the name of a specification with its length (``WhisperSpec``)."""
    if len(seen.head) < 6:
        return False
    version, length = struct.unpack("<IH", seen.head[:6])
    return 0 < version < 32 and seen.head[6 : 6 + length].rstrip(b"\0").endswith(b"Spec")


def _is_one_shard(seen: Evidence) -> bool:
    return SHARD.match(seen.path.name) is not None


def _architecture(seen: Evidence) -> str:
    """What ``general.architecture`` states, which llama.cpp writes first; empty if that is not known."""
    if not seen.head.startswith(b"GGUF"):
        return ""
    match = re.search(rb"general\.architecture\x08\0\0\0.{8}([a-z0-9_-]+)", seen.head, re.S)
    return match[1].decode() if match else ""


def _is_broken_link(seen: Evidence) -> bool:
    return seen.path.is_symlink() and not seen.path.exists()


def _holds_broken_link(seen: Evidence) -> bool:
    links = (Evidence(seen.path / name) for name in seen.names)
    return any(map(_is_broken_link, links))


def _is_other_pickle(seen: Evidence) -> bool:
    is_pickle = seen.head[:1] == b"\x80" and seen.head[1:2] in (b"\0", b"\1", b"\2", b"\3", b"\4", b"\5")
    return is_pickle and seen.head[2:4] != b"\x8a\x0a"  # torch.save's, before PyTorch 1.6


def _is_float8(seen: Evidence) -> bool:
    return any(dtype.startswith("F8_") for dtype in seen.tensors.values())


def _is_quantized(seen: Evidence) -> bool:
    dtypes = set(seen.tensors.values())
    return bool(dtypes & {"I8", "U8", "I32"}) or _is_float8(seen)


def _has_tensor_like(pattern: str, seen: Evidence) -> bool:
    return any(re.search(pattern, name) for name in seen.tensors)


def _is_scaled(seen: Evidence) -> bool:
    return _has_tensor_like(r"weight_scale|scale_weight|scale_inv|\.scales?$", seen)


def _is_other_activation(seen: Evidence) -> bool:
    activation = seen.config.get("activation_function", ACTIVATIONS[0])
    return seen.config.get("model_type", "gpt2") == "gpt2" and activation not in (*ACTIVATIONS, *SAME_FUNCTION)


def _family(seen: Evidence) -> str:
    """The models that have a tensor of such a name; empty if none is known."""
    for family, pattern in OTHER_NAMES.items():
        if _has_tensor_like(pattern, seen):
            return family
    return ""


# ------------------------------------------------------------------------------------------------------------- tables

# Values of model_type in config.json that people take for GPT-2's.
OTHER_MODELS = frozenset(
    [
        "bart",
        "bert",
        "bloom",
        "codegen",
        "cohere",
        "ctrl",
        "deepseek_v2",
        "deepseek_v3",
        "distilbert",
        "electra",
        "falcon",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "glm",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox",
        "gpt_oss",
        "gptj",
        "granite",
        "internlm2",
        "llama",
        "llama4",
        "mamba",
        "mistral",
        "mixtral",
        "mpt",
        "olmo",
        "olmo2",
        "openai-gpt",
        "opt",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "roberta",
        "stablelm",
        "starcoder2",
        "t5",
        "xglm",
        "xlnet",
        "xlm-roberta",
    ]
)

# The name of a tensor -> the models that have it, as transformers calls them.
OTHER_NAMES = {
    "Llama or a similar model (Mistral, Qwen2, Gemma)": r"layers\.0\.self_attn\.q_proj\.weight$",
    "BERT or a similar model": r"encoder\.layer\.0\.attention\.self\.query\.weight$",
    "GPT-Neo": r"h\.0\.attn\.attention\.q_proj\.weight$",
    "GPT-J": r"h\.0\.attn\.q_proj\.weight$",
    "GPT-NeoX or Pythia": r"(^|gpt_neox\.)layers\.0\.attention\.query_key_value\.weight$",
    "BLOOM or Falcon": r"h\.0\.self_attention\.query_key_value\.weight$",
    "T5": r"encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight$",
    "MPT": r"blocks\.0\.attn\.Wqkv\.weight$",
}

FOLDERS = (
    Situation(
        "an FSDP run: `pytorch_model_fsdp_0/`",
        _holds("pytorch_model_fsdp_0"),
        "weights that FSDP saved in shards",
        "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path}/pytorch_model_fsdp_0 {path}/model.pt",
        "{path}",
    ),
    Situation(
        "a distributed checkpoint of PyTorch: `.metadata`, `__0_0.distcp`",
        _holds(".metadata", "*.distcp"),
        "a distributed checkpoint of PyTorch",
        "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} {path}/model.pt",
        "{path}",
    ),
    Situation(
        "a DeepSpeed ZeRO-3 run: `zero_pp_rank_0_mp_rank_00_model_states.pt`",
        _holds("zero_pp_rank_*_model_states.pt"),
        "a DeepSpeed ZeRO-3 run, whose weights are divided among its ranks",
        "python -m deepspeed.utils.zero_to_fp32 {parent} {parent}/fp32 --tag {name}",
        "{parent}/fp32",
    ),
    Situation(
        "a DeepSpeed run with tensor parallelism: `mp_rank_00_model_states.pt`, `mp_rank_01_model_states.pt`",
        _holds("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"),
        "a DeepSpeed run with tensor parallelism, whose files hold a part of every matrix; save the whole model from the training "
        "script, and pass that file",
    ),
    Situation(
        "a Megatron-LM run: `iter_0005000/mp_rank_00/model_optim_rng.pt`",
        _either(_holds("latest_checkpointed_iteration.txt"), _holds("mp_rank_00"), _holds("model_optim_rng.pt")),
        "a Megatron-LM checkpoint; convert it with checkpoint_reshaping_and_interoperability.py of transformers 4 "
        "(--convert_checkpoint_from_megatron_to_transformers), and pass the folder that it writes",
    ),
    Situation(
        "a checkpoint of Orbax: `_METADATA`, `manifest.ocdbt`",
        _either(_holds("_METADATA"), _holds("manifest.ocdbt"), _holds("_CHECKPOINT_METADATA")),
        "a checkpoint of Orbax (JAX)",
        'python -c \'import sys, os, orbax.checkpoint as o, flax.serialization as f; open(sys.argv[2], "xb")'
        ".write(f.msgpack_serialize(o.PyTreeCheckpointer().restore(os.path.abspath(sys.argv[1]))))' {path} {path}/flax_model.msgpack",
        "{path}",
    ),
    Situation(
        "the steps of Orbax: `1000/_CHECKPOINT_METADATA`",
        lambda seen: _orbax_step(seen) is not None,
        "the checkpoints of a run with Orbax (JAX), one for each step; pass one of them, such as {step}",
    ),
    Situation(
        "a SavedModel without its variables",
        _holds("saved_model.pb"),
        "a SavedModel of TensorFlow without variables/variables.index, which names its tensors; copy the whole folder again",
    ),
    Situation(
        "an OpenVINO model: `openvino_model.xml`, `openvino_model.bin`",
        _holds("openvino_model.xml"),
        f"an OpenVINO model, which is a program with constants; {ORIGIN}",
    ),
    Situation(
        "a Core ML package: `.mlpackage`",
        _either(_named("*.mlpackage"), _holds("*.mlpackage")),
        f"a Core ML model, which is a program with constants; {ORIGIN}",
    ),
    Situation(
        "a TensorRT engine: `rank0.engine`",
        _either(_holds("*.engine"), _holds("*.plan")),
        f"a TensorRT engine, which runs on one kind of GPU only; {ORIGIN}",
    ),
    Situation(
        "a `pytorch_model.bin` that a browser has unpacked: `data.pkl`, `data/`, `version`",
        _holds("data.pkl", "data", "version"),
        "a file of torch.save that was unpacked",
        "cd {parent} && zip -0 -D -X -r {name}.bin {name}",
        "{path}.bin",
    ),
    Situation(
        "a copy of a snapshot of the Hub's cache with broken links",
        _holds_broken_link,
        f"its files are broken symbolic links; {LINKS}",
    ),
    Situation(
        "an interrupted download: `.incomplete`, `.part`, `.crdownload`, `.aria2`",
        _either(_holds("*.incomplete"), _holds("*.part"), _holds("*.crdownload"), _holds("*.aria2")),
        f"an interrupted download; download it again, for example with {DOWNLOAD}",
    ),
    Situation(
        "the Hub's cache with several models: `models--openai-community--gpt2`",
        _holds("models--*"),
        "the Hub's cache, not one model; pass one of its folders, such as {path}/{cached}",
    ),
    Situation(
        "weights one or two folders below",
        lambda seen: bool(seen.below),
        "no weights in this directory, but below it; pass {below}",
    ),
    Situation(
        "a configuration or a tokenizer without weights",
        _either(_holds("config.json"), _holds("tokenizer.json"), _holds("vocab.json"), _holds("hparams.json")),
        "no weights in this directory, only a configuration or a tokenizer; add the file of weights (model.safetensors or "
        f"pytorch_model.bin), or download the model with {DOWNLOAD}",
    ),
)

DOWNLOADS = (
    Situation(
        "a pointer of Git LFS",
        _begins(b"version https://git-lfs"),
        "a Git LFS pointer, not the weights; run 'git lfs pull' in the repository that it comes from",
    ),
    Situation(
        "a web page in place of the file",
        _is_web_page,
        "a web page, not weights; the download fetched the page that shows the file. Download the file itself, for example "
        f"with {DOWNLOAD}",
    ),
    Situation(
        "a server's answer in place of the file: `Entry not found`",
        _is_answer,
        "a server's answer, not weights ({text}); correct the address, or log in with 'hf auth login', and download it again",
    ),
)

FILES = (
    *DOWNLOADS,
    Situation(
        "an empty file",
        lambda seen: seen.size == 0,
        "an empty file; download or copy it again",
    ),
    Situation(
        "a file of zeros",
        lambda seen: len(seen.head) == HEAD and not any(seen.head),
        "a file that begins with zeros, as an interrupted download leaves it; download it again",
    ),
    Situation(
        "the partial file of a download: `.incomplete`, `.part`, `.crdownload`, `.aria2`",
        _named("*.incomplete", "*.part", "*.crdownload", "*.aria2"),
        "the partial file of a download; finish the download, and pass the file that it leaves",
    ),
    Situation(
        "what macOS stores beside a file: `._model.safetensors`",
        _begins(b"\x00\x05\x16\x07"),
        "what macOS stores beside a file, not the file; pass the file without '._' before its name",
    ),
    Situation(
        "an archive of NeMo: `.nemo`",
        _named("*.nemo"),
        f"an archive of NeMo, which has other names and another layout; export it with NeMo to Hugging Face's format, or {ORIGIN}",
    ),
    Situation(
        "a tar archive, or a compressed one (gzip, bzip2, xz, Zstandard, 7z, RAR)",
        _either(_begins(*ARCHIVES), lambda seen: seen.head[257:262] == b"ustar"),
        "a tar or a compressed archive; unpack it first with '{unpack}', and pass what comes out",
    ),
    Situation(
        "one array of NumPy: `.npy`",
        _begins(b"\x93NUMPY"),
        "a single array of NumPy, and a model has many; save all of them by name with safetensors.numpy.save_file, and pass that file",
    ),
    Situation(
        "a zip archive with a model in it",
        _is_zip,
        "a zip archive without PyTorch's data.pkl",
        "python -m zipfile -e {path} {path}.d",
        "{path}.d",
    ),
    Situation(
        "the configuration or the tokenizer: `config.json`",
        _is_json,
        "JSON, not weights; pass the directory that it is in",
    ),
    Situation(
        "a TensorFlow Lite model",
        lambda seen: seen.head[4:8] == b"TFL3",
        f"a TensorFlow Lite model, which is a program and not weights; {ORIGIN}",
    ),
    Situation(
        "the state of an llm.c run",
        _begins(*(number.to_bytes(4, "little") for number in LLMC_STATES)),
        "the state of an llm.c run, not its weights; pass the file of weights, whose magic number is 20240326",
    ),
    Situation(
        "a ggml file from before GGUF: `ggml-model-f16.bin`",
        _begins(b"lmgg", b"fmgg", b"tjgg", b"algg"),
        f"a ggml file from before GGUF; {ORIGIN}",
    ),
    Situation(
        "the state of a training run alone: `optimizer.pt` in a folder without weights",
        lambda seen: bool(TRAINING_STATE.match(seen.path.name)) and not _weights_in(seen.path.parent),
        "the state of a training run, not weights, and no weights are beside it; pass the file of the model, or the folder that "
        "save_pretrained wrote",
    ),
    Situation(
        "the state of a training run: `optimizer.pt`, `scheduler.pt`, `rng_state.pth`, `training_args.bin`",
        lambda seen: bool(TRAINING_STATE.match(seen.path.name)),
        "the state of a training run, not weights; pass its folder, {folder}",
    ),
    Situation(
        "one file of a DeepSpeed ZeRO-3 run",
        _named("*zero_pp_rank_*_states.pt"),
        "one rank's part of a DeepSpeed run; pass its folder, {folder}",
    ),
    Situation(
        "one file of a distributed checkpoint of PyTorch: `__0_0.distcp`",
        _named("*.distcp", ".metadata"),
        "a part of a distributed checkpoint of PyTorch; pass its folder, {folder}",
    ),
    Situation(
        "the data of an ONNX model: `model.onnx_data`",
        _named("*.onnx_data*", "*.onnx.data"),
        "the data of an ONNX model, without the names of its tensors; pass the .onnx file that it belongs to",
    ),
    Situation(
        "one file of an OpenVINO model: `openvino_model.bin`",
        _named("openvino_*.bin", "openvino_*.xml"),
        f"an OpenVINO model, which is a program with constants; {ORIGIN}",
    ),
    Situation(
        "a CTranslate2 model: `model.bin`",
        _is_ctranslate2,
        f"a CTranslate2 model, whose weights are arranged for its own runtime; {ORIGIN}",
    ),
    Situation(
        "a Core ML model: `.mlmodel`",
        _named("*.mlmodel"),
        f"a Core ML model, which is a program with constants; {ORIGIN}",
    ),
    Situation(
        "one file of a TensorRT engine: `rank0.engine`",
        _named("*.engine", "*.plan"),
        f"a TensorRT engine, which runs on one kind of GPU only; {ORIGIN}",
    ),
    Situation(
        "one shard of several: `model-00001-of-00003.safetensors`",
        _is_one_shard,
        "one shard of several, which does not hold the whole model; pass its folder, {folder}",
    ),
    Situation(
        "a GGUF file of another architecture",
        lambda seen: _architecture(seen) not in ("", "gpt2"),
        "a model of the architecture '{architecture}', not 'gpt2'; run it with llama.cpp, for example with "
        "'llama-cli -m {path}'",
    ),
    Situation(
        "a TensorFlow checkpoint without its index: only `model.ckpt.data-00000-of-00001`",
        _both(_lacks("{}.index"), _has_beside("{}.data-*")),
        "{name}.index: no such file. It names the tensors of the checkpoint; copy it from where the data comes "
        "from (OpenAI's: 'gpt2x inspect openai://124M')",
    ),
    Situation(
        "a TensorFlow checkpoint without its data: only `model.ckpt.index`",
        _both(_is_v2_index, _lacks("{}.data-*")),
        "{name}.data-00000-of-00001: no such file. It holds the values of the checkpoint; copy it from where the "
        "index comes from (OpenAI's: 'gpt2x inspect openai://124M')",
    ),
    Situation(
        "a TensorFlow V1 checkpoint",
        _is_v1,
        V1,
    ),
    Situation(
        "a SavedModel of TensorFlow 2 or Keras: `saved_model.pb`, `variables/`",
        _either(_named("saved_model.pb"), lambda seen: seen.path.name == seen.path.parent.name == "variables"),
        "a SavedModel, which stores tensors without GPT-2's names; pass the tf_model.h5 that save_pretrained of transformers 4 "
        f"writes two folders above it, or {ORIGIN}",
    ),
    Situation(
        "a broken symbolic link",
        _is_broken_link,
        f"a broken symbolic link; {LINKS}",
    ),
    Situation(
        "a pickle that torch.save did not write",
        _is_other_pickle,
        "a pickle, but not one of torch.save: refused. Save the tensors with safetensors, and pass that file",
    ),
)

MODELS = (
    Situation(
        "weights quantized by bitsandbytes (8 or 4 bits)",
        _either(_has_tensor(".SCB"), _has_tensor(".quant_map"), _has_tensor(".absmax")),
        f"weights quantized by bitsandbytes, which are rounded; {ORIGIN}",
    ),
    Situation(
        "weights quantized by AWQ",
        lambda seen: _has_tensor(".qweight", ".qzeros")(seen) and not _has_tensor(".g_idx")(seen),
        f"weights quantized by AWQ, which are rounded; {ORIGIN}",
    ),
    Situation(
        "weights quantized by GPTQ",
        _has_tensor(".qweight"),
        f"weights quantized by GPTQ, which are rounded; {ORIGIN}",
    ),
    Situation(
        "weights quantized by optimum-quanto",
        _has_tensor("._data", "._scale"),
        f"weights quantized by optimum-quanto, which are rounded; {ORIGIN}",
    ),
    Situation(
        "weights quantized by PyTorch: `.scale` and `.zero_point` of a layer",
        _has_tensor(".scale", ".zero_point"),
        f"weights quantized by PyTorch (torch.ao), which are rounded; {ORIGIN}",
    ),
    Situation(
        "weights quantized by MLX",
        _has_tensor(".scales", ".biases"),
        "weights quantized by MLX, which are rounded; to write the rounded values in full",
        "python -m mlx_lm convert --hf-path {folder} --mlx-path {folder}/full --dequantize",
        "{folder}/full",
    ),
    Situation(
        "weights in float8 or integers, with scales",
        _both(_is_quantized, _is_scaled),
        f"quantized weights with scales ({{dtypes}}), which are rounded; {ORIGIN}",
    ),
    Situation(
        "weights in float8, without scales",
        _is_float8,
        "weights quantized to float8",
        "python -c 'import sys; from safetensors.torch import load_file, save_file; "
        "save_file({{k: v.float() for k, v in load_file(sys.argv[1]).items()}}, sys.argv[2])' {path} {path}.float32.safetensors",
        "{path}.float32.safetensors",
    ),
    Situation(
        "another model, by its `config.json`",
        lambda seen: str(seen.config.get("model_type")) in OTHER_MODELS,
        "a model of the type '{model_type}', and gpt2x reads GPT-2 only; export it with Optimum: "
        "'optimum-cli export onnx --model {folder} {folder}-onnx'",
    ),
    Situation(
        "another activation function: `activation_function` in `config.json`",
        _is_other_activation,
        "a GPT-2 with the activation function {activation}, and gpt2x supports {activations}; export it with Optimum: "
        "'optimum-cli export onnx --model {folder} {folder}-onnx'",
    ),
    Situation(
        "another model, by the names of its tensors",
        lambda seen: _family(seen) != "",
        "a model of the family {family}, by the names of its tensors, and gpt2x reads GPT-2 only; export it with Optimum: "
        "'optimum-cli export onnx --model {folder} {folder}-onnx'",
    ),
)

SITUATIONS = (*FOLDERS, *FILES, *MODELS)


# -------------------------------------------------------------------------------------------------- consulting the table


def advice_on_folder(path: Path) -> str | None:
    """What a folder without weights is, and what to do next; None if that is not known."""
    return _advice(FOLDERS, Evidence(path, _names_in(path), below=_weights_below(path)))


def advice_on_file(file: File, head: bytes) -> str | None:
    """What an open file is if not weights, and what to do next; None if that is not known."""
    return _advice(FILES, _evidence_of(file, head))


def advice_on_download(file: File, head: bytes) -> str | None:
    """What a failed download left in place of a file; None if it is none."""
    return _advice(DOWNLOADS, _evidence_of(file, head))


@contextlib.contextmanager
def explained(path: Path, container: Container | None = None) -> Iterator[None]:
    """Replace the message of an error by the sentence of the table, if it has one for this path.

    Args:
        path: the file of weights, or the prefix of a TensorFlow checkpoint.
        container: the file, if it could be opened.
    """
    try:
        yield
    # Their messages state the cause, which no row of the table knows better.
    except (ChecksumError, DestinationError, TokenizerError, UnknownHeadsError, UnsafeError):
        raise
    except ConversionError as error:
        # The first bytes of a file that could be opened are those of its format, whatever else they look like.
        seen = Evidence(path) if container else _evidence_on_disk(path)
        advice = _advice(FILES, seen) or _advice(MODELS, _evidence_of_model(path, container))
        if advice is None:
            raise
        raise type(error)(f"{path}: {advice}") from None


def _advice(rows: tuple[Situation, ...], seen: Evidence) -> str | None:
    # The first row that fits is shown, so special cases come before general ones.
    for row in rows:
        if row.test(seen):
            return message(row, seen)
    return None


def message(row: Situation, seen: Evidence) -> str:
    """The sentence of a row for a path, with its command."""
    values = _fields(seen)
    sentence = row.sentence.format_map(values)
    if not row.command:
        return sentence
    command, result = row.command.format_map(values), row.result.format_map(values)
    joint = "run" if sentence.endswith("in full") else "Run"
    stop = "," if joint == "run" else "."
    return f"{sentence}{stop} {joint}\n  {command}\nand pass {result}"


def _fields(seen: Evidence) -> dict[str, str]:
    """What sentences and commands name. Paths are quoted for a shell."""
    path, folder = seen.path, seen.path.parent
    cached = sorted(fnmatch.filter(seen.names, "models--*"))
    paths = {
        "path": path,
        "name": path.name,
        "folder": folder,
        "parent": folder,
        "cached": cached[0] if cached else "",
    }
    words = {
        "below": " or ".join(shlex.quote(str(path / name)) for name in seen.below[:3]),
        "text": repr(seen.head[:60].decode("utf-8", "replace").split("\n")[0]),
        "unpack": _unpack(seen),
        "architecture": _architecture(seen),
        "model_type": str(seen.config.get("model_type")),
        "family": _family(seen),
        "step": shlex.quote(str(_orbax_step(seen))),
        "activation": repr(seen.config.get("activation_function"))[:60],
        "activations": ", ".join(ACTIVATIONS),
        "dtypes": ", ".join(sorted(set(seen.tensors.values())))[:100],
    }
    return {**{key: shlex.quote(str(value)) for key, value in paths.items()}, **words}


def _unpack(seen: Evidence) -> str:
    """The command that unpacks an archive, and keeps it."""
    path = shlex.quote(str(seen.path))
    folder = shlex.quote(str(seen.path.parent))
    is_tar = ".tar" in seen.path.name or seen.path.suffix in (".tgz", ".txz", ".tbz2") or seen.head[257:262] == b"ustar"
    if is_tar:
        return f"tar -xf {path} -C {folder}"
    for beginning, command in ARCHIVES.items():
        if seen.head.startswith(beginning):
            return f"{command} {path}"
    return f"tar -xf {path}"


# ------------------------------------------------------------------------------------------------------------ evidence


def _weights_below(path: Path) -> tuple[str, ...]:
    """The subfolders with weights, one or two levels down, relative to ``path``."""
    found = []
    for pattern in ("*/*", "*/*/*"):
        for file in itertools.islice(path.glob(pattern), MAX_ENTRIES):
            if _is_weights(file.name) and file.is_file():
                found.append(str(file.parent.relative_to(path)))
    return tuple(sorted(set(found)))


def _is_weights(name: str) -> bool:
    """Whether a name is one that weights of a whole model have."""
    if NO_WEIGHTS.match(name) or name.startswith(NO_MODEL):
        return False
    return name in (*WEIGHTS, *OTHERS, *EXPORTED_NAMES) or name.endswith(SUFFIXES)


def _weights_in(folder: Path) -> bool:
    """Whether a folder has weights, or folders in it have."""
    return any(map(_is_weights, _names_in(folder))) or bool(_weights_below(folder))


def _orbax_step(seen: Evidence) -> Path | None:
    """The folder of the newest step, in a folder with steps of Orbax; None if it has none."""
    steps = [seen.path / name for name in seen.names if name.isdecimal() and len(name) < MAX_DIGITS]
    for step in sorted(steps, key=lambda path: int(path.name), reverse=True):
        items = [path for path in (step / "default", step) if any((path / name).exists() for name in ORBAX)]
        if items:
            return items[0]
    return None


def _evidence_of(file: File, head: bytes) -> Evidence:
    tail = file.read(file.size - 8, 8) if file.size >= sstable.FOOTER else b""
    members = _members(file.path) if head.startswith(b"PK") else ()
    return Evidence(file.path, head=head, tail=tail, size=file.size, members=members)


def _names_in(folder: Path) -> frozenset[str]:
    return frozenset(file.name for file in itertools.islice(folder.iterdir(), MAX_ENTRIES))


def _evidence_on_disk(path: Path) -> Evidence:
    names = _names_in(path.parent)
    index = Path(f"{path}.index")
    if path.is_file():
        file = File(path)
        return replace(_evidence_of(file, file.read(0, min(file.size, HEAD))), names=names)
    if index.is_file():
        file = File(index)
        return Evidence(path, names, index=file.read(0, min(file.size, HEAD)))
    return Evidence(path, names)


def _evidence_of_model(path: Path, container: Container | None) -> Evidence:
    if container:
        tensors = {name: tensor.dtype.name for name, tensor in container.tensors.items()}
    else:
        tensors = _safetensors_header(path)
    return Evidence(path, tensors=tensors, config=_config_beside(path))


def _members(path: Path) -> tuple[str, ...]:
    """The first names in a zip archive; empty if it is invalid."""
    try:
        with zipfile.ZipFile(path) as archive:
            return tuple(archive.namelist()[:MAX_MEMBERS])
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error):
        return ()


def _safetensors_header(path: Path) -> dict[str, str]:
    """Name -> dtype of a safetensors file, whatever its dtypes; empty if it is invalid."""
    if not path.is_file():
        return {}
    file = File(path)
    size = struct.unpack("<Q", file.read(0, 8))[0] if file.size > 8 else 0
    if not 2 <= size <= min(MAX_HEADER, file.size - 8):
        return {}
    try:
        header = parse_json(file.read(8, size).rstrip(b" "), str(path))
    except ConversionError:
        return {}
    header.pop("__metadata__", None)
    return {name: str(entry.get("dtype")) for name, entry in header.items() if isinstance(entry, dict)}


def _config_beside(path: Path) -> Mapping[str, Any]:
    """What ``config.json`` states; empty if there is none that is valid."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    if not config.is_file():
        return {}
    try:
        return read_json(config, MAX_CONFIG)
    except ConversionError:
        return {}
