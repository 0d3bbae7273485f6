"""The files and directories of a control group hierarchy, whichever its version."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable
from contextlib import suppress

from hutch.errors import Busy, Denied, InvalidArgument, NotFound, Unsupported

__all__ = [
    "child_names",
    "parse_keyed",
    "pids_below",
    "read_int",
    "read_keyed",
    "read_text",
    "remove_empty",
    "remove_tree",
    "walk_deepest_first",
    "write_text",
    "write_value",
    "write_values",
]


def read_text(path: str) -> str:
    """Return a whole file, without the white space at its end."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(fd, 1 << 16):
            parts.append(part)
    finally:
        os.close(fd)
    return b"".join(parts).decode().rstrip()


def read_int(path: str, default: int | None = None) -> int | None:
    """Return the number in a file; None for `max`, `default` where there is no such file."""
    try:
        text = read_text(path)
    except FileNotFoundError:
        return default
    return None if text == "max" else int(text)


def parse_keyed(text: str) -> dict[str, int]:
    """Return the `key number` lines of a flat keyed text."""
    result: dict[str, int] = {}
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if value.lstrip("-").isdigit():
            result[key] = int(value)
    return result


def read_keyed(path: str) -> dict[str, int]:
    """Return the numbers of a flat keyed file; nothing where there is no such file."""
    try:
        return parse_keyed(read_text(path))
    except (FileNotFoundError, OSError) as exc:
        if exc.errno in (errno.ENOENT, errno.ENODEV):
            return {}
        raise


def write_text(path: str, value: str) -> None:
    """Write a value with one write(2), as these files ask for. `OSError` passes."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def write_value(directory: str, name: str, value: str, field: str) -> None:
    """Write a limit; a refusal becomes an error that names the field of `Limits`."""
    path = f"{directory}/{name}"
    try:
        write_text(path, value)
    except OSError as exc:
        raise _refusal(exc, path, value, field) from exc


def write_values(directory: str, name: str, values: list[str], field: str) -> None:
    """Write several values to one file, each with its own write(2); errors name `field[n]`."""
    path = f"{directory}/{name}"
    index = 0
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for index, value in enumerate(values):  # noqa: B007
                os.write(fd, value.encode())
        finally:
            os.close(fd)
    except OSError as exc:
        raise _refusal(exc, path, values[index], f"{field}[{index}]") from exc


def _refusal(exc: OSError, path: str, value: str, field: str) -> Exception:
    name = os.path.basename(path)
    if exc.errno == errno.ENOENT and os.path.isdir(os.path.dirname(path)):
        return Unsupported(f"{field}: this kernel has no {name}")
    if exc.errno == errno.ENOENT:
        return NotFound(f"control group {os.path.dirname(path)} is gone")
    if exc.errno == errno.EBUSY:
        return Busy(
            f"{field}: the kernel cannot set {value} now: more is in use",
            hint="choose a larger value, or end what uses it",
        )
    if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return Denied(f"{field}: not allowed to write {path}: {exc.strerror}")
    if exc.errno in (errno.EOPNOTSUPP, errno.ENODEV):
        return Unsupported(f"{field}: the kernel refused {value} ({name}): {exc.strerror}")
    return InvalidArgument(f"the kernel refused {value} ({name}): {exc.strerror}", field=field)


def child_names(directory: str) -> list[str]:
    """Return the groups directly beneath; none where the directory is gone."""
    try:
        # Each directory in it is a link to it (`..`); to list all its files takes far longer.
        if os.stat(directory).st_nlink == 2:
            return []
        with os.scandir(directory) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENODEV):
            return []
        raise


def walk_deepest_first(directory: str) -> list[str]:
    """Return every group beneath and then the group itself, children before parents."""
    found: list[str] = []
    waiting = [directory]
    while waiting:
        path = waiting.pop()
        found.append(path)
        waiting.extend(f"{path}/{name}" for name in child_names(path))
    found.reverse()
    return found


def pids_below(directory: str) -> set[int]:
    """Return the processes of a group and of the groups beneath it."""
    found: set[int] = set()
    for path in walk_deepest_first(directory):
        try:
            text = read_text(f"{path}/cgroup.procs")
        except OSError as exc:
            # A threaded group answers EOPNOTSUPP; its processes are listed by its parent.
            if exc.errno in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
                continue
            raise
        found.update(int(pid) for pid in text.split())
    found.discard(0)
    return found


def remove_empty(directories: Iterable[str]) -> None:
    """Remove the groups that have neither processes nor groups beneath them."""
    for directory in set(directories):
        with suppress(OSError):
            os.rmdir(directory)


def remove_tree(directory: str, timeout_s: float) -> None:
    """Remove a group and what was made beneath it; `Busy` when processes stay in it.

    A group is busy for a moment after its last process was reaped, so EBUSY is tried
    again, waiting a little longer each time, until the time is over.
    """
    deadline = time.monotonic() + timeout_s
    pause = 0.0001
    while True:
        if _try_remove(directory):
            return
        if time.monotonic() >= deadline:
            pids = sorted(pids_below(directory))
            raise Busy(f"control group {directory} still has processes: {pids[:8]}")
        time.sleep(pause)
        pause = min(pause * 2, 0.02)


def _try_remove(directory: str) -> bool:
    try:
        os.rmdir(directory)
        return True
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENODEV):
            return True
        if exc.errno not in (errno.EBUSY, errno.ENOTEMPTY):
            raise
    for path in walk_deepest_first(directory):
        try:
            os.rmdir(path)
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.ENODEV, errno.EBUSY, errno.ENOTEMPTY):
                raise
    return not os.path.isdir(directory)
