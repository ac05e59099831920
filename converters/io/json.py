"""Untrusted JSON: no duplicate keys, limited depth and size."""

from __future__ import annotations

import codecs
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FormatError
from .reading import File

MAX_DIGITS, MAX_DEPTH = 1000, 64  # of a number and of a value in JSON
MAX_CONFIG = 1 << 20  # bytes of a configuration, of which real ones have a few thousand


def read_json(path: Path, limit: int = 64 << 20) -> dict[str, Any]:
    """Read a small JSON file that holds an object.

    Raises:
        FormatError: for anything else, also for a byte order mark.
    """
    file = File(path)
    if file.size > limit:
        raise FormatError(f"{path}: {file.size} bytes exceeds the limit of {limit}")
    data = file.read(0, file.size)
    if data.startswith(codecs.BOM_UTF8):  # which transformers does not read, either
        saved, name = shlex.quote(f"{path}.bom"), shlex.quote(str(path))
        raise FormatError(
            f"{path}: a UTF-8 byte order mark before the JSON. Remove it with `mv {name} {saved} && tail -c +4 {saved} > {name}`"
        )
    return parse_json(data, str(path))


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object without duplicate keys.

    Raises:
        FormatError: for anything else.
    """
    value = parse_value(data, where)
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected a JSON object, not {type(value).__name__}")
    return value


def parse_value(data: bytes, where: str) -> Any:
    """Any JSON value, its objects without duplicate keys.

    Raises:
        FormatError: for anything else.
    """
    try:
        # Decoded here, as json.loads would also guess UTF-16 and UTF-32.
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_int=_whole_number)
        if isinstance(value, dict | list):
            _check_depth(value)
    except UnicodeDecodeError as error:
        raise FormatError(f"{where}: not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise FormatError(f"{where}: invalid JSON: a string that is not valid Unicode") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: invalid JSON: {error}") from None
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {key[:100]!r}")
        for text in (key, value):
            if isinstance(text, str):
                text.encode()  # raises for a lone surrogate, which is not valid Unicode
        result[key] = value
    return result


def _whole_number(text: str) -> int:
    if len(text) > MAX_DIGITS:  # Python does not print longer ones
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _check_depth(value: dict[str, Any] | list[Any]) -> None:
    """Refuse values so deep that Python can read them, but neither compare nor print them."""
    level = [value]
    for _ in range(MAX_DEPTH):
        parts = (x.values() if isinstance(x, dict) else x for x in level)
        level = [x for part in parts for x in part if isinstance(x, dict | list)]
        if not level:
            return
    raise ValueError(f"values are nested more than {MAX_DEPTH} deep")


def to_json(value: Mapping[str, Any]) -> bytes:
    """A JSON file for people to read: indented, keys sorted."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
