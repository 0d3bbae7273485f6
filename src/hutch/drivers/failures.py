"""Turn the kernel's and the launcher's failures into hutch's errors, once."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from hutch.errors import (
    Busy,
    Denied,
    Exhausted,
    HutchError,
    InternalError,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unsupported,
)
from hutch.plan.ops import Exec, MoveMount, Plan
from hutch.process.errors import LaunchFailed, MachineFailed

__all__ = ["CommandFailed", "from_oserror", "launching", "machine_failures", "translated"]

_LAST_WORDS = 2000


class CommandFailed(HutchError):
    """The program could not be run; `exit_code` is 127 (not found) or 126 (not runnable)."""

    def __init__(self, message: str, *, exit_code: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


@contextmanager
def translated(operation: str) -> Iterator[None]:
    """Turn an `OSError` of preparing a launch into our error, naming the operation."""
    try:
        yield
    except OSError as exc:
        raise from_oserror(operation, exc) from exc


@contextmanager
def launching(plan: Plan, what: str) -> Iterator[None]:
    """Name the failing operation of a plan."""
    try:
        yield
    except LaunchFailed as exc:
        raise _launch_failure(exc, plan, what) from exc


@contextmanager
def machine_failures(operation: str, directory: str) -> Iterator[None]:
    """Say at which stage a virtual machine's start failed, with the last words that QEMU
    or the guest's kernel left in `directory`."""
    try:
        yield
    except MachineFailed as exc:
        log = "qemu.log" if exc.stage == "qemu" else "console.log"
        said = last_line(f"{directory}/{log}")
        text = f"{operation}: {exc.stage}: {exc.text or os.strerror(exc.errno).lower()}"
        if exc.stage == "qemu" and (known := _refusal(operation, said)) is not None:
            raise known from exc
        if exc.stage in ("qemu", "agent") and said:
            raise Unavailable(f"{text}: {said}", hint="see `hutch doctor`") from exc
        if exc.stage == "setup":
            raise from_oserror(f"{operation}: {exc.text}", OSError(exc.errno, "")) from exc
        raise Unavailable(text, hint="see `hutch doctor`") from exc


_NO_MODEL = re.compile(r"unable to find CPU model '(.*)'$")
_NO_FEATURE = re.compile(r"Property '[\w.-]+-cpu\.(.*)' not found$")
# Mounted over by the launcher, which follows no link there.
_KERNELS = ("/dev", "/proc", "/sys")
_NO_MEMORY = re.compile(r"(guest RAM|guest memory).*Cannot allocate memory$")


def _refusal(operation: str, said: str) -> HutchError | None:
    """Return what QEMU's last words say of the specification, where they do."""
    if said.endswith("Invalid password, cannot unlock any keyslot"):
        return Denied(f"{operation}: the key does not open its disk")
    models = "`qemu-system-x86_64 -cpu help` lists models and features"
    if (found := _NO_MODEL.search(said)) is not None:
        return InvalidArgument(
            f"this QEMU has no model {found[1]!r}", field="cpu_model", hint=models
        )
    if (found := _NO_FEATURE.search(said)) is not None:
        return InvalidArgument(
            f"this QEMU knows no feature {found[1]!r}", field="cpu_model", hint=models
        )
    if _NO_MEMORY.search(said) is not None:
        return Exhausted(
            f"{operation}: this host does not give its guest so much memory",
            hint="give less with --memory, or add swap",
        )
    return None


def last_line(path: str) -> str:
    """Return the last line of a log, empty where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _LAST_WORDS))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].strip() if lines else ""


def from_oserror(operation: str, exc: OSError) -> HutchError:
    """Return our error for an errno: what the caller can do next decides the class."""
    reason = os.strerror(exc.errno).lower() if exc.errno else str(exc)
    text = f"{operation}: {reason}"
    if exc.filename:
        text += f" ({exc.filename})"
    match exc.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return Exhausted(text, hint="free disk space and retry")
        case errno.EMFILE | errno.ENFILE | errno.ENOMEM | errno.EAGAIN:
            return Exhausted(text, hint="raise the limit, or run fewer instances at once")
        case errno.EPERM | errno.EACCES if operation.endswith("oom_score_adj"):
            return Denied(text, hint="below the caller's own it needs CAP_SYS_RESOURCE: give more")
        case errno.EPERM | errno.EACCES:
            return Denied(text, hint="run as root, or see `hutch doctor`")
        case errno.EROFS:
            return Denied(text, hint="name a writable root with --root or HUTCH_ROOT")
        case errno.ENOSYS | errno.EOPNOTSUPP | errno.ENODEV:
            return Unsupported(text, hint="see `hutch doctor` for what this host lacks")
        case errno.EBUSY:
            return Busy(text)
        case errno.ENOENT | errno.ESRCH:
            return NotFound(text)
        case errno.EINVAL | errno.ERANGE:
            return InvalidArgument(text)
        # A path of the image or of the specification: a file where a directory is wanted, …
        case errno.ENOTDIR | errno.EISDIR | errno.EEXIST | errno.ELOOP | errno.ENAMETOOLONG:
            return InvalidArgument(text)
    return InternalError(text)


def _launch_failure(exc: LaunchFailed, plan: Plan, what: str) -> HutchError:
    last = plan.child[-1]
    program = last.argv[0] if isinstance(last, Exec) else ""
    if exc.section != "exec":
        operations = {"prepare": plan.prepare, "child": plan.child}.get(exc.section, ())
        operation = operations[exc.index] if exc.index < len(operations) else None
        name = exc.section if operation is None else type(operation).__name__
        detail = f" {exc.detail}" if exc.detail else ""
        where = getattr(operation, "target", "")
        if where in _KERNELS and exc.errno in (errno.ELOOP, errno.ENOTDIR):
            found = "a link" if exc.errno == errno.ELOOP else "no directory"
            return InvalidArgument(
                f"{what}: {where} of the image is {found}",
                hint=f"make the image anew with a directory {where}, which may be empty, or "
                "with none",
            )
        # move_mount(2): EINVAL where one is a directory and the other is not.
        if isinstance(operation, MoveMount) and exc.errno in (errno.EINVAL, errno.ENOTDIR):
            return InvalidArgument(
                f"{what}: mount at{detail}: {os.strerror(exc.errno).lower()}",
                hint="a directory is mounted on a directory, a file on a file",
            )
        return from_oserror(f"{what}: {name}{detail}", OSError(exc.errno, ""))
    if exc.errno in (errno.ENOENT, errno.ENOTDIR):
        return CommandFailed(
            f"{what}: {program!r}: executable file not found in the image",
            exit_code=127,
            hint="check the command, the PATH of the image, and a script's interpreter line",
        )
    return CommandFailed(
        f"{what}: {program!r}: {os.strerror(exc.errno).lower()}",
        exit_code=126,
        hint="give it less: arguments and environment together have 2 MiB, 128 KiB each"
        if exc.errno == errno.E2BIG
        else "the file must be executable, and built for this machine's architecture",
    )
