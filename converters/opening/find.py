"""Step 1: find the file of weights that a path stands for, and the directory of its configuration and tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..adapter_config import lone_adapter
from ..containers.shard_index import shard_sets, without_later_parts
from ..containers.tf_bundle import V1
from ..errors import FormatError
from ..formats import FORMATS, MODELS, OTHERS, SUFFIXES, WEIGHTS
from ..io.json import read_json
from ..io.reading import File, check_name, names_of, reading
from .situations import HEAD, NO_WEIGHTS, advice_on_folder

TF_SUFFIX = r"\.(index|data-\d{5}-of-\d{5})$"
MAX_STATE = 1 << 16  # bytes of the file "checkpoint" that are searched
MAX_NAME = 200
CONFIG = "config.json"
MAX_DEPTH = 4  # of folders in folders: a Trainer's output, its checkpoint, DeepSpeed's folder in it
UNUSUAL_SUFFIXES = (".ckpt", ".tar", ".th", "")  # of files that are weights only if their first bytes say so


@dataclass(frozen=True)
class Source:
    """What a path stands for.

    Args:
        path: what the user gave; the folder that was chosen, if there are several in it.
        weights: the file of weights; of a TensorFlow checkpoint, its prefix; of shards without an index, the first.
        is_bundle: whether ``weights`` is the prefix of a TensorFlow checkpoint.
        home: the directory whose configuration and tokenizer belong to the weights.
        is_directory: whether the user gave a directory.
        candidates: every file of the directory that holds weights, by name.
        shards: every shard, in order, if there is no index of them.
        notes: what was chosen, and from what.
    """

    path: Path
    weights: Path
    is_bundle: bool
    home: Path
    is_directory: bool = False
    candidates: tuple[str, ...] = ()
    shards: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def subject(self) -> Path:
        """What a refusal is about: the file of weights, or the folder of its shards."""
        return self.path if self.shards else self.weights


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


def _in_directory(path: Path, depth: int = 0) -> Source:
    """The weights in a directory, or else in the folder of it that training programs and the Hub's cache put them into."""
    found = _weights_in(path)
    if found:
        candidates = tuple(sorted(file.name for file in path.iterdir() if _holds_weights(file)))
        return replace(found, is_directory=True, candidates=candidates)
    chosen = _chosen_folder(path) if depth < MAX_DEPTH else None
    if chosen is None:
        raise _nothing_in(path)
    source = _in_directory(chosen.folder, depth + 1)
    notes = (chosen.note, *source.notes)
    if chosen.is_home:
        return replace(source, notes=notes)
    return replace(source, path=path, home=_home_above(path), candidates=(), notes=notes)


def _home_above(path: Path) -> Path:
    """A folder, or the one that ``save_pretrained(saved_model=True)`` of transformers 4 wrote its ``saved_model/1`` into."""
    above = path.absolute().parent
    if above.name != "saved_model" or (path / CONFIG).is_file() or not (above.parent / CONFIG).is_file():
        return path
    return above.parent


def _weights_in(path: Path) -> Source | None:
    """The weights in a directory itself; None if there are none."""
    # A folder may hold several. Hugging Face's own files count before a checkpoint of TensorFlow, and both before what
    # was made of them for other programs.
    for name in WEIGHTS:
        if (path / name).is_file():
            return Source(path, path / name, False, path)
    prefix = _prefix_in(path)
    if prefix:
        return Source(path, prefix, True, path)
    for name in (*OTHERS, *MODELS):
        if (path / name).is_file():
            return Source(path, path / name, False, path)
    return _shards_in(path) or _only_file(path)


def _shards_in(path: Path) -> Source | None:
    """The shards in a directory that has no index of them.

    Raises:
        FormatError: if one is missing.
    """
    sets = shard_sets(path)
    if not sets:
        return None
    first = next((found for found in sets if not found.missing), sets[0])
    if first.missing:
        names = ", ".join(first.missing[:5])
        count = len(first.missing)
        raise FormatError(
            f"{path}: {count} of {first.count} shards missing ({names}{', ...' if count > 5 else ''}); copy or download them into this folder"
        )
    note = f"{path} has no index of its shards; {first.files[0].name} and the {first.count - 1} after it were read"
    return Source(path, first.files[0], False, path, shards=first.files, notes=(note,))


def _only_file(path: Path) -> Source | None:
    """The one file in a directory that has the suffix of a known format; None if there is none."""
    error = lone_adapter(path)
    if error:
        raise error
    candidates = [file for file in sorted(path.iterdir()) if not NO_WEIGHTS.match(file.name) and file.is_file()]
    files = without_later_parts([file for file in candidates if file.suffix in SUFFIXES])
    if not files:
        files = [file for file in candidates if file.suffix in UNUSUAL_SUFFIXES and _is_recognised(file)]
    if len(files) == 1:
        return Source(path, files[0], False, path)
    if not files:
        return None
    advice = advice_on_folder(path)
    raise FormatError(f"{path}: {advice or f'several weight files ({names_of(files[:5])}); pass one of them'}")


