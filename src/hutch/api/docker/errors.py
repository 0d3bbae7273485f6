"""The one table from errors to status codes, and the body that tells of them."""

from __future__ import annotations

import re

import msgspec

from hutch import errors
from hutch.drivers.failures import CommandFailed

__all__ = ["STATUS", "ApiError", "NotModified", "error_body", "message_of", "status_of"]

STATUS: dict[type[errors.HutchError], int] = {
    errors.HutchError: 500,
    errors.InvalidArgument: 400,
    errors.NotFound: 404,
    errors.AlreadyExists: 409,
    errors.WrongState: 409,
    errors.Busy: 409,
    errors.Exhausted: 500,
    errors.Unavailable: 500,
    errors.Denied: 403,
    errors.IntegrityError: 500,
    errors.OperationTimeout: 500,
    errors.OutcomeUnknown: 500,
    errors.Unsupported: 501,
    errors.InternalError: 500,
}


# What we call an instance, Docker's users know as a container.
_INSTANCE = re.compile(r"(?<!exec )\binstance(?=:? ['\w])")


class ApiError(errors.HutchError):
    """An answer that Docker gives with a status and words of its own."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class NotModified(ApiError):
    """It is as asked for already: 304, without a body."""

    def __init__(self) -> None:
        super().__init__(304, "")


def status_of(exc: BaseException) -> int:
    """Return the status that an error is answered with."""
    if isinstance(exc, ApiError):
        return exc.status
    if isinstance(exc, CommandFailed):
        return 400  # the program named is not there or cannot be run
    for kind in type(exc).__mro__:
        if kind in STATUS:
            return STATUS[kind]
    return 500


def message_of(exc: BaseException) -> str:
    """Return an error with its cure in one line, as Docker's clients show it."""
    if isinstance(exc, errors.HutchError):
        hint = exc.hint
        message = _INSTANCE.sub("container", exc.message)
        # A cure that is a command of ours is none for who holds another client.
        return f"{message} ({hint})" if hint and "`hutch" not in hint else message
    if isinstance(exc, OSError):
        name = f"{exc.filename}: " if exc.filename else ""
        return f"{name}{(exc.strerror or str(exc)).lower()}"
    return f"internal error: {type(exc).__name__}: {exc}"


def error_body(message: str) -> bytes:
    """Return the body of an error."""
    return msgspec.json.encode({"message": message}) + b"\n"
