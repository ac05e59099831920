"""``gpt2x generate``."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .controls import controls, given_controls, show_origin
from .running import PROVIDER, RUNTIME, THREADS, TOKENIZER, Running, open_draft
from .source import RunPrecision, weight_options
from .text import read_text

if TYPE_CHECKING:
    from ..generation.config import GenerationConfig
    from ..generation.guesses import Speculate
    from ..runtimes.base import Decoder
    from ..tokenizer import Tokenizer
    from ..weight_options import WeightOptions


@click.command(short_help="Continue a prompt, or a file of prompts.")
@click.argument("model")
@click.argument("prompt", required=False)
@controls
@click.option(
    "--prompts",
    "prompts_file",
    type=click.Path(),
    help='Continue each line of a JSON Lines file, {"prompt": "..."}. (One prompt from standard input: pass - for PROMPT.)',
)
@click.option("--output", type=click.Path(), help="Write the results of --prompts here, as JSON Lines.")
@click.option("--resume", is_flag=True, help="Continue an --output that was interrupted.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Batch size, with --prompts."
)
@TOKENIZER
@click.option(
    "--prompt-lookup",
    type=click.IntRange(min=1),
    metavar="[N]",
    is_flag=False,
    flag_value=7,
    help="Speculative decoding: guess up to N tokens at a time (default: 7) from n-grams of the text so far.",
)
@click.option(
    "--draft", metavar="MODEL", help="Speculative decoding: guess with a smaller model of the same vocabulary."
)
@RUNTIME
@click.option(
    "--precision",
    type=RunPrecision(),
    help="Precision of the ONNX model (default: fp32, or the only one), or two, such as w8a8+int4: one for prompts, one for decoding.",
)
@THREADS
@PROVIDER
@weight_options("MODEL")
def generate(
    model: str, prompt: str | None, prompts_file: str | None, output: str | None, resume: bool, batch_size: int,
    tokenizer_dir: str | None, prompt_lookup: int | None, draft: str | None, runtime: str | None, precision: str | None,
    threads: int | None, provider: str | None, weights: WeightOptions, **options: Any,
) -> None:  # fmt: skip
    """Continue PROMPT with MODEL: weights in any format, ONNX, TorchScript, or a .pt2 file.

    \b
      gpt2x generate models/124M "In a shocking finding," --top-k 40 --seed 1
      gpt2x generate gpt2-onnx/ "In a shocking finding," --temperature 0 --repetition-penalty 1.2
      gpt2x generate gpt2-onnx/ "Dear" --num-beams 4 --no-repeat-ngram-size 3
      gpt2x generate gpt2-hf/ "In a shocking finding," --adapter lora/
      gpt2x generate gpt2-onnx/ --prompts in.jsonl --output out.jsonl
      gpt2x generate gpt2-xl-onnx/ "In a shocking finding," --draft gpt2-onnx/

    ONNX Runtime runs a directory with an ONNX model, without torch. generation_config.json beside the model sets what no
    option sets.
    """
    _check_use(prompt, prompts_file, output, resume)
    if prompt_lookup and draft:
        raise click.UsageError("pass either --prompt-lookup or --draft")
    given = given_controls(options)
    _check_given(given)  # before a download
    running = Running.of(model, runtime, precision, threads, weights, provider)
    tokenizer = running.tokenizer(tokenizer_dir)  # before the model, which takes longer to open
    config = _config(running, given)
    _check_speculation(config, prompt_lookup, draft)
    text = read_text("-") if prompt == "-" else prompt or ""
    if "no_repeat_ngram_size" in given and not prompts_file:
        _check_ngram_size(config, len(tokenizer.encode(text)))
    decoder = running.open()
    config = replace(
        config, speculate=_speculate(config, prompt_lookup, draft, running, batch_size if prompts_file else 1)
    )
    if prompts_file and output:
        from .prompts_file import continue_file

        continue_file(decoder, tokenizer, config, Path(prompts_file), Path(output), resume=resume, batch=batch_size)
        return
    _print(decoder, tokenizer, config, text)


def _check_use(prompt: str | None, prompts_file: str | None, output: str | None, resume: bool) -> None:
    if (prompt is None) == (prompts_file is None):
        raise click.UsageError("pass either PROMPT or --prompts FILE")
    if (prompts_file is None) != (output is None):
        raise click.UsageError("--prompts and --output go together")
    if prompts_file and not os.path.isfile(prompts_file):
        raise click.FileError(prompts_file, "not a file")
    if resume and not output:
        raise click.UsageError("--resume continues an --output: pass --prompts and --output, too")


def _check_given(given: dict[str, Any]) -> None:
    from ..generation.config import check_given

    try:
        check_given(given)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _check_speculation(config: GenerationConfig, prompt_lookup: int | None, draft: str | None) -> None:
    if config.beams and (prompt_lookup or draft):
        option = "--draft" if draft else "--prompt-lookup"
        raise click.UsageError(f"{option} does not do beam search: leave out {option}, or --num-beams")


def _check_ngram_size(config: GenerationConfig, prompt_length: int) -> None:
    from ..generation.prompts import check_ngram_size

    check_ngram_size(config.sampling, [config.most_tokens(prompt_length)])


def _speculate(
    config: GenerationConfig, prompt_lookup: int | None, draft: str | None, main: Running, batch: int
) -> Speculate | None:
    """Where the guesses of speculative decoding come from; None for none, or where it would have no effect.

    Args:
        main: the model that they are for.
    """
    from ..generation.guesses import Draft, PromptLookup

    if prompt_lookup is None and draft is None:
        return None
    option = "--draft" if draft else "--prompt-lookup"
    if config.num_return_sequences > 1 or batch > 1:
        click.echo(f"Note: {option} works for one text at a time; several are decoded without it", err=True)
        return None
    if draft is None:
        return PromptLookup(prompt_lookup or PromptLookup.guesses)
    return Draft(open_draft(draft, main.threads, main.provider))


def _config(running: Running, given: dict[str, Any]) -> GenerationConfig:
    """The controls of the options, and of ``generation_config.json`` where no option sets them."""
    from ..generation.config import controls_beside

    folder = Path(running.home())
    found = controls_beside(folder if folder.is_dir() else folder.parent)
    try:
        config = found.config(given)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    show_origin(found, given)
    return config


def _print(decoder: Decoder, tokenizer: Tokenizer, config: GenerationConfig, prompt: str) -> None:
    """Print the text while it is generated; of several texts, each when all are complete."""
    from ..generation.generate import continuations, new_generation, stream_text

    if config.beams or config.num_return_sequences > 1:
        (found,) = continuations(decoder, tokenizer, [prompt], config)
        for number, one in enumerate(found, 1):
            if len(found) > 1:
                click.echo(f"--- {number} of {len(found)}" + ("" if one.score is None else f", score {one.score:.4f}"))
            click.echo(prompt + one.text)
        finishes = [one.finish for one in found]
    else:
        generation = new_generation(decoder, tokenizer, [prompt], config)
        for (piece,) in stream_text(generation, tokenizer, [prompt], config.stop_strings):
            click.echo(piece, nl=False)
        click.echo()
        finishes = [finish for finish in generation.finish if finish]
    if "context" in finishes:
        click.echo(f"Stopped: the context of {decoder.n_ctx} tokens is full.", err=True)
