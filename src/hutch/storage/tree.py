"""Files beneath a root held by a descriptor: stat, list, read, write, pack and extract.

Every path is resolved as inside that root (RESOLVE_IN_ROOT): a symbolic link that a
container made cannot lead to the host, not even one swapped in at the last moment. Only
regular files are read or written: opening a device or a fifo would act on the host.
"""

from __future__ import annotations

import errno
import os
import stat as modes
from collections.abc import Iterator, Sequence

import msgspec

from hutch.errors import HutchError, InvalidArgument, NotFound
from hutch.linux.files import open_in_root
from hutch.storage.faults import explain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hutch.linux.idmap import IdMapping
    from hutch.storage.compression import Readable
    from hutch.storage.extract import UnpackLimits

__all__ = [
    "Stat",
    "extract",
    "list_directory",
    "make_directory",
    "open_file",
    "pack",
    "read",
    "remove",
    "stat",
    "write",
]

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
_CHUNK = 1 << 20


class Stat(msgspec.Struct, frozen=True, kw_only=True):
    """What a path is. `mode` is st_mode whole; `link_target` as the link has it."""

    name: str
    mode: int
    size: int
    mtime_ns: int
    uid: int
    gid: int
    link_target: str = ""

    @property
    def is_dir(self) -> bool:
        """Tell whether it is a directory."""
        return modes.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Tell whether it is a regular file."""
        return modes.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        """Tell whether it is a symbolic link."""
        return modes.S_ISLNK(self.mode)


def stat(root_fd: int, path: str, *, follow: bool = False) -> Stat:
    """Return what `path` is; its last part is followed if it is a link and `follow` is set."""
    flags = os.O_PATH if follow else os.O_PATH | os.O_NOFOLLOW
    fd = _open(root_fd, path, flags)
    try:
        return _stat(fd, os.path.basename(path.rstrip("/")) or "/")
    finally:
        os.close(fd)


def _stat(fd: int, name: str) -> Stat:
    status = os.fstat(fd)
    target = ""
    if modes.S_ISLNK(status.st_mode):
        target = os.readlink("", dir_fd=fd)
    return Stat(
        name=name,
        mode=status.st_mode,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        uid=status.st_uid,
        gid=status.st_gid,
        link_target=target,
    )


def list_directory(root_fd: int, path: str) -> Sequence[Stat]:
    """Return what is in a directory, by name; nothing in it is followed."""
    fd = _open(root_fd, path, _DIRECTORY)
    found = []
    try:
        for name in sorted(os.listdir(fd)):
            try:
                entry = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            except FileNotFoundError:
                continue
            try:
                found.append(_stat(entry, name))
            finally:
                os.close(entry)
    except OSError as error:
        raise _explain(error, path) from error
    finally:
        os.close(fd)
    return found


def open_file(root_fd: int, path: str, flags: int = os.O_RDONLY, mode: int = 0o644) -> int:
    """Open a regular file and return its descriptor, the caller's.

    With O_CREAT a missing one is made; a dangling symbolic link is not made whole.
    """
    try:
        found = open_in_root(root_fd, _checked(path), os.O_PATH)
    except OSError as error:
        if not (error.errno == errno.ENOENT and flags & os.O_CREAT):
            raise _explain(error, path) from error
        return _open(root_fd, path, flags | os.O_EXCL, mode)
    try:
        # Only looking at it, O_PATH wakes no device and waits for no fifo.
        if not modes.S_ISREG(os.fstat(found).st_mode):
            raise InvalidArgument(f"{path}: not a regular file", field="path")
        again = flags & ~(os.O_CREAT | os.O_EXCL) | os.O_CLOEXEC
        return os.open(f"/proc/self/fd/{found}", again)
    except OSError as error:
        raise _explain(error, path) from error
    finally:
        os.close(found)


def read(root_fd: int, path: str, *, limit: int | None = None) -> bytes:
    """Return a file's content; raise `InvalidArgument` where it is over `limit` bytes."""
    fd = open_file(root_fd, path)
    parts: list[bytes] = []
    size = 0
    try:
        while data := os.read(fd, _CHUNK):
            size += len(data)
            if limit is not None and size > limit:
                raise InvalidArgument(f"{path}: larger than {limit} bytes", field="path")
            parts.append(data)
    except OSError as error:
        raise _explain(error, path) from error
    finally:
        os.close(fd)
    return b"".join(parts)


