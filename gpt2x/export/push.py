"""Upload a directory that ``gpt2x export`` wrote to the Hugging Face Hub, through huggingface_hub.

    check_push("me/gpt2-onnx")                      # before the export: would the upload be accepted?
    push(Path("gpt2-onnx"), "me/gpt2-onnx")         # after it: a new repository with one commit

The server and the login are huggingface_hub's matters: ``HF_ENDPOINT``, ``HF_TOKEN``, ``hf auth login``.
"""

from __future__ import annotations

import logging
import os
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

# Uploaded besides ``onnx/``: the card, configuration and tokenizer, and weights under Hugging Face's file names.
FILES = ("README.md", "LICENSE", "genai_config.json", *(name for _, names in COMPANIONS for name in names))
WEIGHTS = r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
UPLOADED = re.compile("|".join([*map(re.escape, FILES), WEIGHTS]))

BAD_NAME = (
    "not a valid repository name, which is OWNER/NAME, each of at most 96 letters, digits, '-', '_' and '.', "
    "without '--' and '..', and not ending in .git"
)
NO_LOGIN = "uploading needs a login: log in (hf auth login) or set HF_TOKEN"
READ_ONLY = "this login can only read: log in (hf auth login) with a token that can write, or set HF_TOKEN to one"
EXISTS = "already exists on the Hub, and gpt2x uploads to new repositories only: choose another name"
NO_XET = "cannot connect to the Hub's storage of large files (Xet): set HF_HUB_DISABLE_XET=1 to upload without it"

# What a status means for an upload, where that differs from a download.
WRITE_STATUS = {
    403: "this login cannot create or change the repository: check OWNER, and that HF_TOKEN has write access there",
    409: EXISTS,
}


