"""Volumes as they were once (snapshots) and as others begin (clones), by what their form can:
a btrfs subvolume's snapshot, a snapshot within an image, a copy that shares its blocks where the
file system can, else a copy without its holes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import msgspec

from hutch.errors import AlreadyExists, NotFound
from hutch.records import Records
from hutch.storage import homes
from hutch.storage.copying import copy_tree
from hutch.storage.faults import disk_errors
from hutch.storage.filemounts import frozen
from hutch.storage.homes import Form, Home
from hutch.storage.limited import point_of, reserve
from hutch.storage.poolkinds import run_tool
from hutch.storage.snapshots import LIMITED_FILE, QCOW2_FILE
from hutch.storage.sparse import copy_sparse
from hutch.storage.trash import Trash
from hutch.storage.volume_openings import Volume
from hutch.storage.volume_records import (
    VOLUME_SNAPSHOTS,
    VOLUMES,
    VolumeRecord,
    VolumeSnapshotRecord,
    check_name,
)
from hutch.storage.volumes import Volumes

__all__ = ["VolumeCopies", "VolumeSnapshot", "still"]

Quiet = Callable[[], AbstractContextManager[None]]
Copy = Callable[[str], object]


class VolumeSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of a volume."""

    volume: str
    name: str
    created_at: float


