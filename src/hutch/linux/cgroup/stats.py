"""What a control group has used, in one shape for v1 and v2."""

from __future__ import annotations

import msgspec

__all__ = ["BlockDevice", "CpuStats", "MemoryStats", "PidsStats", "Stats"]


class CpuStats(msgspec.Struct, frozen=True, kw_only=True):
    """CPU time in nanoseconds since the group was made; `per_cpu_ns` on v1 only."""

    total_ns: int = 0
    user_ns: int = 0
    system_ns: int = 0
    per_cpu_ns: tuple[int, ...] = ()
    periods: int = 0
    throttled_periods: int = 0
    throttled_ns: int = 0


class MemoryStats(msgspec.Struct, frozen=True, kw_only=True):
    """Memory in bytes; `limit` is None when there is none.

    `working_set` is usage without the inactive file cache, which is what Docker shows.
    `failures` counts hits on the limit, `oom_kills` processes killed for it.
    """

    usage: int = 0
    limit: int | None = None
    max_usage: int = 0
    swap: int = 0
    cache: int = 0
    rss: int = 0
    working_set: int = 0
    failures: int = 0
    oom_kills: int = 0
    detail: dict[str, int] = {}


class PidsStats(msgspec.Struct, frozen=True, kw_only=True):
    """Tasks (processes and threads) now, and the limit or None."""

    current: int = 0
    limit: int | None = None


class BlockDevice(msgspec.Struct, frozen=True, kw_only=True):
    """Traffic with one block device."""

    major: int
    minor: int
    read_bytes: int = 0
    write_bytes: int = 0
    read_ops: int = 0
    write_ops: int = 0


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of all counters; a controller that is absent leaves its zeros."""

    time_ns: int
    cpu: CpuStats = CpuStats()
    memory: MemoryStats = MemoryStats()
    pids: PidsStats = PidsStats()
    block: tuple[BlockDevice, ...] = ()
