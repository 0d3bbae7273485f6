"""What QEMU gets to open a machine's encrypted disks, and how large its own disk is."""

from __future__ import annotations

import os

from hutch.drivers.base import Launch
from hutch.drivers.vm.sandbox import Descriptors
from hutch.plan.machine.model import Descriptor, Secret
from hutch.storage.diskchain import chain, virtual_size
from hutch.storage.diskkeys import DiskKey
from hutch.storage.disks import disk_size

__all__ = ["DISK_KEY", "secrets", "writable_files", "writable_size"]

DISK_KEY = "key0"


def secrets(launch: Launch, descriptors: Descriptors) -> list[Secret]:
    """Return the keys of the machine's disks; without one at hand nothing is behind it."""

    def secret(name: str, key: DiskKey | None) -> Secret:
        fd = key.open() if key else os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        return Secret(name=name, file=Descriptor(descriptors.add(fd)))

    found = [secret(DISK_KEY, launch.disk_key)] if launch.spec.machine.disk_key else []
    for index, key in enumerate(launch.attached_keys, 1):
        if key is not None:
            found.append(secret(f"key{index}", key))
    return found


def writable_files(launch: Launch) -> list[str]:
    """Return the files of the writable disk of an image's machine, the lowest first. An
    encrypted one is one file: what would be written over it is to be encrypted too."""
    if launch.spec.machine.disk_key is not None:
        return [launch.disk]
    return chain(os.path.dirname(launch.disk))


def writable_size(launch: Launch) -> int:
    """Return the bytes of that disk, as its machine sees it."""
    if launch.spec.machine.disk_key is not None:
        return disk_size(launch.disk, encrypted=True)
    return virtual_size(os.path.dirname(launch.disk))
