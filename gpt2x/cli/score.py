"""``gpt2x score``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..precisions import PAIR
from .running import PROVIDER, RUNTIME, THREADS, TOKENIZER, Running
from .source import RunPrecision, weight_options
from .text import printable, read_text

if TYPE_CHECKING:
    from ..runtimes.base import Decoder
    from ..scoring.score import Score
    from ..tokenizer import Tokenizer
    from ..weight_options import WeightOptions


class Precisions(click.ParamType[tuple[str, ...]]):
    """Names of precisions, separated by commas. Pairs of two are refused."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        names = tuple(RunPrecision().convert(name, param, ctx) for name in value.split(","))
        for name in names:
            if PAIR in name:
                from ..scoring.spans import pair_refused

                self.fail(pair_refused(name), param, ctx)
        if len(set(names)) < len(names):
            self.fail(f"{value!r} names a precision twice", param, ctx)
        return names


@dataclass(frozen=True)
class Options:
    """What to open, and how to score."""

    running: Running
    stride: int | None

    def open(self, precision: str | None) -> Decoder:
        """Open the model, if it can score.

        Raises:
            ConversionError: if it cannot be opened.
            InputError: if it returns only the last logits.
        """
        from ..scoring.spans import check_can_score

        decoder = replace(self.running, precision=precision).open()
        check_can_score(decoder)
        return decoder


@click.command(short_help="Log-likelihood and perplexity of a text.")
@click.argument("model")
@click.argument("file", type=click.Path(allow_dash=True))
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    metavar="N",
    help="Stride of the sliding window in tokens (default: half the context).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--tokens",
    "tokens_file",
    type=click.Path(dir_okay=False),
    help="Write each token with its log-probability and the five most likely tokens, as JSON Lines.",
)
@click.option(
    "--output", type=click.Path(dir_okay=False), help="Write the results of a .jsonl FILE here, as JSON Lines."
)
@click.option("--resume", is_flag=True, help="Continue an --output that was interrupted.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Batch size, for a .jsonl FILE."
)
@TOKENIZER
@RUNTIME
@click.option(
    "--precision",
    "precisions",
    type=Precisions(),
    help="Precisions of the ONNX models to run, such as fp32,int8 (default: fp32, or the only one).",
)
@THREADS
@PROVIDER
@weight_options("MODEL")
def score(
    model: str, file: str, stride: int | None, as_json: bool, tokens_file: str | None, output: str | None, resume: bool,
    batch_size: int, tokenizer_dir: str | None, runtime: str | None, precisions: tuple[str, ...] | None,
    threads: int | None, provider: str | None, weights: WeightOptions,
) -> None:  # fmt: skip
    """Print the log-likelihood, perplexity and bits per byte that MODEL gives the text in FILE.

    \b
      gpt2x score models/124M book.txt
      gpt2x score gpt2-onnx/ book.txt --precision fp32,int8
      gpt2x score gpt2-onnx/ book.txt --tokens tokens.jsonl
      gpt2x score gpt2-onnx/ texts.jsonl --output scores.jsonl

    FILE is UTF-8 text, - for standard input, or JSON Lines, each {"text": "..."}. The perplexity is that of a sliding window,
    as transformers' documentation computes it. A smaller --stride gives each token more context and takes longer; the
    default is half the context, as recommended there. With the context length, windows do not overlap. See docs/scoring.md.
    """
    chosen = precisions or (None,)
    _check_use(file, as_json, tokens_file, output, resume, len(chosen))
    text = None if _is_jsonl(file) else _text(file)
    if tokens_file:
        from converters.io.publishing import check_free

        check_free(Path(tokens_file), force=False, directory=False)
    running = Running.of(model, runtime, chosen[0], threads, weights, provider)
    options = Options(running, stride)
    tokenizer = running.tokenizer(tokenizer_dir)
    if text is None:
        assert output
        from .texts_file import score_file

        score_file(
            options.open(chosen[0]), tokenizer, Path(file), Path(output), stride, resume=resume, batch=batch_size
        )
        return
    rows = []
    for decoder in _opened(options, chosen):
        rows.append(
            Row(
                decoder.precision, decoder.runtime, decoder.n_ctx, _score(decoder, tokenizer, text, stride, tokens_file)
            )
        )
    _show(file, stride, rows, as_json)


