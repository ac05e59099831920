"""``hf://``: download one model of the Hugging Face Hub, through huggingface_hub and into its cache.

Only the configuration, the tokenizer and one kind of weights of a repository are downloaded. The server, the login, the
cache and whether there is a network are huggingface_hub's matters: ``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HOME``,
``HF_HUB_OFFLINE``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from converters import ConversionError, UnsafeError
from converters.adapter_config import CONFIG_FILE, WEIGHT_FILES
from converters.containers.shard_index import GGUF_PART, without_later_parts
from converters.formats import INDEXES, OTHERS, WEIGHTS
from converters.io.json import read_json
from converters.io.publishing import writing
from converters.tokenizer import NAMES as TOKENIZER_FILES
from converters.tokenizer import OTHERS as OTHER_TOKENIZERS
from converters.values import is_list_of

from .. import contract
from .._version import __version__
from ..precisions import PRECISIONS
from .common import SCHEMES, Want, Warn, cache_home
from .hub_errors import UnreachableError, translated

# Names become paths of this machine: only plain characters, and none that hides a file.
PART = r"[A-Za-z0-9_][A-Za-z0-9._+-]*"
PATH = rf"{PART}(?:/{PART})*"
ADDRESS = re.compile(rf"(?P<repo>{PART}/{PART})(?:@(?P<revision>(?:refs/(?:pr|convert)/)?{PART}))?(?:/(?P<path>{PATH}))?/?")  # fmt: skip

OURS = "genai_config.json"  # beside every ONNX directory that gpt2x writes
ADAPTER = re.compile(rf"onnx/{contract.ADAPTER_NAME.pattern}{re.escape(contract.ADAPTER_SUFFIX)}")

# Files that belong to weights, in groups: the names that show that a folder has a group, and all names of the group.
KERAS_TOKENIZER = ("assets/tokenizer/vocabulary.json", "assets/tokenizer/merges.txt")
COMPANIONS = (
    (("config.json", "hparams.json"), ("config.json", "hparams.json")),
    (("generation_config.json",), ("generation_config.json",)),
    (
        ("tokenizer.json", "vocab.json", "encoder.json", *OTHER_TOKENIZERS, *KERAS_TOKENIZER),
        (*TOKENIZER_FILES, *KERAS_TOKENIZER),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Address:
    """The parts of an address: ``hf://REPO@REVISION/PATH``."""

    source: str
    repo: str
    revision: str
    path: str  # of a file or folder; empty for the repository's root


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository: its files, and how to download one."""

    commit: str
    names: frozenset[str]
    get: Callable[[str], Path]
    remember: Callable[[str], None]  # note in the Hub's cache, by way of one file, that the revision is this commit


@dataclass(frozen=True)
class Choice:
    """The weights to download: their folder ("" or "a/b/"), their files, and the name that is then opened."""

    folder: str
    files: tuple[str, ...]
    opened: str


def download(source: str, rest: str, want: Want, warn: Warn) -> Path:
    """Return the local path of a model of the Hub.

    Raises:
        ConversionError: as ``gpt2x.fetch``.
        ModuleNotFoundError: if huggingface_hub is not installed.
    """
    address = parse(source, rest)
    snapshot = _snapshot(address, warn)
    choice = _choose(address, snapshot.names, want)
    companions = _companions(snapshot.names, choice.folder)
    weights = [*choice.files, *_shards(address, snapshot, choice)]
    # The weights come last: where they are, everything is.
    paths = {name: snapshot.get(name) for name in (*companions.values(), *weights)}
    snapshot.remember(next(iter(paths)))
    if choice.opened.endswith(".onnx") or _all_in(choice.folder, companions):
        return _root(paths) / choice.opened
    return _view(address, snapshot.commit, choice, companions, paths)


def parse(source: str, rest: str) -> Address:
    """Return the parts of an address, each of plain characters.

    Raises:
        ConversionError: if the address is not valid.
    """
    plain = len(rest) <= 400 and ".." not in rest
    match = ADDRESS.fullmatch(rest) if plain else None
    if match and "--" not in match["repo"]:
        return Address(source, match["repo"], match["revision"] or "main", match["path"] or "")
    hint = " (GPT-2 small is hf://openai-community/gpt2)" if re.fullmatch(r"(distil)?gpt2[a-z-]*/?", rest) else ""
    raise ConversionError(f"{source[:200]}: not a valid address of a model on the Hub, which is {SCHEMES['hf']}{hint}")


# -------------------------------------------------------------------------------------------- what is downloaded


def _choose(address: Address, names: frozenset[str], want: Want) -> Choice:
    if address.path in names:
        return _file(address.path, names)
    if f"{address.path}.index" in names:
        return _tensorflow(address.path, names)
    folder = f"{address.path}/" if address.path else ""
    here = {name.removeprefix(folder) for name in names if name.startswith(folder)}
    if not here:
        raise ConversionError(f"{address.source}: the repository has no {address.path or 'files'}{_listing(names)}")
    choice = _CHOOSERS[want](address, folder, here, names)
    if choice:
        return choice
    if want == "adapter":
        missing, advice = "PEFT adapter", f"name its folder: {_base(address)}/FOLDER"
    elif want == "onnx":
        missing, advice = "ONNX model that gpt2x reads", "export one: gpt2x export SRC --onnx DIR"
    else:
        missing, advice = "weights under a known file name", f"name a file: {_base(address)}/FILE"
    raise ConversionError(f"{address.source}: no {missing}; {advice}{_listing(here)}")


def _either(address: Address, folder: str, here: set[str], names: frozenset[str]) -> Choice | None:
    ours = _onnx(address, folder, here, names) if OURS in here else None
    return ours or _weights(address, folder, here, names)


def _weights_or_onnx(address: Address, folder: str, here: set[str], names: frozenset[str]) -> Choice | None:
    """Choose weights, or else the float32 model of an export. The weights of its other models are rounded."""
    weights = _weights(address, folder, here, names)
    model = contract.model_file()
    if weights or OURS not in here or model not in here:
        return weights
    return Choice(folder, _file(folder + model, names).files, folder)


def _weights(address: Address, folder: str, here: set[str], names: frozenset[str]) -> Choice | None:
    known = _first(WEIGHTS, here)
    if known:
        return Choice(folder, (folder + known,), folder)
    direct = sorted(name for name in here if "/" not in name and re.fullmatch(PART, name))
    prefix = _tensorflow_prefix(address, folder, direct, names)
    if prefix:
        return _tensorflow(folder + prefix, names)
    files = without_later_parts([Path(name) for name in direct if name.endswith(".gguf")])
    gguf = _only(address, [file.name for file in files])
    other = gguf or _first(OTHERS, here)
    return _file(folder + other, names) if other else None


def _first(names: Iterable[str], here: set[str]) -> str | None:
    return next((name for name in names if name in here), None)


def _tensorflow_prefix(address: Address, folder: str, direct: list[str], names: frozenset[str]) -> str | None:
    indexes = [name.removesuffix(".index") for name in direct if name.endswith(".index")]
    prefixes = [prefix for prefix in indexes if _data_files(folder + prefix, names)]
    return "model.ckpt" if "model.ckpt" in prefixes else _only(address, prefixes)


def _onnx(address: Address, folder: str, here: set[str], names: frozenset[str]) -> Choice | None:
    files: list[str] = []
    for model in map(contract.model_file, PRECISIONS):
        if model in here:
            files += _file(folder + model, names).files
        if contract.lora_file(model) in here:
            files.append(folder + contract.lora_file(model))
    adapters = sorted(name for name in here if ADAPTER.fullmatch(name))
    return Choice(folder, (*files, *(folder + name for name in adapters)), folder) if files else None


def _adapter(address: Address, folder: str, here: set[str], names: frozenset[str]) -> Choice | None:
    weights = _first(WEIGHT_FILES, here)
    if weights is None or CONFIG_FILE not in here:
        return None
    return Choice(folder, (folder + weights, folder + CONFIG_FILE), folder)


_CHOOSERS: dict[Want, Callable[[Address, str, set[str], frozenset[str]], Choice | None]] = {
    "weights": _weights_or_onnx,
    "onnx": _onnx,
    "either": _either,
    "adapter": _adapter,
}


def _file(name: str, names: frozenset[str]) -> Choice:
    """Choose one file, with the files that hold the rest of it."""
    prefix = re.fullmatch(r"(.+)\.(?:index|data-\d{5}-of-\d{5})", name)
    if prefix:
        return _tensorflow(prefix[1], names)
    folder = name[: name.rfind("/") + 1]
    part = GGUF_PART.fullmatch(name)
    if part:
        beside = re.compile(rf"{re.escape(part['stem'])}-\d{{5}}-of-{part['count']}\.gguf")
        return Choice(folder, tuple(sorted(filter(beside.fullmatch, names))), name)
    if not name.endswith(".onnx"):
        return Choice(folder, (name,), name)
    data = {f"{name}_data", f"{name}.data"}
    if name == f"{folder}model.onnx":
        data.add(folder + contract.OLD_WEIGHTS)
    directory = re.sub(r"(^|/)onnx/$", r"\1", folder)
    return Choice(directory, (name, *sorted(data & names)), name)


def _tensorflow(prefix: str, names: frozenset[str]) -> Choice:
    files = (f"{prefix}.index", *_data_files(prefix, names))
    folder = prefix[: prefix.rfind("/") + 1]
    return Choice(folder, tuple(file for file in files if file in names), prefix)


def _data_files(prefix: str, names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if re.fullmatch(rf"{re.escape(prefix)}\.data-\d{{5}}-of-\d{{5}}", name))


def _only(address: Address, found: list[str]) -> str | None:
    if len(found) > 1:
        raise ConversionError(
            f"{address.source}: several weight files; name one: {_base(address)}/FILE{_listing(found)}"
        )
    return found[0] if found else None


def _base(address: Address) -> str:
    return address.source.rstrip("/")


def _listing(names: Iterable[str]) -> str:
    listed = sorted(name[:100] for name in names)
    if not listed:
        return ""
    more = f" and {len(listed) - 10} more" if len(listed) > 10 else ""
    return f" (it has {', '.join(listed[:10])}{more})"


def _shards(address: Address, snapshot: Snapshot, choice: Choice) -> list[str]:
    """Return the files that the chosen index of shards names.

    Raises:
        ConversionError: if the index has no names of files, or one of the files is missing.
        UnsafeError: if a name is not that of a file beside the index.
    """
    index = choice.files[0]
    if not index.endswith((".index.json", *INDEXES)):
        return []
    shards = []
    for name in _shard_names(address, index, read_json(snapshot.get(index)).get("weight_map")):
        if not _is_shard(name):
            raise UnsafeError(f"{address.source}: {index} names {name[:200]!r}, which is not a weight file beside it")
        if choice.folder + name not in snapshot.names:
            raise ConversionError(f"{address.source}: missing {name}, which {index} names")
        shards.append(choice.folder + name)
    return shards


def _shard_names(address: Address, index: str, weight_map: object) -> list[str]:
    values: list[object] = []
    for files in weight_map.values() if isinstance(weight_map, dict) else ():
        values += files if isinstance(files, list) else [files]
    if not values or not is_list_of(values, str):
        raise ConversionError(f"{address.source}: {index} has no weight_map from tensors to files")
    return sorted(set(values))


def _is_shard(name: str) -> bool:
    plain = len(name) <= 200 and ".." not in name and re.fullmatch(PATH, name)
    return bool(plain) and not name.endswith((".json", ".index"))


def _companions(names: frozenset[str], folder: str) -> dict[str, str]:
    """Return base name -> name of the files that belong to a folder's weights, from there or else from the root."""
    found: dict[str, str] = {}
    for keys, group in COMPANIONS:
        home = folder if any(folder + key in names for key in keys) else ""
        found |= {base: home + base for base in group if home + base in names}
    return found


