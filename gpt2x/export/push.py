"""Upload a directory that ``gpt2x export`` wrote to the Hugging Face Hub, through huggingface_hub.

    check_push("me/gpt2-onnx")                      # before the export: could it be uploaded?
    push(Path("gpt2-onnx"), "me/gpt2-onnx")         # after it: a new repository with one commit

Which Hub and which login are that library's business: ``HF_ENDPOINT``, ``HF_TOKEN``, ``hf auth login``.
"""

from __future__ import annotations

import logging
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters import ConversionError, DestinationError

from .._version import __version__
from ..download.hub import COMPANIONS
from ..download.hub_errors import STATUS, UnreachableError, explained

if TYPE_CHECKING:
    import huggingface_hub

SEGMENT = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
NAME = re.compile(rf"{SEGMENT}/{SEGMENT}")

# What is uploaded besides ``onnx/``: the card, configuration and tokenizer, and weights in files of Hugging Face's names.
FILES = ("README.md", "LICENSE", "genai_config.json", *(name for _, names in COMPANIONS for name in names))
KNOWN = re.compile(
    "|".join(map(re.escape, FILES)) + r"|(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
)

BAD_NAME = (
    "not the name of a repository on the Hub, which is OWNER/NAME, each of at most 96 letters, digits, '-', '_' and '.', "
    "without '--' and '..', and not ending in .git"
)
NO_LOGIN = "uploading needs a login: log in (hf auth login) or set HF_TOKEN"
READ_ONLY = "this login may only read: log in (hf auth login) with a token that may write, or set HF_TOKEN to one"
EXISTS = "exists already on the Hub, and gpt2x uploads to new repositories only: choose another name"
NO_XET = "the Hub's storage of large files (Xet) cannot be reached; HF_HUB_DISABLE_XET=1 uploads without it"

# What a status means where something is to be written, instead of what it means to a download.
WRITE_STATUS = {
    403: "this login may not create or change it: check OWNER, and that HF_TOKEN may write there",
    409: EXISTS,
}


def check_push(name: str) -> None:
    """Refuse what ``push`` would have to refuse. Nothing is written, neither here nor on the Hub.

    Raises:
        DestinationError: if the name is not valid or is taken, if nobody is logged in or the Hub refuses the login, or
            if the Hub cannot be reached; the message says what to do.
        ModuleNotFoundError: if huggingface_hub is not installed.
    """
    _check_name(name)
    api = _api(name)
    with _translated(name):
        _check_rights(name, api.whoami())
        exists = api.repo_exists(name)
    if exists:
        raise DestinationError(f"{name}: {EXISTS}")


def push(directory: Path, name: str) -> str:
    """Create a repository, upload what is in a directory as one commit, and return the repository's URL.

    Only what belongs to a model is uploaded: ``onnx/``, the card, configuration, tokenizer and weights. Links are followed
    within the directory only.

    Raises:
        DestinationError: as ``check_push``, or if the upload fails; the message says whether the repository exists now,
            and how to go on.
        ModuleNotFoundError: if huggingface_hub is not installed.
    """
    _check_name(name)
    files = _files(directory)
    api = _api(name)
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(path_in_repo=file, path_or_fileobj=path) for file, path in files.items()]
    whole = f"{directory} is whole. Upload it with: hf upload"
    where = shlex.quote(str(directory))
    with _quiet():
        with _translated(name, f"Nothing was uploaded; {whole} OWNER/NAME {where}"):
            url = str(api.create_repo(name))
        with _translated(name, f"The repository exists now, and may be empty or incomplete; {whole} {name} {where}"):
            api.create_commit(name, operations, commit_message=f"Upload the ONNX export of gpt2x {__version__}")
    return url


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name) or "--" in name or ".." in name or name.endswith(".git"):
        raise DestinationError(f"{name[:200]}: {BAD_NAME}")


