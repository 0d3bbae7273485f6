"""Shell patterns on values: `*` and `?`, matched without backtracking.

A pattern runs over a text as a set of places in the pattern, so that no pattern takes more
than its length times the text's; a regular expression made of `*a*a*a*b` would not end.
"""

from __future__ import annotations

__all__ = ["ends", "parse_pattern", "replace", "strip_prefix", "strip_suffix"]

_ANY, _ONE = "*", "?"
Pattern = tuple[tuple[str, str], ...]


def parse_pattern(text: str) -> Pattern:
    """Return a pattern's parts: (`*`, ""), (`?`, "") or ("c", character)."""
    parts: list[tuple[str, str]] = []
    at = 0
    while at < len(text):
        char = text[at]
        if char == "\\" and at + 1 < len(text):
            at += 1
            parts.append(("c", text[at]))
        elif char == "*":
            if not parts or parts[-1][0] != _ANY:
                parts.append((_ANY, ""))
        elif char == "?":
            parts.append((_ONE, ""))
        else:
            parts.append(("c", char))
        at += 1
    return tuple(parts)


def ends(pattern: Pattern, text: str, start: int = 0) -> list[int]:
    """Return where matches of the pattern that begin at `start` end, in rising order."""
    found: list[int] = []
    places = _settle(pattern, {0})
    at = start
    while places:
        if len(pattern) in places:
            found.append(at)
        if at >= len(text):
            break
        char = text[at]
        after: set[int] = set()
        for place in places:
            if place == len(pattern):
                continue
            kind, wanted = pattern[place]
            if kind == _ANY:
                after.add(place)
            elif kind == _ONE or wanted == char:
                after.add(place + 1)
        places = _settle(pattern, after)
        at += 1
    return found


def _settle(pattern: Pattern, places: set[int]) -> set[int]:
    """Add the places that are reached without a character: those after a `*`."""
    more = set(places)
    for place in places:
        while place < len(pattern) and pattern[place][0] == _ANY:
            place += 1
            more.add(place)
    return more


def strip_prefix(text: str, pattern: str, *, longest: bool) -> str:
    """Return `text` without the shortest or longest beginning that matches."""
    found = ends(parse_pattern(pattern), text)
    return text[found[-1 if longest else 0] :] if found else text


def strip_suffix(text: str, pattern: str, *, longest: bool) -> str:
    """Return `text` without the shortest or longest end that matches."""
    found = ends(parse_pattern(pattern)[::-1], text[::-1])
    return text[: len(text) - found[-1 if longest else 0]] if found else text


def replace(text: str, pattern: str, by: str, *, every: bool) -> str:
    """Return `text` with the first (or every) longest match replaced; an empty match is none."""
    parts = parse_pattern(pattern)
    done: list[str] = []
    at = 0
    while at < len(text):
        found = ends(parts, text, at)
        if found and found[-1] > at:
            done.append(by)
            at = found[-1]
            if not every:
                break
        else:
            done.append(text[at])
            at += 1
    return "".join(done) + text[at:]
