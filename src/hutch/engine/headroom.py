"""How much memory can be had, in one quick look."""

from __future__ import annotations

from contextlib import suppress

from hutch.engine.context import Context
from hutch.linux.cgroup.reclaim import read_memory

__all__ = ["available_memory", "headroom"]


def headroom(context: Context) -> int:
    """Return the bytes that can be had on the host, or under this root's own group."""
    free = available_memory()
    parent = context.groups.hierarchy.parent
    with suppress(OSError):
        had = read_memory(parent)
        if had.limit is not None:
            free = min(free, had.limit - had.usage)
    return free


def available_memory() -> int:
    """Return the bytes of memory that the host could give without swapping."""
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 1 << 62  # kernels before 3.14 do not tell
