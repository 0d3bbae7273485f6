"""The entry point: global options, finding the command, and turning errors into exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import TYPE_CHECKING, NoReturn

from hutch.cli.options import Option, UnknownOption, UsageError, parse
from hutch.cli.table import ALIASES, GROUPS, HIDDEN, TABLE

if TYPE_CHECKING:
    from types import ModuleType

    from hutch.cli.command import Command

__all__ = ["GLOBAL_OPTIONS", "find_command", "group_of", "main", "run"]

GLOBAL_OPTIONS: tuple[Option, ...] = (
    ("root", "", "text", "DIRECTORY", "Where everything is kept (HUTCH_ROOT)"),
    ("output", "o", "text", "FORMAT", "Write `table` or `json`"),
    ("debug", "D", "flag", "", "Show tracebacks of errors"),
    ("help", "h", "flag", "", "Show this help"),
    ("version", "v", "flag", "", "Show the version"),
)
_LIGHT = ("version", "completion")
_INTERRUPTS = (1, 2, 15)  # SIGHUP, SIGINT, SIGTERM: `signal` itself costs 2 ms
_STAND_INS: dict[str, dict[str, object] | None] = {
    "typing_extensions": None,
    "platform": {"system": lambda: os.uname().sysname},
    "msgspec.inspect": {},
    "msgspec._json_schema": {"schema": None, "schema_components": None},
}
# The modules of commands that leave files or processes behind unless they end in order.
_UNDONE = ("transfer", "files", "build", "run", "vm", "lifecycle", "snapshots")
_TRAILING: tuple[Option, ...] = (
    ("output", "o", "text", "FORMAT", "Write `table` or `json`"),
    ("help", "", "flag", "", "Show this help"),
)


def main() -> NoReturn:
    """Run the command line of this process and leave with its exit code."""
    import gc

    # A command lives for milliseconds: collecting cycles while modules load is wasted work.
    gc.set_threshold(100_000)
    _speak_utf8()
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = code or 1
    # Nothing is left to clean up, and taking the interpreter down costs milliseconds.
    os._exit(code)


def _speak_utf8() -> None:
    """Write UTF-8 whatever the locale says: names and logs are in it, and so is JSON."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.encoding != "utf-8":
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def run(argv: list[str]) -> int:
    """Run one command line; return its exit code. Errors are written to stderr."""
    debug = "--debug" in argv or "-D" in argv[:1]
    call = _Call()
    try:
        return _dispatch(argv, call)
    except BrokenPipeError:
        _silence_stdout()
        return 128 + 13
    except KeyboardInterrupt:
        return 130
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else 1
    except Exception as exc:
        from hutch.cli.exitcodes import report

        if debug:
            import traceback

            traceback.print_exc()
        return report(exc, run_like=call.words == "run", as_json=call.json)


class _Call:
    """What is known of a command line when it fails."""

    words = ""
    json = False


def _silence_stdout() -> None:
    """Keep the interpreter from writing to the closed pipe once more."""
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(null, 1)
    os.close(null)


def _dispatch(argv: list[str], call: _Call) -> int:
    """Find and do the command; what is found of it is put into `call`."""
    settings, rest = parse(GLOBAL_OPTIONS, argv, interspersed=False)
    call.json = settings.get("output") == "json"
    if settings.get("version") and not rest:
        rest = ["version"]
    if not rest or (settings.get("help") and not rest):
        from hutch.cli.help import show_overview

        show_overview(None)
        return 0
    if rest[0] == "help":
        rest = [*rest[1:], "--help"]
        if len(rest) == 1:
            return _dispatch(["--help"], call)
    words, arguments = find_command(rest)
    if not words:
        from hutch.cli.help import show_overview

        group = group_of(rest)
        show_overview(group)
        return 0 if len(rest) > len(group.split()) else 1
    call.words = words
    if words not in _LIGHT:
        _load_msgspec()
    command = load_command(words)
    taken = {name for option in command.options for name in option[:2]}
    extra = tuple(
        (o[0], "" if o[1] in taken else o[1], *o[2:]) for o in _TRAILING if o[0] not in taken
    )
    try:
        values, positionals = parse(
            (*command.options, *extra), arguments, interspersed=command.interspersed
        )
    except UsageError as exc:
        call.json = call.json or ("output" not in taken and _asks_json(arguments))
        raise (_refused(words, exc) if isinstance(exc, UnknownOption) else exc) from None
    if "output" not in taken:
        call.json = values.get("output", settings.get("output")) == "json"
    if values.pop("help", False) or settings.get("help"):
        from hutch.cli.help import show_command

        show_command(words, command)
        return 0
    return _invoke(words, command, settings, values, positionals, "output" not in taken)


