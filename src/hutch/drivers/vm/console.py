"""A machine's serial console: what the guest's kernel wrote there, and a link to it."""

from __future__ import annotations

import _socket
import os
import re

from hutch.drivers.vm.boot import CONSOLE_SOCKET
from hutch.errors import Unavailable

__all__ = ["LOG", "connect", "count_oom_kills", "log_size", "trim"]

LOG = "console.log"
# mm/oom_kill.c; a limit of a control group has "Memory cgroup out of memory".
_KILLED = re.compile(rb"out of memory: Killed process \d+", re.IGNORECASE)
_READ = 256 << 10
_KEPT = 4 << 20


def trim(directory: str) -> None:
    """Empty a log that earlier starts have made long. What a guest writes during one start is
    not bounded: its own kernel is told to be quiet, but it may be hostile."""
    if log_size(directory) > _KEPT:
        with open(f"{directory}/{LOG}", "r+b") as file:
            file.truncate(0)


def log_size(directory: str) -> int:
    """Return how long the log is, which goes on from one start to the next."""
    try:
        return os.stat(f"{directory}/{LOG}").st_size
    except FileNotFoundError:
        return 0


def count_oom_kills(directory: str, start: int) -> int:
    """Return of how many programs the guest's kernel said that it killed for want of memory.

    It is the guest's word, and only about itself. `start` is where this start's part of the
    log begins; of a long part the end is looked at.
    """
    try:
        with open(f"{directory}/{LOG}", "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - _READ))
            return len(_KILLED.findall(file.read(_READ)))
    except FileNotFoundError:
        return 0


def connect(directory: str) -> _socket.socket:
    """Return a link to the console of a running machine; QEMU serves one at a time."""
    link = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        handle = os.open(f"{directory}/run", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # By descriptor: a socket's path has room for 107 bytes only.
            link.connect(f"/proc/self/fd/{handle}/{CONSOLE_SOCKET}")
        finally:
            os.close(handle)
    except (FileNotFoundError, ConnectionError) as exc:
        link.close()
        raise Unavailable("the machine has no console: it does not run") from exc
    except BaseException:
        link.close()
        raise
    return link
