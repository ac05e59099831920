"""``hf://``: one model of the Hugging Face Hub, through huggingface_hub and into its cache.

Of a repository only the configuration, the tokenizer and one kind of weights are downloaded. Which server is asked, as
whom, where the files are kept and whether there is a network at all is that library's business: ``HF_ENDPOINT``,
``HF_TOKEN``, ``HF_HOME``, ``HF_HUB_OFFLINE``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from converters import ConversionError, UnsafeError
from converters.formats import OTHERS, WEIGHTS
from converters.io.json import read_json
from converters.io.publishing import writing

from .. import contract
from .._version import __version__
from ..precisions import PRECISIONS
from .common import SCHEMES, Want, Warn, cache_home

PART = r"[A-Za-z0-9_][A-Za-z0-9._+-]*"
PATH = rf"{PART}(?:/{PART})*"
ADDRESS = re.compile(rf"(?P<repo>{PART}/{PART})(?:@(?P<revision>(?:refs/(?:pr|convert)/)?{PART}))?(?:/(?P<path>{PATH}))?/?")  # fmt: skip

OURS = "genai_config.json"  # beside every ONNX directory that gpt2x writes

# What belongs to weights: the names that show that a folder has it, and all that is then taken from there.
COMPANIONS = (
    (("config.json", "hparams.json"), ("config.json", "hparams.json")),
    (("generation_config.json",), ("generation_config.json",)),
    (
        ("tokenizer.json", "vocab.json", "encoder.json"),
        ("tokenizer.json", "vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "tokenizer_config.json",
         "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    ),
)  # fmt: skip

# What the library raises, by the names of its classes (which outlast its versions), the special before the general.
REFUSED = {
    "GatedRepoError": "is gated: accept its terms on its page, then log in (hf auth login) or set HF_TOKEN",
    "DisabledRepoError": "has been disabled by the Hub",
    "RepositoryNotFoundError": "no such repository on the Hub, or a private one: check the name, or log in (hf auth login) or set HF_TOKEN",
    "RevisionNotFoundError": "the repository has no such revision: check what is behind the @",
    "EntryNotFoundError": "the Hub lists a file that it does not have; try again later",
}
STATUS = {
    401: "the Hub does not know this login: log in again (hf auth login), or correct or unset HF_TOKEN",
    403: "the Hub does not allow it to this login: check HF_TOKEN, and the terms on the model's page",
    404: "the server does not have it; is HF_ENDPOINT right?",
    429: "the Hub has had too many requests from here: try again later, or log in (hf auth login)",
}
UNREACHABLE = {
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set, so nothing is requested",
    "ProxyError": "the Hub cannot be reached through the proxy",
    "TimeoutException": "the Hub does not answer",
    "Timeout": "the Hub does not answer",
    "ConnectError": "the Hub cannot be reached",
    "TransportError": "the connection to the Hub broke",
    "ConnectionError": "the Hub cannot be reached",
    "LocalEntryNotFoundError": "the Hub cannot be reached",
}


@dataclass(frozen=True)
class Address:
    """A model on the Hub, and the words that it was named by."""

    source: str
    repo: str
    revision: str
    path: str  # of a file or folder; empty for the repository's root


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository: the names of its files, and how to have one on disk."""

    commit: str
    names: frozenset[str]
    get: Callable[[str], Path]
    keep: Callable[[str], None]  # remember, by one file, that this is what the revision means


@dataclass(frozen=True)
class Choice:
    """What is taken of a repository: the files, the folder they belong to ("" or "a/b/"), and which name is opened."""

    folder: str
    files: tuple[str, ...]
    opened: str


