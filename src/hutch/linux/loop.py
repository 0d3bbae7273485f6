"""Files as block devices; see loop(4)."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["attached_device", "backing_file", "held_device", "loop_device", "set_capacity"]

_GET_FREE = 0x4C82
_CONFIGURE = 0x4C0A
_SET_CAPACITY = 0x4C07
_GET_STATUS = 0x4C05
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


def attached_device(path: str) -> str:
    """Return the block device that is made of a file already, "" for none. A second one would
    let two file systems write to the same blocks."""
    for name in os.listdir("/sys/block"):
        if name.startswith("loop") and _is_behind(path, name):
            return f"/dev/{name}"
    return ""


def _is_behind(path: str, device: str) -> bool:
    """Tell whether a block device is made of a file, and not of another one that has the same
    path elsewhere: in a container, say, or beneath a mount."""
    if backing_file(device) != os.path.realpath(path):
        return False
    try:
        status = os.stat(path)
        fd = os.open(f"/dev/{os.path.basename(device)}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True  # of a file whose server was killed nothing is told
    try:
        found = fcntl.ioctl(fd, _GET_STATUS, bytes(struct.calcsize(_INFO)))
        return struct.unpack(_INFO, found)[:2] == (status.st_dev, status.st_ino)
    except OSError:
        return True
    finally:
        os.close(fd)


@contextmanager
def held_device(path: str) -> Iterator[str]:
    """Yield the block device that is made of a file already and keep it so, "" for none."""
    device = attached_device(path)
    try:
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC) if device else -1
    except OSError as exc:
        if exc.errno != errno.ENXIO:  # it is about to go
            raise
        fd = -1
    if fd < 0:
        yield ""
        return
    try:
        # It may have gone and be another file's by now.
        yield device if _is_behind(path, device) else ""
    finally:
        os.close(fd)


def set_capacity(device: str) -> None:
    """Let a block device be as long as its file is now. `OSError` passes."""
    fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _SET_CAPACITY, 0)
    finally:
        os.close(fd)


def backing_file(device: str) -> str:
    """Return the path of the file that is behind a block device, "" for one that is free."""
    try:
        with open(f"/sys/block/{os.path.basename(device)}/loop/backing_file") as file:
            return file.read().removesuffix("\n")
    except OSError:
        return ""
