"""The models that a server has, by name."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..tokenizer import Tokenizer
from .chat import ChatTemplate
from .engine import Engine
from .faults import ServingError
from .token_text import TokenTexts


class Embedder(Protocol):
    """A model that an export for feature extraction wrote."""

    def embed(self, prompts: list[list[int]]) -> NDArray[np.float32]:
        """The embedding of each prompt, (n, C)."""
        ...


@dataclass
class ServedModel:
    """A model with its engine, and what is known of it.

    Attributes:
        name: what clients call it.
        engine: runs it.
        tokenizer: its tokenizer.
        end_tokens: the tokens that end a text.
        chat: its chat template, if it has one.
        embedder: for ``/v1/embeddings``, if the directory has such a model.
    """

    name: str
    engine: Engine
    tokenizer: Tokenizer
    end_tokens: tuple[int, ...]
    chat: ChatTemplate | None = None
    embedder: Embedder | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.token_texts = TokenTexts(self.tokenizer)

    @property
    def context(self) -> int:
        """Tokens of a text with its prompt, at most."""
        return self.engine.plan.context

    @property
    def n_vocab(self) -> int:
        """The size of the vocabulary."""
        return self.engine.decoder.n_vocab


class Models:
    """All models of a server. The first is used where a request names none.

    A name with a colon, such as ``gpt2:adapter``, is a name like any other: an adapter is served as a model.

    Args:
        models: all of them; their names differ.
        resources: is closed at the end.
    """

    def __init__(self, models: list[ServedModel], resources: ExitStack) -> None:
        self._models = {model.name: model for model in models}
        self._default = models[0]
        self._resources = resources

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def find(self, name: str | None) -> ServedModel:
        """The model of a name.

        Raises:
            ServingError: if there is none.
        """
        if name is None:
            return self._default
        if name not in self._models:
            known = ", ".join(self._models)
            raise ServingError("model_not_found", f"there is no model {name[:100]!r}; there is {known}", "model")
        return self._models[name]

    @property
    def alive(self) -> bool:
        """Whether every engine runs."""
        return all(model.engine.alive for model in self)

    @property
    def ready(self) -> bool:
        """Whether every engine takes requests."""
        return all(model.engine.ready for model in self)

    def close(self) -> None:
        """Close every engine, and then the decoders, whose memory several of them may share."""
        self._resources.close()
