"""Help texts: the overview, the groups, and the page of one command."""

from __future__ import annotations

from hutch.cli.command import Command
from hutch.cli.main import GLOBAL_OPTIONS
from hutch.cli.options import Option
from hutch.cli.table import ALIASES, GROUPS, HIDDEN, TABLE

__all__ = ["command_page", "overview", "show_command", "show_overview"]

_WIDTH = 92


def show_overview(group: str | None) -> None:
    """Print all commands, or those of one group."""
    print(overview(group))


def show_command(words: str, command: Command) -> None:
    """Print the page of one command."""
    print(command_page(words, command))


def overview(group: str | None) -> str:
    """Return the list of commands, of all of them or of one group."""
    shown = {words: line for words, (_, line) in TABLE.items() if words not in HIDDEN}
    if group is not None and group != "container":
        members = {w: line for w, line in shown.items() if w.startswith(group + " ")}
        return "\n".join(
            [
                f"Usage: hutch {group} COMMAND",
                "",
                GROUPS[group],
                "",
                "Commands:",
                *_columns([(w.removeprefix(f"{group} "), line) for w, line in members.items()]),
                "",
                f"`hutch {group} COMMAND --help` says more about one.",
            ]
        )
    single = [(words, line) for words, line in shown.items() if " " not in words]
    return "\n".join(
        [
            "Usage: hutch [OPTIONS] COMMAND",
            "",
            "Run OCI images as containers, without a daemon.",
            "",
            "Commands:",
            *_columns(single),
            "",
            "Groups:",
            *_columns([(name, line) for name, line in GROUPS.items() if " " not in name]),
            "",
            "Options:",
            *option_lines(GLOBAL_OPTIONS),
            "",
            "Examples:",
            "  hutch image bootstrap busybox",
            "  hutch run --rm -it busybox sh",
            "  hutch doctor",
            "",
            "`hutch COMMAND --help` says more about one.",
        ]
    )


def command_page(words: str, command: Command) -> str:
    """Return the page of one command."""
    usage = f"Usage: hutch {words} [OPTIONS] {command.arguments}".rstrip()
    lines = [usage, "", command.summary]
    other = [alias for alias, real in ALIASES.items() if real == words]
    if other:
        lines += ["", "Also: " + ", ".join(f"hutch {alias}" for alias in other)]
    if command.epilog:
        lines += ["", *_wrap(command.epilog, _WIDTH)]
    if command.options:
        lines += ["", "Options:", *option_lines(sorted(command.options))]
    if command.examples:
        lines += ["", "Examples:", *(f"  {example}" for example in command.examples)]
    return "\n".join(lines)


def option_lines(options: tuple[Option, ...] | list[Option]) -> list[str]:
    """Return the lines that describe options."""
    rows = []
    for name, short, kind, placeholder, text in options:
        left = f"{f'-{short}, ' if short else '    '}--{name}"
        if kind != "flag":
            left += f" {placeholder or 'VALUE'}"
        rows.append((left, text + (" (may be repeated)" if kind == "list" else "")))
    return _columns(rows)


def _columns(rows: list[tuple[str, str]]) -> list[str]:
    width = min(max((len(left) for left, _ in rows), default=0), 34)
    lines = []
    for left, right in rows:
        wrapped = _wrap(right, _WIDTH - width - 4) or [""]
        if len(left) > width:
            lines += [f"  {left}"]
        else:
            lines += [f"  {left:<{width}}  {wrapped.pop(0)}".rstrip()]
        lines += [f"  {'':<{width}}  {part}" for part in wrapped]
    return lines


def _wrap(text: str, width: int) -> list[str]:
    from textwrap import wrap

    return wrap(text, width)