def _check_use(
    file: str, as_json: bool, tokens_file: str | None, output: str | None, resume: bool, models: int
) -> None:
    if _is_jsonl(file):
        if not output:
            raise click.UsageError("a .jsonl FILE needs --output")
        if as_json or tokens_file or models > 1:
            raise click.UsageError(
                "--json, --tokens and several precisions are for a single text, not for a .jsonl FILE"
            )
        if not Path(file).is_file():
            raise click.FileError(file, "not a file")
    elif output or resume:
        raise click.UsageError("--output and --resume are for a .jsonl FILE")
    if resume and not output:
        raise click.UsageError("--resume continues an --output: pass it, too")
    if tokens_file and models > 1:
        raise click.UsageError("--tokens takes one precision")


def _is_jsonl(file: str) -> bool:
    return file.endswith(".jsonl")


def _text(file: str) -> str:
    """Raises: FormatError: if it is empty or not UTF-8."""
    from converters import FormatError

    text = read_text(file)
    if not text:
        raise FormatError(f"{'standard input' if file == '-' else file}: empty: there is nothing to score")
    return text


def _opened(options: Options, precisions: Sequence[str | None]) -> Iterator[Decoder]:
    """The models of all precisions, one after another. A missing one is reported before the first is opened."""
    from ..contract import has_onnx

    model = options.running.model
    if len(precisions) > 1 and has_onnx(model):
        from ..runtimes.onnx_model import find_model

        for precision in precisions:
            find_model(model, precision)
    for precision in precisions:
        yield options.open(precision)


# ------------------------------------------------------------------------------------------------------------- score


@dataclass(frozen=True)
class Row:
    """The score of one model."""

    precision: str
    runtime: str
    context: int
    score: Score


def _score(decoder: Decoder, tokenizer: Tokenizer, text: str, stride: int | None, tokens_file: str | None) -> Score:
    from ..scoring.score import Tally, encode_text, scored_windows
    from .text import steps_bar
    from .tokens_file import tokens_writer

    encoded = encode_text(decoder, tokenizer, text)
    tally = Tally(decoder, encoded, stride)
    alternatives = 5 if tokens_file else 0
    with tokens_writer(tokens_file, tokenizer, encoded.tokens) as write, steps_bar(len(encoded.tokens)) as advance:
        seen = 0
        for window, found in scored_windows(decoder, encoded.tokens, stride, alternatives):
            tally.add(window, found)
            write(window, found)
            advance(window.end - seen)
            seen = window.end
    return tally.score()


def _show(file: str, stride: int | None, rows: Sequence[Row], as_json: bool) -> None:
    from ..scoring.windows import default_stride

    context = rows[0].context
    used = default_stride(context) if stride is None else stride
    one = rows[0].score
    if used > context:
        click.echo(
            f"Note: the stride of {used} is above the context of {context}: {one.tokens - one.scored} of {one.tokens} tokens "
            "were not scored",
            err=True,
        )
    if as_json:
        click.echo(json.dumps(_as_json(file, used, rows), indent=2))
        return
    click.echo(
        printable(f"{file}: {one.bytes} bytes, {one.tokens} tokens, {one.scored} scored; stride {used} of {context}")
    )
    click.echo(_table(rows))


def _as_json(file: str, stride: int, rows: Sequence[Row]) -> dict[str, Any]:
    results = []
    for row in rows:
        values = asdict(row.score)
        del values["log_probabilities"]
        results.append({"precision": row.precision, "runtime": row.runtime, **values})
    return {"file": file, "context": rows[0].context, "stride": stride, "results": results}


def _table(rows: Sequence[Row]) -> str:
    cells = [("precision", "log-likelihood", "perplexity", "bits per byte")]
    for row in rows:
        one = row.score
        cells.append((row.precision, f"{one.log_likelihood:.4f}", _number(one.perplexity), _number(one.bits_per_byte)))
    lines = []
    for first, *others in cells:
        lines.append(f"{first:<10}" + "".join(f"{cell:>18}" for cell in others))
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