def download(source: str, rest: str, want: Want, warn: Warn) -> Path:
    """Have a model of the Hub on disk.

    Raises:
        ConversionError: as ``gpt2x.fetch``.
    """
    address = parse(source, rest)
    snapshot = _snapshot(address, warn)
    choice = _choose(address, snapshot.names, want)
    beside = _companions(snapshot.names, choice.folder)
    got = {name: snapshot.get(name) for name in beside.values()}
    files = [*choice.files, *_shards(address, snapshot, choice)]  # weights last: where they are, all is
    got |= {name: snapshot.get(name) for name in files}
    snapshot.keep(next(iter(got)))
    if choice.opened.endswith(".onnx") or all(name == choice.folder + base for base, name in beside.items()):
        first = next(iter(got))
        return got[first].parents[first.count("/")] / choice.opened
    linked = {name.removeprefix(choice.folder): got[name] for name in files}
    linked |= {base: got[name] for base, name in beside.items()}
    return _linked(address, snapshot.commit, choice.folder, linked) / choice.opened.removeprefix(choice.folder)


def parse(source: str, rest: str) -> Address:
    """The parts of an address, each of plain characters.

    Raises:
        ConversionError: if it is not of the form that it should have.
    """
    match = ADDRESS.fullmatch(rest) if len(rest) <= 400 and ".." not in rest else None
    if match and "--" not in match["repo"]:
        return Address(source, match["repo"], match["revision"] or "main", match["path"] or "")
    hint = " (GPT-2 small is hf://openai-community/gpt2)" if re.fullmatch(r"(distil)?gpt2[a-z-]*/?", rest) else ""
    raise ConversionError(f"{source[:200]}: not the name of a model on the Hub, which is {SCHEMES['hf']}{hint}")


# ----------------------------------------------------------------------------------------------- what is taken


def _choose(address: Address, names: frozenset[str], want: Want) -> Choice:
    if address.path in names:
        return _file(address.path, names)
    if f"{address.path}.index" in names:
        return _tensorflow(address.path, names)
    folder = f"{address.path}/" if address.path else ""
    here = {name.removeprefix(folder) for name in names if name.startswith(folder)}
    if not here:
        raise ConversionError(f"{address.source}: the repository has no {address.path or 'files'}{_some(names)}")
    found = _ONNX_OR_WEIGHTS[want](address, folder, here, names)
    if found is None:
        kind = "ONNX model that gpt2x reads" if want == "onnx" else "weights under a name that gpt2x looks for"
        advice = "export one: gpt2x export SRC --onnx DIR" if want == "onnx" else f"name a file: {_base(address)}/FILE"
        raise ConversionError(f"{address.source}: no {kind}; {advice}{_some(here)}")
    return found


def _either(address: Address, folder: str, here: set[str], names: frozenset[str]) -> Choice | None:
    ours = _onnx(address, folder, here, names) if OURS in here else None
    return ours or _weights(address, folder, here, names)


def _weights_or_onnx(address: Address, folder: str, here: set[str], names: frozenset[str]) -> Choice | None:
    """Weights, or else the float32 model of an export: the others hold rounded weights, which are not converted."""
    found, model = _weights(address, folder, here, names), contract.model_file()
    if found or OURS not in here or model not in here:
        return found
    return Choice(folder, _file(folder + model, names).files, folder)


def _weights(address: Address, folder: str, here: set[str], names: frozenset[str]) -> Choice | None:
    if name := next((name for name in WEIGHTS if name in here), None):
        return Choice(folder, (folder + name,), folder)
    direct = sorted(name for name in here if "/" not in name and re.fullmatch(PART, name))
    prefixes = [name.removesuffix(".index") for name in direct if name.endswith(".index")]
    prefixes = [p for p in prefixes if _data_files(folder + p, names)]
    if prefix := _one(address, ["model.ckpt"] if "model.ckpt" in prefixes else prefixes):
        return _tensorflow(folder + prefix, names)
    if name := _one(address, [name for name in direct if name.endswith(".gguf")]):
        return _file(folder + name, names)
    name = next((name for name in OTHERS if name in here), None)
    return _file(folder + name, names) if name else None


