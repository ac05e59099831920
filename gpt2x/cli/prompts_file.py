"""``gpt2x generate --prompts``: JSON Lines in, JSON Lines out."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from converters import DestinationError

from .text import printable, steps_bar

if TYPE_CHECKING:
    from ..generation.config import GenerationConfig
    from ..generation.many import Done, Job
    from ..runtimes.base import Decoder
    from ..tokenizer import Tokenizer

MAX_LINE = 16 << 20  # bytes


def continue_file(
    decoder: Decoder, tokenizer: Tokenizer, config: GenerationConfig, prompts: Path, output: Path, *, resume: bool,
    batch: int,
) -> None:  # fmt: skip
    """Continue each prompt of a file, in the order of its lines.

    A line that is not a prompt is reported on standard error and skipped. Each line of the result has the keys of its
    prompt's line, and ``line``, ``text`` and ``finish``; with several texts a prompt, ``index``; of beam search, ``score``.

    Raises:
        DestinationError: if the output exists and ``resume`` is false, or belongs to other prompts.
    """
    from ..generation.many import continue_many

    with _opened(output, resume) as file:
        reader = _Prompts(prompts, _lines_done(file, output, prompts, config.num_return_sequences))
        results: dict[int, Done] = {}
        with steps_bar(reader.remaining) as advance:
            for done in continue_many(decoder, tokenizer, reader.jobs(), config, batch):
                results[done.number] = done
                for line in reader.next_complete(results):
                    _write(file, reader, line, results.pop(line))
                    advance(1)
    if reader.skipped:
        click.echo(f"Skipped {reader.skipped} of {reader.remaining} lines, see above.", err=True)


class _Prompts:
    """The lines of a file of prompts, from a line on."""

    def __init__(self, path: Path, done: int) -> None:
        self.path = path
        self.done = done
        self.skipped = 0
        with path.open("rb") as file:
            self.remaining = sum(1 for _ in file) - done
        self.objects: dict[int, dict[str, Any]] = {}  # by line, until its result is written
        self.order: deque[int] = deque()

    def jobs(self) -> Iterator[Job]:
        """A job for each line that is a prompt."""
        from ..generation.many import Job

        with self.path.open("rb") as file:
            for line, data in enumerate(file, 1):
                if line <= self.done:
                    continue
                try:
                    self.objects[line] = _prompt(data)
                except ValueError as error:
                    self.skip(line, str(error))
                    continue
                self.order.append(line)
                yield Job(line, self.objects[line]["prompt"])

    def next_complete(self, results: dict[int, Done]) -> Iterator[int]:
        """The lines whose turn it is to be written."""
        while self.order and self.order[0] in results:
            yield self.order.popleft()

    def skip(self, line: int, reason: str) -> None:
        """Report a line that has no result."""
        self.skipped += 1
        click.echo(printable(f"{self.path}:{line}: {reason}; skipped"), err=True)


def _prompt(data: bytes) -> dict[str, Any]:
    """The object of a line.

    Raises:
        ValueError: if it is not one with a prompt.
    """
    if len(data) > MAX_LINE:
        raise ValueError(f"the line has {len(data)} bytes; the limit is {MAX_LINE}")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(found, dict):
        raise ValueError('not an object such as {"prompt": "..."}')
    if not isinstance(found.get("prompt"), str):
        raise ValueError('no text under the key "prompt"')
    return found


def _write(file: BinaryIO, reader: _Prompts, line: int, done: Done) -> None:
    prompt = reader.objects.pop(line)
    if done.error:
        reader.skip(line, done.error)
    for index, one in enumerate(done.continuations):
        result = {**prompt, "line": line, "text": one.text, "finish": one.finish}
        if len(done.continuations) > 1:
            result["index"] = index
        if one.score is not None:
            result["score"] = one.score
        file.write(json.dumps(result, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
    file.flush()


# ------------------------------------------------------------------------------------------------------------ resume


def _opened(output: Path, resume: bool) -> BinaryIO:
    if not output.exists():
        return output.open("x+b")
    if not resume:
        raise DestinationError(f"{output} exists: pass --resume to continue it, or another --output")
    return output.open("r+b")


def _lines_done(file: BinaryIO, output: Path, prompts: Path, texts: int) -> int:
    """The last line of the prompts that has all its results. What was written after them is removed.

    Raises:
        DestinationError: if the output does not hold results of these prompts.
    """
    groups = [_Group(0, "")]
    offset = 0
    for data in file:
        if not data.endswith(b"\n"):
            break
        try:
            result = _prompt(data)
            line = int(result["line"])
        except (ValueError, KeyError, TypeError):
            raise DestinationError(f"{output} does not hold results of gpt2x generate; pass another --output") from None
        offset += len(data)
        if line != groups[-1].line:
            groups = [groups[-1], _Group(line, result["prompt"])]
        groups[-1].texts += 1
        groups[-1].end = offset
    # Beam search may find fewer texts than asked for; then the last line is computed again.
    complete = groups[-1] if groups[-1].texts >= texts else groups[0]
    file.truncate(complete.end)
    file.seek(complete.end)
    if complete.line:
        _check_same(output, prompts, complete)
    return complete.line


@dataclass
class _Group:
    """The results of one line of the prompts."""

    line: int
    prompt: str
    texts: int = 0
    end: int = 0  # where they end in the file


def _check_same(output: Path, prompts: Path, group: _Group) -> None:
    with prompts.open("rb") as file:
        data = next(islice(file, group.line - 1, None), b"")
    try:
        same = _prompt(data)["prompt"] == group.prompt
    except ValueError:
        same = False
    if not same:
        raise DestinationError(
            f"{output}: its line {group.line} continues another prompt than {prompts}; pass the same --prompts, or another "
            "--output"
        )
