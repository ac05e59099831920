"""``gpt2x verify``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .running import PROVIDER
from .source import RunPrecision, is_remote, local, named_adapter, runnable, weight_options, with_local_adapter
from .text import SAMPLE, need, printable, read_text

if TYPE_CHECKING:
    from ..verify.checks import Check
    from ..verify.report import Report
    from ..weight_options import WeightOptions


@dataclass(frozen=True)
class Request:
    """What was typed."""

    a: str
    b: str | None
    against: str | None
    text_file: str | None
    json_file: str | None
    html_file: str | None
    force: bool
    runtime: str | None
    precision: str | None
    provider: str | None
    rounded: bool
    weights: WeightOptions

    @property
    def files(self) -> list[str]:
        """The files that the report is written to."""
        return [file for file in (self.json_file, self.html_file) if file and file != "-"]

    @property
    def stored_adapter(self) -> str | None:
        """The name of the adapter beside B, if --adapter gives one.

        Raises:
            UsageError: if it is not a valid name.
        """
        named = named_adapter(self.weights.get("adapter"))
        return named[0] if named else None

    @property
    def adapter(self) -> str | Path | None:
        """The adapter of PEFT, in either form of --adapter."""
        given = self.weights.get("adapter")
        named = named_adapter(given)
        return named[1] if named else given


@click.command(short_help="Prove that two models are the same.")
@click.argument("a")
@click.argument("b", required=False)
@click.option(
    "--against", type=click.Choice(["openai-124M"]), help="Compare with the checksums of a published release."
)
@click.option("--text", "text_file", metavar="FILE", help="Text to run both on (default: a scene of Shakespeare).")
@click.option("--json", "json_file", metavar="FILE", help="Write the report as JSON (- for stdout).")
@click.option("--report", "html_file", metavar="FILE", help="Write the report as an HTML page with plots.")
@click.option("--force", is_flag=True, help="Overwrite the files of --json and --report.")
@click.option("--runtime", type=click.Choice(["torch", "onnx"]), help="What to run if B has both weights and ONNX.")
@click.option(
    "--precision",
    type=RunPrecision(),
    help="Precision of the ONNX model in B, or else in A (default: fp32, or the only one).",
)
@PROVIDER
@click.option("--rounded", is_flag=True, help="Round A's weights to B's dtypes before comparing (convert --dtype).")
@weight_options(
    "A",
    metavar="[NAME=]DIR",
    help="PEFT adapter (LoRA) to merge into the weights of A; with NAME=, B is an ONNX model that takes it at run time.",
)
@click.pass_context
def verify(ctx: click.Context, /, **options: Any) -> None:
    """Prove that A and B are the same GPT-2: the same weights, the same logits, the same greedy tokens.

    \b
      gpt2x verify models/124M gpt2-onnx/ --report report.html
      gpt2x verify models/124M gpt2.safetensors
      gpt2x verify gpt2.safetensors --against openai-124M
      gpt2x verify gpt2.safetensors half.safetensors --rounded
      gpt2x verify gpt2-hf/
      gpt2x verify gpt2-hf/ tuned-onnx/ --adapter lora/
      gpt2x verify gpt2-hf/ gpt2-onnx/ --adapter french=lora-fr/

    A and B are weights in any format, an ONNX directory or file, TorchScript, or a .pt2 file. If a directory has weights
    and ONNX, A means the weights and B the ONNX (if B has no ONNX, A means the ONNX). Weights are compared byte for byte,
    without torch. Then both run: in one pass, token by token, in chunks, batched, padded. ONNX runs with graph optimizations
    (ORT_ENABLE_ALL), and once without (ORT_DISABLE_ALL). Without B, gpt2x's model of A is compared with transformers, or with
    a float64 reference if transformers is missing. The exit code is 1 if anything differs.
    """
    request = Request(**options)
    _check_usage(request)
    report = _named_as_typed(_compare(request), request)
    _show(report, request)
    ctx.exit(0 if report.passed else 1)


def _check_usage(request: Request) -> None:
    """Refuse options that do not go together, and files that cannot be written.

    Raises:
        UsageError: naming the options.
        DestinationError: if a file exists.
    """
    from converters.io.publishing import check_free

    of_second = {
        "--runtime": request.runtime,
        "--precision": request.precision,
        "--provider": request.provider,
        "--rounded": request.rounded,
    }
    if request.b and request.against:
        raise click.UsageError("B and --against exclude each other")
    for option, given in of_second.items():
        if given and not request.b:
            raise click.UsageError(f"{option} applies to B, which is missing")
    for file in request.files:
        check_free(Path(file), request.force, directory=False)
    if request.json_file and request.json_file == request.html_file:
        raise click.UsageError("--json and --report must be different files")
    if request.html_file:
        need("matplotlib", extra="verify")  # before the models run
    is_plain = request.b and not request.rounded and request.runtime != "torch"
    if request.stored_adapter and not is_plain:
        raise click.UsageError(
            "--adapter NAME=DIR compares with B, an ONNX model, without --rounded or --runtime torch"
        )


def _compare(request: Request) -> Report:
    """Open both models, of which URLs are downloaded first, and compare them.

    Raises:
        ConversionError: if one of them cannot be opened.
    """
    from converters import open_checkpoint

    from ..verify import report as parity

    text = read_text(request.text_file, SAMPLE) if request.text_file else None
    a = local(request.a)
    b = runnable(request.b, request.runtime, request.precision) if request.b else None
    weights = with_local_adapter({**request.weights, "adapter": request.adapter})
    if request.against:
        return parity.verify_release(open_checkpoint(a, **weights))
    if b is None:
        _check_alone(a)
        return parity.verify_alone(open_checkpoint(a, **weights), text)
    if request.stored_adapter:
        plain: WeightOptions = {**weights, "adapter": None}
        base = open_checkpoint(a, **plain)
        return parity.verify_adapter(
            base, str(weights["adapter"]), b, request.stored_adapter, text, request.precision, request.provider
        )
    return parity.verify(
        a,
        b,
        text=text,
        runtime=request.runtime,
        precision=request.precision,
        provider=request.provider,
        rounded=request.rounded,
        **weights,
    )


def _check_alone(path: str) -> None:
    """Refuse a program without a second model: only weights have references of their own."""
    from ..runtimes.opening import NAMES, kind_of

    kind = kind_of(path)
    if kind != "weights" and not Path(path).is_dir():
        raise click.UsageError(f"{path} is {NAMES[kind]}: pass B, the model to compare it with")


def _named_as_typed(report: Report, request: Request) -> Report:
    """The report with the URLs that were typed, in place of paths in a cache."""
    if is_remote(request.a):
        report = replace(report, a=f"{request.a} + {request.adapter}" if request.adapter else request.a)
    if request.b and is_remote(request.b):
        report = replace(report, b=request.b)
    return report


def _show(report: Report, request: Request) -> None:
    """Print the table, and write the files of --json and --report."""
    from converters.io.publishing import new_file

    json_file, html_file, force = request.json_file, request.html_file, request.force
    click.echo(report.to_json() if json_file == "-" else printable(table(report)))
    if json_file not in (None, "-"):
        with new_file(Path(str(json_file)), force) as out:
            out.write((report.to_json() + "\n").encode())
    if html_file:
        from ..verify.report_page import page

        with new_file(Path(html_file), force) as out:
            out.write(page(report).encode())


NAMES = 15  # characters of the name of a check, at least
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
    """The report as text: one line for each check, the metrics of logits in columns, and failures below their check."""
    lines = [f"{report.a} against {report.b}"]
    headed = False
    width = max((len(check.name) for check in report.checks if check.details), default=0)
    width = max(width, NAMES)
    for check in report.checks:
        measured = "max_abs_error" in check.details
        if measured and not headed:
            lines.append(_heading(width))
            headed = True
        text = _metrics(check.details) if measured else check.result
        lines.append(f"  {check.name:<{width}} {_mark(check):<13} {text}".rstrip())
        lines += [f"    {failure}" for failure in check.details.get("failures", [])]
    return "\n".join([*lines, _conclusion(report)])


def _heading(width: int) -> str:
    heads = [f"{head:>{_width(form)}}" for head, form in COLUMNS.values()]
    return " " * (width + 17) + " ".join(heads)


def _mark(check: Check) -> str:
    """The verdict of a check, where a failure stands out and a check that was not made shows as a dash."""
    return check.verdict.replace("different", "DIFFERENT") or "-"


def _conclusion(report: Report) -> str:
    failed = [check.name for check in report.checks if check.passed is False]
    if failed:
        return f"DIFFERENT: {', '.join(failed)}."
    if not report.passed:
        return "Nothing was compared."
    return "Within the bounds of its precision." if report.inexact else "The same."


def _metrics(details: Mapping[str, Any]) -> str:
    return " ".join(_cell(details[name], form) for name, (_, form) in COLUMNS.items())


def _cell(value: float | None, form: str) -> str:
    return " " * _width(form) if value is None else format(value, form)


def _width(form: str) -> int:
    """The width of a format such as "9.1e"."""
    return int(form.split(".")[0])
