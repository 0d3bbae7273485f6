"""Which boot of the host this is."""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os

__all__ = ["boot_id", "boot_time"]


def boot_id(proc: str | os.PathLike[str] = "/proc") -> str:
    """Return the identifier that the kernel drew when it started."""
    with open(f"{proc}/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def boot_time() -> float:
    """Return the seconds since the kernel started, sleep included: nobody can set this clock,
    so that with `boot_id` it is one for what must end after a while."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
