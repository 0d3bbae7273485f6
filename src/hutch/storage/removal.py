"""Remove directory trees by descriptor, however deep and whatever is in them."""

from __future__ import annotations

import os

__all__ = ["remove_path", "remove_tree"]

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_DEPTH = 48


def remove_tree(name: str | bytes, *, dir_fd: int) -> None:
    """Remove `name` in the directory `dir_fd` and all beneath it; missing is fine.

    Symbolic links are removed, never followed. A container may have nested directories
    past any limit of recursion, path length or descriptors: what is deeper than a fixed
    depth is first moved up beside `name`.
    """
    pending: list[str | bytes] = [name]
    while pending:
        _remove(pending.pop(), dir_fd, dir_fd, 0, pending)


def remove_path(path: str) -> None:
    """Remove what is at `path` and all beneath it as `remove_tree` does; missing is fine, but
    for the directory it is in."""
    fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        remove_tree(os.path.basename(path), dir_fd=fd)
    finally:
        os.close(fd)


def _remove(
    name: str | bytes, dir_fd: int, top_fd: int, depth: int, pending: list[str | bytes]
) -> None:
    try:
        fd = _open(name, dir_fd)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        _unlink(name, dir_fd)
        return
    try:
        with os.scandir(fd) as entries:
            found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for child, is_directory in found:
            if not is_directory:
                _unlink(child, fd)
            elif _is_gone(child, fd):
                continue
            elif depth < _DEPTH:
                _remove(child, fd, top_fd, depth + 1, pending)
            else:
                moved = f".{os.urandom(8).hex()}.removed"
                os.rename(child, moved, src_dir_fd=fd, dst_dir_fd=top_fd)
                pending.append(moved)
    finally:
        os.close(fd)
    try:
        os.rmdir(name, dir_fd=dir_fd)
    except FileNotFoundError:
        pass


def _is_gone(name: str | bytes, dir_fd: int) -> bool:
    """Tell whether a directory could be removed as it is, for it is empty."""
    try:
        os.rmdir(name, dir_fd=dir_fd)
    except OSError:
        return False
    return True


def _open(name: str | bytes, dir_fd: int) -> int:
    try:
        fd = os.open(name, _OPEN, dir_fd=dir_fd)
    except PermissionError:
        # Without root a directory of mode 0 must be opened up first.
        os.chmod(name, 0o700, dir_fd=dir_fd)
        return os.open(name, _OPEN, dir_fd=dir_fd)
    except OSError as error:
        if _is_link(name, dir_fd):
            raise NotADirectoryError(*error.args) from error
        raise
    if os.geteuid() != 0:
        os.fchmod(fd, 0o700)
    return fd


def _is_link(name: str | bytes, dir_fd: int) -> bool:
    import stat

    return stat.S_ISLNK(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode)


def _unlink(name: str | bytes, dir_fd: int) -> None:
    try:
        os.unlink(name, dir_fd=dir_fd)
    except FileNotFoundError:
        pass
