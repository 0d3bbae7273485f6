"""A running machine on its way to another host: its disk and memory copied while it runs.

QEMU stops it for the last of its memory when little is left of it, and not before the answers
of the other side have come through (`switchover-ack`): the streams of the main process are
held still just before, so that nothing is under way between the agent and the monitor.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from hutch.drivers.moving import CopyState, Streams
from hutch.drivers.vm.boot import QMP_SOCKET
from hutch.drivers.vm.machine import load_record
from hutch.drivers.vm.state import SHARES, VOLUMES, check_devices, check_movable, immovable
from hutch.errors import HutchError, OperationTimeout, Unavailable, Unsupported
from hutch.plan.machine.disks import node_name
from hutch.plan.machine.version import QemuVersion
from hutch.process.guest import Guest
from hutch.qmp.machine import cont, query_status, stop
from hutch.qmp.migration import (
    DONE,
    MigrationFailed,
    cancel_migration,
    continue_migration,
    migrate,
    migrate_to_name,
    query_migrate,
    set_capabilities,
    set_parameters,
    start_postcopy,
    wait_migration,
)
from hutch.qmp.mirror import begin_mirror, drop_mirror, end_mirror, query_job
from hutch.storage.snapshots import DISK_FILE

if TYPE_CHECKING:
    from hutch.process.guest import Quiet
    from hutch.qmp import Monitor

__all__ = ["COPYING_CAPABILITIES", "Departing", "departing", "run_on"]

WRITABLE = node_name(1)
_SWITCH_S = 60.0
# What is sent while it stands still is to be no more than its devices.
_POST_COPY_MS = 10
# QEMU looks anew for what was written when less is left than it sends in the time allowed. If it
# may not stop the machine then, as its answers are held back, an emulated processor is not told
# where that finds only pages that are still to be sent, and what it writes to them after that is
# lost (`physical_memory_sync_dirty_bitmap`): until then it is to look when all is sent.
_HELD_MS = 1
# Capabilities that must be said either way: a machine may have them on from its own loading.
COPYING_CAPABILITIES = ("multifd", "postcopy-ram", "switchover-ack", "return-path")
_OURS = (*COPYING_CAPABILITIES, "auto-converge", "pause-before-switchover", "x-ignore-shared")


def wanted_capabilities(version: QemuVersion, streams: Streams) -> list[str]:
    """Return what both sides switch on."""
    wanted = ["return-path"]
    if version.waits_for_switchover:
        wanted.append("switchover-ack")
    if streams.post_copy:
        wanted.append("postcopy-ram")
    if streams.channels:
        wanted.append("multifd")
    return wanted


def stream_parameters(streams: Streams) -> dict[str, object]:
    """Return what both sides set."""
    if not streams.channels:
        return {}
    compression = "zstd" if streams.compress else "none"
    return {"multifd_channels": streams.channels, "multifd_compression": compression}


@contextmanager
def departing(
    directory: str, *, cards: int, streams: Streams, bandwidth: int, downtime_s: float
) -> Iterator[Departing]:
    """Copy a running machine; see `hutch.drivers.moving.Movable.depart`."""
    from hutch.qmp import conversation

    record = load_record(directory)
    if record.holds_shares:
        raise immovable(*SHARES)
    if record.volumes:
        raise immovable(*VOLUMES)
    check_devices(record)
    with conversation(f"{directory}/run/{QMP_SOCKET}") as monitor:
        check_movable(monitor, cards)
        _check_version(monitor, record.accelerator)
        if streams.channels:
            _check_parallel(monitor, directory)
        drop_mirror(monitor, WRITABLE)  # of a copy that was cut short
        copied = Departing(monitor, directory, streams, downtime_s)
        _prepare(monitor, streams, bandwidth, copied.downtime_ms)
        with ExitStack() as held:
            copied.held = held
            try:
                yield copied
            except BaseException:
                copied.give_up()
                raise


def _check_version(monitor: Monitor, accelerator: str) -> None:
    if accelerator == "tcg" and not monitor.version.sees_emulated_writes:
        raise Unsupported(
            f"QEMU {monitor.version} loses writes of an emulated machine that is copied while "
            "it runs",
            hint="start it with QEMU 9.0 or later",
        )


def _check_parallel(monitor: Monitor, directory: str) -> None:
    from hutch.drivers.vm.rendezvous import require_own_network

    if not monitor.version.names_channels:
        raise Unsupported(
            f"parallel streams: QEMU {monitor.version} cannot open them",
            hint="leave --parallel and --compress out, or use QEMU 8.2 or later",
        )
    require_own_network(directory)


def _prepare(monitor: Monitor, streams: Streams, bandwidth: int, downtime_ms: int) -> None:
    on = [*wanted_capabilities(monitor.version, streams), "auto-converge"]
    on.append("pause-before-switchover")
    set_capabilities(monitor, on, off=[name for name in _OURS if name not in on])
    set_parameters(
        monitor,
        max_bandwidth=bandwidth,
        downtime_limit=_HELD_MS if monitor.version.waits_for_switchover else downtime_ms,
        **stream_parameters(streams),
    )
    if streams.post_copy:
        set_parameters(monitor, max_postcopy_bandwidth=bandwidth)


class Departing:
    """See `hutch.drivers.moving.Departure`."""

    def __init__(
        self,
        monitor: Monitor,
        directory: str,
        streams: Streams,
        downtime_s: float,
    ) -> None:
        self.waits = monitor.version.waits_for_switchover
        self.downtime_ms = _POST_COPY_MS if streams.post_copy else max(1, int(downtime_s * 1000))
        self.stopped_at = 0.0
        self.held: ExitStack
        self._monitor = monitor
        self._directory = directory
        self._streams = streams
        self._quiet: Quiet | None = None

    def mirror(self, connection: int) -> None:
        begin_mirror(self._monitor, WRITABLE, connection)

    def mirrored(self) -> tuple[int, int]:
        job = query_job(self._monitor, WRITABLE)
        if job is None or job.status not in ("created", "running", "ready", "paused"):
            raise Unavailable("the copy of the disk has failed")
        if job.status == "ready":
            return job.total, job.total
        # Equal numbers would say that it follows the disk.
        return job.current, max(job.total, job.current + 1)

    def begin(self, connection: int) -> None:
        from hutch.qmp.descriptors import send_fd

        with send_fd(self._monitor, connection) as name:
            migrate(self._monitor, f"fd:{name}")

    def begin_parallel(self) -> socket.socket:
        from hutch.drivers.vm.rendezvous import listen_at_name, new_name

        name = new_name()
        listener = listen_at_name(self._directory, name)
        try:
            migrate_to_name(self._monitor, name)
        except BaseException:
            listener.close()
            raise
        return listener

    def copying(self) -> CopyState:
        found = query_migrate(self._monitor)
        if found.status in DONE:
            raise MigrationFailed(found.status, found.error_desc)
        ram = found.ram
        if ram is None:
            return CopyState(remaining=1, total=1, sent=0, rate=0, passes=0)
        return CopyState(
            remaining=ram.remaining,
            total=ram.total,
            sent=ram.transferred,
            rate=int(ram.mbps * 125_000),
            passes=ram.dirty_sync_count,
            throttle=found.cpu_throttle_percentage or 0,
        )

    def hold_streams(self) -> int:
        # QEMU writes its disks back when the machine stands still: by then that is little.
        _write_back(f"{self._directory}/{DISK_FILE}")
        quiet = Guest(f"{self._directory}/run").quiesce(self._monitor.fileno())
        self._quiet = self.held.enter_context(quiet)
        return self._quiet.unacked

    def allow(self) -> None:
        if self.waits:
            set_parameters(self._monitor, downtime_limit=self.downtime_ms)

    def wait_stopped(self, timeout_s: float) -> bool:
        try:
            wait_migration(self._monitor, until=("pre-switchover",), timeout_s=timeout_s)
        except OperationTimeout:
            return False
        self.stopped_at = _when_stopped(self._monitor)
        return True

    def hurry(self) -> None:
        if self._streams.post_copy:
            start_postcopy(self._monitor)
        else:
            stop(self._monitor)

    def end_mirror(self) -> None:
        end_mirror(self._monitor, WRITABLE)

    def finish(self) -> bool:
        continue_migration(self._monitor)
        # With little left QEMU sends it all at once, post-copy or not.
        until = ("completed", "postcopy-active") if self._streams.post_copy else ("completed",)
        return wait_migration(self._monitor, until=until, timeout_s=_SWITCH_S) == "completed"

    def let_go(self) -> None:
        assert self._quiet is not None
        self._quiet.dismiss()

    def wait_complete(self, timeout_s: float) -> None:
        wait_migration(self._monitor, timeout_s=timeout_s)

    def give_up(self) -> None:
        """Let the machine go on here; what is amiss is for the caller of `run_on` to see."""
        try:
            go_on(self._monitor)
        except HutchError:
            pass


def _write_back(path: str) -> None:
    """See what was written to a file on the disk; who is told of a failure is its writer."""
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.fdatasync(fd)
        finally:
            os.close(fd)


def _when_stopped(monitor: Monitor) -> float:
    """Return when the processors were stopped, by `time.monotonic`: QEMU says it at once, and
    has written its disks back and perhaps sent much of the memory before it says the rest."""
    now = time.monotonic()
    try:
        stopped = monitor.wait_event(["STOP"], timeout_s=0)
    except OperationTimeout:
        return now
    return now - max(0.0, time.time() - stopped.time)


def run_on(directory: str) -> None:
    """Let a machine go on whose copying was cut short; safe to repeat."""
    from hutch.qmp import conversation

    with conversation(f"{directory}/run/{QMP_SOCKET}") as monitor:
        go_on(monitor)


def go_on(monitor: Monitor) -> None:
    """End what is being copied, and let the processors run."""
    status = query_migrate(monitor).status
    if status not in DONE and status != "none":
        cancel_migration(monitor)
    deadline = time.monotonic() + _SWITCH_S
    while query_status(monitor) == "finish-migrate" and time.monotonic() < deadline:
        time.sleep(0.001)
    if query_status(monitor) != "running":
        cont(monitor)
    drop_mirror(monitor, WRITABLE)