def _onnx(address: Address, folder: str, here: set[str], names: frozenset[str]) -> Choice | None:
    files = [file for file in map(contract.model_file, PRECISIONS) if file in here]
    parts = tuple(part for file in files for part in _file(folder + file, names).files)
    return Choice(folder, parts, folder) if parts else None


_ONNX_OR_WEIGHTS: dict[Want, Callable[[Address, str, set[str], frozenset[str]], Choice | None]] = {
    "weights": _weights_or_onnx,
    "onnx": _onnx,
    "either": _either,
}


def _file(name: str, names: frozenset[str]) -> Choice:
    """One file that was named, with the files that are parts of it."""
    if prefix := re.fullmatch(r"(.+)\.(?:index|data-\d{5}-of-\d{5})", name):
        return _tensorflow(prefix[1], names)
    folder = name[: name.rfind("/") + 1]
    if not name.endswith(".onnx"):
        return Choice(folder, (name,), name)
    data = {f"{name}_data", f"{name}.data"} | (
        {folder + contract.OLD_WEIGHTS} if name == f"{folder}model.onnx" else set()
    )
    return Choice(re.sub(r"(^|/)onnx/$", r"\1", folder), (name, *sorted(data & names)), name)


def _tensorflow(prefix: str, names: frozenset[str]) -> Choice:
    parts = (f"{prefix}.index", *_data_files(prefix, names))
    return Choice(prefix[: prefix.rfind("/") + 1], tuple(p for p in parts if p in names), prefix)


def _data_files(prefix: str, names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if re.fullmatch(rf"{re.escape(prefix)}\.data-\d{{5}}-of-\d{{5}}", name))


def _one(address: Address, found: list[str]) -> str | None:
    if len(found) > 1:
        raise ConversionError(
            f"{address.source}: several files of weights; name one: {_base(address)}/FILE{_some(found)}"
        )
    return found[0] if found else None


def _base(address: Address) -> str:
    return address.source.rstrip("/")


def _some(names: Iterable[str]) -> str:
    listed = sorted(name[:100] for name in names)
    more = f" and {len(listed) - 10} more" if len(listed) > 10 else ""
    return f" (it has {', '.join(listed[:10])}{more})" if listed else ""


def _shards(address: Address, snapshot: Snapshot, choice: Choice) -> list[str]:
    """The files that a chosen index of shards names.

    Raises:
        UnsafeError: if one is no plain name of a file beside the index.
    """
    if not choice.files[0].endswith(".index.json"):
        return []
    named = read_json(snapshot.get(choice.files[0])).get("weight_map")
    shards = set(named.values()) if isinstance(named, dict) and all(map(_is_text, named.values())) else set()
    if not shards:
        raise ConversionError(f"{address.source}: {choice.files[0]} has no weight_map of names to files")
    for name in sorted(shards):
        if len(name) > 200 or ".." in name or not re.fullmatch(PATH, name) or name.endswith((".json", ".index")):
            raise UnsafeError(f"{address.source}: {choice.files[0]} points to {name[:200]!r}, which is not a file of weights beside it: refused")  # fmt: skip
    if missing := sorted(name for name in shards if choice.folder + name not in snapshot.names):
        raise ConversionError(f"{address.source}: {missing[0]}, which {choice.files[0]} names, is not there")
    return sorted(choice.folder + name for name in shards)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _companions(names: frozenset[str], folder: str) -> dict[str, str]:
    """Base name -> name of what belongs to the weights of a folder: from there, or else from the root."""
    found: dict[str, str] = {}
    for keys, group in COMPANIONS:
        home = folder if any(folder + key in names for key in keys) else ""
        found |= {base: home + base for base in group if home + base in names}
    return found


