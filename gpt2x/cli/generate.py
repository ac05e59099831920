"""``gpt2x generate``."""

from __future__ import annotations

import functools
import os

import click

from .source import IGNORE_CONFIG_KEY, PRECISION, runnable


@click.command(short_help="Continue a prompt.")
@click.argument("model")
@click.argument("prompt")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=0),
    default=100,
    show_default=True,
    help="Maximum number of new tokens.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="Sampling temperature; 0 for greedy decoding.",
)
@click.option(
    "--top-k", type=click.IntRange(min=0), default=0, help="Sample from the K likeliest tokens; 0 disables it."
)
@click.option("--top-p", type=click.FloatRange(0, 1), default=1.0, help="Nucleus sampling threshold; 1 disables it.")
@click.option("--seed", type=click.IntRange(min=0), help="Random seed, for reproducible text.")
@click.option(
    "--tokenizer",
    "tokenizer_dir",
    metavar="DIR",
    help="Directory (or GGUF file) with the tokenizer (default: beside the model).",
)
@click.option("--runtime", type=click.Choice(["torch", "onnx"]), help="What to run if MODEL has both weights and ONNX.")
@click.option("--precision", type=PRECISION, help="ONNX model of MODEL to run (default: fp32, or the only one).")
@click.option("--n-head", type=click.IntRange(min=1), help="Attention heads, if no configuration is beside MODEL.")
@IGNORE_CONFIG_KEY
def generate(
    model: str, prompt: str, max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int | None,
    tokenizer_dir: str | None, runtime: str | None, precision: str | None, n_head: int | None,
    ignore_config_keys: tuple[str, ...],
) -> None:  # fmt: skip
    """Continue PROMPT with MODEL: weights in any format, ONNX, TorchScript, or a .pt2 file.

    \b
      gpt2x generate models/124M "In a shocking finding," --top-k 40 --seed 1
      gpt2x generate gpt2-onnx/ "In a shocking finding," --temperature 0

    ONNX Runtime runs a directory with an ONNX model, without torch.
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
    open_it = functools.partial(
        open_decoder, model, runtime, n_head=n_head, precision=precision, ignore_config_keys=ignore_config_keys
    )
    try:
        tokenizer = Tokenizer.from_pretrained(
            tokenizer_dir or _home(model)
        )  # before the model, which takes longer to open
    except TokenizerError:
        if os.path.isdir(model):
            open_it()  # a missing model is the more important error
        raise
    decoder = open_it()
    generation = Generation(decoder, [tokenizer.encode(prompt)], max_new_tokens, sampling, tokenizer.eos_token_id)
    for (piece,) in stream_text(generation, tokenizer, [prompt]):
        click.echo(piece, nl=False)
    click.echo()
    if generation.finish == ["context"]:
        click.echo(f"Stopped: the context of {decoder.n_ctx} tokens is full.", err=True)


def _home(model: str) -> str:
    """The directory of a model's tokenizer: for ``onnx/model.onnx``, the one above ``onnx``."""
    folder = os.path.dirname(os.path.abspath(model))
    inside = model.endswith(".onnx") and os.path.basename(folder) == "onnx"
    if inside and os.path.isfile(model):
        return os.path.dirname(folder)
    return model
