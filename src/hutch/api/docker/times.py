"""Moments as Docker writes and reads them."""

from __future__ import annotations

import time
from contextlib import suppress

from hutch.errors import InvalidArgument
from hutch.units import parse_duration

__all__ = ["parse_time", "parse_time_ns", "timestamp"]

_MOST_NS = 10**21
_LONGEST = 100


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
    return parse_time_ns(text, field) / 1e9


def parse_time_ns(text: str, field: str) -> int:
    """Return the same in nanoseconds, none of them lost: logs and events are told apart by
    them."""
    try:
        found = _nanoseconds(text.strip()[:_LONGEST], field)
    except (ValueError, OverflowError, InvalidArgument):
        raise _bad(text, field) from None
    if not abs(found) < _MOST_NS:
        raise _bad(text, field)
    return found


def _nanoseconds(given: str, field: str) -> int:
    seconds, dot, fraction = given.partition(".")
    if _is_digits(seconds.removeprefix("-")) and (not dot or _is_digits(fraction)):
        whole = int(seconds) * 10**9
        part = int(f"{fraction[:9]:0<9}")
        return whole - part if given.startswith("-") else whole + part
    with suppress(ValueError):
        return int(float(given)) * 10**9
    if "-" in given[1:]:
        from datetime import datetime

        digits = fraction[: len(fraction) - len(fraction.lstrip("0123456789"))]
        moment = datetime.fromisoformat(seconds + fraction[len(digits) :])
        return int(moment.timestamp()) * 10**9 + int(f"{digits[:9]:0<9}")
    return time.time_ns() - int(parse_duration(given, field=field) * 1e9)


def _is_digits(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _bad(text: str, field: str) -> InvalidArgument:
    return InvalidArgument(
        f"no time: {text[:60]!r}",
        field=field,
        hint="seconds since 1970, 2025-01-31T12:00:00Z, or a duration such as 10m",
    )