def check_push(name: str) -> None:
    """Check that ``push`` would be accepted. Nothing is written, neither here nor on the Hub.

    Raises:
        DestinationError: if the name is not valid or is taken, if there is no login or the Hub rejects it, or if
            the Hub cannot be reached; the message says what to do.
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
    """Create a repository, upload a directory as one commit, and return the repository's URL.

    Only the files of a model are uploaded: ``onnx/``, the card, configuration, tokenizer and weights. Symbolic links
    are followed within the directory only.

    Raises:
        DestinationError: as ``check_push``, or if a file cannot be uploaded, or the upload fails; the message says
            whether the repository exists now, and how to continue.
        ModuleNotFoundError: if huggingface_hub is not installed.
    """
    _check_name(name)
    files = _files(directory)
    api = _api(name)
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(path_in_repo=file, path_or_fileobj=path) for file, path in files.items()]
    complete = f"{directory} is complete. Upload it with: hf upload"
    where = shlex.quote(str(directory))
    with _quiet():
        with _translated(name, f"Nothing was uploaded; {complete} OWNER/NAME {where}"):
            url = str(api.create_repo(name))
        with _translated(name, f"The repository exists now, and may be empty or incomplete; {complete} {name} {where}"):
            api.create_commit(name, operations, commit_message=f"Upload the ONNX export of gpt2x {__version__}")
    return url


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name) or "--" in name or ".." in name or name.endswith(".git"):
        raise DestinationError(f"{name[:200]}: {BAD_NAME}")


def _api(name: str) -> huggingface_hub.HfApi:
    """The Hub's library, with the user's login."""
    import huggingface_hub

    with _translated(name):
        token = huggingface_hub.get_token()
    if token is None:
        raise DestinationError(f"{name}: {NO_LOGIN}")
    # An HTTP library would show a token with other characters in its error.
    if not re.fullmatch(r"[!-~]+", token):
        raise DestinationError(f"{name}: {STATUS[401]}")
    return huggingface_hub.HfApi(token=token, library_name="gpt2x", library_version=__version__)


def _check_rights(name: str, user: Mapping[str, Any]) -> None:
    """Refuse a login that cannot write to a repository, as far as the Hub says so.

    It does not say what a fine-grained login can write to.
    """
    role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise DestinationError(f"{name}: {READ_ONLY}")
    login = str(user.get("name"))
    owners = [login, *(str(organization.get("name")) for organization in user.get("orgs") or ())]
    owner, _, repository = name.partition("/")
    if owner in owners:
        return
    # The Hub finds a repository whatever its capital letters are, but accepts uploads under the exact name only.
    for known in owners:
        if known.lower() == owner.lower():
            raise DestinationError(f"{name}: the owner's name on the Hub is {known}: use {known}/{repository}")
    if role == "write":
        raise DestinationError(
            f"{name}: {owner} does not belong to this login: use its own name, {login}, or one of its organizations"
        )


def _files(directory: Path) -> dict[str, Path]:
    """Return name in the repository -> path of the files to upload. Other files stay private."""
    home = directory.resolve()
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if not _is_uploaded(name):
            continue
        if path.is_symlink():
            _check_link(path, home)
        if path.is_file():
            _check_file(path, name)
            found[name.as_posix()] = path
    if not found:
        raise DestinationError(f"{directory}: no files to upload")
    return found


def _is_uploaded(name: Path) -> bool:
    if len(name.parts) == 1 and UPLOADED.fullmatch(name.name):
        return True
    hidden = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
    return name.parts[0] == "onnx" and not hidden


def _check_link(path: Path, home: Path) -> None:
    if not path.exists():
        fault = "a broken link"
    elif path.is_dir():
        fault = "a link to a folder"
    elif not path.resolve().is_relative_to(home):
        fault = f"a link to a file outside of the directory, {path.resolve()}"
    else:
        return
    raise DestinationError(f"{path}: {fault}, which is not uploaded: replace it by a copy, or remove it")


def _check_file(path: Path, name: Path) -> None:
    if not str(name).isprintable():
        raise DestinationError(f"{path}: the name has characters that are not printable: rename it")
    if not os.access(path, os.R_OK):
        raise DestinationError(f"{path}: no permission to read it: change its permissions (chmod u+r)")


@contextmanager
def _translated(name: str, situation: str = "") -> Iterator[None]:
    """Turn any exception of huggingface_hub into one sentence, followed by one on the situation now."""
    try:
        yield
    except (ConversionError, ImportError, MemoryError):
        raise
    except Exception as error:
        fault = _fault(name, error)
        raise DestinationError(f"{fault}. {situation}" if situation else fault) from error


def _fault(name: str, error: Exception) -> str:
    cause = _cause(error)
    status = getattr(getattr(cause, "response", None), "status_code", None)
    # The storage of large files uses the statuses with other meanings.
    known = STATUS | WRITE_STATUS if cause is error else {}
    if status in WRITE_STATUS and status in known:
        return f"{name}: {WRITE_STATUS[status]}"
    if status is not None and 400 <= status < 500 and status not in known:
        return f"{name}: the Hub refuses the upload with status {status}{_server_message(cause)}"
    # Only hf_xet raises ConnectionError itself, and not a subclass.
    if type(cause) is ConnectionError:
        return f"{name}: {NO_XET}"
    known_fault = explained(name, cause)
    if not isinstance(known_fault, UnreachableError) or status is not None:
        return str(known_fault)
    advice = "unset it" if known_fault.intended else "is there a network? HF_ENDPOINT selects a mirror"
    return f"{known_fault}; {advice}"


def _cause(error: Exception) -> Exception:
    """Return the exception of the transfer of a large file, which huggingface_hub wraps; else the exception itself."""
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _server_message(error: Exception) -> str:
    """Return the server's own sentence, without addresses, which can hold signatures."""
    text = " ".join(str(getattr(error, "server_message", None) or "").split())
    text = re.sub(r"\w+://\S+", "(an address)", text)
    return f": {text[:200]}" if text and not text.startswith("<") else ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide progress bars where stderr is no terminal, and notes on retries, whose addresses can hold signatures."""
    from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    user_decided = HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled()
    hide_bars = not (user_decided or sys.stderr.isatty())
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    try:
        if hide_bars:
            disable_progress_bars()
        if level == logging.WARNING:  # its default; any other level is the user's
            logger.setLevel(logging.ERROR)
        yield
    finally:
        logger.setLevel(level)
        if hide_bars:
            enable_progress_bars()
