"""`.dockerignore`: which paths of a context are left out. The last pattern that fits decides."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Sequence

from hutch.errors import InvalidArgument

__all__ = ["Ignore", "compile_pattern", "read_ignore"]

_MAX_PATTERNS = 10_000
_MAX_STARS = 24
_MAX_INNER = 3
_STAR, _ANY, _DIRECTORIES = "[^/]*", ".*", "(?:.*/)?"
_LAZY = {_ANY: ".*?", _DIRECTORIES: "(?:[^/]*/)*?"}


def read_ignore(data: bytes, name: str = ".dockerignore") -> Ignore:
    """Read a file of patterns, one a line; `#` at the beginning makes a comment."""
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    lines = [line.strip() for line in text.split("\n") if not line.startswith("#")]
    return Ignore([line for line in lines if line], name=name)


class Ignore:
    """Patterns in order. An empty list ignores nothing."""

    def __init__(self, patterns: Iterable[str], *, name: str = "exclude") -> None:
        self._rules: list[tuple[bool, re.Pattern[str]]] = []
        self._kept: list[str] = []
        for index, written in enumerate(patterns):
            where = f"{name}[{index}]"
            pattern = written
            negated = pattern.startswith("!")
            if negated:
                pattern = pattern[1:].strip()
                if not pattern:
                    raise InvalidArgument("'!' needs a pattern", field=where)
            pattern = posixpath.normpath(pattern.lstrip("/") or ".") if pattern != "/" else "."
            if pattern == ".":
                continue
            self._rules.append((negated, compile_pattern(pattern, where)))
            if negated:
                self._kept.append(pattern)
        if len(self._rules) > _MAX_PATTERNS:
            raise InvalidArgument(f"more than {_MAX_PATTERNS} patterns", field=name)

    def __bool__(self) -> bool:
        return bool(self._rules)

    def ignores(self, path: str) -> bool:
        """Tell whether a path (relative, without `./`) is left out, itself or with a parent."""
        parts = path.split("/")
        prefixes = ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]
        ignored = False
        for negated, pattern in self._rules:
            if ignored == (not negated):
                continue
            if any(pattern.fullmatch(prefix) for prefix in prefixes):
                ignored = not negated
        return ignored

    def may_keep_beneath(self, directory: str) -> bool:
        """Tell whether an ignored directory may have something in it that is not ignored."""
        for kept in self._kept:
            fixed = _fixed_part(kept)
            if f"{fixed}/".startswith(f"{directory}/") or f"{directory}/".startswith(
                f"{fixed}/" if fixed else ""
            ):
                return True
        return False


def _fixed_part(pattern: str) -> str:
    """Return the directories of a pattern ahead of the first that has a wildcard."""
    parts: list[str] = []
    for part in pattern.split("/"):
        if any(char in part for char in "*?[\\"):
            break
        parts.append(part)
    return "/".join(parts)


def compile_pattern(pattern: str, field: str = "pattern") -> re.Pattern[str]:
    """Return a pattern as a regular expression: `*` and `?` stay within a name, `**` goes
    over any number of directories, `[a-z]` and `[^a-z]` are sets, `\\` takes what follows."""
    if pattern.count("*") > _MAX_STARS:
        raise InvalidArgument(f"more than {_MAX_STARS} wildcards", field=field)
    parts: list[str] = []
    at = 0
    while at < len(pattern):
        char = pattern[at]
        at += 1
        if char == "*":
            if pattern[at : at + 1] == "*":
                at += 1
                if pattern[at : at + 1] == "/":
                    at += 1
                    parts.append(_DIRECTORIES)
                else:
                    parts.append(_ANY)
            elif parts[-1:] != [_STAR]:
                parts.append(_STAR)
        elif char == "?":
            parts.append("[^/]")
        elif char == "[":
            text, at = _set(pattern, at, field)
            parts.append(text)
        elif char == "\\":
            if at >= len(pattern):
                raise InvalidArgument("ends with a backslash", field=field)
            parts.append(re.escape(pattern[at]))
            at += 1
        else:
            parts.append(re.escape(char))
    try:
        return re.compile("|".join(_whole(parts, field)), re.DOTALL)
    except re.error as error:
        raise InvalidArgument(f"bad pattern {pattern[:80]!r}: {error}", field=field) from None


def _whole(parts: list[str], field: str, inner: int = 0) -> list[str]:
    """Return expressions of which one has to fit: `x**/y` is `xy`, or `x`, anything and `/y`."""
    for at, part in enumerate(parts):
        if part == _DIRECTORIES and at and parts[at - 1] not in ("/", _DIRECTORIES):
            if inner >= _MAX_INNER:
                raise InvalidArgument(
                    f"'**/' stands within a name more than {_MAX_INNER} times", field=field
                )
            before, after = parts[:at], parts[at + 1 :]
            return [
                *_whole([*before, *after], field, inner + 1),
                *_whole([*before, _ANY, "/", *after], field, inner + 1),
            ]
    return [_joined(parts)]


def _joined(parts: list[str]) -> str:
    """Put a pattern together so that no path takes long, whoever wrote either: of what stands
    before a `*` or `**` the first place that fits does as well as any later one, and nothing
    is tried twice (`(?>…)`)."""
    groups: list[tuple[str, list[str]]] = [("", [])]
    for part in parts:
        if part in _LAZY:
            groups.append((part, []))
        else:
            groups[-1][1].append(part)
    *others, (wide, last) = groups
    return "".join(
        [f"(?>{_LAZY.get(w, '')}{_group(group, True)})" for w, group in others]
        + [wide, _group(last, False)]
    )


def _group(parts: list[str], lazy: bool) -> str:
    """Return what has no `**` in it; the last `*` goes as far as it can but where it is lazy."""
    text, rest = "", parts
    while _STAR in rest:
        at = rest.index(_STAR)
        text, rest = text + "".join(rest[:at]), rest[at + 1 :]
        end = rest.index(_STAR) if _STAR in rest else len(rest)
        chunk, rest = "".join(rest[:end]), rest[end:]
        text += f"(?>[^/]*?{chunk})" if rest or lazy else f"{_STAR}{chunk}"
    return text + "".join(rest)


def _set(pattern: str, at: int, field: str) -> tuple[str, int]:
    end = at + (pattern[at : at + 1] == "^")
    inner = ""
    first = end
    while end < len(pattern) and (pattern[end] != "]" or end == first):
        char = pattern[end]
        if char == "\\" and end + 1 < len(pattern):
            end += 1
            inner += re.escape(pattern[end])
        else:
            inner += char if char == "-" else re.escape(char)
        end += 1
    if end >= len(pattern):
        raise InvalidArgument(f"'[' is not closed in {pattern[:80]!r}", field=field)
    return f"[{'^/' if pattern[at] == '^' else ''}{inner}]", end + 1


def has_wildcard(path: str) -> bool:
    """Tell whether a source of COPY is a pattern."""
    return any(char in path for char in "*?[")


def matching(pattern: str, paths: Sequence[str]) -> list[str]:
    """Return the paths that a pattern fits, in their order."""
    rule = compile_pattern(posixpath.normpath(pattern))
    return [path for path in paths if rule.fullmatch(path)]
