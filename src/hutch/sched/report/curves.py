"""Curves of how a metric is distributed over jobs (CDF), as a picture and as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hutch.sched.report.axes import format_number, format_time, marks
from hutch.sched.report.drawing import COLOURS, GREY, GRID, GROUND, INK, Line, Picture, Rect, Text

__all__ = ["LABELS", "Curve", "cdf_picture", "cdf_text"]

Curve = Sequence[tuple[float, float]]
"""Points (value, share of jobs up to it), rising: the upper corners of stairs."""

LABELS = {
    "turnaround": "turnaround",
    "waiting": "waiting",
    "response": "response",
    "slowdown": "slowdown",
    "bounded_slowdown": "bounded slowdown",
}
_TIMES = ("turnaround", "waiting", "response")
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 150, 34, 40


def _scale(curves: Mapping[str, Curve], metric: str) -> tuple[float, float]:
    """Return the bounds of the logarithmic axis; what is below the lowest is drawn on it."""
    floor = 1.0
    highest = max((points[-1][0] for points in curves.values() if points), default=floor)
    if metric in _TIMES and highest < 10:
        floor = 0.01
    return floor, max(highest, floor * 2)


def _stairs(points: Curve, low: float, high: float) -> list[tuple[float, float]]:
    """Return a curve's corners from the axis's lowest value to its highest: the first stands
    for all that is below."""
    share = max((s for value, s in points if value <= low), default=0.0)
    corners = [(low, share)]
    for value, upper in points:
        if value > low:
            corners += [(value, share), (value, upper)]
            share = upper
    return [*corners, (high, share)]


def cdf_picture(
    curves: Mapping[str, Curve], metric: str, *, title: str = "", width: int = 860
) -> Picture:
    """Return a chart of a curve for each policy, on a logarithmic axis."""
    legend = _legend(curves)
    height = max(300, _TOP + 17 * len(legend))
    # About 6 pixels a letter; a long name may take half of the picture, not more.
    right = min(max(_RIGHT, 46 + 6.2 * max(map(len, legend), default=0)), width / 2)
    plot_width, plot_height = width - _LEFT - right, height - _TOP - _BOTTOM
    low, high = _scale(curves, metric)
    span = math.log10(high / low)
    show = format_time if metric in _TIMES else format_number

    def place(value: float, share: float) -> tuple[float, float]:
        part = math.log10(max(value, low) / low) / span
        return _LEFT + part * plot_width, _TOP + (1 - share) * plot_height

    picture = Picture(width, height, [], title)
    shapes = picture.shapes
    shapes.append(Text(_LEFT, 20, title or f"share of jobs by {LABELS[metric]}", 13, bold=True))
    shapes.append(Rect(_LEFT, _TOP, plot_width, plot_height, GROUND))
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = place(low, share)[1]
        shapes.append(Line([(_LEFT, y), (_LEFT + plot_width, y)], GRID, 0.7))
        shapes.append(Text(_LEFT - 8, y + 4, f"{share:.0%}", 11, GREY, "end"))
    for value in marks(low, high, times=metric in _TIMES):
        x = place(value, 0)[0]
        shapes.append(Line([(x, _TOP), (x, _TOP + plot_height)], GRID, 0.7))
        words = ("up to " if value == low else "") + show(value)
        shapes.append(Text(x, _TOP + plot_height + 17, words, 11, anchor="middle"))
    shapes.append(Text(_LEFT + plot_width / 2, height - 6, LABELS[metric], 11, INK, "middle"))
    for n, (words, points) in enumerate(zip(legend, curves.values(), strict=True)):
        colour = COLOURS[n % len(COLOURS)]
        if points:
            drawn = [place(*corner) for corner in _stairs(points, low, high)]
            shapes.append(Line(drawn, colour, 1.8, n >= 7))
        y = _TOP + 8 + n * 17
        x = _LEFT + plot_width + 12
        shapes.append(Line([(x, y), (x + 20, y)], colour, 2.4, n >= 7))
        shapes.append(Text(x + 26, y + 4, words, 11))
    return picture


def _legend(curves: Mapping[str, Curve]) -> list[str]:
    """Return a name for each curve; one that lies on an earlier one says so."""
    seen: dict[tuple[tuple[float, float], ...], str] = {}
    words = []
    for name, points in curves.items():
        first = seen.setdefault(tuple(points), name) if points else name
        words.append(name if first == name else f"{name} = {first}")
    return words


_MARKS = "ox+*#@%&=~^v<>"


def cdf_text(
    curves: Mapping[str, Curve], metric: str, *, width: int = 80, height: int = 16
) -> list[str]:
    """Return lines for a terminal: a mark for each policy on a logarithmic axis."""
    low, high = _scale(curves, metric)
    span = math.log10(high / low)
    columns = max(width - 8, 20)
    grid = [[" "] * columns for _ in range(height)]
    for n, points in enumerate(curves.values()):
        for column in range(columns):
            value = low * 10 ** (span * column / (columns - 1))
            share = max((s for v, s in points if v <= value * (1 + 1e-9)), default=0)
            row = round((1 - share) * (height - 1))
            grid[row][column] = _MARKS[n % len(_MARKS)]
    show = format_time if metric in _TIMES else format_number
    lines = [
        f"{1 - row / (height - 1):>5.0%} │" + "".join(cells).rstrip()
        for row, cells in enumerate(grid)
    ]
    lines.append("      └" + "─" * columns)
    axis = [" "] * columns
    for value in marks(low, high, times=metric in _TIMES):
        words = show(value)
        at = round(math.log10(value / low) / span * (columns - 1))
        at = min(at, columns - len(words))
        if all(cell == " " for cell in axis[max(at - 1, 0) : at + len(words) + 1]):
            axis[at : at + len(words)] = words
    lines.append("       " + "".join(axis).rstrip())
    lines.append(
        f"       {LABELS[metric]}: "
        + ", ".join(f"{_MARKS[n % len(_MARKS)]} {name}" for n, name in enumerate(_legend(curves)))
    )
    return lines
