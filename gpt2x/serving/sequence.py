"""A text that is continued: tokens in, pieces of text and log-probabilities out."""

from __future__ import annotations

import numpy as np

from ..generation.generate import TextPieces
from ..generation.sampling import Chooser
from ..generation.text import TextTokenizer
from ..runtimes.base import Logits
from ..scoring.logits import TokenScores, score_tokens
from .requests import FinishReason, ScoredToken, TextRequest


def random_stream(request: TextRequest, text: int) -> np.random.Generator:
    """The random stream of one text of a request: that of its seed, whatever else runs."""
    return np.random.default_rng(np.random.SeedSequence(request.sampling.seed, spawn_key=(text,)))


class Sequence:
    """One text of a request.

    Args:
        request: the prompt and the controls.
        text: its number among the texts of the prompt.
        tokenizer: the model's.
        context: tokens that fit, with the prompt. A token more may be chosen, as nothing follows it.
    """

    def __init__(self, request: TextRequest, text: int, tokenizer: TextTokenizer, context: int) -> None:
        self.request = request
        self.tokens = list(request.prompt)
        self.finish: FinishReason | None = None
        self.log_probability = 0.0
        self._limit = min(request.max_tokens, context + 1 - len(request.prompt))
        self._choose = Chooser(request.sampling, len(request.prompt), request.end_tokens, random_stream(request, text))
        self._pieces = TextPieces(tokenizer, request.stop_strings)
        self._ready = ""  # text that can be shown
        self._decoded = 0  # characters of the text so far, with those that are held back
        self._shown = 0  # characters that were returned
        self._held: list[ScoredToken] = []
        self._check_length()

    @property
    def new_tokens(self) -> int:
        """How many tokens were generated."""
        return len(self.tokens) - len(self.request.prompt)

    def take(self, logits: Logits) -> None:
        """Choose the next token from the logits (V,) after the last one.

        Raises:
            CheckpointError: if the logits contain NaN or infinity.
            InputError: if the controls rule out every token.
        """
        token = self._choose(self.tokens, logits)
        if token in self.request.end_tokens:
            self.finish = "stop"
            return
        self.tokens.append(token)
        self._held.append(ScoredToken(token, self._decoded, self._score(logits, token)))
        self._ready += self._push(token)
        if self._pieces.stopped:
            self.finish = "stop"
            return
        self._check_length()

    def piece(self) -> tuple[str, tuple[ScoredToken, ...]]:
        """The text that can be shown since the last call, and the tokens that begin in it."""
        text, self._ready = self._ready, ""
        if self.finish:
            text += self._flush()
        self._shown += len(text)
        # At the end, only a stop string is left: its tokens are not shown, and neither is its text.
        everything = self.finish is not None and not self._pieces.stopped
        ready = [token for token in self._held if everything or token.offset < self._shown]
        self._held = self._held[len(ready) :]
        return text, tuple(ready)

    def _push(self, token: int | None) -> str:
        shown = self._pieces.push(token)
        self._decoded = self._shown + len(self._ready) + len(shown) + len(self._pieces.stops.held)
        return shown

    def _flush(self) -> str:
        return "" if self._pieces.stopped else self._push(None)

    def _score(self, logits: Logits, token: int) -> TokenScores | None:
        alternatives = self.request.logprobs
        if alternatives is None:
            return None
        score = score_tokens(logits[None], np.array([token]), alternatives)
        self.log_probability += float(score.log_probabilities[0])
        return score

    def _check_length(self) -> None:
        if self.new_tokens >= self._limit:
            self.finish = "length"