class VolumeCopies:
    """Snapshots and clones of one root's volumes."""

    def __init__(self, volumes: Volumes, records: Records) -> None:
        self._volumes = volumes
        self._records = records

    def snapshot(
        self,
        volume: str,
        name: str,
        *,
        quiet: Quiet = nullcontext,
        copy: Copy | None = None,
    ) -> VolumeSnapshot:
        """Keep a volume as it is now.

        It is as a power cut would find it, or better: who writes to it waits meanwhile. Where
        its form cannot see to that, `quiet` is held, which must stop the writers. `copy`
        copies the file of a volume that is a machine's disk.
        """
        check_name(name, field="snapshot")
        volumes = self._volumes
        with volumes.locked(volume), disk_errors(f"volume {volume}"):
            record = volumes.record(volume)
            if record.pool:
                volumes.pools.ensure(record.pool)
            home = volumes.home(volume, record)
            with self._records.read() as transaction:
                key = f"{volume}/{name}"
                if transaction.get(VOLUME_SNAPSHOTS, key, VolumeSnapshotRecord) is not None:
                    raise AlreadyExists(f"volume {volume}: has a snapshot {name}")
            # What one that was killed has left is not this one's.
            self._delete(home, record, name)
            try:
                self._take(home, record, name, quiet, copy)
                made = VolumeSnapshotRecord(created_at=time.time())
                with self._records.write() as transaction:
                    transaction.insert(VOLUME_SNAPSHOTS, key, made)
                    transaction.event("volume", "snapshot", volume, snapshot=name)
            except BaseException:
                self._delete(home, record, name)
                raise
        return VolumeSnapshot(volume=volume, name=name, created_at=made.created_at)

    def list(self, volume: str) -> Sequence[VolumeSnapshot]:
        """Return a volume's snapshots, the oldest first."""
        self._volumes.record(volume)
        with self._records.read() as transaction:
            found = transaction.items(VOLUME_SNAPSHOTS, VolumeSnapshotRecord, f"{volume}/")
        made = [
            VolumeSnapshot(volume=volume, name=key.partition("/")[2], created_at=record.created_at)
            for key, record in found
        ]
        return sorted(made, key=lambda snapshot: snapshot.created_at)

    def remove(self, volume: str, name: str) -> None:
        """Remove a snapshot; raise `NotFound`."""
        volumes = self._volumes
        with volumes.locked(volume), disk_errors(f"volume {volume}"):
            record = volumes.record(volume)
            if record.pool:
                volumes.pools.ensure(record.pool)
            with self._records.write() as transaction:
                if not transaction.delete(VOLUME_SNAPSHOTS, f"{volume}/{name}"):
                    raise _missing(volume, name)
                transaction.event("volume", "unsnapshot", volume, snapshot=name)
            self._delete(volumes.home(volume, record), record, name)

    def clone(
        self,
        source: str,
        target: str,
        *,
        snapshot: str = "",
        labels: Mapping[str, str] | None = None,
        quiet: Quiet = nullcontext,
        copy: Copy | None = None,
    ) -> Volume:
        """Make a volume that begins as another one is, or was in a snapshot, with its options
        and in its pool."""
        check_name(target)
        volumes = self._volumes
        first, second = sorted((source, target))
        if first == second:
            raise AlreadyExists(f"volume {target}: exists")
        with volumes.locked(first), volumes.locked(second), disk_errors(f"volume {target}"):
            record = volumes.record(source)
            home = volumes.home(source, record)
            with self._records.read() as transaction:
                if transaction.get(VOLUMES, target, VolumeRecord) is not None:
                    raise AlreadyExists(f"volume {target}: exists", hint="choose another name")
                key = f"{source}/{snapshot}"
                if (
                    snapshot
                    and transaction.get(VOLUME_SNAPSHOTS, key, VolumeSnapshotRecord) is None
                ):
                    raise _missing(source, snapshot)
            new = msgspec.structs.replace(
                record, created_at=time.time(), labels=dict(labels or {}), anonymous=False
            )
            return volumes.make(
                target,
                new,
                key=volumes.key_of(source, record),
                build=lambda made: self._build(home, record, made, snapshot, quiet, copy),
            )

    # ---- by form ----------------------------------------------------------------------

    def _take(
        self, home: Home, record: VolumeRecord, name: str, quiet: Quiet, copy: Copy | None
    ) -> None:
        place = _place(home, name)
        if home.form == Form.IMAGE:
            self._take_inside(home, record, name)
            return
        os.makedirs(os.path.dirname(place), 0o700, exist_ok=True)
        if home.form == Form.SUBVOLUME:
            _btrfs_snapshot(homes.path_of(home), place, read_only=True)
            return
        os.mkdir(place, 0o700)
        if home.form == Form.FILE:
            _copy_file(home, f"{place}/{LIMITED_FILE}", copy)
            return
        with quiet():
            copy_tree(homes.path_of(home), f"{place}/_data")

    def _take_inside(self, home: Home, record: VolumeRecord, name: str) -> None:
        from hutch.storage.diskimages import change_snapshot
        from hutch.storage.exports import EXPORTED, is_served, monitor_of

        if not is_served(home.directory):
            key = self._volumes.require_key(home.name, record)
            change_snapshot(f"{home.directory}/{QCOW2_FILE}", "create", name, key=key)
            return
        with _still(home), monitor_of(home.directory) as monitor:
            monitor.execute("blockdev-snapshot-internal-sync", {"device": EXPORTED, "name": name})

    def _delete(self, home: Home, record: VolumeRecord, name: str) -> None:
        """Take a snapshot's files away; missing is fine."""
        place = _place(home, name)
        if home.form == Form.IMAGE:
            self._delete_inside(home, record, name)
        elif home.form == Form.SUBVOLUME:
            if os.path.isdir(place):
                run_tool(("btrfs", "subvolume", "delete"), place, package="btrfs-progs")
        else:
            trash = Trash(os.path.dirname(os.path.dirname(home.directory)))
            trash.discard(place)
            trash.drain()

    def _delete_inside(self, home: Home, record: VolumeRecord, name: str) -> None:
        from hutch.storage.diskimages import change_snapshot
        from hutch.storage.exports import EXPORTED, is_served, monitor_of

        path = f"{home.directory}/{QCOW2_FILE}"
        if name not in _inside(path):
            return
        if is_served(home.directory):
            with monitor_of(home.directory) as monitor:
                monitor.execute(
                    "blockdev-snapshot-delete-internal-sync", {"device": EXPORTED, "name": name}
                )
        else:
            key = self._volumes.require_key(home.name, record)
            change_snapshot(path, "delete", name, key=key)

    def _build(
        self,
        home: Home,
        record: VolumeRecord,
        made: Home,
        snapshot: str,
        quiet: Quiet,
        copy: Copy | None,
    ) -> None:
        """Make a clone's files out of its source's, or of a snapshot's."""
        place = _place(home, snapshot) if snapshot else home.directory
        if home.form == Form.IMAGE:
            self._build_image(home, record, made, snapshot)
        elif home.form == Form.SUBVOLUME:
            os.makedirs(made.directory, 0o711)
            source = place if snapshot else homes.path_of(home)
            _btrfs_snapshot(source, f"{made.directory}/_data", read_only=False)
            homes.limit_subvolume(made)
        elif home.form == Form.FILE:
            os.makedirs(made.directory, 0o711)
            target = f"{made.directory}/{LIMITED_FILE}"
            if snapshot:
                copy_sparse(f"{place}/{LIMITED_FILE}", target)
            else:
                _copy_file(home, target, copy)
            if made.reserved:
                reserve(target)
            if not made.disk:
                homes.ensure(made)
        else:
            homes.make(made, self._volumes.disks)
            with nullcontext() if snapshot else quiet():
                copy_tree(f"{place}/_data", homes.path_of(made))

    def _build_image(self, home: Home, record: VolumeRecord, made: Home, snapshot: str) -> None:
        from hutch.storage.diskimages import change_snapshot

        key = self._volumes.require_key(home.name, record)
        os.makedirs(made.directory, 0o711)
        path = f"{made.directory}/{QCOW2_FILE}"
        with _still(home):
            copy_sparse(f"{home.directory}/{QCOW2_FILE}", path)
        if snapshot:
            change_snapshot(path, "apply", snapshot, key=key)
        for name in _inside(path):
            change_snapshot(path, "delete", name, key=key)


