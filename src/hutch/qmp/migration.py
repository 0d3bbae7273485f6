"""Save the machine's state to a file, load it from one, and watch a migration.

QEMU tells of every step by an event once the capability `events` is set, so nothing here
asks again and again. `query_migrate` is for progress and for the words of a failure.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from hutch.errors import InvalidArgument, OperationTimeout, OutcomeUnknown, Unavailable
from hutch.qmp.descriptors import fdset, send_fd
from hutch.qmp.machine import query_status, stop
from hutch.qmp.monitor import Monitor

__all__ = [
    "DONE",
    "MIGRATE_S",
    "Migration",
    "MigrationFailed",
    "cancel_migration",
    "continue_migration",
    "load_state",
    "migrate",
    "migrate_incoming",
    "migrate_incoming_at_name",
    "migrate_to_name",
    "query_migrate",
    "save_state",
    "set_capabilities",
    "set_parameters",
    "start_postcopy",
    "wait_migration",
]

MIGRATE_S = 60.0
DONE = frozenset({"completed", "failed", "cancelled"})


class Ram(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """How far the memory is, in bytes; `pages_per_second` and `mbps` are of late."""

    transferred: int = 0
    remaining: int = 0
    total: int = 0
    mbps: float = 0.0
    dirty_pages_rate: int = 0
    dirty_sync_count: int = 0
    pages_per_second: int = 0
    postcopy_requests: int = 0


class Migration(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """What QEMU knows of the migration; times are in milliseconds."""

    status: str = "none"
    total_time: int | None = None
    downtime: int | None = None
    expected_downtime: int | None = None
    setup_time: int | None = None
    error_desc: str | None = None
    blocked_reasons: list[str] = []
    cpu_throttle_percentage: int | None = None
    ram: Ram | None = None


class MigrationFailed(Unavailable):
    """The state did not get across; the source is as it was. `status` is QEMU's word."""

    def __init__(self, status: str, reason: str | None) -> None:
        super().__init__(f"qemu: migration {status}: {reason or 'no reason given'}"[:2000])
        self.status = status


def set_capabilities(monitor: Monitor, wanted: Iterable[str], *, off: Iterable[str] = ()) -> None:
    """Switch capabilities of migration on (and others off), e.g. `x-ignore-shared`.

    `events` is always set. Both sides must agree on all but `events`.
    """
    states = dict.fromkeys(wanted, True) | {"events": True} | dict.fromkeys(off, False)
    monitor.execute(
        "migrate-set-capabilities",
        {"capabilities": [{"capability": name, "state": on} for name, on in states.items()]},
    )


def set_parameters(monitor: Monitor, **parameters: Any) -> None:
    """Set parameters of migration; underscores stand for dashes.

    `max_bandwidth` and `max_postcopy_bandwidth` are bytes a second (0 is no limit),
    `downtime_limit` milliseconds, `multifd_channels` a count.
    """
    values = {name.replace("_", "-"): value for name, value in parameters.items()}
    monitor.execute("migrate-set-parameters", values)


def query_migrate(monitor: Monitor) -> Migration:
    """Return the state of the migration now."""
    state: Migration = monitor.ask("query-migrate", kind=Migration)
    return state


def migrate(monitor: Monitor, uri: str) -> None:
    """Begin to send the state to `tcp:host:port`, `unix:path`, `fd:name` or `file:path`."""
    monitor.forget_events(["MIGRATION"])
    monitor.execute("migrate", {"uri": uri})


def migrate_incoming(monitor: Monitor, uri: str) -> None:
    """Begin to receive, in a QEMU that was started with `-incoming defer`."""
    monitor.forget_events(["MIGRATION"])
    monitor.execute("migrate-incoming", {"uri": uri})


def migrate_to_name(monitor: Monitor, name: str) -> None:
    """Begin to send the state by as many connections as it takes to an abstract socket."""
    monitor.forget_events(["MIGRATION"])
    monitor.execute("migrate", {"channels": _channels(name)})


def migrate_incoming_at_name(monitor: Monitor, name: str) -> None:
    """Begin to receive the state by connections to an abstract socket, which QEMU makes."""
    monitor.forget_events(["MIGRATION"])
    monitor.execute("migrate-incoming", {"channels": _channels(name)})


def _channels(name: str) -> list[dict[str, object]]:
    address = {"transport": "socket", "type": "unix", "path": name, "abstract": True}
    return [{"channel-type": "main", "addr": address}]


