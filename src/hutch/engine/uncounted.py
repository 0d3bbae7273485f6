"""What /proc knows of a container that has no control group, as an ordinary user's often has none.

Its processes are those of its PID namespace. What has ended is no longer counted, but for those
whose parent in the container waited for them.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hutch.linux.cgroup import Stats

__all__ = ["processes_beside", "stats_beside"]

# Of proc(5)'s stat, counted from the state: utime, stime, cutime, cstime, num_threads, rss.
_USER, _SYSTEM, _CHILDREN_USER, _CHILDREN_SYSTEM, _THREADS, _RSS = 11, 12, 13, 14, 17, 21


def processes_beside(pid: int) -> list[int]:
    """Return the processes in the PID namespace of `pid`: `pid` alone where that is the host's."""
    try:
        namespace = os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return []
    if namespace == os.readlink("/proc/self/ns/pid"):
        return [pid]
    return sorted(p for name in os.listdir("/proc") if (p := _in(namespace, name)))


def _in(namespace: str, name: str) -> int:
    """Return the number of a process that is in the namespace, else 0."""
    if not name.isdigit():
        return 0
    try:
        return int(name) if os.readlink(f"/proc/{name}/ns/pid") == namespace else 0
    except OSError:  # it has ended, or is another user's
        return 0


def stats_beside(pid: int) -> Stats:
    """Return processor time, resident memory and tasks of the container that `pid` began."""
    from hutch.linux.cgroup import CpuStats, MemoryStats, PidsStats, Stats

    tick = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    user = system = tasks = pages = 0
    for each in processes_beside(pid):
        fields = _stat(each)
        if fields:
            user += fields[_USER] + fields[_CHILDREN_USER]
            system += fields[_SYSTEM] + fields[_CHILDREN_SYSTEM]
            tasks += fields[_THREADS]
            pages += fields[_RSS]
    rss = pages * os.sysconf("SC_PAGE_SIZE")
    return Stats(
        time_ns=time.time_ns(),
        cpu=CpuStats(total_ns=(user + system) * tick, user_ns=user * tick, system_ns=system * tick),
        memory=MemoryStats(usage=rss, rss=rss, working_set=rss),
        pids=PidsStats(current=tasks),
    )


def _stat(pid: int) -> list[int]:
    """Return the numbers of a process after its state, None of them when it has gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            content = file.read()
    except OSError:
        return []
    state, *numbers = content[content.rindex(b")") + 2 :].split()
    return [0, *(int(number) for number in numbers)] if state else []
