"""A machine's writable disk as a chain of files: `disk.raw`, then `disk.1.qcow2`, ….

A machine begins with `disk.raw` alone. A fork freezes what there is and gives the machine, and
each of its twins, an empty overlay on it: the frozen files are the same in all their directories,
by hard links, so each keeps what it needs and the last one frees it. At every moment the files
of a directory are a whole disk: an overlay is empty until it is used, one that is not needed
any more holds nothing that those above it do not hide, and a disk that takes the place of all
that was there (`disk.N.raw`) hides what has lower numbers.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from contextlib import suppress

from hutch.storage.faults import disk_errors
from hutch.storage.sparse import can_clone, copy_sparse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

    from hutch.storage.disks import Disks

__all__ = [
    "FEW",
    "allocated",
    "chain",
    "copy_disk",
    "ensure_one",
    "freeze_disk",
    "is_chain",
    "is_copied",
    "link_disk",
    "next_overlay",
    "overlay_number",
    "place_disk",
    "replace_disk",
    "virtual_size",
]

FEW = 16 << 20
"""A disk that takes less than this is copied rather than shared."""
_BASE = "disk.raw"
_FILE = re.compile(r"disk(?:\.([1-9][0-9]{0,5}))?\.(raw|qcow2)")
_QCOW2 = b"QFI\xfb"
_SIZE_AT = 24  # of the header of a qcow2 image, big-endian (docs/interop/qcow2.txt)


def overlay_number(path: str) -> int:
    """Return an overlay's number; 0 for `disk.raw`."""
    found = _FILE.fullmatch(os.path.basename(path))
    return int(found[1] or 0) if found else 0


def chain(directory: str | Path) -> list[str]:
    """Return the files of the disk in a directory, the lowest first; none where there is none."""
    files = _files(os.fspath(directory))
    bases = [index for index, path in enumerate(files) if path.endswith(".raw")]
    return files[bases[-1] :] if bases else []


def _files(directory: str) -> list[str]:
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    # `disk.qcow2` is the disk of a machine without an image.
    found = (name for name in names if _FILE.fullmatch(name) and name != "disk.qcow2")
    return sorted((f"{directory}/{name}" for name in found), key=overlay_number)


def is_chain(directory: str | Path) -> bool:
    """Tell whether a disk has overlays."""
    return len(chain(directory)) > 1


def next_overlay(directory: str | Path) -> str:
    """Return the path of the overlay that would come on top."""
    return f"{directory}/disk.{overlay_number(chain(directory)[-1]) + 1}.qcow2"


def virtual_size(directory: str | Path) -> int:
    """Return the size in bytes of the disk in a directory, as its machine sees it."""
    top = chain(directory)[-1]
    with open(top, "rb", buffering=0) as file:
        head = file.read(_SIZE_AT + 8)
        if overlay_number(top) and head[:4] == _QCOW2:
            return int.from_bytes(head[_SIZE_AT:])
        return os.fstat(file.fileno()).st_size


def allocated(directory: str | Path, *, whole: bool = False) -> int:
    """Return the bytes of the host's disk that a directory's disk takes; those of a file that
    several have are shared out between them, unless the `whole` disk is asked for."""
    total = 0
    for path in chain(directory):
        with suppress(FileNotFoundError):  # the disk is being made one
            status = os.stat(path)
            total += status.st_blocks * 512 // (1 if whole else max(1, status.st_nlink))
    return total


def link_disk(files: Sequence[str], target: str | Path) -> None:
    """Have frozen files of a disk in another directory too; a copy of them where that is on
    another file system. Nothing is left of a failure."""
    made: list[str] = []
    try:
        for path in files:
            place = f"{target}/{os.path.basename(path)}"
            try:
                os.link(path, place)
            except OSError as exc:
                if exc.errno not in (errno.EXDEV, errno.EMLINK, errno.EPERM):
                    raise
                copy_sparse(path, place)
            made.append(place)
    except BaseException:
        for place in made:
            os.unlink(place)
        raise


def is_copied(source: str | Path, target: str | Path) -> bool:
    """Tell whether a disk of one file is little, or a copy of it shares its blocks."""
    base = chain(source)[0]
    return os.stat(base).st_blocks * 512 <= FEW or can_clone(base, os.fspath(target))


def place_disk(source: str | Path, target: str | Path, disks: Disks) -> None:
    """Make a machine's disk of one that nobody writes to: a copy of a small one, else the same
    files with an empty overlay on them. Nothing is left of a failure but what is in `target`."""
    files = chain(source)
    if len(files) == 1 and is_copied(source, target):
        copy_sparse(files[0], f"{target}/{_BASE}")
        return
    link_disk(files, target)
    disks.create_overlay(next_overlay(target), virtual_size(source))


def freeze_disk(source: str | Path, target: str | Path, disks: Disks) -> None:
    """Have the disk of a machine that does not run in another directory too, as it is now: a
    copy of a small one, else its files, and the machine goes on on an overlay."""
    files = chain(source)
    if len(files) == 1 and is_copied(source, target):
        copy_sparse(files[0], f"{target}/{_BASE}")
        return
    disks.create_overlay(next_overlay(source), virtual_size(source))
    link_disk(files, target)


def copy_disk(source: str | Path, target: str) -> None:
    """Copy a disk that nobody writes to, as one raw file."""
    from hutch.storage.diskimages import flatten_chain

    files = chain(source)
    if len(files) == 1:
        copy_sparse(files[0], target)
    else:
        flatten_chain(files, target)


def replace_disk(directory: str | Path, partial: str) -> None:
    """Put a raw disk (a file of that directory, under another name) in the place of all that
    a machine's disk was. Killed at any moment, it is one or the other."""
    files = _files(os.fspath(directory))
    number = overlay_number(files[-1]) + 1 if files else 1
    placed = f"{directory}/disk.{number}.raw"
    os.rename(partial, placed)
    for path in files:
        os.unlink(path)
    os.rename(placed, f"{directory}/{_BASE}")


def ensure_one(directory: str | Path) -> None:
    """Make one file, `disk.raw`, of the disk of a machine that does not run, at the price of a
    copy. Raises `Exhausted` when the host's disk is full. Killed at any moment, it is whole."""
    files = _files(os.fspath(directory))
    if len(files) <= 1 and not (files and overlay_number(files[0])):
        return
    partial = f"{directory}/.{_BASE}"
    with disk_errors(f"disk {files[0]}"):
        try:
            _unlink(partial)
            copy_disk(directory, partial)
            fd = os.open(partial, os.O_RDWR | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            replace_disk(directory, partial)
        except BaseException:
            _unlink(partial)
            raise


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
