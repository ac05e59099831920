"""``gpt2x generate --prompts``: JSON Lines in, JSON Lines out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from .jsonl import Lines, Work, lines_done, open_output, write_line
from .text import steps_bar

if TYPE_CHECKING:
    from ..generation.config import GenerationConfig
    from ..generation.many import Done
    from ..runtimes.base import Decoder
    from ..tokenizer import Tokenizer

WORK = Work("gpt2x generate", "continues", "prompt", "--prompts")


def continue_file(
    decoder: Decoder, tokenizer: Tokenizer, config: GenerationConfig, prompts: Path, output: Path, *, resume: bool,
    batch: int,
) -> None:  # fmt: skip
    """Continue each prompt of a file, in the order of its lines.

    A line that is not a prompt is reported on standard error and skipped. Each line of the result has the keys of its
    prompt's line, and ``line``, ``text`` and ``finish``; with several texts a prompt, ``index``; of beam search, ``score``.

    Raises:
        DestinationError: if the output exists and ``resume`` is false, or belongs to other prompts.
        InputError: if a control names a token outside the vocabulary, or n-grams longer than the context.
    """
    from ..generation.generate import end_tokens_of
    from ..generation.many import Job, continue_many
    from ..generation.prompts import check_tokens

    check_tokens(decoder, config.sampling, end_tokens_of(decoder, tokenizer, config))  # before there is an output
    with open_output(output, resume) as file:
        texts = config.num_return_sequences
        done_before = lines_done(WORK, file, output, prompts, texts, fewer=config.beams is not None)
        lines = Lines(WORK, prompts, done_before)
        jobs = (Job(line, prompt) for line, prompt in lines.texts())
        results: dict[int, Done] = {}
        with steps_bar(lines.remaining) as advance:
            for done in continue_many(decoder, tokenizer, jobs, config, batch):
                results[done.number] = done
                for line in lines.next_complete(results):
                    _write(file, lines, line, results.pop(line))
                    advance(1)
    lines.report()


def _write(file: BinaryIO, lines: Lines, line: int, done: Done) -> None:
    prompt = lines.objects.pop(line)
    if done.error:
        lines.skip(line, done.error)
    for index, one in enumerate(done.continuations):
        result = {**prompt, "line": line, "text": one.text, "finish": one.finish}
        if len(done.continuations) > 1:
            result["index"] = index
        if one.score is not None:
            result["score"] = one.score
        write_line(file, result)
    file.flush()