# --------------------------------------------------------------------------------------------------- local paths


def _all_in(folder: str, companions: Mapping[str, str]) -> bool:
    return all(name == folder + base for base, name in companions.items())


def _root(paths: Mapping[str, Path]) -> Path:
    """Return the local folder of a snapshot: that of any of its files, without the parts of its name."""
    name, path = next(iter(paths.items()))
    return path.parents[name.count("/")]


def _view(
    address: Address, commit: str, choice: Choice, companions: Mapping[str, str], paths: Mapping[str, Path]
) -> Path:
    """Make a folder of links, in which the weights of a subfolder lie beside the companions of the root."""
    bases = {name: base for base, name in companions.items()}
    view = cache_home() / "hub" / address.repo.replace("/", "--") / commit / choice.folder
    for name, target in paths.items():
        link = view / bases.get(name, name.removeprefix(choice.folder))
        with writing(link):
            link.parent.mkdir(parents=True, exist_ok=True)
            # Renamed into place, as another process may make the same link, and a link cannot be replaced otherwise.
            new = link.with_name(f".{os.urandom(4).hex()}.tmp")
            new.symlink_to(target.absolute())
            os.replace(new, link)
    return view / choice.opened.removeprefix(choice.folder)


# ------------------------------------------------------------------------------------------- the Hub, or its cache


