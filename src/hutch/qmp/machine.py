"""Ask about the machine as a whole and move it: run state, processors, end, screen."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Literal

import msgspec

from hutch.errors import OperationTimeout, OutcomeUnknown, WrongState
from hutch.qmp.monitor import COMMAND_S, Monitor

__all__ = [
    "ENDED",
    "RUNNING",
    "Cpu",
    "add_vnc_client",
    "cont",
    "inject_nmi",
    "query_cpus",
    "query_status",
    "quit",
    "screendump",
    "stop",
    "system_powerdown",
    "system_reset",
    "wait_status",
]

RUNNING = frozenset({"running"})
ENDED = frozenset({"shutdown", "guest-panicked", "internal-error", "io-error"})
"""Run states from which a guest does not go on by itself."""
# What QEMU says when its run state has changed. MIGRATION needs the capability `events`.
_MOVES = frozenset(
    {"STOP", "RESUME", "SHUTDOWN", "RESET", "SUSPEND", "WAKEUP", "GUEST_PANICKED", "MIGRATION"}
    | {"BLOCK_IO_ERROR", "WATCHDOG", "MEMORY_FAILURE"}
)


class _Status(msgspec.Struct, frozen=True):
    status: str
    running: bool


class Cpu(msgspec.Struct, frozen=True, kw_only=True):
    """A virtual processor: its number, the host's thread that runs it, its place."""

    index: int = msgspec.field(name="cpu-index")
    thread_id: int = msgspec.field(name="thread-id")
    qom_path: str = msgspec.field(name="qom-path", default="")


def stop(monitor: Monitor) -> None:
    """Stop the virtual processors. When it returns, the disks are quiet too."""
    monitor.execute("stop")


def cont(monitor: Monitor) -> None:
    """Let the virtual processors run."""
    monitor.execute("cont")


def quit(monitor: Monitor, *, timeout_s: float = COMMAND_S) -> None:
    """End QEMU, without a word to the guest, and wait until it has closed the monitor.

    Raise `OperationTimeout` where it stays; a QEMU that is gone already is fine.
    """
    deadline = time.monotonic() + timeout_s
    try:
        monitor.execute("quit", timeout_s=timeout_s)
    except OutcomeUnknown:
        return  # it closes the connection as the last thing it does
    monitor.wait_closed(timeout_s=max(0.0, deadline - time.monotonic()))


def system_powerdown(monitor: Monitor) -> None:
    """Press the power button (ACPI); whether the guest heeds it is the guest's affair."""
    monitor.execute("system_powerdown")


def system_reset(monitor: Monitor) -> None:
    """Press the reset button; a QEMU with `-no-reboot` ends."""
    monitor.execute("system_reset")


def inject_nmi(monitor: Monitor) -> None:
    """Send a non-maskable interrupt, for a guest that hangs and is set to panic on it."""
    monitor.execute("inject-nmi")


def query_status(monitor: Monitor) -> str:
    """Return the run state: `running`, `paused`, `prelaunch`, `inmigrate`, `shutdown`, …"""
    status: _Status = monitor.ask("query-status", kind=_Status)
    return status.status


def wait_status(
    monitor: Monitor,
    wanted: Collection[str],
    *,
    timeout_s: float,
    fatal: Collection[str] = ENDED,
) -> str:
    """Wait until the run state is one of `wanted` and return it.

    Asks once, and again after every event that tells of a change. Raise `WrongState` where
    it gets to one of `fatal`, `OperationTimeout`, or `OutcomeUnknown` when QEMU has gone.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        status = query_status(monitor)
        if status in wanted:
            return status
        if status in fatal:
            raise WrongState(f"qemu: the machine is {status}, not {' or '.join(sorted(wanted))}")
        left = deadline - time.monotonic()
        try:
            monitor.wait_event(_MOVES, timeout_s=max(0.0, left))
        except OperationTimeout:
            raise OperationTimeout(
                f"qemu: the machine is still {status}, not {' or '.join(sorted(wanted))}"
            ) from None


def query_cpus(monitor: Monitor) -> list[Cpu]:
    """Return the virtual processors with their threads; stops nothing."""
    cpus: list[Cpu] = monitor.ask("query-cpus-fast", kind=list[Cpu])
    return cpus


def screendump(
    monitor: Monitor,
    fd: int,
    *,
    format: Literal["png", "ppm"] = "png",
    timeout_s: float = COMMAND_S,
) -> None:
    """Write a picture of the first display to a descriptor opened for writing only.

    The picture is whole when it returns. `CommandFailed` where there is no display.
    """
    from hutch.qmp.descriptors import fdset

    with fdset(monitor, fd) as path:
        monitor.execute("screendump", {"filename": path, "format": format}, timeout_s=timeout_s)


def add_vnc_client(monitor: Monitor, fd: int) -> None:
    """Serve VNC to a connected stream socket; QEMU needs `-vnc none` for it.

    So neither a listening port nor a path is given to QEMU. There is no password: who gets
    such a socket is for the caller to decide.
    """
    from hutch.qmp.descriptors import send_fd

    with send_fd(monitor, fd) as name:
        monitor.execute("add_client", {"protocol": "vnc", "fdname": name, "skipauth": True})