def _is_recognised(path: Path) -> bool:
    """Whether the first bytes of a file tell its format without doubt."""
    file = File(path)
    head = file.read(0, min(file.size, HEAD))
    for entry in FORMATS:
        for opener in entry.openers:
            if not opener.uncertain and opener.matches(head, file.size):
                return True
    return False


def _nothing_in(path: Path) -> FormatError:
    advice = advice_on_folder(path)
    if advice:
        return FormatError(f"{path}: {advice}")
    looked = ", ".join((*WEIGHTS, "*.index", *OTHERS, *MODELS[:2]))
    return FormatError(
        f"{path}: no weights in this directory (looked for {looked}, and a single file with one of the suffixes {' '.join(SUFFIXES)})"
    )


# ---------------------------------------------------------------------------------------------- folders in a folder


@dataclass(frozen=True)
class _Choice:
    """The folder to read in place of another.

    Args:
        folder: the folder.
        note: what was chosen, and from what.
        is_home: whether the configuration and the tokenizer are in it, too; else they are in the folder above.
    """

    folder: Path
    note: str
    is_home: bool = True


def _chosen_folder(path: Path) -> _Choice | None:
    """The folder with the weights, where a known program puts them into a folder of their own; else None."""
    for choose in LAYOUTS:
        choice = choose(path)
        if choice:
            return choice
    return None


def _hub_snapshot(path: Path) -> _Choice | None:
    """The Hub's cache: ``refs/main`` names the folder in ``snapshots`` that is current.

    Raises:
        FormatError: if there are several snapshots, and ``refs/main`` names none of them.
    """
    if not (path / "snapshots").is_dir():
        return None
    snapshots = sorted(folder for folder in (path / "snapshots").iterdir() if folder.is_dir())
    named = _first_line(path / "refs" / "main")
    for folder in snapshots:
        if folder.name == named:
            return _Choice(folder, f"{path}: read snapshots/{named}, which refs/main names")
    if len(snapshots) == 1:
        return _Choice(snapshots[0], f"{path}: read snapshots/{snapshots[0].name}, the only one")
    if not snapshots:
        return None
    names = names_of(snapshots[:5])
    raise FormatError(
        f"{path}: several snapshots ({names}), and refs/main names none of them; pass one, such as {snapshots[0]}"
    )


def _newest_checkpoint(path: Path) -> _Choice | None:
    """The output of transformers' Trainer: ``checkpoint-500``, ``checkpoint-1000``; the highest number is the newest."""
    folders = list(_numbered(path, r"checkpoint-(\d+)$"))
    if not folders:
        return None
    newest = folders[-1]
    note = f"{path}: read {newest.name}"
    if len(folders) > 1:
        others = folders[-2:-5:-1]
        note += f", the newest of {len(folders)}; pass another to read it ({names_of(others)})"
    return _Choice(newest, note)


def _deepspeed_folder(path: Path) -> _Choice | None:
    """A DeepSpeed run: the file ``latest`` names a folder, such as ``global_step100``; else the highest number counts."""
    folders = list(_numbered(path, r"global_step(\d+)$"))
    named = path / (_first_line(path / "latest") or "latest")
    if named.is_dir():
        folders.append(named)
    if not folders:
        return None
    newest = folders[-1]
    note = f"{path}: read the model in {newest.name}; zero_to_fp32.py of DeepSpeed writes the optimizer's own float32 copy of it"
    return _Choice(newest, note, is_home=False)


def _saved_model(path: Path) -> _Choice | None:
    """A SavedModel of TensorFlow keeps its variables in a checkpoint of their own."""
    variables = path / "variables"
    if (variables / "variables.index").is_file():
        return _Choice(variables, f"{path}: read variables/variables", is_home=False)
    return None


LAYOUTS: tuple[Callable[[Path], _Choice | None], ...] = (
    _hub_snapshot,
    _newest_checkpoint,
    _deepspeed_folder,
    _saved_model,
)


def _numbered(path: Path, pattern: str) -> Iterator[Path]:
    """The folders whose names match, by their number."""
    numbers: dict[Path, int] = {}
    for folder in path.iterdir():
        match = re.match(pattern, folder.name)
        if match and folder.is_dir():
            # int() takes long for thousands of digits.
            numbers[folder] = int(match[1][:20])
    yield from sorted(numbers, key=numbers.__getitem__)


def _first_line(path: Path) -> str | None:
    """The name that a small file states; None if there is none, or it is not the name of a file."""
    if not path.is_file():
        return None
    file = File(path)
    name = file.read(0, min(file.size, MAX_NAME)).decode("utf-8", "replace").strip()
    return name if _is_valid_name(name) else None


def _is_valid_name(name: str) -> bool:
    is_inside = name not in ("", ".", "..") and "/" not in name and "\\" not in name
    return is_inside and name.isprintable() and len(name) <= MAX_NAME


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
        raise FormatError(f"{directory}: several checkpoints ({names_of(found)}); pass the prefix of one of them")
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
    return state.with_name(name) if _is_valid_name(name) else None


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
