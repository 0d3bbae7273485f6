"""Wait for a stall of memory; see the kernel's Documentation/accounting/psi.rst."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

__all__ = ["wait_pressure"]

_PATH = "/proc/pressure/memory"
# 150 ms in two seconds: the shortest window that is to be had without CAP_SYS_RESOURCE.
_TRIGGER = b"some 150000 2000000\0"
_GLANCE_S = 0.25


def wait_pressure(
    timeout_s: float, path: str = _PATH, *, until: Callable[[], bool] = lambda: False
) -> bool:
    """Wait until somebody was kept waiting for memory, until what is asked four times a second
    is so, or until the time is over; tell whether it was less. On a kernel that does not tell of
    stalls, it is one of the others."""
    deadline = time.monotonic() + timeout_s
    with ExitStack() as stack:
        poller = select.poll()
        with suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            os.write(fd, _TRIGGER)
            poller.register(fd, select.POLLPRI)
        while (left := deadline - time.monotonic()) > 0:
            if poller.poll(min(left, _GLANCE_S) * 1000) or until():
                return True
    return False
