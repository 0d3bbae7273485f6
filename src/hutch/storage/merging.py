"""Lay a stack of layers out as one directory tree, for programs that want a path.

Either mounted, where only the calling thread's children see it, or as a tree of hard links,
which needs no rights but takes longer.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence

from hutch.storage.overlay import Found, Merged

__all__ = ["link_tree", "use_mounted"]

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_HIDDEN = ("trusted.overlay.", "user.overlay.", "system.")


def use_mounted(lower: Sequence[str], target: str, use: Callable[[str], None]) -> bool:
    """Mount the layers (topmost first) at `target` and call `use` with it, in a thread with
    a mount namespace of its own; return whether they could be mounted.

    The mount ends with the thread and the processes that it started, however they end.
    """
    import threading

    failure: list[BaseException] = []
    mounted: list[bool] = []

    def run() -> None:
        try:
            try:
                _mount(lower, target)
            except OSError:
                return
            mounted.append(True)
            use(target)
        except BaseException as exc:
            failure.append(exc)

    thread = threading.Thread(target=run, name="hutch-merged")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return bool(mounted)


def _mount(lower: Sequence[str], target: str) -> None:
    """Attach the overlay in a new mount namespace of this thread."""
    from hutch.linux import mount as linux
    from hutch.linux.namespaces import CLONE_NEWNS, unshare
    from hutch.storage.merged import open_merged
    from hutch.storage.snapshots import OverlayAssets

    fd = open_merged(OverlayAssets(lower=tuple(lower[1:]), upper=lower[0], work=""))
    try:
        # A thread of its own, as this also parts it from the process's root and directory.
        unshare(CLONE_NEWNS)
        linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
        linux.move_mount(fd, "", linux.AT_FDCWD, target)
    finally:
        os.close(fd)


def link_tree(lower: Sequence[str], target: str) -> None:
    """Fill the empty directory `target` with what the layers (topmost first) show.

    Files are hard links, so owners, contents, attributes and links between files are those
    of the layers; it must be on their file system. Directories are made alike.
    """
    with Merged(lower) as merged:
        root = merged.root()
        directories: list[tuple[bytes, Found]] = [(b"", root)]
        base = os.fsencode(target)
        for path, found in merged.walk(b"", root):
            parent, _, name = path.rpartition(b"/")
            if stat.S_ISDIR(found.status.st_mode):
                os.mkdir(base + b"/" + path, 0o700)
                directories.append((path, found))
                continue
            fd = merged.open(found.layer, parent)
            try:
                os.link(name, base + b"/" + path, src_dir_fd=fd, follow_symlinks=False)
            finally:
                os.close(fd)
        # From the deepest up: a directory's time changes with what is put into it.
        for path, found in reversed(directories):
            fd = merged.open(found.layer, path)
            try:
                _dress(base + b"/" + path if path else base, fd, found.status)
            finally:
                os.close(fd)


def _dress(path: bytes, source: int, status: os.stat_result) -> None:
    """Give a directory the owner, attributes, mode and times of its source."""
    if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
        os.chown(path, status.st_uid, status.st_gid)
    for name in os.listxattr(source):
        if not name.startswith(_HIDDEN):
            os.setxattr(path, name, os.getxattr(source, name))
    for acl in ("system.posix_acl_access", "system.posix_acl_default"):
        try:
            os.setxattr(path, acl, os.getxattr(source, acl))
        except OSError:
            continue
    os.chmod(path, status.st_mode & 0o7777)
    os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
