"""Axes: round numbers to mark, and times as people write them."""

from __future__ import annotations

import math

__all__ = ["format_number", "format_time", "marks", "ticks"]

_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)


def format_time(seconds: float) -> str:
    """Return a time in short: `0`, `250 ms`, `12 s`, `5 min`, `3 h`, `2 d`."""
    if not math.isfinite(seconds):
        return "–"
    size = abs(seconds)
    if size < 1e-9:
        return "0"
    if size < 1:
        return f"{seconds * 1000:.3g} ms"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if size >= 2 * length or (size >= length and size % length == 0):
            return f"{_short(seconds / length)} {unit}"
    return f"{_short(seconds)} s"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def format_number(value: float) -> str:
    """Return a number with three digits, more only where it is whole or above 1000."""
    if not math.isfinite(value):
        return "–"
    if float(value).is_integer() and abs(value) < 1e6:
        return str(int(value))
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Return round times between two, at most so many and a few more."""
    span = max(high - low, 1e-9)
    step: float
    if span / most <= 1:
        power = 10.0 ** math.floor(math.log10(span / most))
        step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= most)
    else:
        step = next((s for s in _STEPS if span / s <= most), 0) or _days(span, most)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [(first + n) * step for n in range(max(count, 0))]


def _days(span: float, most: int) -> float:
    days = span / 86400 / most
    power = 10.0 ** math.floor(math.log10(days))
    return 86400 * next(power * m for m in (1, 2, 5, 10) if power * m >= days)


_MARKS = (1, 10, 60, 600, 3600, 36000, 86400, 864000)


def marks(low: float, high: float, *, times: bool) -> list[float]:
    """Return what to mark between two numbers above 0 on a logarithmic axis.

    Powers of ten, or for times above a second those that are round in minutes and hours; on a
    short axis also what lies between them.
    """
    first = math.ceil(math.log10(low) - 1e-9)
    last = math.floor(math.log10(high) + 1e-9)
    tens = [10.0**n for n in range(first, last + 1)]
    if high / low < (60 if times else 100):
        rounded = [m * 10.0**n for n in range(first - 1, last + 1) for m in (1, 2, 5)]
        return [value for value in rounded if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
    if not times:
        return tens
    found = [value for value in tens if value < 1]
    found += [float(value) for value in _MARKS if low <= value <= high]
    return found + [value * 86400 for value in tens if value >= 100 and value * 86400 <= high]
