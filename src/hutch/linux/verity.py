"""fs-verity: files that the kernel checks as they are read; see Documentation/filesystems/fsverity.

Such a file cannot be written to any more, and reading what is not as it was fails with EIO.
"""

from __future__ import annotations

import errno
import fcntl
import struct

__all__ = ["enable_verity", "measure_verity"]

_ENABLE, _MEASURE = 0x40806685, 0xC0046686
# struct fsverity_enable_arg: version, hash algorithm, block size, salt, signature; reserved.
_ARGUMENT = "=4IQ2IQ88x"
_SHA256 = 1
_BLOCK = 4096
_DIGEST = 64
_UNABLE = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS)


def enable_verity(fd: int) -> bool:
    """Let the kernel check a file from now on; `fd` is open for reading, and nobody has it open
    for writing. Return False where the kernel or the file system cannot. `OSError` passes."""
    argument = struct.pack(_ARGUMENT, 1, _SHA256, _BLOCK, 0, 0, 0, 0, 0)
    try:
        fcntl.ioctl(fd, _ENABLE, argument)
    except OSError as exc:
        if exc.errno in _UNABLE:
            return False
        if exc.errno != errno.EEXIST:  # it is one already
            raise
    return True


def measure_verity(fd: int) -> str:
    """Return what the kernel checks a file against (`sha256:…`), "" where it does not."""
    answer = bytearray(struct.pack("=2H", 0, _DIGEST) + bytes(_DIGEST))
    try:
        fcntl.ioctl(fd, _MEASURE, answer)
    except OSError as exc:
        if exc.errno in (*_UNABLE, errno.ENODATA):
            return ""
        raise
    algorithm, size = struct.unpack_from("=2H", answer)
    name = "sha256" if algorithm == _SHA256 else str(algorithm)
    return f"{name}:{bytes(answer[4 : 4 + size]).hex()}"
