"""Write cpio archives in the format that the kernel unpacks as its initramfs (newc). Pure.

Owners, times and inode numbers are fixed, so the same content gives the same bytes.
"""

from __future__ import annotations

import stat

__all__ = ["Cpio"]

_MAGIC = b"070701"
_TRAILER = b"TRAILER!!!"
_PAGE = 4096
_NAME_MAX = 4096


class Cpio:
    """An archive in the making; parents of what is added are added with it, once."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._known: set[str] = set()

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory; one that is there stays as it is."""
        if path in self._known:
            return
        self._add(path, stat.S_IFDIR | mode, b"")

    def file(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._add(path, stat.S_IFREG | mode, content)

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def node(self, path: str, kind: int, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a device; `kind` is S_IFCHR or S_IFBLK."""
        self._add(path, kind | mode, b"", (major, minor))

    def finish(self) -> bytes:
        """Return the archive, filled up with zeros to whole pages.

        QEMU puts it on page boundaries at the end of memory, where a machine of type microvm has
        its ACPI tables in the last page: since version 8 it does not keep clear of them.
        """
        content = b"".join([*self._parts, *_entry(_TRAILER, 0, 0, b"", (0, 0))])
        return content.ljust(-(-len(content) // _PAGE) * _PAGE, b"\0")

    def _add(self, path: str, mode: int, content: bytes, device: tuple[int, int] = (0, 0)) -> None:
        parts = path.split("/")
        if not path or any(part in ("", ".", "..") for part in parts) or len(path) >= _NAME_MAX:
            raise ValueError(f"not a path inside an archive: {path!r}")
        if path in self._known:
            raise ValueError(f"twice in the archive: {path!r}")
        if len(parts) > 1:
            self.directory("/".join(parts[:-1]))
        self._known.add(path)
        self._parts += _entry(path.encode(), len(self._known), mode, content, device)


def _entry(
    name: bytes, inode: int, mode: int, content: bytes, device: tuple[int, int]
) -> tuple[bytes, ...]:
    links = 2 if stat.S_ISDIR(mode) else 1
    size = len(content)
    fields = (inode, mode, 0, 0, links, 0, size, 0, 0, *device, len(name) + 1, 0)
    head = _MAGIC + b"".join(b"%08X" % field for field in fields) + name + b"\0"
    return head, bytes(-len(head) % 4), content, bytes(-size % 4)
