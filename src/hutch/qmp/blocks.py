"""Block nodes of a running machine: add, remove, resize, limit, count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from hutch.errors import NotFound, Unavailable
from hutch.qmp.monitor import COMMAND_S, Monitor

__all__ = [
    "BlockStats",
    "Node",
    "blockdev_add",
    "blockdev_del",
    "query_blockstats",
    "reopen_read_only",
    "resize_block",
    "set_io_throttle",
    "set_throttle_group",
    "snapshot_node",
    "stream_node",
    "top_node",
]

RESIZE_S = 60.0
_JOB = "hutch-stream"
_JOB_ENDS = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")


class _Counters(msgspec.Struct, frozen=True):
    rd_bytes: int = 0
    wr_bytes: int = 0
    rd_operations: int = 0
    wr_operations: int = 0
    flush_operations: int = 0
    unmap_bytes: int = 0
    rd_total_time_ns: int = 0
    wr_total_time_ns: int = 0
    wr_highest_offset: int = 0


class _Entry(msgspec.Struct, frozen=True):
    stats: _Counters
    device: str = ""
    node: str = msgspec.field(name="node-name", default="")
    qdev: str = ""


class BlockStats(msgspec.Struct, frozen=True, kw_only=True):
    """What a disk has done since QEMU started; `device` is its id, `node` its block node."""

    device: str
    node: str
    read_bytes: int
    written_bytes: int
    reads: int
    writes: int
    flushes: int
    discarded_bytes: int
    read_ns: int
    write_ns: int
    highest_offset: int


def blockdev_add(
    monitor: Monitor, options: dict[str, Any], *, timeout_s: float = COMMAND_S
) -> None:
    """Open a block node; `options` as `hutch.plan.machine.disks.blockdev` makes them.

    A file comes as a set of descriptors: see `hutch.qmp.descriptors.add_fd`.
    """
    monitor.execute("blockdev-add", options, timeout_s=timeout_s)


def blockdev_del(monitor: Monitor, node: str, *, timeout_s: float = COMMAND_S) -> None:
    """Close a block node that nothing uses any more."""
    monitor.execute("blockdev-del", {"node-name": node}, timeout_s=timeout_s)


def resize_block(monitor: Monitor, node: str, size: int, *, timeout_s: float = RESIZE_S) -> None:
    """Set a node's size in bytes; the guest is told. Shrinking loses what is cut off."""
    monitor.execute("block_resize", {"node-name": node, "size": size}, timeout_s=timeout_s)


class Node(msgspec.Struct, frozen=True):
    """A block node: its name, and what it is opened from, in QEMU's words."""

    name: str = msgspec.field(name="node-name", default="")
    file: str = ""


class _Drive(msgspec.Struct, frozen=True):
    qdev: str = ""
    inserted: Node | None = None


def top_node(monitor: Monitor, device: str) -> Node:
    """Return the node that a disk writes to; a snapshot puts another one on it."""
    drives: list[_Drive] = monitor.ask("query-block", kind=list[_Drive])
    for drive in drives:
        if _device_id(drive.qdev) == device and drive.inserted is not None:
            return drive.inserted
    raise NotFound(f"qemu: no disk {device}")


def snapshot_node(monitor: Monitor, node: str, overlay: str) -> None:
    """Have what uses a node write to an overlay from now on; the node stays as it is."""
    monitor.execute("blockdev-snapshot", {"node": node, "overlay": overlay})


def stream_node(monitor: Monitor, node: str, base: str, *, timeout_s: float) -> None:
    """Bring all that lies between a node and `base` into the node, while the machine runs."""
    monitor.forget_events(_JOB_ENDS)
    monitor.execute(
        "block-stream",
        # What is written to the image's header as what it is based on: nothing.
        {"job-id": _JOB, "device": node, "base-node": base, "backing-file": ""},
    )
    event = monitor.wait_event(
        _JOB_ENDS, timeout_s=timeout_s, match=lambda event: event.data.get("device") == _JOB
    )
    reason = event.data.get("error")
    if event.name != "BLOCK_JOB_COMPLETED" or reason is not None:
        raise Unavailable(f"qemu: the disk's overlays were not brought together: {reason}")


def reopen_read_only(
    monitor: Monitor, driver: str, node: str, file: str, *, backing: str | None = None
) -> None:
    """Put another node for the file of an image, and let it be read from now on only."""
    options: dict[str, Any] = {
        "driver": driver,
        "node-name": node,
        "read-only": True,
        "file": file,
    }
    if backing is not None:
        options["backing"] = backing
    monitor.execute("blockdev-reopen", {"options": [options]})


def set_io_throttle(
    monitor: Monitor,
    devices: Sequence[str],
    group: str,
    *,
    bytes_per_s: int = 0,
    read_bytes_per_s: int = 0,
    write_bytes_per_s: int = 0,
    operations_per_s: int = 0,
    reads_per_s: int = 0,
    writes_per_s: int = 0,
) -> None:
    """Limit disks by their device ids, together; 0 is no limit, and a total excludes its parts.

    `group` is the name of what they share. For disks without limits at their start: one that
    had them has a throttle group, whose limits change by `set_throttle_group`; with both, the
    stricter holds.
    """
    entries: list[_Entry] = monitor.ask("query-blockstats", kind=list[_Entry])
    # QEMU wants what holds the disk: of a virtio device that is a part of it, not the id.
    paths = {_device_id(entry.qdev): entry.qdev for entry in entries}
    for device in devices:
        if device not in paths:
            raise NotFound(f"qemu: no disk {device}")
        monitor.execute(
            "block_set_io_throttle",
            {
                "id": paths[device],
                "group": group,
                "bps": bytes_per_s,
                "bps_rd": read_bytes_per_s,
                "bps_wr": write_bytes_per_s,
                "iops": operations_per_s,
                "iops_rd": reads_per_s,
                "iops_wr": writes_per_s,
            },
        )


def set_throttle_group(monitor: Monitor, group: str, limits: dict[str, int]) -> None:
    """Change a group's limits, as `hutch.plan.machine.disks.throttle_limits` makes them."""
    monitor.execute("qom-set", {"path": f"/objects/{group}", "property": "limits", "value": limits})


def query_blockstats(monitor: Monitor) -> list[BlockStats]:
    """Return the counters of every disk of the machine."""
    entries: list[_Entry] = monitor.ask("query-blockstats", kind=list[_Entry])
    return [_stats(entry) for entry in entries]


def _stats(entry: _Entry) -> BlockStats:
    counters = entry.stats
    return BlockStats(
        # A virtio disk's path ends in its back end: /machine/peripheral/<id>/virtio-backend.
        device=entry.device or _device_id(entry.qdev),
        node=entry.node,
        read_bytes=counters.rd_bytes,
        written_bytes=counters.wr_bytes,
        reads=counters.rd_operations,
        writes=counters.wr_operations,
        flushes=counters.flush_operations,
        discarded_bytes=counters.unmap_bytes,
        read_ns=counters.rd_total_time_ns,
        write_ns=counters.wr_total_time_ns,
        highest_offset=counters.wr_highest_offset,
    )


def _device_id(qdev: str) -> str:
    prefix = "/machine/peripheral/"
    return qdev[len(prefix) :].split("/")[0] if qdev.startswith(prefix) else qdev
