"""Writable disks of virtual machines: a sparse file with an empty ext4 for the overlay.

The file system has `/upper` and `/work`. Each size is made once, kept under `<root>/cache`
while it is in use, and copied with its holes, which for 10 GiB are less than a megabyte.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from hutch.errors import InvalidArgument, Unsupported, WrongState
from hutch.spec.disk_room import DEFAULT_DISK
from hutch.storage.faults import disk_errors
from hutch.storage.sparse import copy_sparse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

    from hutch.storage.diskkeys import DiskKey

__all__ = ["DEFAULT_SIZE", "Disk", "Disks", "check_size", "disk_size"]

DEFAULT_SIZE = DEFAULT_DISK
_MIN, _MAX = 64 << 20, 16 << 40
_STEP = 1 << 20
_SMALL = 512 << 20
# Up to this size (or 16 times the first) a file system grows by what was laid out when it was
# made; beyond, its descriptors lie elsewhere (meta_bg). mke2fs would lay out for 1024 times
# the size, which is 4 MB of each disk.
_PREPARED = 1 << 40
_BLOCK = 4096  # what mke2fs takes for a file system that is not small
_LAYOUT = 2  # to be raised with any change of what a new disk looks like
_TIMEOUT_S = 600.0
# Who was told where an empty disk is has it open by then, on the most busy host.
_GRACE_S = 600.0
_KEPT_S = 7 * 24 * 3600.0
_QCOW2 = b"QFI\xfb"
_EMPTY = r"disk-[0-9]+-[0-9]+M\.raw|overlay-[0-9]+\.qcow2"
_FULL = ("No space left on device", "Disk quota exceeded")
_ENV = {"LC_ALL": "C.UTF-8", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """A writable disk: what the machine sees, and what it takes on the host, in bytes."""

    path: str
    size: int
    allocated: int


def check_size(size: int, *, field: str = "disk") -> int:
    """Return a disk's size rounded up to whole MiB, or raise `InvalidArgument`."""
    if not _MIN <= size <= _MAX:
        raise InvalidArgument(
            f"expected a size between 64 MiB and 16 TiB, got {size} bytes", field=field
        )
    return -(-size // _STEP) * _STEP


def disk_size(path: str, *, encrypted: bool) -> int:
    """Return the bytes of a writable disk as its machine sees it.

    Whether it is encrypted, a qcow2, its record says: what is not may pretend to be one.
    """
    if not encrypted:
        return os.stat(path).st_size
    with open(path, "rb") as file:
        head = file.read(32)
    if not head.startswith(_QCOW2):
        from hutch.errors import IntegrityError

        raise IntegrityError(f"disk {path}: is no qcow2")
    return int.from_bytes(head[24:32], "big")


class Disks:
    """Make and grow the writable disks of one root; thread-safe, shared with processes."""

    def __init__(self, root: str | Path) -> None:
        self._cache = os.path.join(os.fspath(root), "cache")

    def create(self, path: str, size: int = DEFAULT_SIZE) -> Disk:
        """Make an empty disk at `path`; raise `InvalidArgument` for an impossible size,
        `Exhausted` when the host's disk is full. Nothing is left of a failure."""
        size = check_size(size)
        template = self.empty(size)
        with disk_errors(f"disk {path}"):
            try:
                copy_sparse(template, path)
            except FileExistsError as exc:
                raise WrongState(f"disk {path}: is there already") from exc
            return self.get(path)

    def create_overlay(self, path: str, size: int) -> None:
        """Make an empty overlay (qcow2) at `path`, safe on the host's disk, for a disk of so
        many bytes. What it lies on is not in it: who opens it says so."""
        empty = f"{self._cache}/overlay-{size}.qcow2"
        if not os.path.exists(empty):
            self._make_overlay(empty, size)
        _note_use(empty)
        copy_sparse(empty, path)
        for name in (path, os.path.dirname(path)):
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def _make_overlay(self, path: str, size: int) -> None:
        from hutch.errors import AlreadyExists
        from hutch.storage.diskimages import create_disk

        os.makedirs(self._cache, 0o700, exist_ok=True)
        try:
            create_disk(path, size)
        except AlreadyExists:
            pass  # another process was quicker

    def create_encrypted(self, path: str, size: int, key: DiskKey) -> Disk:
        """Make the same as a qcow2 that is encrypted: what is empty in it is told from what
        is not, which a disk that is nothing but encrypted could not."""
        from hutch.storage.diskimages import convert_disk

        size = check_size(size)
        convert_disk(self.empty(size), path, source_format="raw", format="qcow2", key=key)
        return self.get(path, encrypted=True)

    def get(self, path: str, *, encrypted: bool = False) -> Disk:
        """Return what a disk takes."""
        with disk_errors(f"disk {path}"):
            status = os.stat(path)
            size = disk_size(path, encrypted=encrypted)
        return Disk(path=path, size=size, allocated=status.st_blocks * 512)

    def grow(self, path: str, size: int) -> Disk:
        """Grow a disk that no machine uses, and its file system with it.

        Raises `InvalidArgument` for a size below the present one.
        """
        size = check_size(size)
        old = self.get(path).size
        if size < old:
            raise InvalidArgument(
                f"a disk cannot shrink: it has {old} bytes, got {size}", field="disk"
            )
        with disk_errors(f"disk {path}"):
            # Repairs what an unclean end left; resize2fs insists on it. 1 and 2: repaired.
            _run(["e2fsck", "-f", "-p", path], allowed=(0, 1, 2))
            os.truncate(path, size)
            # Where this fails the file system is as it was, in a longer file.
            _run(["resize2fs", path])
            return self.get(path)

    def empty(self, size: int) -> str:
        """Return the file that new disks of a size are copies of, made where there is none."""
        from hutch.storage.locking import file_lock

        path = f"{self._cache}/disk-{_LAYOUT}-{size >> 20}M.raw"
        if _note_use(path):
            return path
        with disk_errors(f"disk of {size} bytes"):
            os.makedirs(self._cache, 0o700, exist_ok=True)
            with file_lock(f"{path}.lock"):
                if not os.path.exists(path):
                    _make(f"{path}.tmp", size)
                    os.rename(f"{path}.tmp", path)
        return path

    def forget(self, *, all_sizes: bool = False) -> int:
        """Remove the empty disks of sizes that nobody has used for a week, or for ten minutes
        with `all_sizes`; return the bytes freed. They are made anew when they are wanted."""
        from hutch.storage.locking import try_file_lock

        before = time.time() - (_GRACE_S if all_sizes else _KEPT_S)
        freed = 0
        for path in self._kept():
            with disk_errors(path), try_file_lock(f"{path}.lock") as mine:
                if not mine:
                    continue
                for name in (path, f"{path}.tmp"):
                    with suppress(FileNotFoundError):
                        status = os.stat(name)
                        if status.st_atime < before:
                            os.unlink(name)
                            freed += status.st_blocks * 512
        return freed

    def _kept(self) -> list[str]:
        import re

        try:
            names = os.listdir(self._cache)
        except FileNotFoundError:
            return []
        found = {name.removesuffix(".tmp") for name in names}
        return [f"{self._cache}/{name}" for name in sorted(found) if re.fullmatch(_EMPTY, name)]


def _note_use(path: str) -> bool:
    """Note that an empty disk is used now; tell whether it is there. When it was changed stays:
    a template that has seen it is known by that."""
    try:
        changed = os.stat(path).st_mtime_ns
        os.utime(path, ns=(time.time_ns(), changed))
    except FileNotFoundError:
        return False
    return True


def _make(path: str, size: int) -> None:
    """Make the file system, with all that a file of zeros makes superfluous left out."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, size)
            # A guest would otherwise write out all tables of inodes behind our back.
            extended = "lazy_itable_init=1,lazy_journal_init=1,assume_storage_prezeroed=1,nodiscard"
            journal = [] if size < _SMALL else ["-J", "size=32"]
            if size >= _SMALL:
                extended += f",resize={max(_PREPARED, 16 * size) // _BLOCK}"
            options = ["-q", "-F", "-t", "ext4", "-m", "0", *journal, "-L", "hutch"]
            _run(["mke2fs", *options, "-E", f"{extended},root_owner=0:0", path])
            # Without root too the directories belong to root.
            _run(
                ["debugfs", "-w", "-f", "/proc/self/fd/0", path], input=b"mkdir upper\nmkdir work\n"
            )
            os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        os.unlink(path)
        raise


def _run(argv: Sequence[str], *, input: bytes | None = None, allowed: Sequence[int] = (0,)) -> None:
    """Run one of e2fsprogs; raise what its failure means."""
    import errno

    from hutch.errors import IntegrityError
    from hutch.host.programs import find_program
    from hutch.process.run import run_command

    program = find_program(argv[0])
    if program is None:
        raise Unsupported(f"disk: {argv[0]} is not installed", hint="apt-get install e2fsprogs")
    done = run_command([program, *argv[1:]], input=input, env=_ENV, timeout_s=_TIMEOUT_S)
    said = (done.stderr + done.stdout).decode(errors="replace")
    if any(text in said for text in _FULL):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), argv[-1])
    if done.returncode not in allowed:
        lines = [line for line in said.splitlines() if line.strip()] or ["no reason was given"]
        raise IntegrityError(f"disk {argv[-1]}: {argv[0]}: {lines[-1].strip()}")
