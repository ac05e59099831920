"""Download models that are named by an ``hf://`` or ``openai://`` address.

    fetch("hf://openai-community/gpt2")     # from the Hugging Face Hub, into huggingface_hub's cache
    fetch("openai://124M")                  # from OpenAI's public bucket, with every checksum verified

Nothing is requested unless such an address is given.
"""

from __future__ import annotations

import re
from pathlib import Path

from converters import ConversionError

from .common import SCHEMES, ProgressBar, Want, Warn, ignore


def fetch(
    source: str | Path, *, want: Want = "weights", progress: ProgressBar | None = None, warn: Warn | None = None
) -> str | Path:
    """Return the local path of a model, which is downloaded first if ``source`` is an address.

    Args:
        source: ``hf://OWNER/NAME[@REVISION][/FILE or folder]``, ``openai://124M``, or a path, which is
            returned unchanged.
        want: "weights"; "onnx", the ONNX models of a repository that gpt2x exported; "either", ONNX if it has some; or
            "adapter", a PEFT adapter.
        progress: called with a number of bytes; returns a context manager, whose value is called with each advance in
            bytes, or is None. (huggingface_hub draws its own bar where stderr is a terminal.)
        warn: called with a sentence for the user.

    Raises:
        ConversionError: if the address is not valid or the download fails; the message says what to do.
        ModuleNotFoundError: if a library of the extra ``hub`` is not installed.
    """
    scheme, rest = split(source)
    if not scheme:
        return source
    if scheme == "hf":
        from . import hub

        return hub.download(str(source), rest, want, warn or ignore)
    if scheme == "openai":
        from . import openai

        if want == "adapter":
            raise ConversionError(f"{source}: has weights, but no adapter")
        if want == "onnx":
            raise ConversionError(f"{source}: has weights, but no ONNX; export it: gpt2x export {source} --onnx DIR")
        return openai.download(str(source), rest, progress, warn or ignore)
    supported = "; ".join(SCHEMES.values())
    raise ConversionError(
        f"{str(source)[:200]}: gpt2x cannot download from {scheme[:20]}:// (supported: {supported}); "
        "download the file yourself and pass its path"
    )


def split(source: str | Path) -> tuple[str, str]:
    """Return the scheme and the rest of an address; for a path, an empty scheme and the path."""
    text = str(source)
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if not match:
        return "", text
    return match[1].lower(), text[match.end() :]
