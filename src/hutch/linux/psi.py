"""Wait for a stall of memory; see the kernel's Documentation/accounting/psi.rst."""

from __future__ import annotations

import os
import select
import time

__all__ = ["wait_pressure"]

_PATH = "/proc/pressure/memory"
# 150 ms in two seconds: the shortest window that is to be had without CAP_SYS_RESOURCE.
_TRIGGER = b"some 150000 2000000\0"


def wait_pressure(timeout_s: float, path: str = _PATH) -> bool:
    """Wait until somebody was kept waiting for memory, or the time is over; tell which. On a
    kernel that does not tell, it is the time."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        time.sleep(timeout_s)
        return False
    try:
        os.write(fd, _TRIGGER)
        poller = select.poll()
        poller.register(fd, select.POLLPRI)
        return bool(poller.poll(timeout_s * 1000))
    except OSError:
        time.sleep(timeout_s)
        return False
    finally:
        os.close(fd)
