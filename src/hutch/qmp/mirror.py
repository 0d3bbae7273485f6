"""Copy a disk to another QEMU while the machine writes to it: NBD there, a mirror job here."""

from __future__ import annotations

import time

import msgspec

from hutch.errors import OperationTimeout, Unavailable
from hutch.qmp.blocks import blockdev_add
from hutch.qmp.descriptors import send_fd
from hutch.qmp.errors import CommandFailed
from hutch.qmp.monitor import Monitor

__all__ = ["Job", "begin_mirror", "drop_mirror", "end_mirror", "export_disk", "query_job"]
__all__ += ["unexport_disk"]

_PREFIX = "mirror-"
_END_S = 60.0
_POLL_S = 0.002


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A copying job: bytes done of those to do so far, which grow as the guest writes."""

    id: str
    status: str
    current: int = msgspec.field(name="current-progress", default=0)
    total: int = msgspec.field(name="total-progress", default=0)
    error: str = ""


# ---- the target -----------------------------------------------------------------------------


def export_disk(monitor: Monitor, node: str, listener: int) -> None:
    """Serve a block node by NBD, writable, to the one who connects to a listening socket."""
    with send_fd(monitor, listener) as name:
        monitor.execute(
            "nbd-server-start",
            {"addr": {"type": "fd", "data": {"str": name}}, "max-connections": 1},
        )
    monitor.execute(
        "block-export-add",
        {"type": "nbd", "id": f"export-{node}", "node-name": node, "name": node, "writable": True},
    )


def unexport_disk(monitor: Monitor, node: str, *, timeout_s: float = _END_S) -> None:
    """End it: afterwards the node may belong to a machine again."""
    monitor.forget_events(["BLOCK_EXPORT_DELETED"])
    # The client may not have said its good-bye yet.
    monitor.execute("block-export-del", {"id": f"export-{node}", "mode": "hard"})
    monitor.wait_event(
        ["BLOCK_EXPORT_DELETED"],
        timeout_s=timeout_s,
        match=lambda event: event.data.get("id") == f"export-{node}",
    )
    monitor.execute("nbd-server-stop")


# ---- the source -----------------------------------------------------------------------------


def begin_mirror(monitor: Monitor, node: str, connection: int) -> None:
    """Begin to copy a block node over a connected socket to such an export of the same name.

    It goes as fast as the connection: the job's own `speed` counts zeros that are not sent, and
    holds a disk with little on it up for as long as a full one."""
    target = f"{_PREFIX}{node}"
    with send_fd(monitor, connection) as name:
        server = {"type": "fd", "str": name}
        options = {"driver": "nbd", "node-name": target, "server": server, "export": node}
        blockdev_add(monitor, options)
    arguments = {"job-id": target, "device": node, "target": target, "sync": "full"}
    arguments |= {"on-target-error": "report"}
    monitor.execute("blockdev-mirror", arguments)


def query_job(monitor: Monitor, node: str) -> Job | None:
    """Return the job of a node's mirror, None when it has ended."""
    jobs: list[Job] = monitor.ask("query-jobs", kind=list[Job])
    return next((job for job in jobs if job.id == f"{_PREFIX}{node}"), None)


def end_mirror(monitor: Monitor, node: str, *, timeout_s: float = _END_S) -> None:
    """End a mirror that is ready, of a machine that is stopped: when it returns, the copy has
    all that was written, on its disk. Raise `Unavailable` where it does not."""
    monitor.forget_events(["BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"])
    try:
        monitor.execute("block-job-cancel", {"device": f"{_PREFIX}{node}"})
    except CommandFailed as exc:
        raise Unavailable(f"the copy of the disk has failed: {exc.message}") from exc
    event = monitor.wait_event(
        ["BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"],
        timeout_s=timeout_s,
        match=lambda event: event.data.get("device") == f"{_PREFIX}{node}",
    )
    # A mirror that is ready and cancelled has completed: its copy is of this moment.
    if event.name != "BLOCK_JOB_COMPLETED" or event.data.get("error"):
        raise Unavailable(
            f"the copy of the disk has failed: {event.data.get('error', 'cancelled')}"
        )
    _drop_node(monitor, node, timeout_s)


def drop_mirror(monitor: Monitor, node: str, *, timeout_s: float = _END_S) -> None:
    """Give a mirror up, however far it is; nothing of it is left. Safe to repeat."""
    try:
        monitor.execute("block-job-cancel", {"device": f"{_PREFIX}{node}", "force": True})
    except CommandFailed:
        pass  # it has ended
    deadline = time.monotonic() + timeout_s
    while query_job(monitor, node) is not None:
        if time.monotonic() > deadline:
            raise OperationTimeout("qemu: the copy of the disk does not end")
        time.sleep(_POLL_S)
    _drop_node(monitor, node, timeout_s)


def _drop_node(monitor: Monitor, node: str, timeout_s: float) -> None:
    """Close the connection; the job has let go of it, or is about to."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            monitor.execute("blockdev-del", {"node-name": f"{_PREFIX}{node}"})
        except CommandFailed as exc:
            if "in use" not in exc.message and "busy" not in exc.message:
                return  # there is none
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_S)
        else:
            return
