"""How much memory can be had, in one quick look."""

from __future__ import annotations

from contextlib import suppress

from hutch.engine.context import Context
from hutch.linux.cgroup.reclaim import read_memory

__all__ = ["headroom"]


def headroom(context: Context) -> int:
    """Return the bytes that can be had on the host, or under this root's own group."""
    free = _of_host()
    parent = context.groups.hierarchy.parent
    with suppress(OSError):
        had = read_memory(parent)
        if had.limit is not None:
            free = min(free, had.limit - had.usage)
    return free


def _of_host() -> int:
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return 0
