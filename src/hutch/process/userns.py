"""A process in a new user namespace, held for as long as somebody needs its pid."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from hutch.errors import Unsupported
from hutch.process.launcher import launcher_path

__all__ = ["hold_user_namespace"]


@contextmanager
def hold_user_namespace() -> Iterator[int]:
    """Run `hutch-launcher --userns` for the length of the block and give its pid.

    The namespace has no map yet; whoever has the right to writes it.
    """
    ready_r, ready_w = os.pipe2(os.O_CLOEXEC)
    stop_r, stop_w = os.pipe2(os.O_CLOEXEC)
    pid = -1
    try:
        pid = os.posix_spawn(
            launcher_path(),
            ["hutch-launcher", "--userns"],
            {},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, stop_r, 0),
                (os.POSIX_SPAWN_DUP2, ready_w, 1),
            ],
        )
        os.close(ready_w)
        ready_w = -1
        if os.read(ready_r, 1) != b"r":
            raise Unsupported(
                "no user namespace could be made",
                hint="see user.max_user_namespaces, and `hutch doctor`",
            )
        yield pid
    finally:
        for fd in (ready_r, ready_w, stop_r, stop_w):
            if fd >= 0:
                os.close(fd)
        if pid > 0:
            os.waitpid(pid, 0)
