"""Place the entries of a tar beneath a directory descriptor, and nowhere else.

Names are created with O_EXCL and O_NOFOLLOW in a parent resolved inside the root, so an
archive can neither write through a symbolic link nor reach outside. Layers additionally
have their whiteouts turned into overlayfs's own.
"""

from __future__ import annotations

import errno
import os
import stat

import msgspec

from hutch.errors import Exhausted, HutchError, IntegrityError, InvalidArgument
from hutch.storage.beneath import Directories, make_directory, normalise
from hutch.storage.faults import explain
from hutch.storage.owners import Owners
from hutch.storage.removal import remove_tree
from hutch.storage.tarstream import BLK, CHR, DIR, FIFO, LNK, REG, SYM, Entry, TarReader

__all__ = ["Extractor", "UnpackLimits", "UnpackOptions"]

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_META = b".wh..wh."
_MAX_MAJOR, _MAX_MINOR = (1 << 12) - 1, (1 << 20) - 1
_TOO_LARGE = (errno.ENOSPC, errno.E2BIG, errno.ERANGE)
_DAMAGED = (
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EINVAL,
    errno.ENOENT,
    errno.EEXIST,
    errno.EXDEV,
    errno.EPERM,
)


class UnpackLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What one archive may cost. `max_ratio` counts from `ratio_floor` bytes on."""

    max_bytes: int = 64 << 30
    max_entries: int = 4_000_000
    max_depth: int = 256
    max_path: int = 4095
    max_ratio: int = 400
    ratio_floor: int = 1 << 30


class UnpackOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How entries are placed.

    `whiteouts`: turn OCI whiteouts into overlayfs's. `userxattr`: in `user.overlay.*`
    rather than `trusted.overlay.*`, and pass over devices that the kernel refuses (no
    root). `ignore_chown_errors`: leave a file to ourselves where its owner is not ours
    to give. `owner` overrides every owner. `fresh`: the tree is empty and ours alone;
    otherwise directories that exist keep what the archive says of the root itself. `within`:
    the one name that may be placed, with what is beneath it, and no symbolic link is followed
    on the way: for an archive that somebody makes who is not to choose where it goes.
    Without `replace` a directory is never removed for something else, nor the other way round.
    """

    whiteouts: bool = True
    userxattr: bool = False
    ignore_chown_errors: bool = False
    owner: tuple[int, int] | None = None
    fresh: bool = True
    within: bytes = b""
    replace: bool = True


def process_umask() -> int:
    """Return the umask without changing it, which would hit the other threads."""
    with open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(b"Umask:"):
                return int(line[6:], 8)
    return 0o7777


