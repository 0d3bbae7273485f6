"""Read a Dockerfile's text into statements: directives, continuations, comments, heredocs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hutch.dockerfile.model import Directives, Heredoc, Statement
from hutch.dockerfile.source import SourceError
from hutch.dockerfile.words import split_words

__all__ = ["MAX_BYTES", "decode", "read_statement", "read_statements"]

MAX_BYTES = 4 << 20
"""Bytes that a Dockerfile may have."""

_MAX_STATEMENTS = 20_000
_DIRECTIVE = re.compile(r"#[ \t]*([a-zA-Z][a-zA-Z0-9]*)[ \t]*=[ \t]*(.*?)[ \t\r]*$")
_HEREDOC = re.compile(r"""(\d*)<<(-?)(["']?)([^\s<"']+)\3$""")
_WITH_HEREDOCS = ("RUN", "COPY", "ADD")
_BLANKS = " \t\v\f\r"


def decode(data: bytes, name: str) -> str:
    """Return the text of a Dockerfile, its byte order mark gone; refuse what is no text."""
    if len(data) > MAX_BYTES:
        raise SourceError(f"{name}: larger than {MAX_BYTES} bytes")
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise SourceError(f"{name}: not UTF-8 text in line {line}") from None
    if "\0" in text:
        raise SourceError(f"{name}: not a text: there is a zero byte in it")
    return text


def read_statements(text: str) -> tuple[Directives, list[Statement], list[int]]:
    """Return the directives, the statements, and the lines where a blank or a comment stands
    inside a continued instruction; raise `SourceError` with lines."""
    lines = text.split("\n")
    directives = _directives(lines)
    reader = _Reader(lines, directives.escape)
    statements: list[Statement] = []
    while (statement := reader.next()) is not None:
        statements.append(statement)
        if len(statements) > _MAX_STATEMENTS:
            raise SourceError(f"more than {_MAX_STATEMENTS} instructions", first=statement.first)
    return directives, statements, reader.blanks


def _directives(lines: Sequence[str]) -> Directives:
    """Read the directives: comments at the very top that look like `# key=value`."""
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = _DIRECTIVE.match(line.strip(_BLANKS))
        if match is None:
            # A shell's first line may come before.
            if number == 1 and line.startswith("#!"):
                continue
            break
        key = match[1].lower()
        if key not in ("escape", "syntax", "check"):
            break
        if key in found:
            raise SourceError(f"only one {key} directive can be used", first=number)
        found[key] = match[2]
        if key == "escape" and match[2] not in ("\\", "`"):
            raise SourceError(f"escape: expected \\ or `, got {match[2][:20]!r}", first=number)
    skipped, are_errors = _check(found.get("check", ""))
    return Directives(
        escape=found.get("escape", "\\"),
        syntax=found.get("syntax", ""),
        skipped_checks=skipped,
        checks_are_errors=are_errors,
    )


def _check(text: str) -> tuple[tuple[str, ...], bool]:
    """Read `skip=A,B;error=true`."""
    skipped: tuple[str, ...] = ()
    are_errors = False
    for part in filter(None, (p.strip() for p in text.split(";"))):
        key, _, value = part.partition("=")
        if key.strip() == "skip":
            skipped = tuple(name.strip() for name in value.split(","))
        elif key.strip() == "error" and value.strip().lower() in ("true", "false", "1", "0"):
            are_errors = value.strip().lower() in ("true", "1")
        else:
            raise SourceError(f"check: expected skip=… or error=true, got {part[:40]!r}", first=1)
    return skipped, are_errors


class _Reader:
    """The lines of a Dockerfile, read one statement at a time."""

    def __init__(self, lines: Sequence[str], escape: str) -> None:
        self._lines = lines
        self._escape = escape
        self._at = 0
        mark = re.escape(escape)
        # A doubled escape at the end is no continuation.
        self._continued = re.compile(rf"(?:^|[^{mark}]){mark}[ \t\r]*$")
        self.blanks: list[int] = []

    def next(self) -> Statement | None:
        while self._at < len(self._lines):
            line = self._lines[self._at].lstrip(_BLANKS).rstrip("\r")
            if line and not line.startswith("#"):
                return self._statement()
            self._at += 1
        return None

    def _statement(self) -> Statement:
        start = self._at
        parts: list[str] = []
        while self._at < len(self._lines):
            line = self._lines[self._at].rstrip("\r")
            self._at += 1
            bare = line.lstrip(_BLANKS)
            if parts and (not bare or bare.startswith("#")):
                if not bare:
                    self.blanks.append(self._at)
                continue
            if not parts:
                line = bare
            if self._continued.search(line):
                parts.append(line.rstrip(_BLANKS)[:-1])
                continue
            parts.append(line)
            break
        joined = "".join(parts).rstrip(_BLANKS)
        try:
            keyword, flags, text = read_statement(joined, self._escape)
            heredocs = self._heredocs(keyword, text)
        except SourceError as error:
            error.first, error.last = error.first or start + 1, self._at
            raise
        return Statement(
            keyword=keyword,
            flags=flags,
            text=text,
            heredocs=heredocs,
            first=start + 1,
            last=self._at,
            written=joined,
        )

    def _heredocs(self, keyword: str, text: str) -> tuple[Heredoc, ...]:
        if keyword == "ONBUILD":
            keyword, text = _split(text)
        if keyword.upper() not in _WITH_HEREDOCS or "<<" not in text:
            return ()
        found = []
        for word in split_words(text, self._escape):
            match = _HEREDOC.match(word)
            if match is not None:
                found.append(self._document(match))
        return tuple(found)

    def _document(self, match: re.Match[str]) -> Heredoc:
        fd, strips, name = match[1], bool(match[2]), match[4]
        body: list[str] = []
        first = self._at
        while self._at < len(self._lines):
            line = self._lines[self._at]
            self._at += 1
            if strips:
                line = line.lstrip("\t")
            if line.rstrip("\r") == name:
                return Heredoc(
                    name=name,
                    content="".join(f"{text}\n" for text in body),
                    expand=not match[3],
                    strip_tabs=strips,
                    fd=fd,
                )
            body.append(line)
        raise SourceError(f"heredoc {name!r} is not ended by a line {name!r}", first=first)


def read_statement(line: str, escape: str) -> tuple[str, tuple[str, ...], str]:
    """Split a statement into its keyword in capitals, its flags, and the rest."""
    keyword, rest = _split(line)
    flags: list[str] = []
    while rest.startswith("--"):
        word, after = _flag(rest, escape)
        if word == "--":
            rest = after
            break
        flags.append(word)
        rest = after
    return keyword.upper(), tuple(flags), rest


def _split(line: str) -> tuple[str, str]:
    for at, char in enumerate(line):
        if char in _BLANKS:
            return line[:at], line[at:].strip(_BLANKS)
    return line, ""


def _flag(text: str, escape: str) -> tuple[str, str]:
    """Take one flag off the front, its quotes and escapes resolved."""
    word, quote, at = "", "", 0
    while at < len(text):
        char = text[at]
        if char == escape and at + 1 < len(text) and quote != "'":
            following = text[at + 1]
            # What an expansion is to see stays escaped.
            word += char + following if following == "$" else following
            at += 2
            continue
        if quote:
            if char == quote:
                quote = ""
            else:
                word += char
        elif char in "'\"":
            quote = char
        elif char in _BLANKS:
            break
        else:
            word += char
        at += 1
    if quote:
        raise SourceError(f"quote {quote} is not closed in {text[:60]!r}")
    return word, text[at:].strip(_BLANKS)
