"""One lock per instance, across threads and processes; the kernel drops it with its holder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hutch.engine.context import Context
from hutch.errors import NotFound
from hutch.linux.locks import lock_file

__all__ = ["LOCK_TIMEOUT_S", "instance_lock"]

LOCK_TIMEOUT_S = 120.0


@contextmanager
def instance_lock(
    context: Context, identifier: str, *, timeout_s: float = LOCK_TIMEOUT_S
) -> Iterator[None]:
    """Hold the lock of an instance; raise `Busy` when another holds it for too long.

    Holders do bounded work only: nobody waits for a program's end with the lock held.
    """
    path = context.directory(identifier) / "lock"
    try:
        with lock_file(path, timeout_s=timeout_s):
            yield
    except FileNotFoundError as exc:
        if exc.filename != str(path):
            raise
        raise NotFound(f"no such instance: {identifier[:12]}") from None
