"""A comparison of policies as one page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from hutch.sched.metrics import METRICS
from hutch.sched.report.axes import format_number, format_time
from hutch.sched.report.curves import LABELS, cdf_picture
from hutch.sched.report.drawing import DARK, to_svg
from hutch.sched.report.gantt import gantt_picture
from hutch.sched.report.result import Result

__all__ = ["html_page"]

_STYLE = """
:root { color-scheme: light dark; --line: #d0d7de; --best: #dafbe1; --dim: #57606a; }
@media (prefers-color-scheme: dark) { :root { --line: #3d444d; --best: #1b3a26; --dim: #9198a1; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p, figcaption { color: var(--dim); } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } td.best { background: var(--best); }
figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; border-radius: 6px; }
"""
# Words on bars keep their colours, as the bars do.
_DARK_STYLE = "".join(
    f"""rect[fill="{light}"]{{fill:{dark}}} [stroke="{light}"]{{stroke:{dark}}} """
    f"""text[fill="{light}"]{{fill:{dark}}}\n"""
    for light, dark in DARK.items()
)

_TIMES = ("turnaround", "waiting", "response")
# Path, heading, how it is written, whether less is better (None: neither).
_COLUMNS = (
    ("waiting.mean", "waiting, mean", format_time, True),
    ("waiting.p95", "95 %", format_time, True),
    ("turnaround.mean", "turnaround, mean", format_time, True),
    ("response.mean", "response, mean", format_time, True),
    ("bounded_slowdown.mean", "bounded slowdown, mean", format_number, True),
    ("bounded_slowdown.p99", "99 %", format_number, True),
    ("jain", "fairness", format_number, False),
    ("utilisation", "utilisation", lambda value: f"{value:.1%}", False),
    ("preemptions", "pauses", format_number, None),
)


def html_page(
    results: Sequence[Result], *, trace: str, cores: float, settings: Mapping[str, str]
) -> str:
    """Return the page: a table, curves of each metric, and charts where slices were kept."""
    first = results[0].figures
    facts = [
        f"{first['jobs']:,} job{'s' * (first['jobs'] != 1)}",
        f"{cores:g} core{'s' * (cores != 1)}",
        *(f"{name} {value}" for name, value in settings.items()),
    ]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>Policies on {escape(trace)}</title><style>{_STYLE}"
        f"@media (prefers-color-scheme: dark) {{\n{_DARK_STYLE}}}\n</style></head><body>",
        f"<h1>Policies compared on {escape(trace)}</h1>",
        f"<p>{escape(', '.join(facts))}. The best of each column is marked.</p>",
        _table(results),
        _curves(results),
        _charts(results, cores),
        "<p>Waiting is end − arrival − run time; response is first run − arrival; slowdown is "
        "turnaround over run time, bounded below by 10 s of run time unless told otherwise; "
        "fairness is Jain's index of the slowdowns. Simulated by hutch.</p>",
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _table(results: Sequence[Result]) -> str:
    best: dict[str, float] = {}
    for path, _, _, less in _COLUMNS:
        values = [v for r in results if (v := r.value(path)) is not None]
        if values and less is not None and len(results) > 1:
            best[path] = min(values) if less else max(values)
    head = "".join(f"<th>{escape(title)}</th>" for _, title, _, _ in _COLUMNS)
    rows = []
    for result in results:
        cells = [f"<td>{escape(result.policy)}</td>"]
        for path, _, show, _ in _COLUMNS:
            value = result.value(path)
            # What is written alike is marked alike.
            is_best = value is not None and path in best and show(value) == show(best[path])
            mark = ' class="best"' if is_best else ""
            cells.append(f"<td{mark}>{'–' if value is None else escape(show(value))}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="wide"><table><thead><tr><th>policy</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _curves(results: Sequence[Result]) -> str:
    figures = []
    for metric in METRICS:
        curves = {r.policy: r.curve(metric) for r in results if r.curve(metric)}
        if curves:
            figures.append(f"<figure>{to_svg(cdf_picture(curves, metric))}</figure>")
    if not figures:
        return ""
    names = ", ".join(LABELS[metric] for metric in METRICS)
    return (
        f"<h2>Distributions</h2><p>The share of jobs whose value is at most what is below: "
        f"{escape(names)}. Higher and further left is better.</p>" + "".join(figures)
    )


def _charts(results: Sequence[Result], cores: float) -> str:
    drawn = [r for r in results if r.slices and not r.dropped]
    left_out = [r.policy for r in results if r.dropped]
    if not drawn and not left_out:
        return ""
    figures = [
        f"<figure>{to_svg(gantt_picture(r.slices, int(cores), title=r.policy))}</figure>"
        for r in drawn
    ]
    if left_out:
        figures.append(
            f"<p>Not drawn, for they have too many slices: {escape(', '.join(left_out))}. "
            "<code>--window FROM:TO</code> draws some seconds of them.</p>"
        )
    return "<h2>Schedules</h2>" + "".join(figures)
