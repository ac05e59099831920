"""A report as one self-contained HTML page: the table of checks, and three plots as inline SVG."""

from __future__ import annotations

import html
import io
import math
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

from .._version import __version__
from .checks import Check
from .report import Report

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>gpt2x verify: {verdict}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ border-bottom: 1px solid #ddd; padding: .3em .6em; text-align: left; vertical-align: top }}
td.number {{ font-variant-numeric: tabular-nums; text-align: right }}
.passed {{ color: #06731f }} .failed {{ color: #b00020; font-weight: bold }} .skipped {{ color: #777 }}
code {{ overflow-wrap: anywhere }} svg {{ max-width: 100%; height: auto }}
</style>
<h1>gpt2x verify: <span class="{status}">{verdict}</span></h1>
<p><code>{a}</code><br>against <code>{b}</code></p>
<p>{conclusion}</p>
<table><tr><th>check<th>verdict<th>result<th>what was compared</tr>
{checks}</table>
<h2>Logits</h2>
<p>Errors are absolute differences of logits; relative errors are divided by the largest logit at the same position. KL
divergence is in nats. Top-1 is the agreement on the most likely token, top-5 on the set of the five most likely tokens.
"Share of bound" is the largest share of its bound that a metric reaches; above 100% the check fails.</p>
<table><tr><th>check<th>share of bound{heads}</tr>
{metrics}</table>
{plots}
<p>gpt2x {version}, Python {python}, {machine}, {date}</p>
</html>
"""

COLUMNS = {
    "positions": "positions",
    "max_abs_error": "max error",
    "mean_abs_error": "mean error",
    "max_rel_error": "max relative",
    "mean_rel_error": "mean relative",
    "kl_divergence": "KL",
    "top1_agreement": "top-1",
    "top5_agreement": "top-5",
    "perplexity": "perplexity",
    "perplexity_other": "perplexity, other",
}
EXPLAINED = {
    "configuration": "all settings that determine shapes and arithmetic",
    "weights": "every tensor, byte for byte; for other precisions, block by block",
    "weights beside": "the weights in the directory that transformers would load instead of the ONNX model's",
    "tokenizer": "vocabulary and merges",
    "full context": "as many tokens as the context holds, in one pass",
    "one token": "a prompt of one token, with an empty cache",
    "token by token": "the first tokens one at a time, each with the cache of the tokens before it",
    "chunks": "a full context in small and large chunks, then token by token up to the last slot, each with the cache",
    "batch rows": "a batch of five rows, each compared with the same row alone",
    "left padding": "prompts of different lengths in one batch, padded on the left, then more tokens",
    "right padding": "prompts of different lengths in one batch, padded on the right, then more tokens",
    "ORT_DISABLE_ALL": "the ONNX graph without optimization; all other checks use ORT_ENABLE_ALL",
    "greedy tokens": "the likeliest token at each step",
}
STATUS = {True: "passed", False: "failed", None: "skipped"}  # the class in the page's style


def page(report: Report) -> str:
    """Return the page. Names that come from files are escaped.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    measured = [check for check in report.checks if "max_abs_error" in check.details]
    verdict, conclusion = _verdict(report)
    if measured:
        worst = max(map(_share, measured))
        conclusion += f" The worst metric reaches {worst:.0%} of its bound."
    return PAGE.format(
        verdict=verdict,
        status=STATUS[report.passed],
        a=_escaped(report.a),
        b=_escaped(report.b),
        conclusion=conclusion,
        checks="".join(map(_check_row, report.checks)),
        heads="".join(f"<th>{head}" for head in COLUMNS.values()),
        metrics="".join(map(_metrics_row, measured)),
        plots="\n".join(map(_svg, _plots(measured))) if measured else "",
        version=__version__,
        python=platform.python_version(),
        machine=_escaped(f"{platform.system()} {platform.machine()}"),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _verdict(report: Report) -> tuple[str, str]:
    """Return the heading, and the sentence below it."""
    if any(check.passed is False for check in report.checks):
        return "different", "The two models differ."
    if not report.passed:
        return "nothing compared", "Nothing was compared."
    if report.inexact:
        return "within bounds", "The two models agree within the bounds of the number format."
    return "same", "The two models are the same."


def _escaped(text: str) -> str:
    """Return text for the page: without markup, control characters and invalid Unicode."""
    return html.escape("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


def _share(check: Check) -> float:
    """Return the largest share of its bound that a metric reaches; infinite if one is NaN or infinite."""
    limits = check.details["limits"]
    shares = [check.details[name] / limit if limit else 0.0 for name, limit in limits.items()]
    return max((share if math.isfinite(share) else math.inf) for share in shares)


def _check_row(check: Check) -> str:
    name, result, what = map(_escaped, (check.name, check.result, EXPLAINED.get(check.name, "")))
    return f'<tr><td>{name}<td class="{STATUS[check.passed]}">{check.verdict}<td>{result}<td>{what}</tr>\n'


def _metrics_row(check: Check) -> str:
    cells = "".join(f'<td class="number">{_number(check.details[name])}' for name in COLUMNS)
    return f'<tr><td>{_escaped(check.name)}<td class="number">{_share(check):.0%}{cells}</tr>\n'


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.3g}"


Plot = Callable[[Any], None]


def _plots(measured: list[Check]) -> list[Plot]:
    longest = max(measured, key=lambda check: check.details["positions"])
    return [partial(_plot_errors, longest), partial(_plot_divergence, longest), partial(_plot_agreement, measured)]


def _plot_errors(check: Check, axes: Any) -> None:
    axes.plot(check.details["error_by_position"], linewidth=0.8)
    axes.set(title=f"Error by position ({check.name})", xlabel="position", ylabel="largest error of a logit")
    axes.axhline(check.details["limits"]["max_abs_error"], color="red", linestyle=":", label="bound")
    # Linear near 0, which a logarithmic axis does not have: errors of equal logits are 0.
    axes.set_yscale("symlog", linthresh=1e-8)
    axes.set_ylim(bottom=0)
    axes.legend()


def _plot_divergence(check: Check, axes: Any) -> None:
    import numpy as np

    exponents = np.log10(np.maximum(check.details["kl_by_position"], 1e-18))
    axes.hist(exponents[np.isfinite(exponents)], bins=40)
    axes.axvline(np.log10(check.details["limits"]["kl_divergence"]), color="red", linestyle=":", label="bound")
    axes.legend()
    axes.set(title=f"KL divergence ({check.name})", xlabel="log10 of nats (-18: zero)", ylabel="positions")


def _plot_agreement(measured: list[Check], axes: Any) -> None:
    names = [check.name for check in measured]
    for shift, key, label in ((-0.2, "top1_agreement", "top-1"), (0.2, "top5_agreement", "top-5")):
        shares = [100 * check.details[key] for check in measured]
        axes.barh([i + shift for i in range(len(names))], shares, height=0.4, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(title="Agreement", xlabel="percent of positions", xlim=(0, 100))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _svg(plot: Plot) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "gpt2x"}):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        plot(figure.add_subplot())
        out = io.StringIO()
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]
