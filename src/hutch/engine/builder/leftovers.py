"""What a build that was killed leaves: instances of its steps, and secrets in memory."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from hutch.errors import Busy, Exhausted, HutchError, NotFound, Unavailable
from hutch.linux.locks import is_locked

if TYPE_CHECKING:
    from hutch.engine.context import Context
    from hutch.engine.records import InstanceRecord

__all__ = ["BUILD_LABEL", "is_step", "memory_directory", "remove_step", "sweep"]

BUILD_LABEL = "hutch.build"
"""The label of the instances of steps: the scratch directory of the build they belong to."""

_IN_MEMORY = ("/dev/shm", "/run")
_PREFIX = "hutch-build-"
_DRAIN_S = 60.0


def remove_step(context: Context, identifier: str) -> None:
    """End and remove the instance of a step; one that is gone is fine.

    On a full disk what it wrote goes first: that may be what filled it.
    """
    from hutch.engine.stop import remove

    try:
        remove(context, identifier, force=True, remove_volumes=True)
    except NotFound:
        pass
    except (Exhausted, Unavailable):
        context.driver("container").kill_all(identifier)
        context.trash.discard(f"{context.directory(identifier)}/upper")
        context.trash.drain(_DRAIN_S)
        with suppress(NotFound):
            remove(context, identifier, force=True, remove_volumes=True)


def is_step(record: InstanceRecord) -> bool:
    """Tell whether an instance is the step of a build. An image may have the label too, and
    its instances are no steps."""
    token = record.spec.labels.get(BUILD_LABEL)
    return token is not None and "/" not in token and not record.image_id


def sweep(context: Context) -> list[str]:
    """Remove the steps of builds whose process is gone; return their identifiers."""
    from hutch.engine.lookup import all_records

    removed = []
    for record in all_records(context):
        token = record.spec.labels.get(BUILD_LABEL, "")
        if not is_step(record) or is_locked(f"{context.root}/tmp/{token}"):
            continue
        with suppress(Busy, HutchError):
            remove_step(context, record.id)
            removed.append(record.id)
    _sweep_memory()
    return removed


@contextmanager
def memory_directory() -> Iterator[str | None]:
    """Yield a new directory (0700) that is in memory, None where the host has none.

    It is locked while this process lives, and gone when the block ends.
    """
    parent = next((path for path in _IN_MEMORY if _is_tmpfs(path)), None)
    if parent is None:
        yield None
        return
    while True:
        path = f"{parent}/{_PREFIX}{os.urandom(8).hex()}"
        os.mkdir(path, 0o700)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        fcntl.flock(fd, fcntl.LOCK_EX)
        # Between the two calls a sweep may have taken it for a dead process's.
        if os.path.exists(path):
            break
        os.close(fd)
    try:
        yield path
    finally:
        _remove(path)
        os.close(fd)


def _is_tmpfs(path: str) -> bool:
    try:
        with open("/proc/self/mountinfo") as file:
            mounts = [line.split() for line in file]
    except OSError:
        return False
    kinds = [words[words.index("-") + 1] for words in mounts if len(words) > 6 and words[4] == path]
    return bool(kinds) and kinds[-1] == "tmpfs" and os.access(path, os.W_OK)


def _sweep_memory() -> None:
    for parent in _IN_MEMORY:
        try:
            names = os.listdir(parent)
        except OSError:
            continue
        for name in names:
            path = f"{parent}/{name}"
            if not name.startswith(_PREFIX):
                continue
            with suppress(OSError):
                status = os.stat(path, follow_symlinks=False)
                if status.st_uid == os.geteuid() and not is_locked(path):
                    _remove(path)


def _remove(path: str) -> None:
    from hutch.storage.removal import remove_tree

    parent, _, base = path.rpartition("/")
    with suppress(OSError):
        fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            remove_tree(base, dir_fd=fd)
        finally:
            os.close(fd)