def _linked(address: Address, commit: str, folder: str, files: Mapping[str, Path]) -> Path:
    """A folder of links in which weights of a subfolder lie beside the configuration of the root."""
    view = cache_home() / "hub" / address.repo.replace("/", "--") / commit / folder
    for name, target in files.items():
        link = view / name
        with writing(link):
            link.parent.mkdir(parents=True, exist_ok=True)
            new = link.with_name(f".{os.urandom(4).hex()}.tmp")
            new.symlink_to(target.absolute())
            os.replace(new, link)
    return view


# ------------------------------------------------------------------------------------------- the Hub, or its cache


def _snapshot(address: Address, warn: Warn) -> Snapshot:
    """The commit that a revision means; where the Hub cannot be reached, the one that the cache has."""
    try:
        return _online(address)
    except _UnreachableError as error:
        cached = _cached(address)
        if cached is None:
            raise ConversionError(
                f"{error}; and the Hub's cache does not have it whole. Is there a network? HF_ENDPOINT names a mirror"
            ) from error
        if not error.wanted:
            warn(f"{error}; what the Hub's cache has of it is used")
        return cached


def _online(address: Address) -> Snapshot:
    import huggingface_hub

    api = huggingface_hub.HfApi(library_name="gpt2x", library_version=__version__)
    with _translated(address):
        info = api.model_info(address.repo, revision=address.revision)
    commit = str(info.sha)
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise ConversionError(f"{address.source}: the server does not answer as the Hub does; check HF_ENDPOINT")

    def get(name: str, revision: str = commit) -> Path:
        with _translated(address):
            return Path(api.hf_hub_download(address.repo, name, revision=revision))

    def keep(name: str) -> None:
        if address.revision != commit:
            with suppress(ConversionError):  # all is there: this is the library's note for when there is no network
                get(name, address.revision)

    return Snapshot(commit, _plain(file.rfilename for file in info.siblings or ()), get, keep)


def _cached(address: Address) -> Snapshot | None:
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(
            address.repo, revision=address.revision, local_files_only=True, allow_patterns=[]
        )
    except Exception:  # whatever kept it from being found, it is not there
        return None
    folder = Path(found)
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return Snapshot(folder.name, _plain(files), folder.joinpath, lambda name: None)


def _plain(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name for name in names if ".." not in name and re.fullmatch(PATH, name))


class _UnreachableError(ConversionError):
    """There is no way to the Hub now; ``wanted`` if that is the user's wish."""

    wanted = False


@contextmanager
def _translated(address: Address) -> Iterator[None]:
    """Turn whatever the library raises into one sentence."""
    try:
        yield
    except (ConversionError, ImportError, MemoryError):
        raise
    except Exception as error:  # three HTTP libraries and a Rust one have been beneath it so far
        raise _explained(address, error) from error


def _explained(address: Address, error: Exception) -> ConversionError:
    kinds = [kind.__name__ for kind in type(error).__mro__]
    status = getattr(getattr(error, "response", None), "status_code", None)
    here = "LocalEntryNotFoundError" in kinds  # which says that the Hub was not even asked
    if not here and (said := next((text for name, text in REFUSED.items() if name in kinds), None)):
        return ConversionError(f"{address.source}: {said}")
    if status in STATUS:
        return ConversionError(f"{address.source}: {STATUS[status]}")
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        where = f"{error.filename}: " if error.filename else "the Hub's cache: "
        return ConversionError(
            f"{address.source}: {where}{os.strerror(error.errno)}; HF_HOME moves the cache elsewhere"
        )
    text = next((text for name, text in UNREACHABLE.items() if name in kinds), None)
    if text or status is not None:
        gone = _UnreachableError(
            f"{address.source}: {text or f'the Hub answers with status {status}; try again later'}"
        )
        gone.wanted = "OfflineModeIsEnabled" in kinds
        return gone
    line = re.sub(r"\w+://\S+", "(an address)", str(error).strip().split("\n")[0])[:200]
    return ConversionError(f"{address.source}: huggingface_hub gave up: {type(error).__name__}: {line}")
