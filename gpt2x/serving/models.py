"""The models that a server has, by name."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from ..tasks import GENERATION
from ..tokenizer import Tokenizer
from .chat import ChatTemplate
from .embedder import Embedder
from .engine import Engine
from .faults import ServingError
from .token_text import TokenTexts
from .worker import Worker

EMBEDDINGS = "feature-extraction"


@dataclass
class ServedModel(ABC):
    """A model, and what is known of it.

    Attributes:
        name: what clients call it.
        tokenizer: its tokenizer.
        created: when it was opened.
        task: what it was exported for.
    """

    name: str
    tokenizer: Tokenizer
    created: int = field(default_factory=lambda: int(time.time()), kw_only=True)
    task: ClassVar[str]

    @property
    @abstractmethod
    def worker(self) -> Worker:
        """What runs it."""

    @property
    @abstractmethod
    def context(self) -> int:
        """Tokens of a text with its prompt, at most."""

    @property
    @abstractmethod
    def n_vocab(self) -> int:
        """The size of the vocabulary."""

    @property
    @abstractmethod
    def precision(self) -> str:
        """How its weights are stored."""


@dataclass
class TextModel(ServedModel):
    """A model that continues texts.

    Attributes:
        engine: runs it.
        end_tokens: the tokens that end a text.
        chat: its chat template, if it has one.
    """

    engine: Engine
    end_tokens: tuple[int, ...]
    chat: ChatTemplate | None = None
    task: ClassVar[str] = GENERATION

    def __post_init__(self) -> None:
        self.token_texts = TokenTexts(self.tokenizer)

    @property
    def worker(self) -> Worker:
        return self.engine

    @property
    def context(self) -> int:
        return self.engine.plan.context

    @property
    def n_vocab(self) -> int:
        return self.engine.decoder.n_vocab

    @property
    def precision(self) -> str:
        return self.engine.decoder.precision


@dataclass
class EmbeddingModel(ServedModel):
    """A model that computes embeddings of texts.

    Attributes:
        embedder: runs it.
        max_context: tokens of a text, at most; None for the model's context.
    """

    embedder: Embedder
    max_context: int | None = None
    task: ClassVar[str] = EMBEDDINGS

    @property
    def worker(self) -> Worker:
        return self.embedder

    @property
    def context(self) -> int:
        most = self.embedder.model.config.n_ctx
        return min(self.max_context or most, most)

    @property
    def n_vocab(self) -> int:
        return self.embedder.model.config.n_vocab

    @property
    def precision(self) -> str:
        return self.embedder.model.precision


Kind = TypeVar("Kind", bound=ServedModel)


class Models:
    """All models of a server. The first that fits is used where a request names none.

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

    def text_model(self, name: str | None) -> TextModel:
        """The model of a name, which continues texts.

        Raises:
            ServingError: if there is none, or it was exported for another task.
        """
        return self._of_kind(name, TextModel)

    def embedding_model(self, name: str | None) -> EmbeddingModel:
        """The model of a name, which computes embeddings.

        Raises:
            ServingError: if there is none, or it was exported for another task.
        """
        return self._of_kind(name, EmbeddingModel)

    def _of_kind(self, name: str | None, kind: type[Kind]) -> Kind:
        fitting = [model for model in self if isinstance(model, kind)]
        if name is None and fitting:
            return fitting[0]
        found = self.find(name)
        if not isinstance(found, kind):
            raise ServingError(
                "not_exported",
                f"{found.name} was exported for {found.task}, and this path needs {kind.task}: name another model, or "
                f"serve one of gpt2x export --task {kind.task}",
                "model",
            )
        return found

    @property
    def alive(self) -> bool:
        """Whether every model runs."""
        return all(model.worker.alive for model in self)

    @property
    def ready(self) -> bool:
        """Whether every model takes requests."""
        return all(model.worker.ready for model in self)

    def close(self) -> None:
        """Close every engine, and then the decoders, whose memory several of them may share."""
        self._resources.close()
