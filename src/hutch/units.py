"""Quantities as people write them: sizes in bytes, durations, bit rates, moments."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from typing import TYPE_CHECKING, NewType

from hutch.errors import InvalidArgument

if TYPE_CHECKING:
    from decimal import Decimal

    # Seconds since the epoch; a Decimal says nanoseconds, which a float of today cannot.
    Moment = float | Decimal

__all__ = ["Bytes", "format_bytes", "format_duration", "format_rate", "parse_bytes"]
__all__ += ["parse_duration", "parse_moment", "parse_rate", "parse_time", "parse_time_ns", "to_ns"]

Bytes = NewType("Bytes", int)

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?b?)\s*$", re.IGNORECASE)
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h|d)")
_SECONDS = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
    "d": 86400.0,
}
_MAX_BYTES = 1 << 63
_RATE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmg]?)(?:bit)?(?:/s)?\s*$", re.IGNORECASE)
_MAX_RATE = 10**12
_MOST_NS = 10**21
_LONGEST = 100


def parse_bytes(value: str | int, *, field: str = "size") -> Bytes:
    """Return a number of bytes from an int or from `512M`, `1.5g`, `64KiB`.

    Suffixes are powers of 1024 whether or not an `i` stands in them, as in Docker's
    option parser.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise InvalidArgument(f"expected a size, got {value!r}", field=field)
    if isinstance(value, int):
        number = value
    else:
        match = _SIZE.match(value)
        if match is None:
            raise InvalidArgument(
                f"expected a size such as 512M, got {value!r}",
                field=field,
                hint="use a number with an optional suffix b, k, m, g, t or p",
            )
        number = int(float(match[1]) * 1024 ** _POWER[match[2].lower()])
    if not 0 <= number < _MAX_BYTES:
        raise InvalidArgument(f"out of range: {value!r}", field=field)
    return Bytes(number)


def format_bytes(number: int) -> str:
    """Return a size for people, with three significant digits: `1.5GiB`, `17.2MiB`."""
    size = float(number)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f}{unit}" if unit == "B" else f"{size:.3g}{unit}"


def parse_duration(value: str | float, *, field: str = "duration") -> float:
    """Return seconds from a number (seconds) or a Go duration such as `1m30s`, `500ms`."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise InvalidArgument(f"expected a duration, got {value!r}", field=field)
    if isinstance(value, str):
        text = value.strip()
        try:
            seconds = float(text)
        except ValueError:
            parts = _DURATION.findall(text)
            if not parts or "".join(n + u for n, u in parts) != text:
                raise InvalidArgument(
                    f"expected a duration such as 1m30s, got {value!r}", field=field
                ) from None
            seconds = sum(float(n) * _SECONDS[u] for n, u in parts)
    else:
        seconds = float(value)
    if not 0 <= seconds < 1e9:
        raise InvalidArgument(f"out of range: {value!r}", field=field)
    return seconds


def format_duration(seconds: float) -> str:
    """Return a duration for people as Docker's listings show it: `5 minutes`."""
    whole = int(seconds)
    for size, unit in ((86400 * 7, "week"), (86400, "day"), (3600, "hour"), (60, "minute")):
        if whole >= 2 * size or (size < 86400 and whole >= size):
            count = whole // size
            return f"{count} {unit}{'' if count == 1 else 's'}"
    return f"{whole} second{'' if whole == 1 else 's'}"


def parse_rate(value: str | int, *, field: str = "rate") -> int:
    """Return bits per second from an int or from `10mbit`, `1.5Gbit`, `800k`.

    Prefixes are powers of 1000, as tc(8) and Incus have them. 0 is no limit; below 8 kbit
    no packet would pass in a second.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise InvalidArgument(f"expected a rate, got {value!r}", field=field)
    if isinstance(value, int):
        rate = value
    else:
        match = _RATE.match(value)
        if match is None:
            raise InvalidArgument(
                f"expected a rate such as 10mbit, got {value[:40]!r}",
                field=field,
                hint="bits per second with an optional suffix kbit, mbit or gbit; 0 is no limit",
            )
        rate = int(float(match[1]) * 1000 ** _POWER[match[2].lower()])
    if rate and not 8000 <= rate <= _MAX_RATE:
        raise InvalidArgument(
            f"out of range: {value!r}", field=field, hint="from 8kbit to 1000gbit; 0 is no limit"
        )
    return rate


def format_rate(rate: int) -> str:
    """Return bits per second as `parse_rate` reads them, exactly: `10mbit`, `1500kbit`."""
    for unit, size in (("gbit", 10**9), ("mbit", 10**6), ("kbit", 1000)):
        if rate and rate % size == 0:
            return f"{rate // size}{unit}"
    return f"{rate}bit"


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
        raise _no_time(text, field) from None
    if not abs(found) < _MOST_NS:
        raise _no_time(text, field)
    return found


def parse_moment(text: str, field: str) -> Moment:
    """Return the same in seconds, none of its nanoseconds lost."""
    from decimal import Decimal

    return Decimal(parse_time_ns(text, field)).scaleb(-9)


def to_ns(moment: Moment) -> int:
    """Return nanoseconds since the epoch."""
    return int(moment * 10**9)


def _nanoseconds(given: str, field: str) -> int:
    seconds, dot, fraction = given.partition(".")
    if _is_number(seconds.removeprefix("-")) and (not dot or _is_number(fraction)):
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


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _no_time(text: str, field: str) -> InvalidArgument:
    return InvalidArgument(
        f"no time: {text[:60]!r}",
        field=field,
        hint="seconds since 1970, 2025-01-31T12:00:00Z, or a duration such as 10m",
    )