@contextmanager
def _ended_by_exception() -> Iterator[None]:
    """Let SIGTERM and SIGHUP undo what is half done, as Ctrl-C does; a second one kills."""
    import signal

    def end(number: int, _frame: object) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)
        raise SystemExit(128 + number)

    # What nohup(1) or a parent has ignored stays ignored.
    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) == signal.SIG_DFL
    ]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _asks_json(arguments: list[str]) -> bool:
    """Guess whether a command line that cannot be read asks for JSON."""
    written = " ".join(arguments).replace("=", " ")
    return any(text in written for text in ("-o json", "-ojson", "--output json"))


def _refused(words: str, exc: UnknownOption) -> UsageError:
    """Return a better error for an option that Docker has and hutch has not."""
    from hutch.cli.refused import refused_option

    why = refused_option(words, exc.name)
    return exc if why is None else UsageError(f"--{exc.name} is not supported", hint=why)


def _load_msgspec() -> None:
    """Load msgspec without those parts of it that no command uses: 13 ms in all.

    typing_extensions brings inspect, ast and dis; `typing` has what msgspec takes from it
    since 3.11. uuid asks platform, which compiles regular expressions, only for the name of
    the system. Types are neither inspected nor described as schemas here. Whoever imports
    one of these later gets the real one.
    """
    if "msgspec" in sys.modules:
        return
    import signal

    # An interrupt while it looks for what it may do without is taken for a "not there": it
    # then crashes with its first decoder.
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
    absent = [name for name in _STAND_INS if name not in sys.modules]
    for name in absent:
        sys.modules[name] = _stand_in(name)
    try:
        import msgspec  # noqa: F401
    finally:
        for name in absent:
            del sys.modules[name]
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _stand_in(name: str) -> ModuleType:
    if _STAND_INS[name] is None:
        return None  # type: ignore[return-value]  # as where it is not installed
    module = type(sys)(name)
    module.__dict__.update(_STAND_INS[name] or {})
    return module


def _invoke(
    words: str,
    command: Command,
    settings: dict[str, object],
    values: dict[str, object],
    positionals: list[str],
    output_is_ours: bool,
) -> int:
    from hutch.cli.command import expect
    from hutch.cli.session import Invocation

    expect(command, words, positionals)
    output = values.pop("output", None) if output_is_ours else None
    output = output or settings.get("output") or "table"
    if output not in ("table", "json"):
        raise UsageError(f"--output: expected table or json, got {output!r}")
    root = settings.get("root")
    with Invocation(
        words=words,
        options=values,
        arguments=positionals,
        root=root if isinstance(root, str) else None,
        output=str(output),
    ) as invocation:
        if TABLE[words][0] not in _UNDONE:
            return command.handler(invocation)
        with _ended_by_exception():
            return command.handler(invocation)


def find_command(rest: list[str]) -> tuple[str, list[str]]:
    """Return the command's words and what follows them; no words for a bare group's name."""
    for count in (3, 2, 1):
        words = " ".join(rest[:count])
        words = ALIASES.get(words, words)
        if words in TABLE and len(rest) >= count:
            return words, rest[count:]
    if rest[0] == "container" and len(rest) > 1 and rest[1] in TABLE:
        return rest[1], rest[2:]
    after = rest[len(group_of(rest).split()) :]
    if group_of(rest) and (not after or after[0].startswith("-")):
        return "", []
    raise _unknown(rest)


def group_of(rest: list[str]) -> str:
    """Return the group of commands whose name the words begin with, or an empty text."""
    for count in (2, 1):
        if (group := " ".join(rest[:count])) in GROUPS and len(rest) >= count:
            return group
    return ""


def _unknown(rest: list[str]) -> UsageError:
    from difflib import get_close_matches

    from hutch.cli.refused import refused_command

    wrong = " ".join(rest[: len(group_of(rest).split()) + 1])
    if (why := refused_command(wrong)) is not None:
        return UsageError(f"`hutch {wrong}` is not supported", hint=why, exit_code=1)
    known = [words for words in TABLE if words not in HIDDEN]
    near = get_close_matches(wrong, known, 1, 0.6)
    hint = f"did you mean `hutch {near[0]}`?" if near else "`hutch --help` lists the commands"
    return UsageError(f"unknown command: {wrong!r}", hint=hint, exit_code=1)


def load_command(words: str) -> Command:
    """Import the module of a command and return the command."""
    from importlib import import_module

    commands: dict[str, Command] = import_module(f"hutch.cli.{TABLE[words][0]}").COMMANDS
    return commands[words]
