"""Copy files with their holes, sharing blocks where the file system can."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from hutch.linux.files import clone_file

__all__ = ["can_clone", "copy_sparse", "data_ranges"]

_NO_CLONE = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS)
_NO_RANGE = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
_CHUNK = 1 << 20


def copy_sparse(source: str, target: str, *, mode: int = 0o600) -> int:
    """Copy a file to a new one, holes as holes; return its size.

    Raises `FileExistsError` where `target` is there; on any other failure nothing is left.
    """
    source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        target_fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            return _copy(source_fd, target_fd)
        except BaseException:
            os.unlink(target)
            raise
        finally:
            os.close(target_fd)
    finally:
        os.close(source_fd)


def can_clone(source: str, directory: str) -> bool:
    """Tell whether a copy of a file in this directory would share its blocks."""
    fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        with open(source, "rb", buffering=0) as file:
            clone_file(file.fileno(), fd)
    except OSError as error:
        if error.errno not in _NO_CLONE:
            raise
        return False
    finally:
        os.close(fd)
    return True


def _copy(source: int, target: int) -> int:
    size = os.fstat(source).st_size
    try:
        clone_file(source, target)
    except OSError as error:
        if error.errno not in _NO_CLONE:
            raise
    else:
        return size
    os.ftruncate(target, size)
    for start, length in data_ranges(source):
        _copy_range(source, target, start, start + length)
    return size


def data_ranges(fd: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of what a file has between its holes."""
    size = os.fstat(fd).st_size
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                return
            raise
        at = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, at - start


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    while start < end:
        try:
            done = os.copy_file_range(source, target, end - start, start, start)
        except OSError as error:
            if error.errno not in _NO_RANGE:
                raise
            data = os.pread(source, min(end - start, _CHUNK), start)
            done = os.pwrite(target, data, start) if data else 0
        if done == 0:
            return  # the source was cut short meanwhile
        start += done
