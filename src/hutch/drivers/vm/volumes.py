"""Volumes that a machine has to itself, as disks with file systems of their own.

They are functions of one device at the first port for hot-plug: a machine that is booted has
them from the start, one from a template gets them before it goes on. So wherever its state is
loaded later, they are where its guest knows them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hutch.drivers.base import Launch, LaunchMount
from hutch.drivers.vm.sandbox import Descriptors
from hutch.errors import InvalidArgument, Unsupported
from hutch.plan import guest
from hutch.plan.machine.disks import VOLUMES_MAX, blockdev, volume_device, volume_name
from hutch.plan.machine.model import MICROVM, Descriptor, Disk, DiskFile
from hutch.plan.vm import GUEST_VOLUMES
from hutch.spec.model import InstanceSpec, VolumeMount
from hutch.storage.sparse import copy_sparse

if TYPE_CHECKING:
    from hutch.qmp.monitor import Monitor

__all__ = [
    "check_volumes",
    "copy_volume",
    "grow_volume",
    "guest_path",
    "plug_volumes",
    "volume_disks",
]
__all__ += ["volume_setup", "volumes"]

_MS_NOSUID, _MS_NODEV, _MS_NOATIME = 2, 4, 1024
_RESIZE_S = 600.0


def check_volumes(spec: InstanceSpec, machine: str) -> None:
    """Raise for volumes as disks that a machine of that type cannot have."""
    disks = [mount for mount in spec.mounts if isinstance(mount, VolumeMount) and mount.disk]
    if disks and machine == MICROVM:
        raise Unsupported(
            "mounts: a machine of type microvm has no port for volumes as disks",
            hint="use --machine q35",
        )
    if len(disks) > VOLUMES_MAX:
        raise InvalidArgument(
            f"at most {VOLUMES_MAX} volumes are disks of one machine, got {len(disks)}",
            field="mounts",
        )


def volumes(launch: Launch) -> list[LaunchMount]:
    """Return the mounts that are disks of the machine."""
    return [mount for mount in launch.mounts if mount.disk]


def guest_path(number: int) -> str:
    """Return where the guest has the files of a volume."""
    return f"{GUEST_VOLUMES}/{number}/upper"


def volume_disks(launch: Launch, descriptors: Descriptors) -> tuple[Disk, ...]:
    """Return the disks. The file's own lock (QEMU's) keeps a second machine from it."""
    found = []
    for number, mount in enumerate(volumes(launch)):
        fd = os.open(mount.source, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        found.append(_disk(number, Descriptor(descriptors.add(fd))))
    return tuple(found)


def _disk(number: int, file: str | Descriptor) -> Disk:
    return Disk(image=DiskFile(file=file), serial=volume_name(number), detect_zeroes=True)


def volume_setup(launch: Launch) -> list[guest.SetupOp]:
    """Return what mounts them in the guest, which waits for those that are being plugged."""
    made: list[guest.SetupOp] = []
    for number, _ in enumerate(volumes(launch)):
        link = _link(number)
        made.append(guest.Disk(serial=volume_name(number), link=link))
        made.append(
            guest.Mount(
                source=link,
                target=f"{GUEST_VOLUMES}/{number}",
                fstype="ext4",
                flags=_MS_NOSUID | _MS_NODEV | _MS_NOATIME,
                data="noinit_itable,discard",
            )
        )
    return made


def _link(number: int) -> str:
    return f"/dev/disk-volume{number}"


def plug_volumes(monitor: Monitor, mounts: Sequence[LaunchMount], *, first: int) -> None:
    """Plug them into a machine that was resumed from a template; `first` is the function of
    the first of them, and function 0 comes last: only then does the guest look."""
    from hutch.qmp.blocks import blockdev_add
    from hutch.qmp.descriptors import fdset
    from hutch.qmp.devices import device_add

    for number, mount in reversed(list(enumerate(mounts))):
        fd = os.open(mount.source, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            with fdset(monitor, fd) as name:
                blockdev_add(monitor, blockdev(_disk(number, name), volume_name(number)))
        finally:
            os.close(fd)
        device = volume_device(number, first=first, serial=volume_name(number))
        device_add(monitor, "virtio-blk-pci", id=str(device.pop("id")), **device)


def grow_volume(directory: str, number: int, size: int) -> None:
    """Let a volume of a running machine, and its file system, grow to `size` bytes."""
    from hutch.drivers.vm.boot import QMP_SOCKET
    from hutch.process.guest import Guest
    from hutch.qmp import conversation
    from hutch.qmp.blocks import resize_block

    with conversation(f"{directory}/run/{QMP_SOCKET}") as monitor:
        resize_block(monitor, volume_name(number), size)
    grown = guest.Resize(device=_link(number), path=f"{GUEST_VOLUMES}/{number}", size=size)
    request = guest.encode_setup([grown])
    Guest(f"{directory}/run").call(guest.Call.SETUP, request, timeout_s=_RESIZE_S)


def copy_volume(directory: str, number: int, source: str, target: str) -> None:
    """Copy a volume of a running machine, which writes it out and then stands still for it.
    Whoever is killed meanwhile leaves a machine that goes on."""
    from hutch.drivers.vm.boot import QMP_SOCKET
    from hutch.process.guest import Guest
    from hutch.qmp import conversation
    from hutch.qmp.machine import cont, stop

    agent = Guest(f"{directory}/run")
    path = guest.path_argument(f"{GUEST_VOLUMES}/{number}")
    with conversation(f"{directory}/run/{QMP_SOCKET}") as monitor:
        for call in (guest.Call.FREEZE, guest.Call.THAW):
            agent.call(call, path)
        with agent.quiesce(monitor.fileno()):
            stop(monitor)
            try:
                copy_sparse(source, target)
            finally:
                cont(monitor)