@contextmanager
def still(home: Home, quiet: Quiet) -> Iterator[str]:
    """Yield a directory with an open volume's files to which nobody writes meanwhile: a momentary
    snapshot, its own file system frozen, or what `quiet` sees to. Its lock is held."""
    if home.form in (Form.FILE, Form.IMAGE):
        with frozen(point_of(home.directory)):
            yield homes.path_of(home)
    elif home.form == Form.SUBVOLUME:
        place = _place(home, f".{os.urandom(6).hex()}")
        os.makedirs(os.path.dirname(place), 0o700, exist_ok=True)
        _btrfs_snapshot(homes.path_of(home), place, read_only=True)
        try:
            yield place
        finally:
            run_tool(("btrfs", "subvolume", "delete"), place, package="btrfs-progs")
    else:
        with quiet():
            yield homes.path_of(home)


def _place(home: Home, snapshot: str) -> str:
    return f"{home.directory}/snapshots/{snapshot}"


def _still(home: Home) -> AbstractContextManager[None]:
    """Keep an open file system as it is on its disk; a closed one is still."""
    if homes.is_open(home):
        return frozen(point_of(home.directory))
    return nullcontext()


def _copy_file(home: Home, target: str, copy: Copy | None) -> None:
    """Copy the file that a volume is, and see the copy safe on the disk."""
    if copy is not None:
        copy(target)
    else:
        with _still(home):
            copy_sparse(f"{home.directory}/{LIMITED_FILE}", target)
    with open(target, "rb", buffering=0) as file:
        os.fsync(file.fileno())


def _inside(path: str) -> list[str]:
    """Return the names of the snapshots within an image."""
    from hutch.storage.diskimages import snapshots_in

    return snapshots_in(path)


def _btrfs_snapshot(source: str, target: str, *, read_only: bool) -> None:
    flags = ("-r",) if read_only else ()
    run_tool(("btrfs", "subvolume", "snapshot", *flags, source), target, package="btrfs-progs")


def _missing(volume: str, name: str) -> NotFound:
    return NotFound(
        f"volume {volume}: has no snapshot {name}", hint=f"hutch volume snapshot ls {volume}"
    )