class Extractor:
    """Extract one tar; `label` names it in errors.

    Names count from `prefix` beneath the root, while symbolic links on the way are
    resolved in the root itself. With `owners` the archive's ids are those inside a user
    namespace.
    """

    def __init__(
        self,
        root_fd: int,
        reader: TarReader,
        *,
        limits: UnpackLimits,
        options: UnpackOptions,
        label: str,
        prefix: bytes = b"",
        owners: Owners | None = None,
    ) -> None:
        self._owners = owners
        self._prefix = prefix + b"/" if prefix else b""
        self._root_fd = root_fd
        self._reader = reader
        self._limits = limits
        self._options = options
        self._label = label
        self._dirs = Directories(root_fd, links=not options.within)
        self._late: dict[bytes, tuple[int, int, bool]] = {}
        self._whiteouts: set[bytes] = set()
        # In a fresh tree no directory has a set-group-ID bit yet (they come last), so what
        # we create is ours and needs no chown when the entry says the same.
        self._ours = (os.geteuid(), os.getegid()) if options.fresh else None
        self._chmod_bits = process_umask() | 0o7000 if options.fresh else 0o7777
        self._overlay = b"user.overlay." if options.userxattr else b"trusted.overlay."
        self.entries = 0
        self.has_xattrs = False

    def run(self) -> None:
        """Place every entry, then the modes and times of directories."""
        name = b""
        try:
            for entry in self._reader:
                name = entry.name
                self._place(entry)
            self._finish_directories()
        except HutchError as error:
            if error.message.startswith(self._label):
                raise
            raise type(error)(f"{self._label}: {error.message}", hint=error.hint) from error
        except OSError as error:
            what = f"{self._label}: {_show(name)}"
            if error.errno in _DAMAGED and not (error.errno == errno.EPERM and os.geteuid()):
                raise IntegrityError(f"{what}: {(error.strerror or '').lower()}") from error
            raise explain(error, what) from error
        except (ValueError, OverflowError) as error:
            raise IntegrityError(f"{self._label}: {_show(name)}: {error}") from error
        finally:
            self._dirs.forget()

    @property
    def implicit(self) -> set[bytes]:
        """Directories made for something beneath them that the archive does not describe."""
        return self._dirs.made

    # ---- one entry ----------------------------------------------------------------

    def _place(self, entry: Entry) -> None:
        name = normalise(entry.name)
        limits = self._limits
        self.entries += 1
        if len(name) > limits.max_path or name.count(b"/") >= limits.max_depth:
            raise Exhausted(
                f"path too long or too deep (limits max_path, max_depth): {name[:64]!r}"
            )
        if not name:
            self._root(entry)
            return
        self._require_within(name)
        name = self._prefix + name
        parent, _, base = name.rpartition(b"/")
        dir_fd = self._parent(parent)
        if self.entries + self._dirs.count > limits.max_entries:
            raise Exhausted(f"more than {limits.max_entries} entries (limit max_entries)")
        if self._options.whiteouts and base.startswith(_WHITEOUT):
            self._whiteout(dir_fd, parent, base)
            return
        kind = entry.type
        if kind == REG:
            self._file(dir_fd, name, base, entry)
        elif kind == DIR:
            self._directory(dir_fd, name, base, entry)
        elif kind == SYM:
            self._symlink(dir_fd, name, base, entry)
        elif kind == LNK:
            self._link(dir_fd, name, base, entry)
        else:
            self._node(dir_fd, name, base, entry)

    def _require_within(self, name: bytes) -> None:
        only = self._options.within
        if only and name != only and not name.startswith(only + b"/"):
            raise IntegrityError(f"{_show(name)} is not what was asked for, {_show(only)}")

    def _parent(self, path: bytes) -> int:
        """Open a parent directory; one that this layer has whited out begins anew."""
        try:
            return self._dirs.open(path)
        except NotADirectoryError:
            parts = path.split(b"/")
            for count in range(1, len(parts) + 1):
                name = b"/".join(parts[:count])
                if name in self._whiteouts:
                    break
            else:
                raise
        base = name.rpartition(b"/")[2]
        dir_fd = self._clear(self._dirs.open(name.rpartition(b"/")[0]), name, base)
        make_directory(dir_fd, base)
        self._whiteouts.discard(name)
        self._dirs.made.add(name)
        self._opaque(dir_fd, base)
        return self._dirs.open(path)

    def _root(self, entry: Entry) -> None:
        if entry.type != DIR:
            raise IntegrityError("the root must be a directory")
        if self._prefix or not self._options.fresh:
            return
        self._chown(self._root_fd, None, entry)
        if entry.xattrs:
            self._set_xattrs(self._root_fd, entry.xattrs)
        self._late[b""] = (entry.mode, entry.mtime_ns, True)

    def _file(self, dir_fd: int, name: bytes, base: bytes, entry: Entry) -> None:
        mode = entry.mode
        try:
            fd = os.open(base, _CREATE, mode & 0o777, dir_fd=dir_fd)
        except FileExistsError:
            dir_fd = self._clear(dir_fd, name, base)
            fd = os.open(base, _CREATE, mode & 0o777, dir_fd=dir_fd)
        try:
            if entry.sparse is not None:
                self._write_sparse(fd, entry)
            elif entry.size:
                self._write(fd)
            if (entry.uid, entry.gid) != self._ours:
                self._chown(fd, None, entry)
            if mode & self._chmod_bits:
                os.fchmod(fd, mode)
            if entry.xattrs:
                self._set_xattrs(fd, entry.xattrs)
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(fd)

    def _write(self, fd: int) -> None:
        piece = self._reader.piece
        while data := piece():
            written = os.write(fd, data)
            while written < len(data):
                data = data[written:]
                written = os.write(fd, data)

    def _write_sparse(self, fd: int, entry: Entry) -> None:
        reader = self._reader
        os.ftruncate(fd, entry.size)
        for offset, length in entry.sparse or ():
            os.lseek(fd, offset, os.SEEK_SET)
            while length:
                data = reader.piece(length)
                length -= len(data)
                while data:
                    data = data[os.write(fd, data) :]

    def _directory(self, dir_fd: int, name: bytes, base: bytes, entry: Entry) -> None:
        mode = entry.mode
        existed = False
        try:
            os.mkdir(base, mode & 0o777 | 0o700, dir_fd=dir_fd)
        except FileExistsError:
            existed = True
            st = os.stat(base, dir_fd=dir_fd, follow_symlinks=False)
            if not stat.S_ISDIR(st.st_mode):
                dir_fd = self._clear(dir_fd, name, base, directory=True)
                os.mkdir(base, mode & 0o777 | 0o700, dir_fd=dir_fd)
                if name in self._whiteouts:
                    self._whiteouts.discard(name)
                    self._opaque(dir_fd, base)
            self._dirs.made.discard(name)
            self._chown(dir_fd, base, entry)
        else:
            if (entry.uid, entry.gid) != self._ours:
                self._chown(dir_fd, base, entry)
        if entry.xattrs:
            fd = os.open(base, _DIRECTORY, dir_fd=dir_fd)
            try:
                self._set_xattrs(fd, entry.xattrs)
            finally:
                os.close(fd)
        # Bits that mkdir(2) cannot give wait for the end: no file may inherit a group, and
        # without root a directory must stay writable until it is full.
        late = existed or bool(mode & self._chmod_bits) or mode & 0o700 != 0o700
        self._late[name] = (mode, entry.mtime_ns, late)

    def _symlink(self, dir_fd: int, name: bytes, base: bytes, entry: Entry) -> None:
        if not entry.linkname:
            raise IntegrityError("symbolic link without a target")
        try:
            os.symlink(entry.linkname, base, dir_fd=dir_fd)
        except FileExistsError:
            dir_fd = self._clear(dir_fd, name, base)
            os.symlink(entry.linkname, base, dir_fd=dir_fd)
        if (entry.uid, entry.gid) != self._ours:
            self._chown(dir_fd, base, entry)
        self._touch(dir_fd, base, entry.mtime_ns)

    def _link(self, dir_fd: int, name: bytes, base: bytes, entry: Entry) -> None:
        linkname = normalise(entry.linkname)
        self._require_within(linkname)
        target = self._prefix + linkname
        if target == name or not target:
            raise IntegrityError(f"hard link to itself or to the root: {_show(name)}")
        parent, _, target_base = target.rpartition(b"/")
        for attempt in (0, 1):
            # Both parents at once: opening one must not evict the other.
            source_fd = os.dup(self._dirs.open(parent))
            try:
                dir_fd = self._dirs.open(name.rpartition(b"/")[0])
                os.link(
                    target_base,
                    base,
                    src_dir_fd=source_fd,
                    dst_dir_fd=dir_fd,
                    follow_symlinks=False,
                )
                return
            except FileExistsError:
                if attempt or self._same(source_fd, target_base, dir_fd, base):
                    return
                self._clear(dir_fd, name, base)
            except (FileNotFoundError, PermissionError) as error:
                raise IntegrityError(
                    f"hard link {_show(name)} to {_show(target)}: no such file in this archive"
                ) from error
            finally:
                os.close(source_fd)

    def _same(self, source_fd: int, source: bytes, dir_fd: int, base: bytes) -> bool:
        first = os.stat(source, dir_fd=source_fd, follow_symlinks=False)
        second = os.stat(base, dir_fd=dir_fd, follow_symlinks=False)
        return os.path.samestat(first, second)

    def _node(self, dir_fd: int, name: bytes, base: bytes, entry: Entry) -> None:
        form = {CHR: stat.S_IFCHR, BLK: stat.S_IFBLK, FIFO: stat.S_IFIFO}[entry.type]
        major, minor = (entry.devmajor, entry.devminor) if entry.type != FIFO else (0, 0)
        if major > _MAX_MAJOR or minor > _MAX_MINOR:
            raise IntegrityError(f"{_show(name)}: device number {major}:{minor} out of range")
        device = os.makedev(major, minor)
        try:
            self._mknod(dir_fd, base, form | 0o600, device)
        except FileExistsError:
            dir_fd = self._clear(dir_fd, name, base)
            self._mknod(dir_fd, base, form | 0o600, device)
        except PermissionError:
            if self._options.userxattr:
                return
            raise
        self._chown(dir_fd, base, entry)
        fd = os.open(base, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        try:
            # A descriptor opened with O_PATH refuses fchmod; its /proc link takes chmod.
            os.chmod(f"/proc/self/fd/{fd}", entry.mode)
        finally:
            os.close(fd)
        self._touch(dir_fd, base, entry.mtime_ns)

    def _mknod(self, dir_fd: int, base: bytes, mode: int, device: int) -> None:
        os.mknod(base, mode, device, dir_fd=dir_fd)

    # ---- whiteouts ----------------------------------------------------------------

    def _whiteout(self, dir_fd: int, parent: bytes, base: bytes) -> None:
        if base == _OPAQUE:
            os.setxattr(dir_fd, self._overlay + b"opaque", b"y")
            return
        if base.startswith(_META):
            return
        hidden = base[len(_WHITEOUT) :]
        if hidden in (b"", b".", b".."):
            raise IntegrityError(f"whiteout of {hidden!r}")
        try:
            os.mknod(hidden, stat.S_IFCHR, 0, dir_fd=dir_fd)
            self._whiteouts.add(parent + b"/" + hidden if parent else hidden)
        except FileExistsError:
            # A whiteout hides what lower layers have, never what this one brings
            # (OCI image layer specification, "Whiteouts").
            st = os.stat(hidden, dir_fd=dir_fd, follow_symlinks=False)
            if stat.S_ISDIR(st.st_mode):
                self._opaque(dir_fd, hidden)

    def _opaque(self, dir_fd: int, base: bytes) -> None:
        fd = os.open(base, _DIRECTORY, dir_fd=dir_fd)
        try:
            os.setxattr(fd, self._overlay + b"opaque", b"y")
        finally:
            os.close(fd)

    # ---- metadata -----------------------------------------------------------------

    def _clear(self, dir_fd: int, name: bytes, base: bytes, *, directory: bool = False) -> int:
        """Remove what stands in the way; return the parent's descriptor, opened anew."""
        st = os.stat(base, dir_fd=dir_fd, follow_symlinks=False)
        if not self._options.replace and stat.S_ISDIR(st.st_mode) != directory:
            here, there = ("a directory", "none") if not directory else ("none", "a directory")
            raise InvalidArgument(
                f"{_show(name)}: is {here} here, and {there} in what is copied",
                hint="remove it, or copy to another name",
            )
        if stat.S_ISDIR(st.st_mode):
            remove_tree(base, dir_fd=dir_fd)
            beneath = name + b"/"
            for path in [p for p in self._late if p == name or p.startswith(beneath)]:
                del self._late[path]
            self._dirs.made = {
                p for p in self._dirs.made if p != name and not p.startswith(beneath)
            }
        else:
            os.unlink(base, dir_fd=dir_fd)
        self._dirs.forget()
        return self._dirs.open(name.rpartition(b"/")[0])

    def _chown(self, fd: int, base: bytes | None, entry: Entry) -> None:
        uid, gid = self._options.owner or (entry.uid, entry.gid)
        if self._owners is not None:
            uid, gid = self._owners.outside(uid, gid)
        try:
            if base is None:
                os.fchown(fd, uid, gid)
            else:
                os.chown(base, uid, gid, dir_fd=fd, follow_symlinks=False)
        except (PermissionError, OverflowError, OSError) as error:
            if isinstance(error, OverflowError) or uid > 0xFFFFFFFE or gid > 0xFFFFFFFE:
                raise IntegrityError(f"owner {uid}:{gid} out of range") from error
            refused = error.errno in (errno.EPERM, errno.EINVAL)
            if not (refused and self._options.ignore_chown_errors):
                raise

    def _set_xattrs(self, fd: int, xattrs: dict[bytes, bytes]) -> None:
        """Set what an image may bring: never overlayfs's own nor a security module's."""
        for key, value in xattrs.items():
            if key.startswith(b"user."):
                if key.startswith(b"user.overlay."):
                    continue
            elif key not in (
                b"security.capability",
                b"system.posix_acl_access",
                b"system.posix_acl_default",
            ):
                continue
            self.has_xattrs = True
            try:
                os.setxattr(fd, key, value)
            except OSError as error:
                if error.errno == errno.ENOTSUP or (
                    error.errno == errno.EPERM and self._options.userxattr
                ):
                    continue
                if error.errno in _TOO_LARGE and _has_room(fd):
                    # Ext4 keeps the attributes of a file in one block, and calls that full.
                    raise Exhausted(
                        f"extended attribute {_show(key)} of {len(value)} bytes: more than the"
                        " file system of the root keeps with a file",
                        hint="use a root on another file system, such as xfs or btrfs",
                    ) from error
                if error.errno == errno.EINVAL:
                    raise IntegrityError(
                        f"extended attribute {_show(key)}: the kernel knows no such value"
                    ) from error
                raise

    def _touch(self, dir_fd: int, base: bytes, mtime_ns: int) -> None:
        os.utime(base, ns=(mtime_ns, mtime_ns), dir_fd=dir_fd, follow_symlinks=False)

    def _finish_directories(self) -> None:
        for path in sorted(self._late, reverse=True):
            mode, mtime_ns, chmod = self._late[path]
            if not path:
                os.fchmod(self._root_fd, mode)
                os.utime(self._root_fd, ns=(mtime_ns, mtime_ns))
                continue
            parent, _, base = path.rpartition(b"/")
            dir_fd = self._dirs.open(parent)
            if chmod:
                fd = os.open(base, _DIRECTORY, dir_fd=dir_fd)
                try:
                    os.fchmod(fd, mode)
                    os.utime(fd, ns=(mtime_ns, mtime_ns))
                finally:
                    os.close(fd)
            else:
                self._touch(dir_fd, base, mtime_ns)


def _has_room(fd: int) -> bool:
    status = os.fstatvfs(fd)
    return status.f_bavail * status.f_frsize > 1 << 20


def _show(name: bytes) -> str:
    return ascii(os.fsdecode(name[:200]))
