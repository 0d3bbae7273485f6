"""What stands behind a machine's devices where nobody looks at it: the disks of a template
while it is booted and saved, and the kernel of a clone.

The guest's drivers ask a device for its features and size once, when they find it. So what
stands behind a template's devices offers what an instance's will: disks of the same kind
and at least the same size, cards with the same offloads.
"""

from __future__ import annotations

import os

from hutch.drivers.vm.sandbox import Descriptors
from hutch.drivers.vm.setup import ROOT_SERIAL, WRITABLE_SERIAL
from hutch.host.kvm import tiny_guest
from hutch.plan.machine.model import Descriptor, Disk, DiskFile
from hutch.storage.disks import DEFAULT_SIZE

__all__ = ["ROOT_SIZE", "empty_disks", "seen_size", "stub_kernel"]

# The guest goes by this size until it is told of another, and the end of an image's disk is
# in its file system: larger than any image will do. Reading behind the end is an error.
ROOT_SIZE = 1 << 40


def seen_size(size: int) -> int:
    """Return the size of a template's writable disk for one of `size`: usually the same.

    Never smaller, or its file system could not be mounted before the guest has heard of the
    change; and one of few, as each is another template."""
    return DEFAULT_SIZE if size <= DEFAULT_SIZE else 1 << (size - 1).bit_length()


def empty_disks(descriptors: Descriptors, size: int) -> tuple[Disk, Disk]:
    """Return disks like an instance's, with nothing in them; `size` is the writable one's."""
    root = _empty(ROOT_SIZE)
    try:
        readable = os.open(f"/proc/self/fd/{root}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(root)
    return (
        Disk(
            image=_image(descriptors, readable), serial=ROOT_SERIAL, read_only=True, discard=False
        ),
        Disk(
            image=_image(descriptors, _empty(size)),
            serial=WRITABLE_SERIAL,
            detect_zeroes=True,
        ),
    )


def stub_kernel(descriptors: Descriptors) -> str:
    """Return the path in QEMU of a kernel that is never started.

    A clone's kernel is in its memory. But QEMU, told to start none, would have other option
    ROMs than the template, and one of 50 MB takes it 20 ms to read.
    """
    fd = os.memfd_create("hutch-no-kernel", os.MFD_CLOEXEC)
    number = descriptors.add(fd)
    os.write(fd, tiny_guest())
    return f"/proc/self/fd/{number}"


def _empty(size: int) -> int:
    """Return a file of holes, which takes no memory."""
    fd = os.memfd_create("hutch-empty", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


def _image(descriptors: Descriptors, fd: int) -> DiskFile:
    return DiskFile(file=Descriptor(descriptors.add(fd)))