def _api(name: str) -> huggingface_hub.HfApi:
    """The Hub's library, with the login that it knows."""
    import huggingface_hub

    with _translated(name):
        token = huggingface_hub.get_token()
    if token is None:
        raise DestinationError(f"{name}: {NO_LOGIN}")
    if not re.fullmatch(r"[!-~]+", token):  # an HTTP library would quote it in its message
        raise DestinationError(f"{name}: {STATUS[401]}")
    return huggingface_hub.HfApi(token=token, library_name="gpt2x", library_version=__version__)


def _check_rights(name: str, user: Mapping[str, Any]) -> None:
    """Refuse a login of which the Hub says that it cannot write there. Of a fine-grained one, only the upload tells."""
    role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise DestinationError(f"{name}: {READ_ONLY}")
    mine, owner = str(user.get("name")), name.split("/")[0]
    owners = {mine.lower(), *(str(org.get("name")).lower() for org in user.get("orgs") or ())}
    if role == "write" and owner.lower() not in owners:
        raise DestinationError(
            f"{name}: {owner} is not this login's: give its own name, {mine}, or one of its organizations"
        )


def _files(directory: Path) -> dict[str, Path]:
    """Name in the repository -> path of what belongs to a model in a directory. Whatever else is there stays private."""
    home = directory.resolve()
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if not (len(name.parts) == 1 and KNOWN.fullmatch(name.name)) and not _in_onnx(name):
            continue
        if path.is_symlink() and not (path.is_file() and path.resolve().is_relative_to(home)):
            raise DestinationError(f"{path}: a link to a folder, or to outside of {directory}: not uploaded; replace it by what it points to")  # fmt: skip
        if path.is_file():
            if not str(name).isprintable():
                raise DestinationError(f"{path}: its name is not printable text, so it is not uploaded; rename it")
            found[name.as_posix()] = path
    if not found:
        raise DestinationError(f"{directory}: no files to upload")
    return found


def _in_onnx(name: Path) -> bool:
    return name.parts[0] == "onnx" and not any(part.startswith(".") or part == "__pycache__" for part in name.parts)


@contextmanager
def _translated(name: str, more: str = "") -> Iterator[None]:
    """Turn whatever the library raises into one sentence, and one more on what there is now."""
    try:
        yield
    except (ConversionError, ImportError, MemoryError):
        raise
    except Exception as error:
        fault = _fault(name, error)
        raise DestinationError(f"{fault}. {more}" if more else fault) from error


def _fault(name: str, error: Exception) -> str:
    cause = error
    while isinstance(cause, RuntimeError) and isinstance(cause.__cause__, Exception):
        cause = cause.__cause__  # the transfer of a large file, which the library wraps
    status = getattr(getattr(cause, "response", None), "status_code", None)
    known = STATUS | WRITE_STATUS if cause is error else {}  # the store of large files means other things by them
    if status in WRITE_STATUS and status in known:
        return f"{name}: {WRITE_STATUS[status]}"
    if status is not None and 400 <= status < 500 and status not in known:
        return f"{name}: the Hub refuses the upload with status {status}{_said(cause)}"
    if type(cause) is ConnectionError:  # the bare class comes from hf_xet alone
        return f"{name}: {NO_XET}"
    explained = explained(name, cause)
    if not isinstance(explained, UnreachableError) or status is not None:
        return str(explained)
    return f"{explained}; " + ("unset it" if explained.intended else "is there a network? HF_ENDPOINT names a mirror")


def _said(error: Exception) -> str:
    """The server's own sentence, without addresses, which can hold signatures."""
    text = " ".join(str(getattr(error, "server_message", None) or "").split())
    text = re.sub(r"\w+://\S+", "(an address)", text)
    return f": {text[:200]}" if text and not text.startswith("<") else ""


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars where stderr is no terminal, and no notes on retries: they quote addresses, which can hold signatures."""
    from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    as_set = HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled()
    without_bars = not (as_set or sys.stderr.isatty())
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    try:
        if without_bars:
            disable_progress_bars()
        if level == logging.WARNING:  # which it is unless the user has set another
            logger.setLevel(logging.ERROR)
        yield
    finally:
        logger.setLevel(level)
        if without_bars:
            enable_progress_bars()
