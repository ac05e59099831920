"""``gpt2x verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from gpt2x.parity import Report


@click.command()
@click.argument("a")
@click.argument("b", required=False)
@click.option(
    "--against", type=click.Choice(["openai-124M"]), help="Compare with a published release by its checksums."
)
@click.option("--json", "json_file", metavar="FILE", help="Write the report as JSON; - is the terminal.")
@click.option("--force", is_flag=True, help="Replace the FILE of --json.")
@click.option("--n-head", type=click.IntRange(min=1), help="Attention heads, where nothing beside the files says it.")
@click.pass_context
def verify(
    ctx: click.Context,
    a: str,
    b: str | None,
    against: str | None,
    json_file: str | None,
    force: bool,
    n_head: int | None,
) -> None:
    """Prove that A and B are the same GPT-2: the same weights, the same logits, the same words.

    \b
      gpt2x verify models/124M gpt2.safetensors
      gpt2x verify gpt2.safetensors --against openai-124M
      gpt2x verify gpt2-hf/

    Weights are compared byte for byte, and need no torch. Logits and greedy words are compared where torch is
    installed. Without B, A as gpt2x runs it is compared with transformers, or with a float64 reference where that is
    missing. Exit code 1 when anything differs.
    """
    from converters import open_checkpoint
    from converters.files import check_free
    from gpt2x.parity import verify_alone, verify_checkpoints, verify_release

    if b and against:
        raise click.UsageError("give B or --against, not both")
    if json_file not in (None, "-"):
        check_free(Path(str(json_file)), force, directory=False)
    first = open_checkpoint(a, n_head=n_head)
    if against:
        report = verify_release(first)
    elif b:
        report = verify_checkpoints(first, open_checkpoint(b, n_head=n_head))
    else:
        report = verify_alone(first)
    show(report, json_file, force)
    ctx.exit(0 if report.passed else 1)


def show(report: Report, json_file: str | None, force: bool) -> None:
    """The table on the terminal, the JSON where it is wanted."""
    from converters.files import new_file

    if json_file == "-":
        click.echo(report.to_json())
        return
    marks = {True: "same", False: "DIFFERENT", None: "-"}
    click.echo(f"{report.a} against {report.b}")
    for check in report.checks:
        mark = "near tie" if check.details.get("near_tie") else marks[check.passed]
        click.echo(f"  {check.name:<14} {mark:<10} {check.result}")
    if json_file:
        with new_file(Path(json_file), force) as out:
            out.write((report.to_json() + "\n").encode())
