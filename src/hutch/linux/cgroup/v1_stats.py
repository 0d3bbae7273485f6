"""How version 1 of the control group interface tells what a group has used."""

from __future__ import annotations

import os
import time

from hutch.errors import NotFound
from hutch.linux.cgroup import files
from hutch.linux.cgroup.stats import BlockDevice, CpuStats, MemoryStats, PidsStats, Stats

__all__ = ["read_oom_kills", "read_stats"]

# The kernel shows "no limit" as the largest multiple of the page size.
_NO_LIMIT = 1 << 62


def read_stats(identifier: str, directories: dict[str, str]) -> Stats:
    """Read all counters of a group once; `NotFound` when it is gone."""
    if not any(os.path.isdir(path) for path in directories.values()):
        raise NotFound(f"no control group {identifier}")
    return Stats(
        time_ns=time.time_ns(),
        cpu=_cpu(directories),
        memory=_memory(directories.get("memory")),
        pids=_pids(directories.get("pids")),
        block=_block(directories.get("io")),
    )


def read_oom_kills(memory: str | None) -> int:
    """Return the OOM kills of a group and of those beneath: v1 counts each by itself."""
    if memory is None:
        return 0
    paths = files.walk_deepest_first(memory)
    return sum(files.read_keyed(f"{path}/memory.oom_control").get("oom_kill", 0) for path in paths)


def _number(path: str) -> int:
    try:
        return files.read_int(path, 0) or 0
    except OSError:
        return 0


def _cpu(directories: dict[str, str]) -> CpuStats:
    account, bandwidth = directories.get("cpuacct"), directories.get("cpu")
    throttling = files.read_keyed(f"{bandwidth}/cpu.stat") if bandwidth else {}
    per_cpu: tuple[int, ...] = ()
    total = user = system = 0
    if account:
        total = _number(f"{account}/cpuacct.usage")
        user = _number(f"{account}/cpuacct.usage_user")
        system = _number(f"{account}/cpuacct.usage_sys")
        try:
            text = files.read_text(f"{account}/cpuacct.usage_percpu")
            per_cpu = tuple(int(word) for word in text.split())
        except FileNotFoundError:
            per_cpu = ()
    return CpuStats(
        total_ns=total,
        user_ns=user,
        system_ns=system,
        per_cpu_ns=per_cpu,
        periods=throttling.get("nr_periods", 0),
        throttled_periods=throttling.get("nr_throttled", 0),
        throttled_ns=throttling.get("throttled_time", 0),
    )


def _memory(directory: str | None) -> MemoryStats:
    if directory is None:
        return MemoryStats()
    detail = files.read_keyed(f"{directory}/memory.stat")
    usage = _number(f"{directory}/memory.usage_in_bytes")
    limit = _number(f"{directory}/memory.limit_in_bytes")
    inactive = detail.get("total_inactive_file", 0)
    return MemoryStats(
        usage=usage,
        limit=limit if 0 < limit < _NO_LIMIT else None,
        max_usage=_number(f"{directory}/memory.max_usage_in_bytes"),
        swap=detail.get("total_swap", 0),
        cache=detail.get("total_cache", 0),
        rss=detail.get("total_rss", 0),
        working_set=usage - inactive if inactive < usage else usage,
        failures=_number(f"{directory}/memory.failcnt"),
        oom_kills=read_oom_kills(directory),
        detail=detail,
    )


def _pids(directory: str | None) -> PidsStats:
    if directory is None:
        return PidsStats()
    return PidsStats(
        current=_number(f"{directory}/pids.current"),
        limit=files.read_int(f"{directory}/pids.max", None),
    )


def _block(directory: str | None) -> tuple[BlockDevice, ...]:
    if directory is None:
        return ()
    counted: dict[tuple[int, int], dict[str, int]] = {}
    for name, suffix in (("io_service_bytes", "bytes"), ("io_serviced", "ops")):
        try:
            text = files.read_text(f"{directory}/blkio.throttle.{name}_recursive")
        except FileNotFoundError:
            continue
        for line in text.splitlines():
            words = line.split()
            if len(words) == 3 and words[1] in ("Read", "Write"):
                major, _, minor = words[0].partition(":")
                entry = counted.setdefault((int(major), int(minor)), {})
                entry[f"{words[1].lower()}_{suffix}"] = int(words[2])
    return tuple(
        BlockDevice(major=major, minor=minor, **numbers)
        for (major, minor), numbers in sorted(counted.items())
    )
