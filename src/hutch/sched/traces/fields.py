"""Read one value of a trace, or say which line and field is wrong and what to do."""

from __future__ import annotations

import math

from hutch.errors import InvalidArgument

__all__ = ["BadLine", "number", "seconds", "size"]

Number = int | float


class BadLine(InvalidArgument):
    """A line of a trace that cannot be read. `line` counts from 1."""

    def __init__(
        self, message: str, *, where: str, line: int, field: str, hint: str | None = None
    ) -> None:
        super().__init__(message, field=f"{where}:{line}: {field}", hint=hint)
        self.line = line


def number(text: str) -> Number:
    """Return a finite number, whole where it is written so. Raises `ValueError`."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(text) from None
        return int(value) if value.is_integer() and abs(value) < 2**53 else value


def seconds(text: str) -> Number:
    """Return a time in seconds, also from `1m30s`. Raises `ValueError` or ours."""
    try:
        return number(text)
    except ValueError:
        from hutch.units import parse_duration

        return parse_duration(text)


def size(text: str) -> int:
    """Return bytes, also from `512M`."""
    from hutch.units import parse_bytes

    return parse_bytes(int(text)) if text.isdecimal() else parse_bytes(text)
