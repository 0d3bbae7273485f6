"""Volumes: files that outlive instances, by name, in `<root>/volumes/<name>` or in a pool."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress

import msgspec

from hutch.errors import (
    AlreadyExists,
    Busy,
    HutchError,
    InvalidArgument,
    NotFound,
    Unsupported,
)
from hutch.ids import new_id
from hutch.records import Records, Transaction
from hutch.storage import homes
from hutch.storage.diskkeys import DiskKey
from hutch.storage.disks import Disks
from hutch.storage.faults import disk_errors
from hutch.storage.homes import Form, Home
from hutch.storage.promises import Admit, admit_all, room_of_volume
from hutch.storage.snapshots import LIMITED_FILE, QCOW2_FILE
from hutch.storage.trash import Trash
from hutch.storage.volume_openings import Openings, Volume, require
from hutch.storage.volume_options import checked_options, is_disk, is_foreign
from hutch.storage.volume_records import (
    VOLUME_OPENINGS,
    VOLUME_SNAPSHOTS,
    VOLUME_USERS,
    VOLUMES,
    VolumeOpening,
    VolumeRecord,
    VolumeSnapshotRecord,
    VolumeUser,
    check_name,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

    from hutch.storage.snapshots import Usage

__all__ = ["VOLUMES", "VOLUME_USERS", "Volume", "VolumeRecord", "VolumeUser", "Volumes"]

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
Filters = Mapping[str, Sequence[str]]


# What Docker's clients know them by.
_ANONYMOUS = "com.docker.volume.anonymous"


class Volumes(Openings):
    """The volumes of one root; thread-safe, shared with other processes.

    A volume's lock (a file beside it) is taken before a transaction, never within one.
    """

    def __init__(
        self,
        root: str | Path,
        records: Records,
        *,
        trash: Trash | None = None,
        admit: Admit = admit_all,
    ) -> None:
        self._trash = trash or Trash(root)
        super().__init__(root, records, admit=admit)
        self.disks = Disks(root)

    # ---- making and finding -----------------------------------------------------------

    def create(
        self,
        name: str | None = None,
        *,
        labels: Mapping[str, str] | None = None,
        driver: str = "local",
        options: Mapping[str, str] | None = None,
        anonymous: bool = False,
        key: DiskKey | None = None,
    ) -> Volume:
        """Make a volume; without a name an anonymous one with a random name.

        One of the same name with the same driver and options is returned as it is, as
        Docker does; otherwise `AlreadyExists`. `key` is for the option `encrypted`, where
        `key-file` does not name it.
        """
        if driver != "local":
            raise Unsupported(f"volume driver {driver!r} is not known", hint="use 'local'")
        chosen = checked_options(options or {})
        anonymous = anonymous or not name
        name = check_name(name or new_id())
        if key is not None and "encrypted" not in chosen:
            raise InvalidArgument("is for encrypted volumes", field="key", hint="--opt encrypted")
        record = VolumeRecord(
            created_at=time.time(),
            options=chosen,
            labels=_labels(labels or {}, anonymous=anonymous),
            anonymous=anonymous,
        )
        with self.locked(name):
            with self._records.read() as transaction:
                found = transaction.get(VOLUMES, name, VolumeRecord)
            if found is not None:
                if found.options != chosen or found.driver != driver:
                    raise AlreadyExists(
                        f"volume {name}: exists with other options", hint="choose another name"
                    )
                return self._volume(name, found)
            with disk_errors(f"volume {name}"):
                return self.make(name, record, key=key)

    def create_filled(
        self,
        name: str,
        *,
        options: Mapping[str, str],
        labels: Mapping[str, str],
        fill: Callable[[str], None],
        anonymous: bool = False,
        arrived: str = "",
        key: DiskKey | None = None,
    ) -> Volume:
        """Make a volume whose first content `fill` puts into its directory: it appears when
        that is whole and on the disk. `arrived` is the migration that brings it. Raises
        `AlreadyExists`."""
        record = VolumeRecord(
            created_at=time.time(),
            options=checked_options(options),
            labels=_labels(labels, anonymous=anonymous),
            anonymous=anonymous,
            arrived=arrived,
        )
        with self.locked(check_name(name)), disk_errors(f"volume {name}"):
            with self._records.read() as transaction:
                if transaction.get(VOLUMES, name, VolumeRecord) is not None:
                    raise AlreadyExists(f"volume {name}: exists", hint="choose another name")
            return self.make(name, record, key=key, fill=fill)

    def make(
        self,
        name: str,
        record: VolumeRecord,
        *,
        key: DiskKey | None = None,
        build: Callable[[Home], None] | None = None,
        fill: Callable[[str], None] | None = None,
    ) -> Volume:
        """Make a volume's files, then its record; nothing is left of a failure. The caller
        holds its lock and knows that it is new. Raises `Exhausted` where its size does not fit.

        `build` makes the files in place of an empty volume, `fill` puts first content into its
        directory.
        """
        if is_foreign(record.options):
            os.makedirs(self._point(name), 0o755, exist_ok=True)
            return self._enter(name, record)
        if record.pool:
            self.pools.ensure(record.pool)
            project = self.pools.take_project(record.pool)
            record = msgspec.structs.replace(record, project=project)
        with self.admitted(name, record):
            return self._make(name, record, key, build, fill)

    def admitted(
        self, name: str, record: VolumeRecord, *, size: int = 0
    ) -> AbstractContextManager[None]:
        """Hold room for what a volume may take, with `size` for what it is to have from now on,
        while it is made or grown. Raises `Exhausted`."""
        pool = self.pools.load(record.pool)[0] if record.pool else None
        promise = room_of_volume(name, record, pool)
        if size and promise.size:
            promise = msgspec.structs.replace(promise, size=size)
        return self._admit(promise)

    def _make(
        self,
        name: str,
        record: VolumeRecord,
        key: DiskKey | None,
        build: Callable[[Home], None] | None,
        fill: Callable[[str], None] | None,
    ) -> Volume:
        home = self.home(name, record)
        key = key or self.key_of(name, record)
        # What a creator that was killed has left is not this one's.
        self._discard(home, record)
        try:
            if build is not None:
                build(home)
            else:
                homes.make(home, self.disks, key=key)
            self.hold_key(name, key)
            if fill is not None:
                self._fill(home, key, fill)
                record = msgspec.structs.replace(record, populated=True)
            return self._enter(name, record)
        except BaseException:
            self._discard(home, record)
            raise

    def _fill(self, home: Home, key: DiskKey | None, fill: Callable[[str], None]) -> None:
        """Let something put content into a new volume, and see it safe on the disk."""
        from hutch.linux.files import syncfs

        homes.ensure(home, key=key)
        path = homes.path_of(home)
        fill(path)
        fd = os.open(path, _OPEN)
        try:
            syncfs(fd)
        finally:
            os.close(fd)
        if home.form == Form.IMAGE:
            homes.release(home)

    def _enter(self, name: str, record: VolumeRecord) -> Volume:
        with self._records.write() as transaction:
            transaction.insert(VOLUMES, name, record)
            transaction.event("volume", "create", name, driver=record.driver)
        return self._volume(name, record)

    def _discard(self, home: Home, record: VolumeRecord) -> None:
        trash = self._trash
        if record.pool:
            trash = Trash(os.path.dirname(os.path.dirname(home.directory)))
        homes.discard(home, trash)
        if record.pool:
            trash.drain()

    def get(self, name: str) -> Volume:
        """Return the volume; raise `NotFound`."""
        return self._volume(name, self.record(name))

    def list(self, filters: Filters | None = None) -> Sequence[Volume]:
        """Return the volumes by name.

        `filters` as Docker has them: name (a part of it), label (`key` or `key=value`),
        driver, dangling (true: used by no instance).
        """
        wanted = dict(filters or {})
        _check_filters(wanted)
        with self._records.read() as transaction:
            return [
                self._volume(name, record)
                for name, record in transaction.items(VOLUMES, VolumeRecord)
                if _matches(transaction, name, record, wanted)
            ]

    def remove(self, name: str, *, force: bool = False, missing_ok: bool = False) -> bool:
        """Remove a volume and its data; return whether there was one.

        Raises `Busy` while an instance uses it, whatever `force`, which as in Docker only
        makes a missing volume no error.
        """
        try:
            with self.locked(check_name(name)):
                self._remove(name)
        except NotFound:
            if force or missing_ok:
                return False
            raise
        return True

    def remove_arrived(self, name: str, arrived: str) -> None:
        """Remove a volume that a migration has brought, unless somebody uses it by now; one of
        the same name that somebody else has made is not touched."""
        with self.locked(check_name(name)), suppress(Busy, NotFound):
            if self.record(name).arrived == arrived:
                self._remove(name)

    def _remove(self, name: str) -> None:
        with self._records.write() as transaction:
            record = require(transaction, name)
            users = _users(transaction, name)
            if users:
                raise Busy(
                    f"volume {name}: used by instance {users[0][:12]}",
                    hint=f"remove the instance first: hutch rm {users[0][:12]}",
                )
            # Mounted first: in an unmounted pool it could not be taken away.
            if record.pool:
                self.pools.ensure(record.pool)
            transaction.delete(VOLUMES, name)
            for key, _ in transaction.items(VOLUME_OPENINGS, VolumeOpening, f"{name}/"):
                transaction.delete(VOLUME_OPENINGS, key)
            for key, _ in transaction.items(VOLUME_SNAPSHOTS, VolumeSnapshotRecord, f"{name}/"):
                transaction.delete(VOLUME_SNAPSHOTS, key)
            transaction.event("volume", "destroy", name)
        self.hold_key(name, None)
        with disk_errors(f"volume {name}"):
            if not is_foreign(record.options):
                self._discard(self.home(name, record), record)
                return
            from hutch.storage.volume_mounts import unmount_volume

            unmount_volume(self._point(name))
            self._trash.discard(f"{self._volumes}/{name}")

    def prune(
        self,
        *,
        all_volumes: bool = False,
        filters: Filters | None = None,
        spare: Callable[[Volume], bool] | None = None,
    ) -> tuple[Sequence[str], int]:
        """Remove volumes that no instance uses: the anonymous ones, or all, but for those to
        `spare`.

        Returns the names and the bytes freed.
        """
        removed: list[str] = []
        freed = 0
        for volume in self.list(filters):
            if not (all_volumes or volume.anonymous) or (spare is not None and spare(volume)):
                continue
            with suppress(Busy, NotFound):
                size = 0 if is_foreign(volume.options) else self.usage(volume.name).bytes
                self.remove(volume.name)
                removed.append(volume.name)
                freed += size
        return removed, freed

    def usage(self, name: str) -> Usage:
        """Return the disk space of a volume's files; of one that is closed, of its own file."""
        from hutch.storage.snapshots import Usage, measure

        record = self.record(name)
        if is_foreign(record.options):
            return measure(self._volume(name, record).path)
        home = self.home(name, record)
        if not homes.is_open(home):
            file = QCOW2_FILE if home.form == Form.IMAGE else LIMITED_FILE
            with suppress(FileNotFoundError):
                status = os.stat(f"{home.directory}/{file}")
                return Usage(bytes=status.st_blocks * 512, inodes=1)
        return measure(homes.path_of(home))

    # ---- use --------------------------------------------------------------------------

    def acquire(
        self, name: str, instance_id: str, *, transaction: Transaction | None = None
    ) -> None:
        """Record that the instance uses the volume, which then cannot be removed."""
        if transaction is None:
            with self._records.write() as own:
                self.acquire(name, instance_id, transaction=own)
            return
        require(transaction, name)
        transaction.put(VOLUME_USERS, f"{name}/{instance_id}", VolumeUser(since=time.time()))

    def release(
        self, name: str, instance_id: str, *, transaction: Transaction | None = None
    ) -> None:
        """Record that the instance no longer uses it; safe to repeat."""
        if transaction is None:
            with self._records.write() as own:
                own.delete(VOLUME_USERS, f"{name}/{instance_id}")
        else:
            transaction.delete(VOLUME_USERS, f"{name}/{instance_id}")

    def users(self, name: str) -> Sequence[str]:
        """Return the identifiers of the instances that use a volume."""
        with self._records.read() as transaction:
            return _users(transaction, name)

    def grow(self, name: str, size: int) -> Volume:
        """Let a volume hold more; raise `Busy` where that cannot be done while it is used."""
        from hutch.storage.disks import check_size

        size = check_size(size, field="size")
        with self.locked(name), disk_errors(f"volume {name}"):
            record = self.record(name)
            if record.pool:
                self.pools.ensure(record.pool)
            home = self.home(name, record)
            if size <= home.size:
                raise InvalidArgument(
                    f"a volume cannot shrink: it has {home.size} bytes, got {size}", field="size"
                )
            key = self.require_key(name, record)
            with self.admitted(name, record, size=size):
                homes.grow(home, size, self.disks, key=key)
                self.note_size(name, size)
        return self.get(name)

    def reconcile(self, instances: Iterable[str], *, running: Collection[str] | None = None) -> int:
        """Forget the use by instances that are not among `instances`; return how many.

        Images that are open for none that is `running` (None: for none of `instances`) are
        closed, pools mounted, and directories that no record names thrown away.
        """
        known = set(instances)
        live = known if running is None else set(running)
        count = 0
        with self._records.write() as transaction:
            for key, _ in transaction.items(VOLUME_USERS, VolumeUser):
                if key.partition("/")[2] not in known:
                    count += transaction.delete(VOLUME_USERS, key)
            recorded = {name for name, _ in transaction.items(VOLUMES, VolumeRecord)}
        self.pools.reconcile()
        self.reconcile_openings(live)
        self._sweep(recorded)
        self._thaw(recorded)
        return count

    def _thaw(self, names: Collection[str]) -> None:
        """Let writers go on where a process that froze a volume was killed."""
        for name in names:
            with suppress(HutchError, OSError):
                record = self.record(name)
                if is_foreign(record.options) or not record.options:
                    continue
                with self.locked(name, timeout_s=0.0):
                    homes.thaw(self.home(name, record))

    def _sweep(self, recorded: Collection[str]) -> None:
        """Throw away what creators that were killed, and removals cut short, have left."""
        bases = [(self._root, "")]
        bases += [(os.path.dirname(p.path), p.name) for p in self.pools.list() if p.mounted]
        for base, pool in bases:
            try:
                names = os.listdir(f"{base}/volumes")
            except OSError:
                continue
            for name in names:
                if name not in recorded and not name.startswith("."):
                    with suppress(HutchError, OSError):
                        self._sweep_one(pool, name)
            if pool:
                Trash(base).empty()

    def _sweep_one(self, pool: str, name: str) -> None:
        with self.locked(name, timeout_s=0.0):
            with self._records.read() as transaction:
                if transaction.get(VOLUMES, name, VolumeRecord) is not None:
                    return
            found = VolumeRecord(created_at=0.0, options={"pool": pool} if pool else {})
            home = self.home(name, found)
            for form in (Form.FILE, Form.IMAGE):
                homes.release(msgspec.structs.replace(home, form=form))
            self._discard(home, found)

    def populate(self, name: str, lower: Sequence[str], target: str) -> bool:
        """Fill a volume used for the first time with what the image has at `target`.

        `lower` are the image's layers, topmost first. Owner and mode of the directory
        come along. Returns whether anything was copied; a volume that holds something,
        or is foreign, is left as it is.
        """
        record = self.record(name)
        if record.populated or is_foreign(record.options):
            return False
        from hutch.storage.copyup import copy_up

        with self.opened(name) as path:
            record = self.record(name)
            if record.populated:
                return False
            copied = False
            with disk_errors(f"volume {name}"):
                if not os.listdir(path):
                    copied = copy_up(lower, target, path)
            self.mark_populated(name)
        return copied

    def mark_populated(self, name: str) -> None:
        """Note that a volume has its first content: no image fills it."""
        with self._records.write() as transaction:
            record = require(transaction, name)
            transaction.put(VOLUMES, name, msgspec.structs.replace(record, populated=True))

    def is_disk(self, name: str) -> bool:
        """Tell whether a volume is a disk, which a virtual machine has to itself."""
        with self._records.read() as transaction:
            record = transaction.get(VOLUMES, name, VolumeRecord)
        return record is not None and is_disk(record.options)

    def as_disk(self, name: str) -> str:
        """Return the file of a volume that is a disk, not mounted on the host any more. The
        caller sees to it that no other instance uses it now."""
        with self.locked(name), disk_errors(f"volume {name}"):
            record = self.record(name)
            if record.pool:
                self.pools.ensure(record.pool)
            homes.give_up(self.home(name, record))
        return self.disk_file(name)

    def disk_file(self, name: str) -> str:
        """Return where the file of a volume that is a disk is."""
        return f"{self.home(name).directory}/{LIMITED_FILE}"

    def note_size(self, name: str, size: int) -> None:
        """Record that a volume of a size has another one by now."""
        with self._records.write() as transaction:
            record = require(transaction, name)
            options = {**record.options, "size": str(size)}
            transaction.put(VOLUMES, name, msgspec.structs.replace(record, options=options))
            transaction.event("volume", "update", name)

    def open_subpath(self, name: str, subpath: str) -> int:
        """Return a descriptor (O_PATH) of `subpath` in the volume, never of what is outside.

        The caller closes it. A symbolic link in the volume is resolved inside it.
        """
        from hutch.linux.files import open_in_root

        if subpath.startswith("/") or ".." in subpath.split("/"):
            raise InvalidArgument(f"must stay inside the volume, got {subpath!r}", field="subpath")
        root = os.open(self.get(name).path, _OPEN)
        try:
            return open_in_root(root, subpath or ".", os.O_PATH)
        except OSError as error:
            raise InvalidArgument(
                f"volume {name} has no {subpath!r}: {(error.strerror or '').lower()}",
                field="subpath",
            ) from error
        finally:
            os.close(root)


def _labels(labels: Mapping[str, str], *, anonymous: bool) -> dict[str, str]:
    return dict(labels) | ({_ANONYMOUS: ""} if anonymous else {})


def _check_filters(filters: Filters) -> None:
    for key in filters:
        if key not in ("name", "label", "driver", "dangling"):
            raise InvalidArgument(
                f"unknown filter {key!r}",
                field="filters",
                hint="volumes are filtered by name, label, driver and dangling",
            )


def _matches(transaction: Transaction, name: str, record: VolumeRecord, filters: Filters) -> bool:
    names, drivers = filters.get("name"), filters.get("driver")
    if names and not any(part in name for part in names):
        return False
    if drivers and record.driver not in drivers:
        return False
    for label in filters.get("label", ()):
        key, equals, value = label.partition("=")
        if key not in record.labels or (equals and record.labels[key] != value):
            return False
    for answer in filters.get("dangling", ()):
        unused = not _users(transaction, name)
        if unused != (answer.lower() in ("true", "1")):
            return False
    return True


def _users(transaction: Transaction, name: str) -> Sequence[str]:
    return [
        key.partition("/")[2] for key, _ in transaction.items(VOLUME_USERS, VolumeUser, f"{name}/")
    ]
