"""Step 1: find the file of weights that a path stands for, and the directory of its configuration and tokenizer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..containers import tf_bundle
from ..errors import FormatError
from ..formats import MODELS, OTHERS, SUFFIXES, WEIGHTS
from ..io.json import read_json
from ..io.reading import check_name, reading


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

    def unread(self, files: Collection[Path]) -> list[str]:
        """Files with weights in the directory that are not among ``files``."""
        read = {self.weights.name, *(file.name for file in files)}
        return [name for name in self.candidates if name not in read]


def find(path: str | Path) -> Source:
    """Find the weights that a path stands for.

    Raises:
        FormatError: if there are none, or several that are equally likely.
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
        prefix = tf_bundle.prefix_of(path)
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
    prefix = tf_bundle.find_prefix(path)
    if prefix:
        return prefix, True
    for name in (*OTHERS, *MODELS):
        if (path / name).is_file():
            return path / name, False
    return _only_file(path), False


def _only_file(path: Path) -> Path:
    """The one file in a directory that has the suffix of a known format."""
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
