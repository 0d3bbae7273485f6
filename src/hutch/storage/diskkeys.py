"""Keys of encrypted disks (LUKS): read, checked, and handed to programs as a descriptor.

A key is never in an argument list, an environment of ours, a record or a log.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from hutch.errors import InvalidArgument, NotFound

__all__ = ["DiskKey", "key_descriptor", "read_key"]

_MAX = 4096


class DiskKey:
    """A key: text, as QEMU takes no other. What is printed of it does not tell it."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes | str, *, field: str = "disk_key") -> None:
        """Check it; one end of line after it does not belong to it."""
        data = value.encode() if isinstance(value, str) else bytes(value)
        data = data.removesuffix(b"\n")
        if not data:
            raise InvalidArgument("is empty", field=field)
        if len(data) > _MAX:
            raise InvalidArgument(f"at most {_MAX} bytes, got {len(data)}", field=field)
        try:
            data.decode()
        except UnicodeDecodeError:
            raise InvalidArgument(
                "is not text", field=field, hint="base64 makes a key of random bytes one"
            ) from None
        self._value = data

    def __repr__(self) -> str:
        return "<DiskKey>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DiskKey) and other._value == self._value

    __hash__ = None  # type: ignore[assignment]

    def open(self) -> int:
        """Return a descriptor of a sealed memory file with the key, the caller's to close."""
        import fcntl

        fd = os.memfd_create("hutch-key", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.write(fd, self._value)
            seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(fd)
            raise
        return fd


def read_key(path: str, *, field: str = "disk_key") -> DiskKey:
    """Return the key that a file holds."""
    try:
        with open(path, "rb") as file:
            return DiskKey(file.read(_MAX + 2), field=field)
    except FileNotFoundError as exc:
        raise NotFound(f"{field}: {path}: no such file") from exc
    except OSError as exc:
        raise InvalidArgument(f"{path}: {(exc.strerror or str(exc)).lower()}", field=field) from exc


@contextmanager
def key_descriptor(key: DiskKey) -> Iterator[int]:
    """Hold a key's descriptor open."""
    fd = key.open()
    try:
        yield fd
    finally:
        os.close(fd)
