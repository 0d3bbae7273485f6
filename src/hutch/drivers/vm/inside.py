"""Ask a guest's agent: figures, processes, limits; and renew what stood still with it."""

from __future__ import annotations

import time

import msgspec

from hutch.drivers.base import ProcessRow
from hutch.drivers.vm.setup import WRITABLE_PATH, renewal
from hutch.linux.cgroup import MemoryStats, PidsStats, Stats
from hutch.plan import guest as protocol
from hutch.plan import guest_answers as answers
from hutch.plan.vm import GUEST_CGROUP
from hutch.process.guest import Guest

__all__ = ["combined", "freeze", "limit_processes", "process_rows", "renew", "stats"]

_ANSWER_S = 60.0


def stats(guest: Guest) -> answers.Stats:
    """Return the guest's own figures."""
    return answers.decode_stats(
        guest.call(protocol.Call.STATS, protocol.group_argument(GUEST_CGROUP), timeout_s=_ANSWER_S)
    )


def combined(host: Stats, inside: answers.Stats) -> Stats:
    """Return one reading: processor time and traffic as the host counts them, memory and
    processes as the guest does, whose memory is the limit."""
    used = max(0, inside.memory_total - inside.memory_available)
    return msgspec.structs.replace(
        host,
        memory=MemoryStats(
            usage=used,
            working_set=used,
            limit=inside.memory_total,
            rss=host.memory.rss,
            oom_kills=inside.oom_kills + host.memory.oom_kills,
            detail=host.memory.detail,
        ),
        pids=PidsStats(current=inside.pids, limit=None),
    )


def process_rows(guest: Guest) -> list[ProcessRow]:
    """Return the program's processes. Times of start are by the host's clock."""
    answer = guest.call(
        protocol.Call.PROCESSES, protocol.group_argument(GUEST_CGROUP), timeout_s=_ANSWER_S
    )
    hertz = 100  # USER_HZ of every Linux ABI that we run; see times(2)
    now = time.time()
    uptime = answers.decode_processes(answer)
    newest = max((process.start_ticks for process in uptime), default=0) / hertz
    return [
        ProcessRow(
            pid=process.pid,
            ppid=process.ppid,
            uid=process.uid,
            started=now - newest + process.start_ticks / hertz,
            cpu_s=process.cpu_ticks / hertz,
            tty=process.tty,
            command=process.command,
        )
        for process in uptime
    ]


def renew(guest: Guest) -> None:
    """Give a guest that stood still the time of day, and entropy."""
    guest.call(protocol.Call.SETUP, protocol.encode_setup(renewal()), timeout_s=_ANSWER_S)


def limit_processes(guest: Guest, pids: int) -> None:
    """Limit the program's processes; 0 takes the limit away."""
    lines = f"pids.max={pids or 'max'}"
    operation = protocol.Cgroup(path=GUEST_CGROUP, lines=lines)
    guest.call(protocol.Call.SETUP, protocol.encode_setup([operation]), timeout_s=_ANSWER_S)


def write_back(guest: Guest) -> None:
    """Have all that was written on the writable disk."""
    for call in (protocol.Call.FREEZE, protocol.Call.THAW):
        guest.call(call, protocol.path_argument(WRITABLE_PATH), timeout_s=_ANSWER_S)


def freeze(guest: Guest, *, frozen: bool) -> None:
    """Stop or continue the program and all that was started beside it."""
    operation = protocol.Cgroup(path=GUEST_CGROUP, lines=f"cgroup.freeze={frozen:d}")
    guest.call(protocol.Call.SETUP, protocol.encode_setup([operation]), timeout_s=_ANSWER_S)
