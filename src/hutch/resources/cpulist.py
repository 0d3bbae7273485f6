"""Lists of processors as the kernel writes them: `0-3,8`."""

from __future__ import annotations

from collections.abc import Iterable

from hutch.errors import InvalidArgument

__all__ = ["format_cpulist", "parse_cpulist"]

_MOST = 1 << 16


def parse_cpulist(text: str, *, field: str = "cpus") -> tuple[int, ...]:
    """Return the numbers of a list such as `0-3,8`, in order; an empty text has none."""
    found: set[int] = set()
    for part in text.replace(" ", "").strip().split(","):
        if not part:
            continue
        first, dash, last = part.partition("-")
        low, high = _number(first, text, field), _number(last if dash else first, text, field)
        if low > high:
            raise InvalidArgument(f"range runs backwards: {part}", field=field)
        found.update(range(low, high + 1))
    return tuple(sorted(found))


def _number(digits: str, text: str, field: str) -> int:
    if not (digits.isascii() and digits.isdigit()) or int(digits[:9]) >= _MOST:
        raise InvalidArgument(f"expected a list such as 0-3,8, got {text[:80]!r}", field=field)
    return int(digits)


def format_cpulist(numbers: Iterable[int]) -> str:
    """Return the shortest list of these numbers: `0-3,8`."""
    parts: list[str] = []
    ordered = sorted(set(numbers))
    start = 0
    for i, number in enumerate(ordered):
        if i + 1 < len(ordered) and ordered[i + 1] == number + 1:
            continue
        first = ordered[start]
        parts.append(str(first) if first == number else f"{first}-{number}")
        start = i + 1
    return ",".join(parts)
