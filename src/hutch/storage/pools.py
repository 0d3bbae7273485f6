"""Storage pools: places for volumes with a size of their own, in `<root>/pools/<name>` or in a
directory elsewhere (another disk, say).

A pool of a file system is one file, sparse unless its room is reserved, mounted when it is
first used after a boot. What is in a pool is `volumes/<name>` and `trash`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from hutch.errors import (
    AlreadyExists,
    Busy,
    Exhausted,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unsupported,
)
from hutch.records import Records, Transaction
from hutch.storage.faults import disk_errors
from hutch.storage.filemounts import unmount_file
from hutch.storage.locking import file_lock
from hutch.storage.poolkinds import (
    KINDS,
    FileSystem,
    PoolKind,
    file_system,
    grow_mounted,
    make_and_mount,
    mount_pool,
    run_tool,
)
from hutch.storage.promises import Admit, admit_all, room_of_pool
from hutch.storage.trash import Trash
from hutch.storage.volume_records import (
    POOLS,
    VOLUMES,
    PoolRecord,
    VolumeRecord,
    check_name,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Pool", "Pools"]

_FILE = "pool.raw"
_POINT = "mounted"
_MARK = ".hutch-pool"
_OURS = (_FILE, _POINT, "volumes", "trash", _MARK)
_MOST = 16 << 40
_STEP = 1 << 20


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    """A pool; bytes. `path` is where its volumes are, `size` what it holds, `used` and `free`
    how that stands now, `allocated` what its file takes of the host's disk. `limits` is how
    volumes are kept to their sizes: by a quota of the file system (`project`, `subvolume`), or
    each by a file system (`file`) or disk (`image`) of its own."""

    name: str
    kind: PoolKind
    path: str
    created_at: float
    limits: str
    size: int = 0
    used: int = 0
    free: int = 0
    allocated: int = 0
    reserved: bool = False
    mounted: bool = True
    volumes: tuple[str, ...] = ()


class Pools:
    """The pools of one root; thread-safe, shared with other processes."""

    def __init__(
        self,
        root: str | Path,
        records: Records,
        *,
        trash: Trash | None = None,
        admit: Admit = admit_all,
    ) -> None:
        self._admit = admit
        self._root = os.fspath(root)
        self._pools = os.path.join(self._root, "pools")
        self._records = records
        self._trash = trash or Trash(root)

    # ---- making and finding -----------------------------------------------------------

    def create(
        self,
        name: str,
        kind: str = "directory",
        *,
        size: int = 0,
        source: str = "",
        reserved: bool = False,
    ) -> Pool:
        """Make a pool; nothing is left of a failure.

        `size` is for kinds with a file system; `source` is an empty directory. With `reserved`
        the host's disk keeps room for all of it, else what is not written takes none. Raises
        `AlreadyExists`, `InvalidArgument`, `Unsupported` for what this host lacks, `Exhausted`.
        """
        check_name(name)
        checked = _kind(kind)
        size = _size(checked, size)
        if reserved and not size:
            raise InvalidArgument(f"a pool of kind {kind} has no size", field="reserved")
        source = _source(source)
        with self._locked(name):
            with self._records.read() as transaction:
                if transaction.get(POOLS, name, PoolRecord) is not None:
                    raise AlreadyExists(f"pool {name}: exists", hint="choose another name")
            home = source or f"{self._pools}/{name}"
            room = self._admit(room_of_pool(name, size, source))
            with room, disk_errors(f"pool {name}"):
                self._claim(name, home, mine=not source)
                try:
                    quotas = self._fill(checked, home, size, reserved=reserved)
                    record = PoolRecord(
                        kind=checked,
                        created_at=time.time(),
                        source=source,
                        size=size,
                        quotas=quotas,
                        reserved=reserved,
                    )
                    with self._records.write() as transaction:
                        transaction.insert(POOLS, name, record)
                        transaction.event("pool", "create", name, type=checked)
                except BaseException:
                    self._erase(home, keep=bool(source))
                    raise
        return self.get(name)

    def _claim(self, name: str, home: str, *, mine: bool) -> None:
        """Take a directory that is empty or was left by a creator that was killed; `mine`, in
        the root, is made."""
        mark = os.fsencode(f"{os.path.realpath(self._root)}\n{name}\n")
        if os.path.isdir(home):
            found = set(os.listdir(home))
            foreign = found - set(_OURS) or _read(f"{home}/{_MARK}") != mark
            if found and foreign and not mine:
                raise InvalidArgument(f"{home}: is not empty", field="source")
            self._erase(home, keep=True)
        elif mine:
            os.makedirs(home, 0o711)
        else:
            raise InvalidArgument(
                f"{home}: no such directory",
                field="source",
                hint="mount the disk that it is on, or make it",
            )
        fd = os.open(f"{home}/{_MARK}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, mark)
        finally:
            os.close(fd)

    def _fill(self, kind: PoolKind, home: str, size: int, *, reserved: bool) -> bool:
        """Make what is in a pool's directory; return whether its file system has quotas."""
        fs = file_system(kind)
        base, quotas = home, False
        if fs is not None:
            if os.geteuid() != 0:
                raise Unsupported(
                    f"pool: kind {kind} needs root, which may mount",
                    hint="use kind directory, or run as root",
                )
            base = f"{home}/{_POINT}"
            os.makedirs(base, 0o711)
            _make_file(f"{home}/{_FILE}", size, reserved=reserved)
            quotas = make_and_mount(fs, f"{home}/{_FILE}", base, reserved=reserved)
            os.chmod(base, 0o711)
        os.makedirs(f"{base}/volumes", 0o711)
        # There before it is needed: on a full file system it could not be made.
        os.makedirs(f"{base}/trash", 0o700)
        return quotas

    def _erase(self, home: str, *, keep: bool) -> None:
        """Take what we put into a pool's directory away; unless kept, the directory too."""
        unmount_file(f"{home}/{_POINT}")
        if not keep:
            self._discard(home)
            return
        for name in _OURS:
            if os.path.lexists(f"{home}/{name}"):
                self._discard(f"{home}/{name}")

    def _discard(self, path: str) -> None:
        import errno
        import shutil

        try:
            self._trash.discard(path)
        except OSError as exc:
            if exc.errno != errno.EXDEV:
                raise
            # On another disk there is no trash to move it to.
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)

    def get(self, name: str) -> Pool:
        """Return a pool as it is now; raise `NotFound`."""
        with self._records.read() as transaction:
            record = _require(transaction, name)
            volumes = _volumes(transaction, name)
        return self._pool(name, record, volumes)

    def list(self) -> Sequence[Pool]:
        """Return the pools by name."""
        with self._records.read() as transaction:
            found = transaction.items(POOLS, PoolRecord)
            volumes = {name: _volumes(transaction, name) for name, _ in found}
        return [self._pool(name, record, volumes[name]) for name, record in found]

    def _pool(self, name: str, record: PoolRecord, volumes: tuple[str, ...]) -> Pool:
        base = self._base(name, record)
        fs = file_system(record.kind)
        there = self._is_there(name, record)
        mounted = there and (fs is None or os.path.ismount(base))
        size = used = free = allocated = 0
        if mounted:
            status = os.statvfs(base)
            free = status.f_bavail * status.f_frsize
            size = status.f_blocks * status.f_frsize
            used = size - status.f_bfree * status.f_frsize
        if there and fs is not None:
            allocated = os.stat(f"{self._home(name, record)}/{_FILE}").st_blocks * 512
        return Pool(
            name=name,
            kind=record.kind,
            path=f"{base}/volumes",
            created_at=record.created_at,
            limits=_limits(record, fs),
            size=record.size or size,
            used=used,
            free=free,
            allocated=allocated,
            reserved=record.reserved,
            mounted=mounted,
            volumes=volumes,
        )

    def _home(self, name: str, record: PoolRecord) -> str:
        return record.source or f"{self._pools}/{name}"

    def _base(self, name: str, record: PoolRecord) -> str:
        home = self._home(name, record)
        return f"{home}/{_POINT}" if file_system(record.kind) is not None else home

    def _is_there(self, name: str, record: PoolRecord) -> bool:
        """Tell whether a pool's directory is to be seen, which may be on a disk that is not
        mounted now."""
        what = _FILE if file_system(record.kind) is not None else "volumes"
        return os.path.lexists(f"{self._home(name, record)}/{what}")

    # ---- use --------------------------------------------------------------------------

    def load(self, name: str) -> tuple[PoolRecord, str]:
        """Return a pool's record, and the directory that holds `volumes`, mounted or not."""
        with self._records.read() as transaction:
            record = _require(transaction, name)
        return record, self._base(name, record)

    def ensure(self, name: str) -> str:
        """Mount a pool where it is not (after a reboot, say); return the directory that holds
        `volumes`. Raises `Unavailable` where its files are not there."""
        record, base = self.load(name)
        if not self._is_there(name, record):
            raise Unavailable(
                f"pool {name}: {self._home(name, record)} does not have its files",
                hint="mount the disk that it is on",
            )
        fs = file_system(record.kind)
        if fs is None or os.path.ismount(base):
            return base
        with self._locked(name), disk_errors(f"pool {name}"):
            if not os.path.ismount(base):
                os.makedirs(base, 0o711, exist_ok=True)
                path = f"{self._home(name, record)}/{_FILE}"
                mount_pool(fs, path, base, quotas=record.quotas, reserved=record.reserved)
        return base

    def take_project(self, name: str) -> int:
        """Return a number for a volume's quota that no other has had in this pool."""
        with self._records.write() as transaction:
            record = _require(transaction, name)
            number = record.last_project + 1
            transaction.put(POOLS, name, msgspec.structs.replace(record, last_project=number))
        return number

    def grow(self, name: str, size: int) -> Pool:
        """Give a pool more room, while it is used where the kernel lets us; `Busy` otherwise.

        A smaller size is refused: a file system's blocks are where they are.
        """
        fs = file_system(self.load(name)[0].kind)
        if fs is None:
            raise InvalidArgument(
                f"pool {name}: of its kind it has what its disk has", field="size"
            )
        self.ensure(name)
        try:
            with self._locked(name), disk_errors(f"pool {name}"):
                self._grow(name, fs, size)
        finally:
            self.ensure(name)
        return self.get(name)

    def _grow(self, name: str, fs: FileSystem, size: int) -> None:
        record, base = self.load(name)
        size = _size(record.kind, size)
        path = f"{self._home(name, record)}/{_FILE}"
        # It is longer where who grew it was killed, and its file system may be as long.
        present = max(record.size, os.stat(path).st_size)
        if size < present or size == record.size:
            raise InvalidArgument(
                f"a pool cannot shrink: it has {present} bytes, got {size}", field="size"
            )
        with self._admit(room_of_pool(name, size, record.source)):
            try:
                _lengthen(path, size, reserved=record.reserved)
                grow_mounted(fs, path, base)
            except (Busy, Exhausted):
                # Nothing has grown but the file.
                os.truncate(path, present)
                raise
            with self._records.write() as transaction:
                record = _require(transaction, name)
                transaction.put(POOLS, name, msgspec.structs.replace(record, size=size))
                transaction.event("pool", "grow", name, size=str(size))

    def trim(self, name: str) -> int:
        """Give what a pool does not use back to the host's disk; return the bytes of it."""
        from hutch.linux.files import trim

        record, base = self.load(name)
        if file_system(record.kind) is None or record.reserved:
            return 0
        path = f"{self._home(name, record)}/{_FILE}"
        self.ensure(name)
        before = os.stat(path).st_blocks
        with disk_errors(f"pool {name}"):
            if record.kind == "btrfs":  # subvolumes are deleted in the background
                run_tool(("btrfs", "subvolume", "sync"), base, package="btrfs-progs")
            fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
                trim(fd)
            finally:
                os.close(fd)
        return max(0, before - os.stat(path).st_blocks) * 512

    def remove(self, name: str) -> None:
        """Remove an empty pool; raise `Busy` while it has volumes."""
        with self._locked(name):
            with self._records.write() as transaction:
                record = _require(transaction, name)
                if volumes := _volumes(transaction, name):
                    raise Busy(
                        f"pool {name}: has volume {volumes[0]}",
                        hint=f"remove its volumes first: hutch volume rm {volumes[0]}",
                    )
                transaction.delete(POOLS, name)
                transaction.event("pool", "destroy", name)
            with disk_errors(f"pool {name}"):
                home = self._home(name, record)
                if os.path.isdir(home):
                    self._erase(home, keep=bool(record.source))

    def reconcile(self) -> None:
        """Mount what a reboot unmounted, and throw away what creators that were killed left
        in the root."""
        with self._records.read() as transaction:
            recorded = {name for name, _ in transaction.items(POOLS, PoolRecord)}
        for name in recorded:
            _quietly(self.ensure, name)
        try:
            found = os.listdir(self._pools)
        except FileNotFoundError:
            return
        for name in found:
            if name not in recorded and not name.startswith("."):
                _quietly(self._sweep, name)

    def _sweep(self, name: str) -> None:
        with self._locked(name, timeout_s=0.0):
            with self._records.read() as transaction:
                is_known = transaction.get(POOLS, name, PoolRecord) is not None
            if not is_known:
                self._erase(f"{self._pools}/{name}", keep=False)

    @contextmanager
    def _locked(self, name: str, *, timeout_s: float | None = None) -> Iterator[None]:
        os.makedirs(self._pools, 0o711, exist_ok=True)
        with file_lock(f"{self._pools}/.{name}.lock", timeout_s=timeout_s):
            yield


