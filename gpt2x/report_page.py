"""A report as one HTML page that needs nothing else: the table, and three plots as inline SVG."""

from __future__ import annotations

import html
import io
from collections.abc import Callable
from typing import Any

from . import __version__
from .parity import Report
from .runs import Check

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
.same {{ color: #06731f }} .different {{ color: #b00020; font-weight: bold }} .unasked {{ color: #777 }}
code {{ overflow-wrap: anywhere }} svg {{ max-width: 100%; height: auto }}
</style>
<h1>gpt2x verify: <span class="{verdict}">{verdict}</span></h1>
<p><code>{a}</code><br>against <code>{b}</code></p>
<table><tr><th>check<th>verdict<th>result</tr>
{checks}</table>
<h2>Logits</h2>
<p>Errors are of logits; relative errors are relative to the largest logit at the same position. KL divergence is in nats.
Agreement is on the likeliest token, and on the set of the five likeliest.</p>
<table><tr><th>check{heads}</tr>
{metrics}</table>
{plots}
<p>gpt2x {version}</p>
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
WORDS = {True: "same", False: "different", None: "unasked"}


def page(report: Report) -> str:
    """The page. Whatever names a file brought are escaped.

    Raises:
        ModuleNotFoundError: where matplotlib is missing.
    """
    measured = [check for check in report.checks if "max_abs_error" in check.details]
    return PAGE.format(
        verdict=WORDS[report.passed],
        a=html.escape(report.a),
        b=html.escape(report.b),
        checks="".join(map(_check_row, report.checks)),
        heads="".join(f"<th>{head}" for head in COLUMNS.values()),
        metrics="".join(map(_metrics_row, measured)),
        plots="\n".join(map(_svg, _plots(measured))) if measured else "",
        version=__version__,
    )


def _check_row(check: Check) -> str:
    word = WORDS[check.passed]
    name, result = html.escape(check.name), html.escape(check.result)
    return f'<tr><td>{name}<td class="{word}">{word}<td>{result}</tr>\n'


def _metrics_row(check: Check) -> str:
    cells = "".join(f'<td class="number">{_number(check.details[name])}' for name in COLUMNS)
    return f"<tr><td>{html.escape(check.name)}{cells}</tr>\n"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.3g}"


Plot = Callable[[Any], None]


def _plots(measured: list[Check]) -> list[Plot]:
    longest = max(measured, key=lambda check: check.details["positions"])

    def errors(axes: Any) -> None:
        axes.plot(longest.details["error_by_position"], linewidth=0.8)
        axes.set(title=f"Error by position ({longest.name})", xlabel="position", ylabel="largest error of a logit")
        bound = longest.details["bounds"]["max_abs_error"] * longest.details["max_logit"]
        axes.axhline(bound, color="red", linestyle=":", label="bound")
        axes.set_yscale("symlog", linthresh=1e-8)
        axes.legend()

    def divergence(axes: Any) -> None:
        import numpy as np

        exponents = np.log10(np.maximum(longest.details["kl_by_position"], 1e-18))
        axes.hist(exponents[np.isfinite(exponents)], bins=40)
        axes.set(title=f"KL divergence ({longest.name})", xlabel="log10 of nats", ylabel="positions")

    def agreement(axes: Any) -> None:
        names = [check.name for check in measured]
        for shift, key, label in ((-0.2, "top1_agreement", "top-1"), (0.2, "top5_agreement", "top-5")):
            shares = [100 * check.details[key] for check in measured]
            axes.barh([i + shift for i in range(len(names))], shares, height=0.4, label=label)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set(title="Agreement", xlabel="percent of positions", xlim=(0, 100))
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))

    return [errors, divergence, agreement]


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