def _snapshot(address: Address, warn: Warn) -> Snapshot:
    """Return the commit of a revision; where the Hub cannot be reached, the one that is in the cache."""
    try:
        return _online(address)
    except UnreachableError as error:
        cached = _cached(address)
        if cached is None:
            raise ConversionError(
                f"{error}, and the Hub's cache does not have all of it. Is there a network? HF_ENDPOINT selects a mirror"
            ) from error
        if not error.intended:
            warn(f"{error}; using what is in the Hub's cache")
        return cached


def _online(address: Address) -> Snapshot:
    import huggingface_hub

    api = huggingface_hub.HfApi(library_name="gpt2x", library_version=__version__)
    with translated(address.source):
        info = api.model_info(address.repo, revision=address.revision)
    commit = str(info.sha)
    # It becomes the name of a folder in the cache.
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise ConversionError(f"{address.source}: the server's answer is not the Hub's: check HF_ENDPOINT")

    def get(name: str, revision: str = commit) -> Path:
        with translated(address.source):
            return Path(api.hf_hub_download(address.repo, name, revision=revision))

    def remember(name: str) -> None:
        if address.revision == commit:
            return
        # Everything is downloaded. Without this note, it would only not be found when there is no network.
        with suppress(ConversionError):
            get(name, address.revision)

    names = _plain(file.rfilename for file in info.siblings or ())
    return Snapshot(commit, names, get, remember)


def _cached(address: Address) -> Snapshot | None:
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(
            address.repo, revision=address.revision, local_files_only=True, allow_patterns=[]
        )
    except Exception:  # whatever the reason, it is not in the cache
        return None
    folder = Path(found)
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return Snapshot(folder.name, _plain(files), folder.joinpath, lambda name: None)


def _plain(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name for name in names if ".." not in name and re.fullmatch(PATH, name))
