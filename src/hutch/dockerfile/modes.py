"""`--chmod`: octal, or the letters of chmod(1)."""

from __future__ import annotations

import re
from collections.abc import Callable

from hutch.dockerfile.source import SourceError

__all__ = ["parse_mode"]

_CLAUSE = re.compile(r"([ugoa]*)((?:[-+=](?:[rwxXst]*|[ugo]))+)")
_ACTION = re.compile(r"([-+=])([rwxXst]*|[ugo])")
_SHIFT = {"u": 6, "g": 3, "o": 0}
_BITS = {"r": 4, "w": 2, "x": 1}

Change = Callable[[int, bool], int]


def parse_mode(text: str) -> Change:
    """Return what makes the new mode of (the old mode, whether it is a directory)."""
    if re.fullmatch(r"[0-7]{1,5}", text) and int(text, 8) <= 0o7777:
        fixed = int(text, 8)
        return lambda _mode, _directory: fixed
    changes: list[Change] = []
    for clause in text.split(","):
        match = _CLAUSE.fullmatch(clause)
        if match is None:
            raise SourceError(f"--chmod: cannot read {text[:40]!r}", hint="write 0755, or u+x,go-w")
        who = "ugo" if not match[1] or "a" in match[1] else match[1]
        changes += [_change(who, sign, what) for sign, what in _ACTION.findall(match[2])]

    def whole(mode: int, directory: bool) -> int:
        for change in changes:
            mode = change(mode, directory)
        return mode

    return whole


def _change(who: str, sign: str, what: str) -> Change:
    def apply(mode: int, directory: bool) -> int:
        for letter in who:
            shift = _SHIFT[letter]
            bits = _asked(what, mode, directory)
            special = _special(what, letter)
            if sign == "=":
                mode &= ~(7 << shift)
                mode |= bits << shift
            elif sign == "+":
                mode |= bits << shift
            else:
                mode &= ~(bits << shift)
            mode = mode & ~special if sign == "-" else mode | special
        return mode & 0o7777

    return apply


def _asked(what: str, mode: int, directory: bool) -> int:
    if what in ("u", "g", "o"):
        return mode >> _SHIFT[what] & 7
    bits = 0
    for letter in what:
        if letter == "X":
            bits |= 1 if directory or mode & 0o111 else 0
        bits |= _BITS.get(letter, 0)
    return bits


def _special(what: str, who: str) -> int:
    found = 0
    if "s" in what:
        found |= {"u": 0o4000, "g": 0o2000, "o": 0}[who]
    if "t" in what and who == "o":
        found |= 0o1000
    return found
