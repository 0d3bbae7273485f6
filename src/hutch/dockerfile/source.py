"""Errors that point at a line of the Dockerfile."""

from __future__ import annotations

from collections.abc import Sequence

from hutch.errors import HutchError, InvalidArgument

__all__ = ["SourceError", "StepFailed", "excerpt"]

_AROUND = 2
_WIDEST = 160


class SourceError(InvalidArgument):
    """A Dockerfile is wrong at lines `first` to `last` (from 1; 0: nowhere in particular).

    `name` is the file's name and `excerpt` the lines around, the wrong ones marked.
    """

    def __init__(
        self, message: str, *, first: int = 0, last: int = 0, hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.reason = message
        self.first = first
        self.last = last or first
        self.name = "Dockerfile"
        self.excerpt = ""

    def locate(self, name: str, lines: Sequence[str]) -> SourceError:
        """Fill in the name of the file and the excerpt; return the error itself."""
        self.name = name
        if self.first:
            self.message = f"{name}:{self.first}: {self.reason}"
            self.args = (self.message,)
            self.excerpt = excerpt(name, lines, self.first, self.last)
        return self


class StepFailed(HutchError):
    """A command of a build ended with another code than 0 (`exit_code`); `excerpt` has the lines
    of the Dockerfile around it."""

    def __init__(
        self, message: str, *, exit_code: int, command: str = "", hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code
        self.command = command
        self.excerpt = ""


def excerpt(name: str, lines: Sequence[str], first: int, last: int) -> str:
    """Return the lines around `first` to `last`, these marked with `>>>`."""
    low, high = max(first - _AROUND, 1), min(last + _AROUND, len(lines))
    shown = [f"{name}:{first}", "-" * 20]
    for number in range(low, high + 1):
        mark = ">>>" if first <= number <= last else "   "
        text = lines[number - 1].rstrip("\r\n")[:_WIDEST]
        safe = "".join(
            c if c.isprintable() or c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in text
        )
        shown.append(f"{number:4} | {mark} {safe}".rstrip())
    return "\n".join([*shown, "-" * 20])
