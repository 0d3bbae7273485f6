"""The machine's memory blocks, and the state of its devices without them."""

from __future__ import annotations

import os

from hutch.errors import IntegrityError
from hutch.qmp.descriptors import fdset
from hutch.qmp.monitor import Monitor

__all__ = ["list_memory", "save_devices"]

_DEVICES_MAX = 64 << 20


def list_memory(monitor: Monitor) -> dict[str, int]:
    """Return QEMU's blocks of memory, the guest's and the firmware's: name and bytes in use."""
    text = monitor.execute("x-query-ramblock")["human-readable-text"]
    found = {}
    for line in text.splitlines()[1:]:
        # name, page size and its unit, offset, used, total; in later versions more
        name, _, _, _, used, *_ = line.split()
        found[name] = int(used, 16)
    return found


def save_devices(monitor: Monitor) -> bytes:
    """Return the state of all devices of a machine that is stopped, as a stream of QEMU's that
    has no memory in it. The disks stay in use, and the machine may go on.

    (The command is named after its first user, and needs nothing of Xen.)
    """
    fd = os.memfd_create("hutch-devices", os.MFD_CLOEXEC)
    try:
        # QEMU picks the member of the set by how it opens it.
        writable = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            with fdset(monitor, writable) as path:
                monitor.execute("xen-save-devices-state", {"filename": path, "live": False})
        finally:
            os.close(writable)
        size = os.fstat(fd).st_size
        if size > _DEVICES_MAX:
            raise IntegrityError(f"qemu: the state of the devices has {size} bytes")
        return os.pread(fd, size, 0)
    finally:
        os.close(fd)
