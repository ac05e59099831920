"""``gpt2x score`` on JSON Lines."""

from __future__ import annotations

from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from .jsonl import Lines, Work, lines_done, open_output, write_line
from .text import steps_bar

if TYPE_CHECKING:
    from ..runtimes.base import Decoder
    from ..scoring.score import Score
    from ..tokenizer import Tokenizer

WORK = Work("gpt2x score", "scores", "text", "FILE")


def score_file(
    decoder: Decoder, tokenizer: Tokenizer, texts: Path, output: Path, stride: int | None, *, resume: bool, batch: int
) -> None:
    """Score each text of a file, in the order of its lines.

    A line that has no text is reported on standard error and skipped. Each line of the result has the keys of its text's
    line, ``line``, and those of ``Score``.

    Raises:
        DestinationError: if the output exists and ``resume`` is false, or belongs to other texts.
    """
    with open_output(output, resume) as file:
        lines = Lines(WORK, texts, lines_done(WORK, file, output, texts, 1))
        remaining = lines.texts()
        results: dict[int, Score | str] = {}  # or why a text has no score
        with steps_bar(lines.remaining) as advance:
            while group := list(islice(remaining, batch)):
                results |= _scores(decoder, tokenizer, group, stride)
                for line in lines.next_complete(results):
                    _write(file, lines, line, results.pop(line))
                    advance(1)
                file.flush()
    lines.report()


def _scores(
    decoder: Decoder, tokenizer: Tokenizer, group: list[tuple[int, str]], stride: int | None
) -> dict[int, Score | str]:
    from ..runtimes.base import InputError
    from ..scoring.score import encode_text, score_encoded

    results: dict[int, Score | str] = {}
    valid = {}
    for line, text in group:
        try:
            valid[line] = encode_text(decoder, tokenizer, text)
        except InputError as error:
            results[line] = str(error)
    scores = score_encoded(decoder, list(valid.values()), stride)
    return results | dict(zip(valid, scores, strict=True))


def _write(file: BinaryIO, lines: Lines, line: int, score: Score | str) -> None:
    stated = lines.objects.pop(line)
    if isinstance(score, str):
        lines.skip(line, score)
        return
    values = asdict(score)
    del values["log_probabilities"]
    write_line(file, {**stated, "line": line, **values})
