"""Turn trees into tar streams: a directory, a merged stack of layers, an upper directory.

Entries come parents first and in the order of their names, so that the same tree gives
the same bytes. A file that shrinks while it is read is filled up with zeros; one that
goes is left out.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

from hutch.errors import Exhausted, IntegrityError
from hutch.storage.faults import explain
from hutch.storage.overlay import Merged, is_opaque, is_whiteout
from hutch.storage.owners import Owners
from hutch.storage.tarstream import BLK, CHR, DIR, FIFO, LNK, REG, SYM
from hutch.storage.tarwrite import END, header, padding

__all__ = ["Attributes", "Packer", "pack_diff", "pack_directory", "pack_merged"]

_CHUNK = 1 << 20
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_KINDS = {
    stat.S_IFDIR: DIR,
    stat.S_IFLNK: SYM,
    stat.S_IFCHR: CHR,
    stat.S_IFBLK: BLK,
    stat.S_IFIFO: FIFO,
}
_HOLES = 1 << 20
_MAX_RUNS = 4096
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EINVAL})
_MAX_DEPTH = 400
_OPAQUE = b".wh..wh..opq"
_XATTRS = ("security.capability", "system.posix_acl_access", "system.posix_acl_default")

Skip = Callable[[bytes], bool]


class Attributes(NamedTuple):
    """What an entry says of a file beside its content; `mtime` in seconds."""

    mode: int
    uid: int
    gid: int
    mtime: int


Rewrite = Callable[[os.stat_result, Attributes], Attributes]


class Packer:
    """Write entries, telling hard links from first names; `rewrite` has the last word on
    their attributes, and with `exact` times are told to the nanosecond."""

    def __init__(
        self,
        owners: Owners | None = None,
        rewrite: Rewrite | None = None,
        *,
        exact: bool = False,
    ) -> None:
        self._links: dict[tuple[int, int], bytes] = {}
        self._owners = owners
        self._rewrite = rewrite
        self._exact = exact

    def _header(
        self,
        name: bytes,
        kind: bytes,
        status: os.stat_result,
        *,
        size: int = 0,
        linkname: bytes = b"",
        device: tuple[int, int] = (0, 0),
        pax: dict[bytes, bytes] | None = None,
    ) -> bytes:
        uid, gid = status.st_uid, status.st_gid
        if self._owners is not None:
            uid, gid = self._owners.inside(uid, gid)
        seconds, fraction = divmod(status.st_mtime_ns, 1_000_000_000)
        found = Attributes(status.st_mode & 0o7777, uid, gid, seconds)
        if self._rewrite is not None:
            found = self._rewrite(status, found)
        if self._exact and fraction:
            pax = {**(pax or {}), b"mtime": b"%d.%09d" % (seconds, fraction)}
        return header(
            name,
            kind,
            mode=found.mode,
            uid=found.uid,
            gid=found.gid,
            size=size,
            mtime=found.mtime,
            linkname=linkname,
            device=device,
            pax=pax,
        )

    def forget_links(self) -> None:
        """Let what comes next be no hard link to what came before."""
        self._links.clear()

    def entry(
        self, name: bytes, status: os.stat_result, dir_fd: int, base: bytes
    ) -> Iterator[bytes]:
        """Yield one entry with its data; `base` is looked up in `dir_fd`."""
        form = stat.S_IFMT(status.st_mode)
        if form == stat.S_IFSOCK:
            return
        if form != stat.S_IFDIR and status.st_nlink > 1:
            first = self._links.setdefault((status.st_dev, status.st_ino), name)
            if first != name:
                yield self._header(name, LNK, status, linkname=first)
                return
        if form == stat.S_IFREG:
            yield from self._file(name, status, dir_fd, base)
            return
        linkname = b""
        if form == stat.S_IFLNK:
            try:
                linkname = os.readlink(base, dir_fd=dir_fd)
            except OSError as error:
                _pass_if_gone(error, name)
                return
        yield self._header(
            name + b"/" if form == stat.S_IFDIR else name,
            _KINDS[form],
            status,
            linkname=linkname,
            device=(os.major(status.st_rdev), os.minor(status.st_rdev))
            if form in (stat.S_IFCHR, stat.S_IFBLK)
            else (0, 0),
            pax=_directory_xattrs(dir_fd, base) if form == stat.S_IFDIR else None,
        )

    def _file(
        self, name: bytes, status: os.stat_result, dir_fd: int, base: bytes
    ) -> Iterator[bytes]:
        try:
            fd = os.open(base, _READ, dir_fd=dir_fd)
        except OSError as error:
            _pass_if_gone(error, name)
            return
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                return
            pax = _xattrs(fd)
            if status.st_size - status.st_blocks * 512 >= _HOLES:
                runs = _runs(fd, status.st_size)
                if runs is not None:
                    yield from self._sparse(name, status, fd, runs, pax)
                    return
            yield self._header(name, REG, status, size=status.st_size, pax=pax)
            yield from _data(fd, 0, status.st_size)
            yield padding(status.st_size)
        finally:
            os.close(fd)

    def _sparse(
        self,
        name: bytes,
        status: os.stat_result,
        fd: int,
        runs: list[tuple[int, int]],
        pax: dict[bytes, bytes],
    ) -> Iterator[bytes]:
        """Yield a sparse file as PAX 1.0 has it: its map ahead of its data."""
        # The map ends with an empty run at the end of the file, as GNU tar writes it.
        runs = [*runs, (status.st_size, 0)]
        numbers = [len(runs), *(number for run in runs for number in run)]
        table = b"".join(b"%d\n" % number for number in numbers)
        table += padding(len(table))
        stored = len(table) + sum(length for _, length in runs)
        pax |= {
            b"GNU.sparse.major": b"1",
            b"GNU.sparse.minor": b"0",
            b"GNU.sparse.name": name,
            b"GNU.sparse.realsize": b"%d" % status.st_size,
        }
        parent, _, base = name.rpartition(b"/")
        yield self._header(parent + b"/GNUSparseFile.0/" + base, REG, status, size=stored, pax=pax)
        yield table
        for offset, length in runs:
            yield from _data(fd, offset, length)
        yield padding(stored)


def _data(fd: int, offset: int, length: int) -> Iterator[bytes]:
    """Yield exactly `length` bytes, zeros after the end of a file that has shrunk."""
    while length:
        data = os.pread(fd, min(_CHUNK, length), offset)
        if not data:
            data = bytes(min(_CHUNK, length))
        offset += len(data)
        length -= len(data)
        yield data


def _pass_if_gone(error: OSError, name: bytes) -> None:
    """Let what was removed or replaced meanwhile be left out; raise for all else.

    What is there but cannot be read must not be missing from an archive without a word.
    """
    if error.errno not in _GONE:
        raise explain(error, os.fsdecode(name[:200])) from error


def _runs(fd: int, size: int) -> list[tuple[int, int]] | None:
    """Return the runs of data in a file with holes; None where there are too many."""
    runs: list[tuple[int, int]] = []
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            break
        at = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        runs.append((start, at - start))
        if len(runs) > _MAX_RUNS:
            return None
    return runs


def _xattrs(fd: int) -> dict[bytes, bytes]:
    """Return the extended attributes an image may carry, as PAX records."""
    try:
        names = os.listxattr(fd)
    except OSError:
        return {}
    found = {}
    for name in names:
        user = name.startswith("user.") and not name.startswith("user.overlay.")
        if (user or name in _XATTRS) and b"=" not in os.fsencode(name):
            try:
                found[b"SCHILY.xattr." + os.fsencode(name)] = os.getxattr(fd, name)
            except OSError:
                continue
    return found


def _directory_xattrs(dir_fd: int, base: bytes) -> dict[bytes, bytes]:
    try:
        fd = os.open(base, _OPEN, dir_fd=dir_fd)
    except OSError:
        return {}
    try:
        return _xattrs(fd)
    finally:
        os.close(fd)


def pack_merged(
    merged: Merged,
    path: bytes = b"",
    *,
    skip: Skip | None = None,
    owners: Owners | None = None,
) -> Iterator[bytes]:
    """Yield a tar of what a stack of layers shows at `path`, names relative to it.

    The directory itself comes first, as `./`; `skip` tells which names to leave out, and
    `owners` how ids on disk are seen inside.
    """
    at, found = merged.resolve(path)
    packer = Packer(owners)
    fd = merged.open(found.layer, at)
    try:
        yield from packer.entry(b".", found.status, fd, b".")
    finally:
        os.close(fd)
    left_out: list[bytes] = []
    for name, entry in merged.walk(at, found):
        parent, _, base = name.rpartition(b"/")
        relative = name[len(at) + 1 :] if at else name
        if any(relative.startswith(prefix) for prefix in left_out):
            continue
        if skip is not None and skip(relative):
            left_out.append(relative + b"/")
            continue
        fd = merged.open(entry.layer, parent)
        try:
            yield from packer.entry(relative, entry.status, fd, base)
        finally:
            os.close(fd)
    yield END


def pack_diff(
    upper: str,
    *,
    skip: Collection[bytes] = (),
    owners: Owners | None = None,
    rewrite: Rewrite | None = None,
) -> Iterator[bytes]:
    """Yield the layer that an upper directory is: its files, and OCI whiteouts.

    `skip` are paths to leave out with all beneath (what the engine itself put there).
    """
    packer = Packer(owners, rewrite)
    fd = os.open(upper, _OPEN)
    if is_opaque(fd):
        yield header(_OPAQUE, REG, mode=0o600)
    yield from _descend(packer, fd, b"", skip=skip, layer=True)
    yield END


def pack_directory(
    dir_fd: int,
    base: bytes,
    name: bytes,
    *,
    contents_only: bool = False,
    owners: Owners | None = None,
    exact: bool = False,
    end: bytes = END,
) -> Iterator[bytes]:
    """Yield a tar of `base` in `dir_fd` (never followed) and all beneath it, as `name`.

    With `contents_only` a directory's entries are named from its top (`./`); with `exact` their
    times are told to the nanosecond. `end` is what follows the last entry.
    """
    packer = Packer(owners, exact=exact)
    status = os.stat(base, dir_fd=dir_fd, follow_symlinks=False)
    if contents_only:
        name = b"."
    yield from packer.entry(name, status, dir_fd, base)
    if stat.S_ISDIR(status.st_mode):
        yield from _descend(packer, _open_child(dir_fd, base), b"" if contents_only else name)
    yield end


def _open_child(dir_fd: int, base: bytes) -> int:
    return os.open(base, _OPEN, dir_fd=dir_fd)


def _descend(
    packer: Packer, fd: int, name: bytes, *, skip: Collection[bytes] = (), layer: bool = False
) -> Iterator[bytes]:
    """Walk an open directory, which is closed, depth first; one descriptor per level.

    With `layer` overlayfs's marks become whiteouts.
    """
    levels = [(fd, name, iter(_names(fd)))]
    try:
        while levels:
            fd, name, names = levels[-1]
            base = next(names, None)
            if base is None:
                levels.pop()
                os.close(fd)
                continue
            path = name + b"/" + base if name else base
            if path in skip:
                continue
            try:
                status = os.stat(base, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                continue
            if layer and (mark := _whiteout(path, status)):
                yield mark
                continue
            yield from packer.entry(path, status, fd, base)
            if stat.S_ISDIR(status.st_mode):
                if len(levels) >= _MAX_DEPTH:
                    raise Exhausted(f"{os.fsdecode(path[:200])}: nested too deep to be packed")
                try:
                    child = _open_child(fd, base)
                except OSError as error:
                    _pass_if_gone(error, path)
                    continue
                levels.append((child, path, iter(_names(child))))
                if layer and is_opaque(child):
                    yield header(path + b"/" + _OPAQUE, REG, mode=0o600)
    finally:
        for fd, _, _ in levels:
            os.close(fd)


def _whiteout(path: bytes, status: os.stat_result) -> bytes:
    """Return the header that stands for a deletion in a layer, nothing for other things."""
    parent, slash, base = path.rpartition(b"/")
    if is_whiteout(status):
        return header(parent + slash + b".wh." + base, REG, mode=0o600)
    if base.startswith(b".wh."):
        raise IntegrityError(
            f"{os.fsdecode(path)}: a name that begins with '.wh.' cannot be in a layer"
        )
    return b""


def _names(fd: int) -> Sequence[bytes]:
    return sorted(os.fsencode(name) for name in os.listdir(fd))
