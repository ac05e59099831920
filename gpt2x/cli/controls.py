"""The controls of text generation as options."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from .text import printable

if TYPE_CHECKING:
    from ..generation.config import FileControls


class TokenIds(click.ParamType[tuple[int, ...]]):
    """Token ids, separated by commas."""

    name = "ids"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of token ids such as 50256,198", param, ctx)


class Bias(click.ParamType[tuple[tuple[int, ...], float]]):
    """Token ids and what is added to the logit of the last: 50256=-1.5."""

    name = "ids=bias"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[tuple[int, ...], float]:
        ids, _, bias = value.partition("=")
        try:
            return TokenIds().convert(ids, param, ctx), float(bias)
        except ValueError:
            self.fail(f"{value!r} is not token ids and a bias; write them as 50256=-1.5", param, ctx)


OPTIONS = (
    click.option("--max-new-tokens", type=click.IntRange(min=0), help="Maximum number of new tokens (default: 100)."),
    click.option("--min-new-tokens", type=click.IntRange(min=0), help="Minimum number of new tokens."),
    click.option(
        "--temperature", type=click.FloatRange(min=0), help="Sampling temperature; 0 for greedy decoding (default: 1)."
    ),
    click.option("--top-k", type=click.IntRange(min=0), help="Sample from the K most likely tokens; 0 disables it."),
    click.option("--top-p", type=click.FloatRange(0, 1), help="Nucleus sampling threshold; 1 disables it."),
    click.option(
        "--min-p", type=click.FloatRange(0, 1), help="Minimum probability of a token, as a share of the most likely one's."
    ),
    click.option("--typical-p", type=click.FloatRange(0, 1), help="Locally typical sampling threshold; 1 disables it."),
    click.option("--repetition-penalty", type=float, help="Penalize tokens that already occur; 1 disables it."),
    click.option("--presence-penalty", type=float, help="Subtract this from the logit of each generated token."),
    click.option("--frequency-penalty", type=float, help="Subtract this once for each time it was generated."),
    click.option("--no-repeat-ngram-size", type=click.IntRange(min=0), help="Do not repeat an n-gram of this size; 0 disables it."),
    click.option(
        "--bad-words-ids", type=TokenIds(), multiple=True, help="Token ids that are never generated in a row (repeatable)."
    ),
    click.option("--logit-bias", type=Bias(), multiple=True, help="Add a bias to the logit of a token: 50256=-1.5 (repeatable)."),
    click.option("--stop", "stop_strings", multiple=True, metavar="TEXT", help="Stop string: end before this text (repeatable)."),
    click.option(
        "--stop-token-id", "stop_token_ids", type=click.IntRange(min=0), multiple=True,
        help="Further end token (repeatable).",
    ),
    click.option("--num-beams", type=click.IntRange(min=1), help="Number of beams for beam search."),
    click.option("--length-penalty", type=float, help="Beam search: above 0, longer texts score higher (default: 1)."),
    click.option("--early-stopping/--no-early-stopping", default=None, help="Beam search: end when as many texts as beams are complete."),
    click.option("-n", "--num-return-sequences", type=click.IntRange(min=1), help="Number of texts (default: 1)."),
    click.option("--seed", type=click.IntRange(min=0), help="Random seed, for reproducible text."),
)  # fmt: skip


def controls(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of all controls to a command."""
    # Decorators apply from the last to the first, and help lists options in the order of the source.
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def given_controls(options: dict[str, Any]) -> dict[str, Any]:
    """The controls that options set, by the names of ``GenerationConfig``."""
    given = {name: value for name, value in options.items() if value not in (None, ())}
    if "logit_bias" in given:
        given["sequence_bias"] = dict(given.pop("logit_bias"))
    return given


def show_origin(found: FileControls, given: dict[str, Any]) -> None:
    """Say on standard error which controls ``generation_config.json`` sets, and which of its keys have no effect."""
    merged = found.merged(given)
    used = {name: value for name, value in found.values.items() if merged.get(name) is value}
    shown = ", ".join(f"{name} {_plain(value)}" for name, value in used.items() if name != "eos_token_id")
    if shown:
        click.echo(printable(f"Note: from generation_config.json: {shown}"), err=True)
    if found.unsupported:
        names = ", ".join(found.unsupported)
        click.echo(printable(f"Note: generation_config.json sets {names}, which gpt2x does not support"), err=True)


def _plain(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