def wait_migration(
    monitor: Monitor, *, until: Collection[str] = ("completed",), timeout_s: float = MIGRATE_S
) -> str:
    """Wait until the migration that was begun reaches one of these statuses; return it.

    The statuses between are `setup active device pre-switchover postcopy-active`. Raise
    `MigrationFailed` when it ends in another way, `OperationTimeout` while it goes on.
    """
    accepted = frozenset(until) | DONE
    try:
        event = monitor.wait_event(
            ["MIGRATION"],
            timeout_s=timeout_s,
            match=lambda event: event.data.get("status") in accepted,
        )
    except OperationTimeout:
        raise OperationTimeout("qemu: the migration has not ended in the time allowed") from None
    status = str(event.data.get("status"))
    if status in until:
        return status
    raise MigrationFailed(status, query_migrate(monitor).error_desc)


def start_postcopy(monitor: Monitor) -> None:
    """Let the target run now and fetch its memory afterwards (capability `postcopy-ram`)."""
    monitor.execute("migrate-start-postcopy")


def continue_migration(monitor: Monitor) -> None:
    """Go on from `pre-switchover` (capability `pause-before-switchover`)."""
    monitor.execute("migrate-continue", {"state": "pre-switchover"})


def cancel_migration(monitor: Monitor, *, timeout_s: float = MIGRATE_S) -> str:
    """End the migration; return `cancelled`, or `completed` where it was too late."""
    monitor.execute("migrate_cancel")
    state = query_migrate(monitor).status
    if state in DONE or state == "none":
        return state
    return wait_migration(monitor, until=DONE, timeout_s=timeout_s)


# ---- templates and snapshots: to and from a file ------------------------------------------


def save_state(
    monitor: Monitor,
    fd: int,
    *,
    ignore_shared: bool,
    timeout_s: float = MIGRATE_S,
    patience_s: float | None = None,
) -> None:
    """Write the state of a machine to a regular file or memory file.

    With `ignore_shared` shared memory backends are left out: they are files already, and
    are the state together with this one. Any access mode of `fd` will do, its position
    too: QEMU gets a descriptor of its own. The machine is then stopped (`postmigrate`) and
    its disks are written back.

    A running machine goes on until little of its memory is left to write. One that dirties
    it faster than that is stopped after `patience_s`.
    """
    _ignore_shared(monitor, ignore_shared)
    with _uri(monitor, fd, os.O_WRONLY) as uri:
        os.truncate(f"/proc/self/fd/{fd}", 0)
        migrate(monitor, uri)
        _wait_written(monitor, timeout_s, patience_s)
    _wait_settled(monitor, time.monotonic() + timeout_s)


def _ignore_shared(monitor: Monitor, on: bool) -> None:
    # Said either way: a machine that was cloned has it on from its own loading.
    name = ["x-ignore-shared"]
    set_capabilities(monitor, name if on else [], off=[] if on else name)


def _wait_written(monitor: Monitor, timeout_s: float, patience_s: float | None) -> None:
    if patience_s is not None:
        try:
            wait_migration(monitor, timeout_s=patience_s)
            return
        except OperationTimeout:
            stop(monitor)
    wait_migration(monitor, timeout_s=timeout_s)


def _wait_settled(monitor: Monitor, deadline: float) -> None:
    """Wait out the moment between the event `completed` and the run state `postmigrate`.

    QEMU (seen with 7.2) takes that last step without an event, and a `cont` that comes in
    between is undone by it.
    """
    pause = 0.0005
    while query_status(monitor) == "finish-migrate":
        if time.monotonic() > deadline:
            raise OperationTimeout("qemu: the migration is over but the machine has not settled")
        time.sleep(pause)
        pause = min(pause * 2, 0.02)


def load_state(
    monitor: Monitor, fd: int, *, ignore_shared: bool, timeout_s: float = MIGRATE_S
) -> None:
    """Load what `save_state` wrote, into a QEMU started with `-incoming defer`.

    It has the same devices and the memory file as it was, private. When it returns the
    machine is as it was saved, stopped; `cont` lets it run. Many may load one file at once.
    """
    _ignore_shared(monitor, ignore_shared)
    deadline = time.monotonic() + timeout_s
    with _uri(monitor, fd, os.O_RDONLY) as uri:
        try:
            migrate_incoming(monitor, uri)
            wait_migration(monitor, timeout_s=max(0.0, deadline - time.monotonic()))
        except OutcomeUnknown as exc:
            # QEMU ends when it cannot load; its reason is in its own log.
            raise MigrationFailed("failed", f"QEMU ended ({exc.message})") from exc


@contextmanager
def _uri(monitor: Monitor, fd: int, mode: int) -> Iterator[str]:
    """Yield where QEMU finds the file: a description of its own, at offset 0."""
    try:
        own = os.open(f"/proc/self/fd/{fd}", mode | os.O_CLOEXEC)
    except OSError as exc:
        raise InvalidArgument(f"state: {(exc.strerror or '').lower()}", field="fd") from exc
    try:
        if monitor.version.migrates_to_files:
            with fdset(monitor, own) as path:
                yield f"file:{path}"
        else:
            with send_fd(monitor, own) as name:
                yield f"fd:{name}"
    finally:
        os.close(own)
