"""``gpt2x generate``."""

from __future__ import annotations

import os

import click

from .source import PRECISION, runnable


@click.command(short_help="Continue a prompt.")
@click.argument("model")
@click.argument("prompt")
@click.option("--max-new-tokens", type=click.IntRange(min=0), default=100, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=1.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(min=0), default=0, help="Sample from the k likeliest tokens; 0 is off.")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1),
    default=1.0,
    help="Sample from the likeliest tokens that make up p; 1 is off.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Makes the text repeatable.")
@click.option(
    "--tokenizer",
    "tokenizer_dir",
    metavar="DIR",
    help="Where the tokenizer is (a directory, or a GGUF file), if not beside the model.",
)
@click.option(
    "--runtime", type=click.Choice(["torch", "onnx"]), help="What to run of a MODEL that has weights and ONNX."
)
@click.option(
    "--precision",
    type=PRECISION,
    help="Which ONNX model of MODEL: fp32, or else the only one.",
)
@click.option("--n-head", type=click.IntRange(min=1), help="Attention heads, where nothing beside MODEL says it.")
def generate(
    model: str, prompt: str, max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int | None,
    tokenizer_dir: str | None, runtime: str | None, precision: str | None, n_head: int | None,
) -> None:  # fmt: skip
    """Continue PROMPT with MODEL, which is anything that convert reads or export writes.

    \b
      gpt2x generate models/124M "In a shocking finding," --top-k 40 --seed 1
      gpt2x generate gpt2-onnx/ "In a shocking finding," --temperature 0

    A directory with an ONNX model is run by ONNX Runtime, without torch.
    """
    from converters import TokenizerError

    from ..generation.loop import Generation, stream_text
    from ..generation.sampling import Sampling
    from ..runtimes.opening import open_decoder
    from ..tokenizer import Tokenizer

    try:
        sampling = Sampling(temperature, top_k, top_p, seed)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    model = runnable(model, runtime, precision)
    try:
        tokenizer = Tokenizer.from_pretrained(tokenizer_dir or _home(model))  # first: a model takes longer to open
    except TokenizerError:
        if os.path.isdir(model):
            open_decoder(model, runtime, n_head=n_head, precision=precision)  # is there a model at all?
        raise
    decoder = open_decoder(model, runtime, n_head=n_head, precision=precision)
    generation = Generation(decoder, [tokenizer.encode(prompt)], max_new_tokens, sampling, tokenizer.eos_token_id)
    for (piece,) in stream_text(generation, tokenizer, [prompt]):
        click.echo(piece, nl=False)
    click.echo()
    if generation.finish == ["context"]:
        click.echo(f"Stopped: the context of {decoder.n_ctx} tokens is full.", err=True)


def _home(model: str) -> str:
    """Where a model's tokenizer is: for ``onnx/model.onnx``, the directory above."""
    above = os.path.dirname(os.path.dirname(os.path.abspath(model)))
    inside = model.endswith(".onnx") and os.path.basename(os.path.dirname(os.path.abspath(model))) == "onnx"
    return above if inside and os.path.isfile(model) else model
