"""What is said on a terminal."""

from __future__ import annotations

import importlib.util

import click


def need(*modules: str, extra: str) -> None:
    """Stop, with the line to type, where a module is missing."""
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        raise click.ClickException(f"this needs {' and '.join(missing)}: pip install 'gpt2x[{extra}]'")


def printable(text: str) -> str:
    """The same text without the control characters that a file may bring to a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
