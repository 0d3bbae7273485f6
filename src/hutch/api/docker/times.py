"""Moments as Docker writes them."""

from __future__ import annotations

import time

__all__ = ["timestamp"]

_FIRST_NS = -62_135_596_800 * 10**9
_LAST_NS = 253_402_300_800 * 10**9 - 1


def timestamp(time_ns: int) -> str:
    """Return a time as Go writes it, with nanoseconds; its zero time for 0, and the nearest that it
    can write for one before the year 1 or after 9999, which a file may have."""
    if not time_ns:
        return "0001-01-01T00:00:00Z"
    seconds, rest = divmod(max(_FIRST_NS, min(time_ns, _LAST_NS)), 10**9)
    moment = time.gmtime(seconds)
    text = f"{moment.tm_year:04d}{time.strftime('-%m-%dT%H:%M:%S', moment)}"
    fraction = f"{rest:09d}".rstrip("0")
    return f"{text}.{fraction}Z" if fraction else f"{text}Z"
