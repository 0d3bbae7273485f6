"""Gantt charts: which job was on which cores when, as a picture and as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush

import msgspec

from hutch.sched.report.axes import format_time, ticks
from hutch.sched.report.drawing import (
    COLOURS,
    GREY,
    GROUND,
    INK,
    PAPER,
    Line,
    Picture,
    Rect,
    Text,
    ink_on,
)
from hutch.sched.simulator import SimJob

__all__ = ["Slice", "SliceRecorder", "gantt_picture", "gantt_text"]

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 16, 34, 34
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


class Slice(msgspec.Struct, frozen=True):
    """A job ran on so many cores from one time to another."""

    job: str | int
    began: int | float
    ended: int | float
    cores: int | float
    seq: int = 0
    """The order of submission of the job."""


class SliceRecorder:
    """An observer that keeps the slices within a window, and no more than `most`.

    `dropped` counts those beyond.
    """

    def __init__(
        self, window: tuple[float, float] = (-math.inf, math.inf), most: int = 20_000
    ) -> None:
        self.window = window
        self.most = most
        self.slices: list[Slice] = []
        self.dropped = 0

    def slice(self, job: SimJob, began: float, ended: float) -> None:
        low, high = self.window
        if ended <= low or began >= high or ended <= began:
            return
        if len(self.slices) >= self.most:
            self.dropped += 1
            return
        self.slices.append(Slice(job.id, max(began, low), min(ended, high), job.cores, job.seq))

    def done(self, jobs: list[SimJob]) -> None:
        pass


class _Bar(msgspec.Struct, frozen=True):
    """A slice on neighbouring rows."""

    what: Slice
    row: int
    rows: int


def _bars(slices: Iterable[Slice], cores: int) -> list[_Bar]:
    """Give each slice rows of its own while it runs, side by side where they are free."""
    free = list(range(cores))
    heapify(free)
    ends: list[tuple[float, int, list[int]]] = []
    bars = []
    for n, piece in enumerate(sorted(slices, key=lambda s: (s.began, s.seq))):
        while ends and ends[0][0] <= piece.began:
            for row in heappop(ends)[2]:
                heappush(free, row)
        count = min(math.ceil(piece.cores), len(free))
        rows = [heappop(free) for _ in range(count)]
        heappush(ends, (piece.ended, n, rows))
        start = 0
        for at in range(1, len(rows) + 1):
            if at == len(rows) or rows[at] != rows[at - 1] + 1:
                bars.append(_Bar(piece, rows[start], at - start))
                start = at
    return bars


def _discernible(bars: Iterable[_Bar], low: float, scale: float, cores: int) -> Iterator[_Bar]:
    """Leave out bars within half a pixel that is taken already: a page of them is megabytes."""
    taken = [-1] * cores
    for bar in bars:
        first = int((bar.what.began - low) * scale * 2)
        last = int((bar.what.ended - low) * scale * 2)
        rows = range(bar.row, bar.row + bar.rows)
        if first == last and all(taken[row] >= first for row in rows):
            continue
        for row in rows:
            taken[row] = max(taken[row], last)
        yield bar


def _span(slices: Sequence[Slice]) -> tuple[float, float]:
    if not slices:
        return 0, 1
    low = min(s.began for s in slices)
    return low, max(max(s.ended for s in slices), low + 1e-9)


def gantt_picture(
    slices: Sequence[Slice], cores: int, *, title: str = "", width: int = 860
) -> Picture:
    """Return a chart with time to the right and a row for each core."""
    low, high = _span(slices)
    row = max(2, min(22, 320 / cores))
    plot, height = width - _LEFT - _RIGHT, row * cores
    scale = plot / (high - low)
    picture = Picture(width, height + _TOP + _BOTTOM, [], title)
    shapes = picture.shapes
    if title:
        shapes.append(Text(_LEFT, 20, title, 13, bold=True))
    shapes.append(Rect(_LEFT, _TOP, plot, height, GROUND))
    colour = _colours(slices)
    for bar in _discernible(_bars(slices, cores), low, scale, cores):
        x = _LEFT + (bar.what.began - low) * scale
        wide = (bar.what.ended - bar.what.began) * scale
        label = (
            f"{bar.what.job}: {format_time(bar.what.began)} to {format_time(bar.what.ended)}, "
            f"{bar.what.cores:g} cores"
        )
        y, tall = _TOP + bar.row * row, bar.rows * row
        # A bar narrower than its edges would vanish under them, and nobody can point at it.
        edge = PAPER if wide > 3 else ""
        told = label if wide > 1 else ""
        fill = colour[bar.what.job]
        shapes.append(Rect(x, y, max(wide, 0.5), tall, fill, told, edge))
        name = str(bar.what.job)
        if wide > 7 * len(name) + 4 and tall >= 13:
            shapes.append(Text(x + wide / 2, y + tall / 2 + 4, name, 11, ink_on(fill), "middle"))
    for at in ticks(low, high):
        x = _LEFT + (at - low) * scale
        shapes.append(Line([(x, _TOP + height), (x, _TOP + height + 4)], INK))
        shapes.append(Text(x, _TOP + height + 17, format_time(at), 11, anchor="middle"))
    shapes.append(Line([(_LEFT, _TOP + height), (_LEFT + plot, _TOP + height)], INK))
    if cores > 1:
        shapes.append(Text(_LEFT - 8, _TOP + 11, str(cores), 11, GREY, "end"))
        shapes.append(Text(_LEFT - 8, _TOP + height, "cores", 11, GREY, "end"))
    return picture


def _colours(slices: Iterable[Slice]) -> dict[str | int, str]:
    """Return a colour for each job by order of submission: the same under every policy."""
    seqs = {piece.job: piece.seq for piece in slices}
    return {
        job: COLOURS[n % len(COLOURS)] for n, job in enumerate(sorted(seqs, key=seqs.__getitem__))
    }


def gantt_text(slices: Sequence[Slice], *, width: int = 80, rows: int = 30) -> list[str]:
    """Return lines for a terminal: a row for each job, a block where it ran.

    Of more than `rows` jobs the first to run are shown, and a line says so.
    """
    jobs: dict[str | int, list[Slice]] = {}
    for piece in sorted(slices, key=lambda s: (s.began, s.seq)):
        jobs.setdefault(piece.job, []).append(piece)
    shown = dict(list(jobs.items())[:rows])
    low, high = _span([piece for pieces in shown.values() for piece in pieces])
    names = max((len(str(job)) for job in shown), default=0)
    columns = max(width - names - 3, 10)
    lines = []
    for job, pieces in shown.items():
        covered = [0.0] * columns
        for piece in pieces:
            _cover(covered, (piece.began - low) / (high - low), (piece.ended - low) / (high - low))
        bar = "".join(_BLOCKS[min(8, round(8 * part))] for part in covered)
        lines.append(f"{job!s:>{names}} │{bar.rstrip()}")
    lines.append(" " * names + " └" + "─" * columns)
    left, right = format_time(low), format_time(high)
    lines.append(" " * (names + 2) + left + right.rjust(columns - len(left)))
    if len(jobs) > len(shown):
        lines.append(f"{len(jobs) - len(shown)} more jobs are not shown")
    return lines


_BLOCKS = " ▏▎▍▌▋▊▉█"


def _cover(covered: list[float], began: float, ended: float) -> None:
    """Add to each column how much of it a slice covers."""
    count = len(covered)
    first, last = began * count, ended * count
    for column in range(int(first), min(count, math.ceil(last))):
        covered[column] += min(last, column + 1) - max(first, column)
