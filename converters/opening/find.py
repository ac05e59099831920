"""Step 1: find the file of weights that a path stands for, and the directory of its configuration and tokenizer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..adapter_config import lone_adapter
from ..containers.tf_bundle import V1
from ..errors import FormatError
from ..formats import MODELS, OTHERS, SUFFIXES, WEIGHTS
from ..io.json import read_json
from ..io.reading import File, check_name, reading

TF_SUFFIX = r"\.(index|data-\d{5}-of-\d{5})$"
MAX_STATE = 1 << 16  # bytes of the file "checkpoint" that are searched
MAX_NAME = 200


@dataclass(frozen=True)
class Source:
    """What a path stands for.

    Args:
        path: what the user gave.
        weights: the file of weights; of a TensorFlow checkpoint, its prefix.
        is_bundle: whether ``weights`` is the prefix of a TensorFlow checkpoint.
        home: the directory whose configuration and tokenizer belong to the weights.
        is_directory: whether the user gave a directory.
        candidates: every file of the directory that holds weights, by name.
    """

    path: Path
    weights: Path
    is_bundle: bool
    home: Path
    is_directory: bool = False
    candidates: tuple[str, ...] = ()


def find(path: str | Path) -> Source:
    """Find the weights that a path stands for.

    Raises:
        FormatError: if there are none, or several that are equally likely.
        CheckpointError: if it is an adapter without its base.
    """
    if not str(path):
        raise FormatError("the source path is empty")
    if "://" in str(path):
        raise FormatError(f"{path}: a URL, not a path; use gpt2x.fetch to download it")
    path = Path(path)
    check_name(path)
    with reading(path):
        if path.is_dir():
            return _in_directory(path)
        prefix = _prefix_of(path)
        return Source(path, prefix or path, prefix is not None, _home(path))


def _in_directory(path: Path) -> Source:
    candidates = tuple(sorted(file.name for file in path.iterdir() if _holds_weights(file)))
    weights, is_bundle = _weights_in(path)
    return Source(path, weights, is_bundle, path, is_directory=True, candidates=candidates)


def _weights_in(path: Path) -> tuple[Path, bool]:
    """The weights of a directory, and whether they are a TensorFlow checkpoint."""
    for name in WEIGHTS:
        if (path / name).is_file():
            return path / name, False
    prefix = _prefix_in(path)
    if prefix:
        return prefix, True
    for name in (*OTHERS, *MODELS):
        if (path / name).is_file():
            return path / name, False
    return _only_file(path), False


def _only_file(path: Path) -> Path:
    """The one file in a directory that has the suffix of a known format."""
    error = lone_adapter(path)
    if error:
        raise error
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(file.name for file in files[:5])
        raise FormatError(f"{path}: several weight files ({names}); pass one of them")
    looked = ", ".join((*WEIGHTS, "*.index", *OTHERS, *MODELS[:2]))
    raise FormatError(
        f"{path}: no weights in this directory (looked for {looked}, and a single file with one of the suffixes {' '.join(SUFFIXES)})"
    )


# ------------------------------------------------------------------------------------ prefixes of TensorFlow checkpoints


def _prefix_of(path: Path) -> Path | None:
    """The prefix that a path stands for: itself, its ``.index`` or one of its ``.data`` files; else None."""
    name = re.sub(TF_SUFFIX, "", path.name)
    if name in ("", ".", ".."):
        return None
    if name != path.name:
        return path.with_name(name)
    is_prefix = not path.exists() and Path(f"{path}.index").is_file()
    return path if is_prefix else None


def _prefix_in(directory: Path) -> Path | None:
    """The TensorFlow checkpoint in a directory: the one that the file ``checkpoint`` names, else the only one.

    Raises:
        FormatError: if there are several and ``checkpoint`` names none of them, or it names one that is not there.
    """
    found = sorted(file.with_suffix("") for file in directory.glob("*.index") if file.is_file())
    state = directory / "checkpoint"
    named = _named_prefix(state) if state.is_file() else None
    if named in found:
        return named
    if len(found) > 1:
        names = ", ".join(prefix.name for prefix in found)
        raise FormatError(f"{directory}: several checkpoints ({names}); pass the prefix of one of them")
    if named is None:
        return found[0] if found else None
    if found:
        raise FormatError(
            f"{state}: names {named.name!r}, which is not here; pass the prefix {found[0]} to read that one"
        )
    if named.is_file():
        raise FormatError(f"{named}: {V1}")
    raise FormatError(f"{state}: names {named.name!r}, but {named.name}.index is missing")


def _named_prefix(state: Path) -> Path | None:
    """The prefix that the file ``checkpoint`` names. Often it is an absolute path of another machine: its last part counts."""
    file = File(state)
    text = file.read(0, min(file.size, MAX_STATE))
    match = re.search(rb'^[ \t]*model_checkpoint_path:\s*"([^"\n]*)"', text, re.M)
    if not match:
        return None
    name = re.split(r"[/\\]", match[1].decode("utf-8", "replace"))[-1]
    is_valid = name not in ("", ".", "..") and name.isprintable() and len(name) <= MAX_NAME
    return state.with_name(name) if is_valid else None


# ------------------------------------------------------------------------------------------------- beside the weights


def _holds_weights(path: Path) -> bool:
    """Whether a file would be read as weights."""
    is_named = path.name in (*WEIGHTS, *OTHERS) or path.suffix == ".gguf"
    if not is_named or not path.is_file():
        return False
    return not path.name.endswith(".index.json") or _names_several_files(path)


def _names_several_files(index: Path) -> bool:
    """Whether an index names several files. mlx-lm writes one for a single file, which states nothing more."""
    weight_map = read_json(index).get("weight_map")
    return not isinstance(weight_map, dict) or len(set(map(str, weight_map.values()))) > 1


def _home(path: Path) -> Path:
    """The file's own directory; for ``onnx/model.onnx``, the one above, if ``config.json`` is only there."""
    folder = path.parent
    absolute = folder.absolute()
    is_onnx_folder = absolute.name == "onnx" and path.suffix == ".onnx"
    if is_onnx_folder and not (folder / "config.json").is_file() and (absolute.parent / "config.json").is_file():
        return absolute.parent
    return folder
