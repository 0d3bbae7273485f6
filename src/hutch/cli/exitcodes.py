"""The one table from errors to exit codes, and how an error is shown.

As Docker's command line: 125 where `run` itself failed, 126 where the program could not be
run, 127 where it was not found, 128+n where signal n ended it, 1 for every other failure.
"""

from __future__ import annotations

import sys

from hutch import errors

__all__ = ["EXIT_CODES", "report"]

EXIT_CODES: dict[type[errors.HutchError], int] = {
    errors.HutchError: 1,
    errors.InvalidArgument: 1,
    errors.NotFound: 1,
    errors.AlreadyExists: 1,
    errors.WrongState: 1,
    errors.Busy: 1,
    errors.Exhausted: 1,
    errors.Unavailable: 1,
    errors.Denied: 1,
    errors.IntegrityError: 1,
    errors.OperationTimeout: 1,
    errors.OutcomeUnknown: 1,
    errors.Unsupported: 1,
    errors.InternalError: 1,
}
_RUN_FAILED = 125


def exit_code(exc: BaseException, *, run_like: bool = False) -> int:
    """Return the exit code for an error; `run_like` for `run`, whose own failures are 125."""
    own = getattr(exc, "exit_code", None)
    if isinstance(own, int) and 0 < own < 256:
        return own
    if run_like:
        return _RUN_FAILED
    for kind in type(exc).__mro__:
        if kind in EXIT_CODES:
            return EXIT_CODES[kind]
    return 1


def report(exc: BaseException, *, run_like: bool = False, as_json: bool = False) -> int:
    """Write an error and its cure to stderr, as one line of JSON if asked; return the exit code."""
    if isinstance(exc, errors.HutchError):
        message, hint = exc.message, exc.hint
    elif isinstance(exc, OSError):
        name = f"{exc.filename}: " if exc.filename else ""
        message, hint = f"{name}{(exc.strerror or str(exc)).lower()}", None
    else:
        message = f"internal error: {type(exc).__name__}: {exc}"
        hint = "this is a bug; `hutch --debug …` shows where"
    code = exit_code(exc, run_like=run_like)
    if isinstance(exc, errors.InternalError) and hint is None:
        hint = "this is a bug; `hutch --debug …` shows where"
    try:
        if as_json:
            from hutch.cli.output import to_json

            about = {"Message": message, "Hint": hint, "ExitCode": code, **_details(exc)}
            print(to_json({"Error": about}, indent=False), file=sys.stderr)
            return code
        print(_shown(f"hutch: {message}"), file=sys.stderr)
        if hint:
            print(_shown(f"hint: {hint}"), file=sys.stderr)
        if excerpt := getattr(exc, "excerpt", ""):
            print(_shown(excerpt.rstrip("\n")), file=sys.stderr)
        for note in getattr(exc, "__notes__", ()):
            print(_shown(f"note: {note}"), file=sys.stderr)
    except OSError:
        pass
    return code


def _shown(text: str) -> str:
    """Return lines without what would act on a terminal: a program may have written them."""
    from hutch.cli.output import visible

    return "\n".join(visible(line.expandtabs()) for line in text.split("\n"))


def _details(exc: BaseException) -> dict[str, object]:
    """Return what an error tells programs beside its text; only what there is."""
    kind = next((k for k in type(exc).__mro__ if k.__module__ == errors.__name__), type(exc))
    found: dict[str, object] = {"Kind": kind.__name__}
    for name in ("field", "excerpt", "decision"):
        if value := getattr(exc, name, None):
            found["Admission" if name == "decision" else name.capitalize()] = value
    if notes := getattr(exc, "__notes__", None):
        found["Notes"] = list(notes)
    return found