def write(
    root_fd: int,
    path: str,
    data: bytes | Iterator[bytes],
    *,
    mode: int | None = None,
    owner: tuple[int, int] | None = None,
    append: bool = False,
    parents: bool = False,
) -> None:
    """Write a file, made with `mode` (0644) and `owner` where it is new.

    An existing file keeps its owner, and its mode unless `mode` is given.
    """
    if parents:
        make_directory(root_fd, os.path.dirname(path.rstrip("/")), owner=owner)
    flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if append else os.O_TRUNC)
    existed = _exists(root_fd, path)
    fd = open_file(root_fd, path, flags, 0o600)
    try:
        for chunk in (data,) if isinstance(data, bytes) else data:
            view = memoryview(chunk)
            while view:
                view = view[os.write(fd, view) :]
        if owner is not None and not existed:
            os.fchown(fd, *owner)
        if mode is not None or not existed:
            os.fchmod(fd, 0o644 if mode is None else mode & 0o7777)
    except OSError as error:
        raise _explain(error, path) from error
    finally:
        os.close(fd)


def make_directory(
    root_fd: int, path: str, *, mode: int = 0o755, owner: tuple[int, int] | None = None
) -> None:
    """Make a directory and its parents; one that exists is left as it is."""
    done = ""
    for part in path.split("/"):
        if part in ("", "."):
            continue
        parent, done = done, f"{done}/{part}"
        if _exists(root_fd, done):
            continue
        fd = _open(root_fd, parent or "/", _DIRECTORY)
        try:
            os.mkdir(part, 0o700, dir_fd=fd)
            made = os.open(part, _DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            try:
                if owner is not None:
                    os.fchown(made, *owner)
                os.fchmod(made, mode)
            finally:
                os.close(made)
        except OSError as error:
            raise _explain(error, path) from error
        finally:
            os.close(fd)


def remove(root_fd: int, path: str, *, recursive: bool = False) -> None:
    """Remove a file, a link or an empty directory; with `recursive` a whole tree."""
    from hutch.storage.removal import remove_tree

    parent, _, base = path.rstrip("/").rpartition("/")
    if base in ("", ".", ".."):
        raise InvalidArgument(f"cannot be removed: {path!r}", field="path")
    fd = _open(root_fd, parent or "/", _DIRECTORY)
    try:
        is_directory = modes.S_ISDIR(os.stat(base, dir_fd=fd, follow_symlinks=False).st_mode)
        if recursive:
            remove_tree(base, dir_fd=fd)
        elif is_directory:
            os.rmdir(base, dir_fd=fd)
        else:
            os.unlink(base, dir_fd=fd)
    except OSError as error:
        raise _explain(error, path) from error
    finally:
        os.close(fd)


def pack(
    root_fd: int,
    path: str,
    *,
    follow: bool = False,
    name: str | None = None,
    contents_only: bool = False,
    mapping: IdMapping | None = None,
) -> Iterator[bytes]:
    """Return a tar stream of a file or a tree, its top entry called `name` (as it is).

    With `follow` a symbolic link at `path` itself is followed (inside the root); links in
    the tree never are. With `contents_only` a directory's entries are relative to it.
    `mapping` is the map of ids of a remapped instance: owners are then those seen inside.
    Raises before the first chunk where there is no such path.
    """
    from hutch.storage.owners import Owners
    from hutch.storage.pack import pack_directory

    base = os.path.basename(path.rstrip("/"))
    if follow or base in ("", ".", ".."):
        target = _open(root_fd, path, os.O_PATH)
        if modes.S_ISDIR(os.fstat(target).st_mode):
            os.close(target)
            holder, inside = _open(root_fd, path, _DIRECTORY), b"."
        else:
            os.close(target)
            holder, inside = _follow(root_fd, path)
    else:
        os.close(_open(root_fd, path, os.O_PATH | os.O_NOFOLLOW))
        holder = _open(root_fd, os.path.dirname(path.rstrip("/")) or "/", _DIRECTORY)
        inside = os.fsencode(base)
    owners = Owners(mapping) if mapping is not None else None
    shown = os.fsencode(name if name is not None else base or ".")

    def stream() -> Iterator[bytes]:
        try:
            yield from pack_directory(
                holder, inside, shown, contents_only=contents_only, owners=owners
            )
        finally:
            os.close(holder)

    return stream()


def _follow(root_fd: int, path: str) -> tuple[int, bytes]:
    """Return the directory and the name of the file that a link at `path` leads to."""
    for _ in range(40):
        parent, _, base = path.rstrip("/").rpartition("/")
        holder = _open(root_fd, parent or "/", _DIRECTORY)
        try:
            target = os.readlink(base, dir_fd=holder)
        except OSError:
            return holder, os.fsencode(base)
        os.close(holder)
        path = target if target.startswith("/") else f"{parent}/{target}"
    raise InvalidArgument(f"{path}: too many symbolic links", field="path")


def extract(
    root_fd: int,
    path: str,
    stream: Readable,
    *,
    limits: UnpackLimits | None = None,
    owner: tuple[int, int] | None = None,
    mapping: IdMapping | None = None,
    within: str = "",
    replace: bool = True,
) -> int:
    """Extract a (compressed) tar into the directory `path`; return how many entries.

    Existing files are replaced, directories merged. Whiteout names are ordinary names
    here. `owner` overrides the owners in the archive; with the map of ids of a remapped
    instance they are those seen inside. With `within` all of it must have that name at its
    top, and nothing else in the directory is touched: `IntegrityError`. Without `replace` a
    directory is not removed for something else, nor the other way round: `InvalidArgument`.
    """
    from hutch.storage.compression import decompress
    from hutch.storage.extract import Extractor, UnpackLimits, UnpackOptions
    from hutch.storage.owners import Owners
    from hutch.storage.tarstream import TarReader
    from hutch.storage.unpack import default_options

    os.close(_open(root_fd, path, _DIRECTORY))
    allowed = default_options()
    extractor = Extractor(
        root_fd,
        TarReader(decompress(stream)),
        limits=limits or UnpackLimits(),
        options=UnpackOptions(
            whiteouts=False,
            fresh=False,
            owner=owner,
            userxattr=allowed.userxattr,
            ignore_chown_errors=allowed.ignore_chown_errors,
            within=os.fsencode(within),
            replace=replace,
        ),
        label=f"copy to {path}",
        prefix=os.fsencode(path.strip("/")),
        owners=Owners(mapping) if mapping is not None else None,
    )
    extractor.run()
    return extractor.entries


def _exists(root_fd: int, path: str) -> bool:
    try:
        os.close(open_in_root(root_fd, path, os.O_PATH))
    except OSError:
        return False
    return True


def _checked(path: str) -> str:
    if "\0" in path or not path:
        raise InvalidArgument(f"not a path: {path!r}", field="path")
    return path


def _open(root_fd: int, path: str, flags: int, mode: int = 0) -> int:
    try:
        return open_in_root(root_fd, _checked(path), flags, mode)
    except OSError as error:
        raise _explain(error, path) from error


def _explain(error: OSError, path: str) -> HutchError:
    if error.errno in (errno.ENOENT, errno.ENXIO):
        return NotFound(f"{path}: no such file or directory")
    if error.errno in (
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EINVAL,
        errno.EEXIST,
        errno.ENOTEMPTY,
    ):
        return InvalidArgument(f"{path}: {(error.strerror or '').lower()}", field="path")
    return explain(error, path)
