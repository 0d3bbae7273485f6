"""The rows of a run as a picture: bars on a logarithmic scale, shorter is faster."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from bench.measure import Row, Samples
from hutch.sched.report.drawing import COLOURS, GREY, INK, Line, Picture, Rect, Shape, Text

__all__ = ["chart"]

_LEFT, _RIGHT = 150.0, 110.0
_BAR, _STEP, _HEAD = 11.0, 18.0, 30.0
_OTHERS = "#c3c8ce"


def chart(rows: Sequence[Row], *, width: float = 760) -> Picture:
    """Draw the rows that are times: a bar to the minimum, a line on to the median.

    `width` in pixels. Ways that were not measured are left out, and rows with none.
    Raise `ValueError` where nothing is left.
    """
    rows = [row for row in rows if row.unit == "ms" and any(_measured(row))]
    if not rows:
        raise ValueError("no case that was measured is a time: nothing to draw")
    scale = _Scale(rows, width)
    y = 34.0
    shapes: list[Shape] = [
        Text(x=12, y=18, words="milliseconds, logarithmic: shorter is faster", colour=GREY)
    ]
    grid = len(shapes)
    for row in rows:
        shapes.append(Text(x=12, y=y + 18, words=row.case, bold=True))
        y += _HEAD
        for name, samples in _measured(row):
            shapes += _bar(name, samples, y, scale)
            y += _STEP
    for decade in scale.decades():
        x = scale.place(decade)
        shapes.insert(grid, Line(points=[(x, 28), (x, y + 4)], colour="#e4e7ea"))
        shapes.append(Text(x=x, y=y + 20, words=f"{decade:g} ms", colour=GREY, anchor="middle"))
    return Picture(width=width, height=y + 30, shapes=shapes, title="hutch and its peers")


def _bar(name: str, samples: Samples, y: float, scale: _Scale) -> list[Shape]:
    """Return the name, the bar, the line to the median, and the minimum in figures."""
    low, middle = samples.minimum * 1000, samples.median * 1000
    end, median = scale.place(low), scale.place(middle)
    ours = name.startswith("hutch")
    label = f"{name}: minimum {low:.3g} ms, median {middle:.3g} ms"
    height = y + _BAR / 2
    return [
        Text(x=_LEFT - 8, y=y + 10, words=name, anchor="end", bold=ours),
        Rect(
            x=_LEFT,
            y=y,
            width=end - _LEFT,
            height=_BAR,
            fill=COLOURS[0] if ours else _OTHERS,
            label=label,
        ),
        Line(points=[(end, height), (median, height)], colour=GREY),
        Text(x=median + 6, y=y + 10, words=f"{low:.3g}", colour=INK if ours else GREY),
    ]


class _Scale:
    """Where on the paper a number of milliseconds is."""

    def __init__(self, rows: Sequence[Row], width: float) -> None:
        every = [samples for row in rows for _, samples in _measured(row)]
        # A decade further down where the shortest bar would have no length.
        self._low = math.floor(math.log10(min(s.minimum for s in every) * 900))
        self._high = math.log10(max(s.median for s in every) * 1000)
        self._room = width - _LEFT - _RIGHT

    def place(self, milliseconds: float) -> float:
        span = max(self._high - self._low, 0.1)
        return _LEFT + self._room * (math.log10(milliseconds) - self._low) / span

    def decades(self) -> list[float]:
        return [10.0**power for power in range(self._low, math.floor(self._high) + 1)]


def _measured(row: Row) -> Iterable[tuple[str, Samples]]:
    return ((name, samples) for name, samples in row.ways.items() if samples.seconds)
