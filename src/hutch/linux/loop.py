"""Files as block devices; see loop(4)."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["loop_device"]

_GET_FREE = 0x4C82
_CONFIGURE = 0x4C0A
_AUTOCLEAR = 4
_ATTEMPTS = 64
# struct loop_config: fd, block size, struct loop_info64, eight reserved words.
_HEAD, _INFO, _TAIL = "=II", "=5Q4I64s64s32s2Q", "=8Q"


@contextmanager
def loop_device(fd: int) -> Iterator[str]:
    """Yield the path of a block device made of an open file. It goes by itself when nothing
    has it open or mounted any more. `OSError` passes."""
    device, path = _attach(fd)
    try:
        yield path
    finally:
        os.close(device)


def _attach(fd: int) -> tuple[int, str]:
    info = struct.pack(_INFO, *(0,) * 5, 0, 0, 0, _AUTOCLEAR, b"hutch", b"", b"", 0, 0)
    config = struct.pack(_HEAD, fd, 0) + info + struct.pack(_TAIL, *(0,) * 8)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_ATTEMPTS):
            path = f"/dev/loop{fcntl.ioctl(control, _GET_FREE)}"
            device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _CONFIGURE, config)
            except OSError as exc:
                os.close(device)
                if exc.errno != errno.EBUSY:  # somebody else was faster
                    raise
                continue
            return device, path
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, "no free loop device")
