"""``gpt2x verify``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .source import PRECISION, is_remote, local, runnable
from .text import need, printable

if TYPE_CHECKING:
    from ..verify.report import Report


@click.command(short_help="Compare two models: weights, logits and greedy tokens.")
@click.argument("a")
@click.argument("b", required=False)
@click.option(
    "--against", type=click.Choice(["openai-124M"]), help="Compare with a published release by its checksums."
)
@click.option("--text", "text_file", metavar="FILE", help="Text to run both on; by default a scene of Shakespeare's.")
@click.option("--json", "json_file", metavar="FILE", help="Write the report as JSON; - is the terminal.")
@click.option("--report", "html_file", metavar="FILE", help="Write the report as an HTML page with plots.")
@click.option("--force", is_flag=True, help="Replace the files of --json and --report.")
@click.option("--runtime", type=click.Choice(["torch", "onnx"]), help="What to run of a B that has weights and ONNX.")
@click.option(
    "--precision",
    type=PRECISION,
    help="Which ONNX model of B (of A, if B has none): fp32, or else the only one.",
)
@click.option("--rounded", is_flag=True, help="Compare B's weights with A's rounded as B's file holds each (--dtype).")
@click.option("--n-head", type=click.IntRange(min=1), help="Attention heads, where nothing beside the files says it.")
@click.pass_context
def verify(
    ctx: click.Context, a: str, b: str | None, against: str | None, text_file: str | None, json_file: str | None,
    html_file: str | None, force: bool, runtime: str | None, precision: str | None, rounded: bool, n_head: int | None,
) -> None:  # fmt: skip
    """Prove that A and B are the same GPT-2: the same weights, the same logits, the same words.

    \b
      gpt2x verify models/124M gpt2-onnx/ --report report.html
      gpt2x verify models/124M gpt2.safetensors
      gpt2x verify gpt2.safetensors --against openai-124M
      gpt2x verify gpt2.safetensors half.safetensors --rounded
      gpt2x verify gpt2-hf/

    A and B are weights in any format, an ONNX directory or file, TorchScript, or a .pt2 file. Of a directory with
    weights and ONNX, A means the weights and B the ONNX (but A the ONNX where B has none). Weights are compared byte for byte, and need no torch. Then
    both are run: in one pass, step by step, in chunks, batched, padded; ONNX with ORT_ENABLE_ALL, and once as it is
    written (ORT_DISABLE_ALL). Without B, A as gpt2x runs it is compared with
    transformers, or with a float64 reference where that is missing. Exit code 1 when anything differs.
    """
    from converters import open_checkpoint
    from converters.io.publishing import check_free

    from ..runtimes.opening import NAMES, kind_of
    from ..verify import report as parity

    if b and against:
        raise click.UsageError("give B or --against, not both")
    for option, given in (("--runtime", runtime), ("--precision", precision), ("--rounded", rounded)):
        if given and not b:
            raise click.UsageError(f"{option} is about B, which is not given")
    for file in (json_file, html_file):
        if file not in (None, "-"):
            check_free(Path(str(file)), force, directory=False)
    if json_file and json_file == html_file:
        raise click.UsageError("--json and --report cannot write one file")
    if html_file:
        need("matplotlib", extra="verify")  # before the work, not after it
    text = read_text(text_file) if text_file else None
    named = {name: typed for name, typed in (("a", a), ("b", b)) if typed and is_remote(typed)}
    a, b = local(a), runnable(b, runtime, precision) if b else None
    if against:
        report = parity.verify_release(open_checkpoint(a, n_head=n_head))
    elif b:
        report = parity.verify(a, b, text=text, runtime=runtime, n_head=n_head, precision=precision, rounded=rounded)
    else:
        if (kind := kind_of(a)) != "weights" and not Path(a).is_dir():
            raise click.UsageError(f"{a} is {NAMES[kind]}: say what to compare it with")
        report = parity.verify_alone(open_checkpoint(a, n_head=n_head), text)
    report = replace(report, a=named.get("a", report.a), b=named.get("b", report.b))
    show(report, json_file, html_file, force)
    ctx.exit(0 if report.passed else 1)


def read_text(path: str) -> str:
    """The first megabyte of a text."""
    from converters import FormatError
    from converters.io.reading import File

    file = File(Path(path))
    data = b"".join(file.chunks(0, min(file.size, 1 << 20)))
    try:
        return data.decode("utf-8", "strict" if file.size <= len(data) else "ignore")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 at byte {error.start}") from None


def show(report: Report, json_file: str | None, html_file: str | None, force: bool) -> None:
    """The table on the terminal, and the files that are wanted."""
    from converters.io.publishing import new_file

    click.echo(report.to_json() if json_file == "-" else printable(table(report)))
    if json_file not in (None, "-"):
        with new_file(Path(str(json_file)), force) as out:
            out.write((report.to_json() + "\n").encode())
    if html_file:
        from ..verify.report_page import page

        with new_file(Path(html_file), force) as out:
            out.write(page(report).encode())


COLUMNS = {  # metric -> heading and format
    "max_abs_error": ("max err", "9.1e"),
    "mean_abs_error": ("mean err", "9.1e"),
    "max_rel_error": ("max rel", "9.1e"),
    "mean_rel_error": ("mean rel", "9.1e"),
    "kl_divergence": ("KL", "9.1e"),
    "top1_agreement": ("top-1", "7.1%"),
    "top5_agreement": ("top-5", "7.1%"),
    "perplexity": ("perplexity", "10.5g"),
    "perplexity_other": ("other's", "10.5g"),
}


def table(report: Report) -> str:
    """The report for a person: a line a check, the metrics of logits in columns, and below a check what failed."""
    marks = {True: "same", False: "DIFFERENT", None: "-"}
    lines, headed = [f"{report.a} against {report.b}"], False
    for check in report.checks:
        measured = "max_abs_error" in check.details
        mark = "near tie" if check.details.get("near_tie") else marks[check.passed]
        if check.passed and check.details.get("inexact"):
            mark = "in bounds"
        if measured and not headed:
            lines.append(" " * 29 + " ".join(f"{head:>{int(form.split('.')[0])}}" for head, form in COLUMNS.values()))
            headed = True
        text = _metrics(check.details) if measured else check.result
        lines.append(f"  {check.name:<15} {mark:<10} {text}".rstrip())
        lines += [f"    {failure}" for failure in check.details.get("failures", [])]
    failed = ", ".join(check.name for check in report.checks if check.passed is False)
    inexact = any(check.details.get("inexact") for check in report.checks)
    passed = "Within the bounds of its number format." if inexact else "The same."
    verdict = passed if report.passed else f"DIFFERENT: {failed}." if failed else "Nothing was compared."
    return "\n".join([*lines, verdict])


def _metrics(details: Mapping[str, Any]) -> str:
    return " ".join(
        format(details[name], form) if details[name] is not None else " " * int(form.split(".")[0])
        for name, (_, form) in COLUMNS.items()
    )
