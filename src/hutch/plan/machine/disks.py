"""Block nodes and their devices, for the command line and for hot-plug alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from hutch.errors import InvalidArgument, Unsupported
from hutch.plan.machine.model import CacheMode, Disk, DiskFile, Throttle
from hutch.plan.machine.quoting import options, path_of
from hutch.plan.machine.slots import Places

__all__ = [
    "SERIAL_MAX",
    "VOLUMES_MAX",
    "base_name",
    "blockdev",
    "disk_arguments",
    "node_name",
    "secret_option",
]
__all__ += ["VOLUME_PORT", "throttle_limits", "volume_arguments", "volume_device", "volume_name"]

SERIAL_MAX = 20
"""VIRTIO_BLK_ID_BYTES: the guest sees no more of a serial."""

VOLUME_PORT = "rp0"
"""The port for hot-plug that volumes share, as functions of one device; see `volume_device`."""
VOLUMES_MAX = 7


def node_name(index: int) -> str:
    """Return the block node of the machine's `index`-th disk; its device is the same + `-dev`."""
    return f"disk{index}"


def _file(image: DiskFile, cache: CacheMode, discard: bool) -> dict[str, Any]:
    return {
        "driver": "host_device" if image.block_device else "file",
        "filename": path_of(image.file),
        "cache": {"direct": cache == "none", "no-flush": cache == "unsafe"},
        "discard": "unmap" if discard else "ignore",
    }


def base_name(node: str, depth: int) -> str:
    """Return the node of the image that lies `depth` beneath a disk's own."""
    return f"{node}-base{depth}"


def _format(
    image: DiskFile,
    *,
    read_only: bool,
    cache: CacheMode,
    discard: bool,
    node_of: str = "",
    depth: int = 0,
) -> dict[str, Any]:
    node: dict[str, Any] = {
        "driver": image.format,
        "read-only": read_only,
        "cache": {"direct": cache == "none", "no-flush": cache == "unsafe"},
        "discard": "unmap" if discard else "ignore",
        "file": _file(image, cache, discard) | {"read-only": read_only},
    }
    if image.key:
        secret = {"key-secret": image.key}
        node |= secret if image.format == "luks" else {"encrypt": {"format": "luks", **secret}}
    if image.backing is not None:
        if image.format != "qcow2":
            raise InvalidArgument("a raw image has no backing file", field="disk.image.backing")
        below = _format(
            image.backing,
            read_only=True,
            cache=cache,
            discard=False,
            node_of=node_of,
            depth=depth + 1,
        )
        node["backing"] = {"node-name": base_name(node_of, depth + 1), **below}
    elif image.format == "qcow2":
        # What an image's header names is the image's author's choice, and never opened.
        node["backing"] = None
    return node


def blockdev(disk: Disk, node: str) -> dict[str, Any]:
    """Return the options of `-blockdev` and `blockdev-add` for a disk, under this node name.

    A throttle filter is on top where the disk has limits, in the group `<node>-limits`.
    """
    discard = disk.discard and not disk.read_only
    top = _format(
        disk.image, read_only=disk.read_only, cache=disk.cache, discard=discard, node_of=node
    )
    if disk.aio != "threads":
        top["file"]["aio"] = disk.aio
    if disk.detect_zeroes and not disk.read_only:
        top["detect-zeroes"] = "unmap" if discard else "on"
    if disk.throttle is None:
        return {"node-name": node, **top}
    return {
        "node-name": node,
        "driver": "throttle",
        "throttle-group": f"{node}-limits",
        "read-only": disk.read_only,
        "discard": top["discard"],
        "file": {"node-name": f"{node}-image", **top},
    }


def secret_option(name: str, descriptor: int) -> str:
    """Return QEMU's object for a key that it reads from its descriptor: its line has no key."""
    return f"secret,id={name},file=/proc/self/fd/{descriptor}"


