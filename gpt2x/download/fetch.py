"""``hf://`` and ``openai://``: models that are fetched before they are opened.

    fetch("hf://openai-community/gpt2")     # from the Hugging Face Hub, into that library's own cache
    fetch("openai://124M")                  # from OpenAI's public bucket, every checksum verified

Nothing is requested unless such a name is given.
"""

from __future__ import annotations

import re
from pathlib import Path

from converters import ConversionError

from .common import SCHEMES, Bar, Want, Warn


def fetch(
    source: str | Path, *, want: Want = "weights", progress: Bar | None = None, warn: Warn | None = None
) -> str | Path:
    """The path of a model that may have to be downloaded first; anything but an address is given back unchanged.

    Args:
        source: ``hf://owner/name[@revision][/file or folder]``, ``openai://124M``, or a path.
        want: "either" takes the ONNX of a repository that gpt2x exported, or else weights; "onnx" insists on ONNX.
        progress: makes a bar of so many bytes, a context that gives the function to advance it by, or None. (The
            Hub's library draws its own, where stderr is a terminal.)
        warn: called with a sentence where something is not as usual.

    Raises:
        ConversionError: if the address is not sound, or what it names cannot be had; the message says what to do.
        ModuleNotFoundError: for ``hf://``, where huggingface_hub is not installed.
    """
    scheme, rest = split(source)
    if not scheme:
        return source
    if scheme == "hf":
        from . import hub

        return hub.download(str(source), rest, want, warn or _silent)
    if scheme == "openai":
        from . import openai as bucket

        if want == "onnx":
            raise ConversionError(f"{source}: weights, and no ONNX: gpt2x export {source} --onnx DIR makes it of them")
        return bucket.download(str(source), rest, progress, warn or _silent)
    known = "; ".join(SCHEMES.values())
    raise ConversionError(
        f"{str(source)[:200]}: gpt2x does not fetch {scheme[:20]}:// (known are {known}); download the file, and give its path"
    )


def split(source: str | Path) -> tuple[str, str]:
    """The scheme and the rest of an address; of a path, an empty scheme and the path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", str(source))
    return (match[1].lower(), str(source)[match.end() :]) if match else ("", str(source))


def _silent(sentence: str) -> None:
    pass
