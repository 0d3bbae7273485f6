"""Words and variables of a Dockerfile: quotes, escapes, `$x` and every form of `${x…}`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hutch.dockerfile.patterns import replace, strip_prefix, strip_suffix
from hutch.dockerfile.source import SourceError

__all__ = ["MAX_VALUE", "expand", "expand_words", "split_words"]

MAX_VALUE = 1 << 20
"""Characters that an expanded text may have: variables that double each other grow fast."""

_MAX_REPLACED = 4096
_MAX_DEPTH = 50
_SPECIAL = "@*#?-$!0"
_BLANKS = " \t\v\f\r\n"


def split_words(text: str, escape: str = "\\") -> list[str]:
    """Split at blanks outside quotes; quotes and escapes stay in the words."""
    words: list[str] = []
    word, quote, at = "", "", 0
    while at < len(text):
        char = text[at]
        if char == escape and quote != "'" and at + 1 < len(text):
            word += char + text[at + 1]
            at += 2
            continue
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in _BLANKS:
            if word:
                words.append(word)
            word = ""
            at += 1
            continue
        word += char
        at += 1
    return [*words, word] if word else words


def expand(
    text: str,
    env: Mapping[str, str],
    *,
    escape: str = "\\",
    keep_quotes: bool = False,
    keep_escapes: bool = False,
    used: Callable[[str], None] | None = None,
) -> str:
    """Return `text` with variables put in and, unless they are kept, quotes and escapes gone.

    A variable that is not set is empty; `used` is told each name that is asked for without a
    word for that case. Raises
    `SourceError` for what is not closed, and for `${x?message}` where it has to.
    """
    return _Expansion(text, env, escape, keep_quotes, keep_escapes, used).whole()


def expand_words(
    text: str,
    env: Mapping[str, str],
    *,
    escape: str = "\\",
    used: Callable[[str], None] | None = None,
) -> list[str]:
    """Return the words of `text` after expansion: a value with blanks becomes several words
    where it is not in quotes."""
    words: list[str] = []
    for raw in split_words(text, escape):
        whole = expand(raw, env, escape=escape, used=used)
        words += [whole] if raw[:1] in "'\"" else whole.split()
    return words


class _Expansion:
    """One text under way; `at` is the next character."""

    def __init__(
        self,
        text: str,
        env: Mapping[str, str],
        escape: str,
        keep_quotes: bool,
        keep_escapes: bool,
        used: Callable[[str], None] | None,
    ) -> None:
        self._text = text
        self._env = env
        self._escape = escape
        self._keep_quotes = keep_quotes
        self._keep_escapes = keep_escapes
        self._used = used
        self._at = 0
        self._depth = 0

    def whole(self) -> str:
        return self._until("")

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _until(self, stops: str) -> str:
        """Expand up to one of `stops`, which stays; an end of the text before it is an error."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise SourceError("variables are nested too deep")
        parts: list[str] = []
        size = 0
        while char := self._peek():
            if stops and char in stops:
                self._depth -= 1
                return "".join(parts)
            part = self._next(char)
            parts.append(part)
            size += len(part)
            if size > MAX_VALUE:
                raise SourceError(f"a value is longer than {MAX_VALUE} characters")
        if stops:
            raise SourceError(f"'{stops[-1]}' is missing in {self._text[:80]!r}")
        self._depth -= 1
        return "".join(parts)

    def _next(self, char: str) -> str:
        if char == "'" and not self._keep_quotes:
            return self._single()
        if char == '"' and not self._keep_quotes:
            return self._double()
        if char == "$":
            return self._variable()
        self._at += 1
        if char != self._escape:
            return char
        following = self._peek()
        if self._keep_escapes and following != "$":
            return char
        self._at += 1
        return following

    def _single(self) -> str:
        end = self._text.find("'", self._at + 1)
        if end < 0:
            raise SourceError(f"quote ' is not closed in {self._text[:80]!r}")
        inner = self._text[self._at + 1 : end]
        self._at = end + 1
        return inner

    def _double(self) -> str:
        self._at += 1
        parts: list[str] = []
        while char := self._peek():
            if char == '"':
                self._at += 1
                return "".join(parts)
            if char == "$":
                parts.append(self._variable())
                continue
            self._at += 1
            if char == self._escape and (following := self._peek()):
                # Only these are escaped within quotes; before others the escape is itself.
                parts.append(following if following in f'"${self._escape}' else char + following)
                self._at += 1
                continue
            parts.append(char)
        raise SourceError(f'quote " is not closed in {self._text[:80]!r}')

    # ---- variables --------------------------------------------------------------------

    def _variable(self) -> str:
        self._at += 1
        if self._peek() == "{":
            self._at += 1
            return self._braced()
        name = self._name()
        if not name:
            return "$"
        if self._used is not None:
            self._used(name)
        return self._env.get(name, "")

    def _name(self) -> str:
        start, char = self._at, self._peek()
        if char and char in _SPECIAL:
            self._at += 1
            return char
        if char.isascii() and char.isdigit():
            while (char := self._peek()).isascii() and char.isdigit():
                self._at += 1
        elif char.isascii() and (char.isalpha() or char == "_"):
            while (char := self._peek()) == "_" or (char.isascii() and char.isalnum()):
                self._at += 1
        return self._text[start : self._at]

    def _value(self, name: str) -> str | None:
        if self._used is not None and self._peek() not in (":", "-", "+", "?"):
            self._used(name)
        return self._env.get(name)

    def _braced(self) -> str:
        name = self._name()
        if not name:
            raise SourceError(f"bad substitution in {self._text[:80]!r}")
        value = self._value(name)
        form = self._peek()
        if form == "}":
            self._at += 1
            return value or ""
        self._at += 1
        match form:
            case ":" | "-" | "+" | "?":
                return self._alternative(name, value, form)
            case "#" | "%":
                longest = self._peek() == form
                self._at += longest
                pattern = self._pattern("}")
                self._at += 1
                strip = strip_prefix if form == "#" else strip_suffix
                return strip(value or "", pattern, longest=longest)
            case "/":
                return self._replaced(value or "")
        raise SourceError(f"unsupported modifier {form!r} in {self._text[:80]!r}")

    def _alternative(self, name: str, value: str | None, form: str) -> str:
        """`:-`, `-`, `:+`, `+`, `:?`, `?`: with the colon an empty value counts as none."""
        is_set = value is not None
        if form == ":":
            is_set = bool(value)
            form = self._peek()
            self._at += 1
        word = self._until("}")
        self._at += 1
        match form:
            case "-":
                return value or "" if is_set else word
            case "+":
                return word if is_set else ""
            case "?":
                if is_set:
                    return value or ""
                raise SourceError(f"{name}: {word or 'is not set'}")
        raise SourceError(f"unsupported modifier ':{form}' in {self._text[:80]!r}")

    def _pattern(self, stops: str) -> str:
        """Expand a pattern: what is escaped stays so, for the pattern to tell."""
        parts: list[str] = []
        while char := self._peek():
            if char in stops:
                return "".join(parts)
            if char == self._escape and self._at + 1 < len(self._text):
                parts.append("\\" + self._text[self._at + 1])
                self._at += 2
            else:
                parts.append(self._next(char))
        raise SourceError(f"'{stops[-1]}' is missing in {self._text[:80]!r}")

    def _replaced(self, value: str) -> str:
        every = self._peek() == "/"
        self._at += every
        pattern = self._pattern("/}")
        by = ""
        if self._peek() == "/":
            self._at += 1
            by = self._until("}")
        self._at += 1
        if len(value) > _MAX_REPLACED:
            raise SourceError(f"'/' works on values of up to {_MAX_REPLACED} characters")
        return replace(value, pattern, by, every=every)
