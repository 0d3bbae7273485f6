"""Moments as Docker writes and reads them."""

from __future__ import annotations

import time
from contextlib import suppress

from hutch.errors import InvalidArgument
from hutch.units import parse_duration

__all__ = ["parse_time", "timestamp"]

_MOST_S = 1e12


def timestamp(time_ns: int) -> str:
    """Return a time as Go writes it, with nanoseconds; its zero time for 0."""
    if not time_ns:
        return "0001-01-01T00:00:00Z"
    seconds, rest = divmod(time_ns, 10**9)
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    fraction = f"{rest:09d}".rstrip("0")
    return f"{text}.{fraction}Z" if fraction else f"{text}Z"


def parse_time(text: str, field: str) -> float:
    """Return seconds since the epoch: of `1700000000.5`, of an RFC 3339 time or date, or of
    the moment that lies a duration such as `10m` or `1h30m` back."""
    try:
        found = _seconds(text.strip(), field)
    except (ValueError, OverflowError, InvalidArgument):
        raise _bad(text, field) from None
    if not abs(found) < _MOST_S:  # what is no number is not either
        raise _bad(text, field)
    return found


def _seconds(given: str, field: str) -> float:
    with suppress(ValueError):
        return float(given)
    if "-" in given[1:]:
        from datetime import datetime

        whole, dot, rest = given.partition(".")
        digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
        moment = datetime.fromisoformat(whole + rest[len(digits) :] if dot else given)
        return moment.timestamp() + (float(f"0.{digits}") if dot and digits else 0.0)
    return time.time() - parse_duration(given, field=field)


def _bad(text: str, field: str) -> InvalidArgument:
    return InvalidArgument(
        f"no time: {text[:60]!r}",
        field=field,
        hint="seconds since 1970, 2025-01-31T12:00:00Z, or a duration such as 10m",
    )
