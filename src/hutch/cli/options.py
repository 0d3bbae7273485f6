"""Parse options by Docker's rules, from a table per command.

`argparse` is not used: it cannot end the options at the first argument, nor read
`--flag=false`, and building its parser for `run` costs several milliseconds.
"""

from __future__ import annotations

from typing import Any

from hutch.errors import HutchError

__all__ = ["Option", "UnknownOption", "UsageError", "destination", "parse"]

# (long name, short letter or "", kind, placeholder, help)
# kinds: flag; text and int (last one wins); list (every one counts)
Option = tuple[str, str, str, str, str]

_TRUE = ("true", "1", "t", "T", "TRUE", "True")
_FALSE = ("false", "0", "f", "F", "FALSE", "False")


class UsageError(HutchError):
    """The command line itself is wrong. `exit_code` is 125 for options, 1 for arguments."""

    def __init__(self, message: str, *, hint: str | None = None, exit_code: int = 125) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


class UnknownOption(UsageError):
    """An option that the command does not have; `name` is without its dashes."""

    def __init__(self, message: str, *, name: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.name = name


def destination(name: str) -> str:
    """Return the key under which an option's value is found: `dry-run` → `dry_run`."""
    return name.replace("-", "_")


def parse(
    table: tuple[Option, ...], argv: list[str], *, interspersed: bool = True
) -> tuple[dict[str, Any], list[str]]:
    """Return the values given and the arguments that are no options.

    Without `interspersed`, options end at the first argument, so that what follows an
    image or an instance belongs to the program run there. `--` ends them everywhere.
    """
    longs = {option[0]: option for option in table}
    shorts = {option[1]: option for option in table if option[1]}
    values: dict[str, Any] = {}
    arguments: list[str] = []
    i = 0
    while i < len(argv):
        word = argv[i]
        i += 1
        if word == "--":
            arguments += argv[i:]
            break
        if word.startswith("--"):
            i = _long(word[2:], longs, argv, i, values)
        elif word.startswith("-") and len(word) > 1:
            i = _shorts(word[1:], shorts, argv, i, values)
        else:
            arguments.append(word)
            if not interspersed:
                arguments += argv[i:]
                break
    return values, arguments


def _long(
    word: str, longs: dict[str, Option], argv: list[str], i: int, values: dict[str, Any]
) -> int:
    name, equals, value = word.partition("=")
    option = longs.get(name)
    if option is None:
        raise UnknownOption(f"unknown option: --{name}", name=name, hint=_near(name, list(longs)))
    if option[2] == "flag":
        _store(values, option, value if equals else "true", f"--{name}")
        return i
    if not equals:
        if i >= len(argv):
            raise UsageError(f"option needs a value: --{name}")
        value = argv[i]
        i += 1
    _store(values, option, value, f"--{name}")
    return i


def _shorts(
    letters: str, shorts: dict[str, Option], argv: list[str], i: int, values: dict[str, Any]
) -> int:
    """Read `-itd`, `-ename=value`, `-e name=value`, `-t=false`."""
    for position, letter in enumerate(letters):
        option = shorts.get(letter)
        if option is None:
            raise UnknownOption(f"unknown option: -{letter} in -{letters}", name=letter)
        rest = letters[position + 1 :]
        if option[2] == "flag":
            if rest.startswith("="):
                _store(values, option, rest[1:], f"-{letter}")
                return i
            _store(values, option, "true", f"-{letter}")
            continue
        if rest:
            _store(values, option, rest.removeprefix("="), f"-{letter}")
            return i
        if i >= len(argv):
            raise UsageError(f"option needs a value: -{letter}")
        _store(values, option, argv[i], f"-{letter}")
        return i + 1
    return i


def _store(values: dict[str, Any], option: Option, value: str, written: str) -> None:
    key = destination(option[0])
    match option[2]:
        case "flag":
            if value not in _TRUE and value not in _FALSE:
                raise UsageError(f"{written}: expected true or false, got {value!r}")
            values[key] = value in _TRUE
        case "int":
            try:
                values[key] = int(value)
            except ValueError:
                raise UsageError(f"{written}: expected a whole number, got {value!r}") from None
        case "list":
            values.setdefault(key, []).append(value)
        case _:
            values[key] = value


def _near(name: str, known: list[str]) -> str | None:
    from difflib import get_close_matches

    near = get_close_matches(name, known, 1, 0.75)  # with 0.6 bogus is near gpus
    return f"did you mean --{near[0]}?" if near else "see --help"
