"""How version 2 of the control group interface tells what a group has used."""

from __future__ import annotations

import os
import time

from hutch.errors import NotFound
from hutch.linux.cgroup import files
from hutch.linux.cgroup.stats import BlockDevice, CpuStats, MemoryStats, PidsStats, Stats

__all__ = ["read_oom_kills", "read_stats"]

_IO = {"rbytes": "read_bytes", "wbytes": "write_bytes", "rios": "read_ops", "wios": "write_ops"}


def read_stats(identifier: str, directory: str) -> Stats:
    """Read all counters of a group once; `NotFound` when it is gone."""
    if not os.path.isdir(directory):
        raise NotFound(f"no control group {identifier}")
    return Stats(
        time_ns=time.time_ns(),
        cpu=_cpu(directory),
        memory=_memory(directory),
        pids=PidsStats(
            current=files.read_int(f"{directory}/pids.current", 0) or 0,
            limit=files.read_int(f"{directory}/pids.max", None),
        ),
        block=_block(directory),
    )


def read_oom_kills(directory: str) -> int:
    """Return the OOM kills of a group and of those beneath."""
    return files.read_keyed(f"{directory}/memory.events").get("oom_kill", 0)


def _cpu(directory: str) -> CpuStats:
    stat = files.read_keyed(f"{directory}/cpu.stat")
    return CpuStats(
        total_ns=stat.get("usage_usec", 0) * 1000,
        user_ns=stat.get("user_usec", 0) * 1000,
        system_ns=stat.get("system_usec", 0) * 1000,
        periods=stat.get("nr_periods", 0),
        throttled_periods=stat.get("nr_throttled", 0),
        throttled_ns=stat.get("throttled_usec", 0) * 1000,
    )


def _memory(directory: str) -> MemoryStats:
    detail = files.read_keyed(f"{directory}/memory.stat")
    events = files.read_keyed(f"{directory}/memory.events")
    usage = files.read_int(f"{directory}/memory.current", 0) or 0
    inactive = detail.get("inactive_file", 0)
    return MemoryStats(
        usage=usage,
        limit=files.read_int(f"{directory}/memory.max", None),
        max_usage=files.read_int(f"{directory}/memory.peak", 0) or 0,
        swap=files.read_int(f"{directory}/memory.swap.current", 0) or 0,
        cache=detail.get("file", 0),
        rss=detail.get("anon", 0),
        working_set=usage - inactive if inactive < usage else usage,
        failures=events.get("max", 0),
        oom_kills=events.get("oom_kill", 0),
        detail=detail,
    )


def _block(directory: str) -> tuple[BlockDevice, ...]:
    try:
        text = files.read_text(f"{directory}/io.stat")
    except FileNotFoundError:
        return ()
    found = []
    for line in text.splitlines():
        device, *words = line.split()
        major, _, minor = device.partition(":")
        if not (major.isdigit() and minor.isdigit()):
            continue
        numbers: dict[str, int] = {}
        for word in words:
            key, _, value = word.partition("=")
            if key in _IO:
                numbers[_IO[key]] = int(value)
        found.append(BlockDevice(major=int(major), minor=int(minor), **numbers))
    return tuple(found)