def _quietly(act: object, name: str) -> None:
    """Do it where it can be done: a pool whose disk is missing must not stop the rest."""
    from hutch.errors import HutchError

    assert callable(act)
    try:
        act(name)
    except (HutchError, OSError):
        pass


def _limits(record: PoolRecord, fs: FileSystem | None) -> str:
    if record.kind == "qcow2":
        return "image"
    return fs.limits if fs is not None and record.quotas else "file"


def _kind(text: str) -> PoolKind:
    for kind in KINDS:
        if text == kind:
            return kind
    raise InvalidArgument(f"expected one of {', '.join(KINDS)}, got {text[:40]!r}", field="kind")


def _size(kind: PoolKind, size: int) -> int:
    fs = file_system(kind)
    if fs is None:
        if size:
            raise InvalidArgument(
                f"a pool of kind {kind} has what its disk has",
                field="size",
                hint="give its volumes sizes, or choose ext4, xfs or btrfs",
            )
        return 0
    if not size:
        raise InvalidArgument(f"a pool of kind {kind} needs one", field="size", hint="--size 100G")
    if not fs.least <= size <= _MOST:
        raise InvalidArgument(
            f"expected {fs.least >> 20} MiB to 16 TiB for {kind}, got {size} bytes", field="size"
        )
    return -(-size // _STEP) * _STEP


def _source(source: str) -> str:
    if source and not os.path.isabs(source):
        raise InvalidArgument(f"must be an absolute path, got {source!r}", field="source")
    return os.path.normpath(source) if source else ""


def _make_file(path: str, size: int, *, reserved: bool) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.close(fd)
    _lengthen(path, size, reserved=reserved)


def _lengthen(path: str, size: int, *, reserved: bool) -> None:
    from hutch.storage.limited import reserve

    os.truncate(path, size)
    if reserved:
        reserve(path)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(8192)
    except OSError:
        return b""


def _require(transaction: Transaction, name: str) -> PoolRecord:
    record = transaction.get(POOLS, name, PoolRecord)
    if record is None:
        raise NotFound(f"pool {name}: not found", hint=f"hutch pool create {name}")
    return record


def _volumes(transaction: Transaction, name: str) -> tuple[str, ...]:
    found = transaction.items(VOLUMES, VolumeRecord)
    return tuple(volume for volume, record in found if record.pool == name)
