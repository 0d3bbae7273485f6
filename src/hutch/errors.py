"""The tree of errors: each class tells the caller what to do next.

Front ends map the tree once (exit codes in `hutch.cli.exitcodes`); drivers turn an
`OSError` into one of these once, naming the operation that failed.
"""

from __future__ import annotations

__all__ = [
    "AlreadyExists",
    "Busy",
    "Denied",
    "Exhausted",
    "HutchError",
    "IntegrityError",
    "InternalError",
    "InvalidArgument",
    "NotFound",
    "OperationTimeout",
    "OutcomeUnknown",
    "Unavailable",
    "Unsupported",
    "WrongState",
]


class HutchError(Exception):
    """Base of every error hutch raises on purpose.

    `message` is lower case, without a full stop, and names the object and the value;
    `hint` is the cure, or None where there is none to give.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class InvalidArgument(HutchError):
    """The request is wrong; change it. `field` is the path of the offending value."""

    def __init__(self, message: str, *, field: str | None = None, hint: str | None = None) -> None:
        super().__init__(f"{field}: {message}" if field else message, hint=hint)
        self.field = field


class NotFound(HutchError):
    """The named object does not exist (an image, an instance, a program in the image)."""


class AlreadyExists(HutchError):
    """An object of that name exists; choose another name or remove it."""


class WrongState(HutchError):
    """The object exists but is in a state that does not allow the operation."""


class Busy(HutchError):
    """Somebody else uses the object now; try again later."""


class Exhausted(HutchError):
    """A resource ran out (disk, memory, addresses, descriptors, a stated limit).

    Of a program that wrote more than its `limit`, `stdout` and `stderr` are what it had
    written, at most that much of each.
    """

    stdout: bytes = b""
    stderr: bytes = b""


class Unavailable(HutchError):
    """A peer or a service does not answer (registry, network); it may later."""


class Denied(HutchError):
    """A peer or the kernel refused for lack of rights; give credentials or privileges."""


class IntegrityError(HutchError):
    """Content does not match its digest or size, or tries to leave its root."""


class OperationTimeout(HutchError):
    """The operation did not end in the time allowed.

    Of a program that was given up (`run`, `exec`), `stdout` and `stderr` are what it had
    written by then.
    """

    stdout: bytes = b""
    stderr: bytes = b""


class OutcomeUnknown(HutchError):
    """The connection was lost before an answer: the operation may have happened."""


class Unsupported(HutchError):
    """This host or kind of instance cannot do it; `hint` says what is missing."""


class InternalError(HutchError):
    """A bug in hutch; please report it."""
