"""Read what a supervisor leaves in its instance's run directory, without a connection."""

# Annotations are not postponed: msgspec would compile each of them when it first decodes.
import os

import msgspec

from hutch.decoding import decode_json
from hutch.process.frames import ExitStatus

__all__ = ["PidRecord", "is_alive", "is_supervised", "read_exit", "read_health", "read_pid"]

_LIMIT = 1 << 20


class PidRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The processes of an instance, named so that a reused number is not mistaken."""

    pid: int
    start_time: int
    supervisor: int
    supervisor_start_time: int
    boot_id: str


def _read(directory: str, name: str) -> bytes | None:
    try:
        fd = os.open(os.path.join(directory, name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        return os.read(fd, _LIMIT)
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


def _is_running(pid: int, start_time: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            stat = file.read(4096)
    except (FileNotFoundError, ProcessLookupError):
        return False
    fields = stat.rpartition(b")")[2].split()  # the name may hold anything
    return len(fields) > 19 and int(fields[19]) == start_time and fields[0] not in (b"Z", b"X")


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
