"""``gpt2x score --tokens``: a line for each token."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converters.io.publishing import Output

    from ..runtimes.base import Ids
    from ..scoring.logits import TokenScores
    from ..scoring.windows import Window
    from ..tokenizer import Tokenizer

    Write = Callable[[Window, TokenScores], None]


@contextmanager
def tokens_writer(path: str | None, tokenizer: Tokenizer, tokens: Ids) -> Iterator[Write]:
    """Yield what writes the tokens of one window after another. The file appears when all are written.

    Raises:
        DestinationError: if the file exists.
    """
    if path is None:
        yield lambda window, found: None
        return
    from converters.io.publishing import new_file

    with new_file(Path(path)) as out:
        lines = _TokenLines(out, tokenizer, tokens)
        yield lines.add
        lines.skip_to(len(tokens))


class _TokenLines:
    def __init__(self, out: Output, tokenizer: Tokenizer, tokens: Ids) -> None:
        self.out = out
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.position = 0

    def add(self, window: Window, found: TokenScores) -> None:
        """Write the tokens up to the end of a window."""
        self.skip_to(window.first)
        assert found.alternatives
        for i, log_probability in enumerate(found.log_probabilities.tolist()):
            ids = found.alternatives.ids[i].tolist()
            others = found.alternatives.log_probabilities[i].tolist()
            top = [{**self._token(token), "log_probability": other} for token, other in zip(ids, others, strict=True)]
            self._write(log_probability, top)

    def skip_to(self, position: int) -> None:
        """Write tokens that were not scored."""
        while self.position < position:
            self._write(None, [])

    def _write(self, log_probability: float | None, top: list[dict[str, Any]]) -> None:
        token = self._token(int(self.tokens[self.position]))
        line = {"position": self.position, **token, "log_probability": log_probability, "top": top}
        self.out.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self.position += 1

    def _token(self, token: int) -> dict[str, Any]:
        return {"id": token, "token": self.tokenizer.decode([token])}
