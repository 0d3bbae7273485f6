"""Moments as Docker writes them."""

from __future__ import annotations

import time

__all__ = ["timestamp"]


def timestamp(time_ns: int) -> str:
    """Return a time as Go writes it, with nanoseconds; its zero time for 0."""
    if not time_ns:
        return "0001-01-01T00:00:00Z"
    seconds, rest = divmod(time_ns, 10**9)
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    fraction = f"{rest:09d}".rstrip("0")
    return f"{text}.{fraction}Z" if fraction else f"{text}Z"
