"""Start a process that outlives its starter and belongs to nobody's terminal."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

__all__ = ["start_detached"]


def start_detached(argv: Sequence[str], *, log: str, pass_fds: Sequence[int] = ()) -> int:
    """Start a program in a session of its own, in `/`, without input; return its id.

    What it writes replaces the content of the file `log` (0600). It inherits `pass_fds` and is
    reaped when it ends.
    """
    import subprocess

    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(log, flags, 0o600)
    try:
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=fd,
            stderr=fd,
            cwd="/",
            pass_fds=tuple(pass_fds),
            start_new_session=True,
        )
    finally:
        os.close(fd)
    threading.Thread(target=process.wait, name="hutch-reaper", daemon=True).start()
    return process.pid