def throttle_limits(throttle: Throttle) -> dict[str, int]:
    """Return the limits of a throttle group (QEMU's ThrottleLimits); 0 is no limit."""
    if throttle.bytes and (throttle.read_bytes or throttle.write_bytes):
        raise InvalidArgument("give a total or its parts", field="disk.throttle.bytes")
    if throttle.operations and (throttle.reads or throttle.writes):
        raise InvalidArgument("give a total or its parts", field="disk.throttle.operations")
    return {
        "bps-total": throttle.bytes,
        "bps-read": throttle.read_bytes,
        "bps-write": throttle.write_bytes,
        "iops-total": throttle.operations,
        "iops-read": throttle.reads,
        "iops-write": throttle.writes,
    }


def disk_arguments(disks: tuple[Disk, ...], places: Places) -> Iterator[str]:
    """Yield what QEMU needs for the machine's disks, in order."""
    cdroms = 0
    for index, disk in enumerate(disks):
        node = node_name(index)
        if len(disk.serial) > SERIAL_MAX:
            raise InvalidArgument(
                f"at most {SERIAL_MAX} characters, got {disk.serial!r}",
                field=f"machine.disks[{index}].serial",
            )
        if disk.throttle is not None:
            group = {
                "qom-type": "throttle-group",
                "id": f"{node}-limits",
                "limits": throttle_limits(disk.throttle),
            }
            yield from ("-object", msgspec.json.encode(group).decode())
        yield from ("-blockdev", msgspec.json.encode(blockdev(disk, node)).decode())
        if disk.kind == "cdrom":
            yield from ("-device", _cdrom(disk, node, cdroms, places))
            cdroms += 1
        else:
            where = places.many("disks", index, len(disks))
            yield from ("-device", _virtio(disk, node, places, where))


def volume_name(index: int) -> str:
    """Return the block node of the `index`-th volume; its device is the same + `-dev`."""
    return f"volume{index}"


def volume_device(index: int, *, first: int, serial: str) -> dict[str, str | int | bool]:
    """Return the options of the device of the `index`-th volume, as `device_add` has them.

    `first` is the function of the first one: 1 where something else is function 0. That one
    makes the guest look for the others, so it is plugged last.
    """
    function = first + index
    return {
        "id": f"{volume_name(index)}-dev",
        "bus": VOLUME_PORT,
        "addr": f"0x0.{function:#x}",
        "multifunction": function == 0,
        "drive": volume_name(index),
        "serial": serial,
        "num_queues": 1,
        "write_cache": True,
    }


def volume_arguments(volumes: tuple[Disk, ...], places: Places) -> Iterator[str]:
    """Yield what QEMU needs for volumes that are there from the start."""
    if volumes and places.micro:
        raise Unsupported("volumes: a machine of type microvm has no port for them")
    if len(volumes) > VOLUMES_MAX:
        raise InvalidArgument(f"at most {VOLUMES_MAX}, got {len(volumes)}", field="machine.volumes")
    for index, disk in enumerate(volumes):
        node = blockdev(disk, volume_name(index))
        yield from ("-blockdev", msgspec.json.encode(node).decode())
        device = volume_device(index, first=0, serial=disk.serial)
        yield from ("-device", options("virtio-blk-pci", **device))


def _virtio(
    disk: Disk, node: str, places: Places, where: dict[str, str | int | bool | None]
) -> str:
    return options(
        places.virtio("virtio-blk"),
        id=f"{node}-dev",
        **where,
        drive=node,
        serial=disk.serial,
        num_queues=disk.queues or 1,
        write_cache=True,
        bootindex=disk.boot_index if disk.boot_index >= 0 else None,
    )


def _cdrom(disk: Disk, node: str, number: int, places: Places) -> str:
    if places.micro:
        raise Unsupported("disks: a machine of type microvm has no cdrom")
    if not disk.read_only:
        raise InvalidArgument("a cdrom is read-only", field="disk.read_only")
    # The six ports of the chipset's AHCI controller.
    return options(
        "ide-cd",
        id=f"{node}-dev",
        bus=f"ide.{number}",
        drive=node,
        serial=disk.serial,
        bootindex=disk.boot_index if disk.boot_index >= 0 else None,
    )
