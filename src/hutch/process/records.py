"""Read what a supervisor leaves in its instance's run directory, without a connection."""

# Annotations are not postponed: msgspec would compile each of them when it first decodes.
import os

import msgspec

from hutch.decoding import decode_json
from hutch.process.frames import ExitStatus

__all__ = [
    "EXIT_LOST",
    "EXIT_SAVED",
    "PidRecord",
    "ProcessStat",
    "is_alive",
    "is_child",
    "is_supervised",
    "read_exit",
    "read_health",
    "read_pid",
    "read_stat",
]

EXIT_SAVED = 254
"""With this a machine's monitor ends when the machine was saved and then ended."""
EXIT_LOST = 255
"""With this a machine's monitor ends when the machine was lost before its program ended."""
_LIMIT = 1 << 20


class PidRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The processes of an instance, named so that a reused number is not mistaken.

    `streams` are the inodes of the pipes that its first process got, 0 where it got none.
    """

    pid: int
    start_time: int
    supervisor: int
    supervisor_start_time: int
    boot_id: str
    streams: tuple[int, int, int] = (0, 0, 0)


def _read(directory: str, name: str) -> bytes | None:
    try:
        fd = os.open(os.path.join(directory, name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        # The size first: a buffer of the limit is mapped and unmapped each time.
        return os.read(fd, min(os.fstat(fd).st_size, _LIMIT))
    finally:
        os.close(fd)


def read_exit(directory: str) -> ExitStatus | None:
    """Return how the instance's process ended, or None while it has not."""
    data = _read(directory, "exit")
    return None if data is None else decode_json(data, ExitStatus)


def read_pid(directory: str) -> PidRecord | None:
    """Return the processes of the instance's last start, alive or not."""
    data = _read(directory, "pid")
    return None if data is None else decode_json(data, PidRecord)


def read_health(directory: str) -> dict[str, object] | None:
    """Return the health probe's record, or None when there is no probe or no result yet."""
    data = _read(directory, "health")
    return None if data is None else decode_json(data, dict[str, object])


class ProcessStat(msgspec.Struct, frozen=True):
    """What /proc/PID/stat says: the start in clock ticks since boot; ended ones are zombies."""

    parent: int
    start_time: int
    ended: bool


def read_stat(pid: int) -> ProcessStat | None:
    """Return who a process is, or None when there is no such process."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):  # the latter while it is being reaped
        return None
    try:
        content = os.read(fd, 4096)
    except ProcessLookupError:
        return None
    finally:
        os.close(fd)
    # The command name may hold spaces and parentheses: count from the last ")".
    fields = content[content.rindex(b")") + 2 :].split(None, 20)
    return ProcessStat(int(fields[1]), int(fields[19]), fields[0] in (b"Z", b"X"))


def _is_running(pid: int, start_time: int) -> bool:
    stat = read_stat(pid)
    return stat is not None and stat.start_time == start_time and not stat.ended


def is_child(pid: int, start_time: int, parent: int) -> bool:
    """Tell whether exactly this process runs and is a child of `parent`.

    An instance's process has its supervisor for a parent for as long as that lives, and
    then another: this one look says of both that they run.
    """
    stat = read_stat(pid)
    if stat is None or stat.ended:
        return False
    return stat.start_time == start_time and stat.parent == parent


def is_alive(directory: str) -> bool:
    """Tell whether the instance's process runs (not whether its supervisor does)."""
    record = read_pid(directory)
    if record is None:
        return False
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        if file.read().strip() != record.boot_id:
            return False
    return _is_running(record.pid, record.start_time)


def is_supervised(directory: str) -> bool:
    """Tell whether the instance's supervisor runs."""
    record = read_pid(directory)
    return record is not None and _is_running(record.supervisor, record.supervisor_start_time)
