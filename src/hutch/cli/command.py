"""What a command is: its options, its usage, and the function that does it.

A command's module defines `COMMANDS`, a dictionary from its words (`"network create"`) to
`Command`s; `hutch.cli.table` says in which module a command is, so that only one is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hutch.cli.options import Option, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hutch.cli.session import Invocation

    Handler = Callable[[Invocation], int]

__all__ = ["FILTER", "FORMAT", "NO_TRUNC", "QUIET", "Command", "expect"]

FORMAT: Option = ("format", "", "text", "TEMPLATE", "Write with a Go template, or `json`")
FILTER: Option = ("filter", "f", "list", "KEY=VALUE", "Show what matches only")
NO_TRUNC: Option = ("no-trunc", "", "flag", "", "Do not shorten")
QUIET: Option = ("quiet", "q", "flag", "", "Show identifiers only")


class Command:
    """One command. `arguments` is the usage after the options; `low` and `high` bound how
    many there are (`high` -1: any number). With `interspersed` options may follow them."""

    __slots__ = (
        "arguments",
        "epilog",
        "examples",
        "handler",
        "high",
        "interspersed",
        "low",
        "options",
        "summary",
    )

    def __init__(
        self,
        *,
        handler: Handler,
        summary: str,
        arguments: str = "",
        low: int = 0,
        high: int = 0,
        options: tuple[Option, ...] = (),
        interspersed: bool = True,
        examples: tuple[str, ...] = (),
        epilog: str = "",
    ) -> None:
        self.handler = handler
        self.summary = summary
        self.arguments = arguments
        self.low = low
        self.high = high
        self.options = options
        self.interspersed = interspersed
        self.examples = examples
        self.epilog = epilog


def expect(command: Command, words: str, arguments: list[Any]) -> None:
    """Raise `UsageError` unless the number of arguments fits."""
    count = len(arguments)
    if count < command.low or (command.high >= 0 and count > command.high):
        wanted = (
            f"exactly {command.low}"
            if command.low == command.high
            else f"at least {command.low}"
            if count < command.low
            else f"at most {command.high}"
        )
        noun = "argument" if wanted.endswith(" 1") else "arguments"
        raise UsageError(
            f"{words}: expected {wanted} {noun}, got {count}",
            hint=f"hutch {words} {command.arguments}".rstrip(),
            exit_code=1,
        )
