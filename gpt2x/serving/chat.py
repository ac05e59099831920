"""Chat templates of tokenizers, as transformers renders them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters import TokenizerError
from converters.io.json import read_json

from .faults import ServingError

CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
MAX_FILE = 16 << 20
MAX_TEMPLATE = 1 << 18  # characters
MAX_RENDERED = 1 << 20  # characters


class ChatTemplate:
    """A chat template, which runs in Jinja's sandbox: it reads the messages, and nothing else.

    Args:
        source: the template.
        special_tokens: what the template knows as ``bos_token`` and so on.

    Raises:
        TokenizerError: if it is too long, or is no valid template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if len(source) > MAX_TEMPLATE:
            raise TokenizerError(f"the chat template has {len(source)} characters; the limit is {MAX_TEMPLATE}")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        environment.globals["raise_exception"] = _refuse
        self.special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise TokenizerError(f"the chat template is not valid: {error}") from None

    @classmethod
    def beside(cls, folder: Path) -> ChatTemplate | None:
        """The template of the tokenizer in a directory; None if it has none.

        Raises:
            TokenizerError: if it is not valid.
        """
        file = folder / TEMPLATE
        config = read_json(folder / CONFIG, MAX_FILE) if (folder / CONFIG).is_file() else {}
        source = config.get("chat_template")
        if file.is_file():
            with file.open(encoding="utf-8") as opened:
                source = opened.read(MAX_TEMPLATE + 1)
        if isinstance(source, list):
            source = _named(source)
        if not isinstance(source, str):
            return None
        return cls(source, _special_tokens(config))

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt of a conversation.

        Raises:
            ServingError: if the template refuses the messages, or fails.
        """
        parts = []
        length = 0
        try:
            for part in self._template.generate(
                messages=list(messages), add_generation_prompt=True, **self.special_tokens
            ):
                parts.append(part)
                length += len(part)
                if length > MAX_RENDERED:
                    raise ValueError(f"it renders more than {MAX_RENDERED} characters")
        except Exception as error:  # a template fails with anything
            raise ServingError(
                "invalid_chat_template", f"the chat template refuses the messages: {str(error)[:300]}", "messages"
            ) from None
        return "".join(parts)


def _refuse(message: str) -> None:
    raise ValueError(message)


def _named(templates: Sequence[Any]) -> str | None:
    """The template named default, of a list of templates with names."""
    for one in templates:
        if isinstance(one, dict) and one.get("name") == "default" and isinstance(one.get("template"), str):
            return str(one["template"])
    return None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found
