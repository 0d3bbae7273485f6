"""Volumes: directories that outlive instances, by name, in `<root>/volumes/<name>/_data`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from hutch.errors import AlreadyExists, Busy, InvalidArgument, NotFound, Unsupported
from hutch.ids import new_id
from hutch.records import Records, Transaction
from hutch.storage.disks import check_size
from hutch.storage.faults import disk_errors
from hutch.storage.limited import ensure_limited, release_limited, tree_of
from hutch.storage.snapshots import LIMITED_FILE
from hutch.storage.trash import Trash
from hutch.units import parse_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

    from hutch.storage.snapshots import Usage

__all__ = ["VOLUMES", "VOLUME_USERS", "Volume", "VolumeRecord", "VolumeUser", "Volumes"]

VOLUMES = "volumes"
VOLUME_USERS = "volume_users"

_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
Filters = Mapping[str, Sequence[str]]
_KEYS = ("type", "device", "o", "size")


class VolumeRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A volume as the store has it. `populated`: it has been given to an instance, and is
    not filled from an image again."""

    created_at: float
    driver: str = "local"
    options: dict[str, str] = {}
    labels: dict[str, str] = {}
    anonymous: bool = False
    populated: bool = False


class VolumeUser(msgspec.Struct, frozen=True, kw_only=True):
    """That an instance uses a volume (key: `<volume>/<instance>`)."""

    since: float


class Volume(msgspec.Struct, frozen=True, kw_only=True):
    """A volume; `path` is its directory on the host."""

    name: str
    path: str
    created_at: float
    driver: str = "local"
    options: dict[str, str] = {}
    labels: dict[str, str] = {}
    anonymous: bool = False


class Volumes:
    """The volumes of one root; thread-safe, shared with other processes."""

    def __init__(self, root: str | Path, records: Records, *, trash: Trash | None = None) -> None:
        self._volumes = os.path.join(os.fspath(root), "volumes")
        self._records = records
        self._trash = trash or Trash(root)

    def _path(self, name: str) -> str:
        return f"{self._volumes}/{name}/_data"

    def _volume(self, name: str, record: VolumeRecord) -> Volume:
        path = self._path(name)
        if _is_bind(record.options):
            path = record.options["device"]
        elif "size" in record.options:  # a disk too, where it is mounted on the host
            path = tree_of(f"{self._volumes}/{name}")
        return Volume(
            name=name,
            path=path,
            created_at=record.created_at,
            driver=record.driver,
            options=record.options,
            labels=record.labels,
            anonymous=record.anonymous,
        )

    # ---- making and finding -----------------------------------------------------------

    def create(
        self,
        name: str | None = None,
        *,
        labels: Mapping[str, str] | None = None,
        driver: str = "local",
        options: Mapping[str, str] | None = None,
        anonymous: bool = False,
    ) -> Volume:
        """Make a volume; without a name an anonymous one with a random name.

        One of the same name with the same driver and options is returned as it is, as
        Docker does; otherwise `AlreadyExists`.
        """
        if driver != "local":
            raise Unsupported(f"volume driver {driver!r} is not known", hint="use 'local'")
        chosen = dict(options or {})
        _check_options(chosen)
        anonymous = anonymous or not name
        name = name or new_id()
        if len(name) > 255 or name[0] in "_.-" or not _LETTERS.issuperset(name):
            raise InvalidArgument(
                f"expected letters, digits, '_', '.' and '-', got {name[:80]!r}", field="name"
            )
        record = VolumeRecord(
            created_at=time.time(),
            options=chosen,
            labels=dict(labels or {}),
            anonymous=anonymous,
        )
        with self._records.write() as transaction:
            found = transaction.get(VOLUMES, name, VolumeRecord)
            if found is not None:
                if found.options != chosen or found.driver != driver:
                    raise AlreadyExists(
                        f"volume {name}: exists with other options", hint="choose another name"
                    )
                return self._volume(name, found)
            with disk_errors(f"volume {name}"):
                self._make(name, chosen)
            transaction.put(VOLUMES, name, record)
            transaction.event("volume", "create", name, driver=driver)
        return self._volume(name, record)

    def _make(self, name: str, options: Mapping[str, str]) -> None:
        """Make the directory; with a size, a file system of that size."""
        directory = f"{self._volumes}/{name}"
        _make(self._path(name))
        if "size" not in options:
            return
        from hutch.storage.disks import Disks
        from hutch.storage.limited import make_limited

        # What a creator that was killed has left is not this one's.
        release_limited(directory)
        self._trash.discard(f"{directory}/{LIMITED_FILE}")
        try:
            disks = Disks(os.path.dirname(self._volumes))
            size = parse_bytes(options["size"], field="options.size")
            if options.get("type") == "disk":
                disks.create(f"{directory}/{LIMITED_FILE}", size)
            else:
                make_limited(disks, directory, size, field="options.size")
        except BaseException:
            self._trash.discard(directory)
            raise

    def get(self, name: str) -> Volume:
        """Return the volume; raise `NotFound`."""
        with self._records.read() as transaction:
            return self._volume(name, _require(transaction, name))

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
        with self._records.write() as transaction:
            if transaction.get(VOLUMES, name, VolumeRecord) is None:
                if force or missing_ok:
                    return False
                raise _missing(name)
            users = _users(transaction, name)
            if users:
                raise Busy(
                    f"volume {name}: used by instance {users[0][:12]}",
                    hint=f"remove the instance first: hutch rm {users[0][:12]}",
                )
            self._delete(transaction, name)
        return True

    def _delete(self, transaction: Transaction, name: str) -> None:
        with disk_errors(f"volume {name}"):
            record = _require(transaction, name)
            if "size" in record.options:
                release_limited(f"{self._volumes}/{name}")
            elif record.options and not _is_bind(record.options):
                from hutch.storage.volume_mounts import unmount_volume

                unmount_volume(self._path(name))
            self._trash.discard(f"{self._volumes}/{name}")
        transaction.delete(VOLUMES, name)
        transaction.event("volume", "destroy", name)

    def prune(
        self, *, all_volumes: bool = False, filters: Filters | None = None
    ) -> tuple[Sequence[str], int]:
        """Remove volumes that no instance uses: the anonymous ones, or all.

        Returns the names and the bytes freed.
        """
        removed: list[str] = []
        freed = 0
        for volume in self.list(filters):
            if not (all_volumes or volume.anonymous):
                continue
            size = 0 if volume.options else self.usage(volume.name).bytes
            with self._records.write() as transaction:
                known = transaction.get(VOLUMES, volume.name, VolumeRecord) is not None
                if known and not _users(transaction, volume.name):
                    self._delete(transaction, volume.name)
                    removed.append(volume.name)
                    freed += size
        return removed, freed

    def usage(self, name: str) -> Usage:
        """Return the disk space of a volume's files."""
        from hutch.storage.snapshots import measure

        return measure(self.get(name).path)

    # ---- use --------------------------------------------------------------------------

    def acquire(
        self,
        name: str,
        instance_id: str,
        *,
        transaction: Transaction | None = None,
        mount: bool = True,
    ) -> None:
        """Record that the instance uses the volume, which then cannot be removed.

        A volume with driver options is mounted, and stays so until it is removed; one that
        is to be a machine's disk is not (`mount=False`).
        """
        if transaction is None:
            with self._records.write() as own:
                self.acquire(name, instance_id, transaction=own, mount=mount)
            return
        record = _require(transaction, name)
        if mount and record.options and not _is_bind(record.options):
            self._mount(name, record.options)
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

    def reconcile(self, instances: Iterable[str]) -> int:
        """Forget the use by instances that are not among `instances`; return how many.

        Directories that no record names are thrown away too.
        """
        known = set(instances)
        count = 0
        with self._records.write() as transaction:
            for key, _ in transaction.items(VOLUME_USERS, VolumeUser):
                if key.partition("/")[2] not in known:
                    count += transaction.delete(VOLUME_USERS, key)
            recorded = {name for name, _ in transaction.items(VOLUMES, VolumeRecord)}
            try:
                names = os.listdir(self._volumes)
            except FileNotFoundError:
                names = []
            for name in names:
                if name not in recorded:
                    release_limited(f"{self._volumes}/{name}")
                    self._trash.discard(f"{self._volumes}/{name}")
        return count

    def populate(self, name: str, lower: Sequence[str], target: str) -> bool:
        """Fill a volume used for the first time with what the image has at `target`.

        `lower` are the image's layers, topmost first. Owner and mode of the directory
        come along. Returns whether anything was copied; a volume that holds something,
        or has driver options, is left as it is.
        """
        with self._records.read() as transaction:
            record = _require(transaction, name)
        if record.populated or (record.options.keys() - {"size"} and not self.is_disk(name)):
            return False
        from hutch.storage.copyup import copy_up
        from hutch.storage.locking import file_lock

        with file_lock(f"{self._volumes}/.{name}.lock"):
            with self._records.read() as transaction:
                record = _require(transaction, name)
            if record.populated:
                return False
            copied = False
            with disk_errors(f"volume {name}"):
                path = self._volume(name, record).path
                if record.options.get("type") == "disk":
                    ensure_limited(f"{self._volumes}/{name}")
                if not os.listdir(path):
                    copied = copy_up(lower, target, path)
            with self._records.write() as transaction:
                record = _require(transaction, name)
                transaction.put(VOLUMES, name, msgspec.structs.replace(record, populated=True))
        return copied

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

    def is_disk(self, name: str) -> bool:
        """Tell whether a volume is a disk, which a virtual machine has to itself."""
        with self._records.read() as transaction:
            record = transaction.get(VOLUMES, name, VolumeRecord)
        return record is not None and record.options.get("type") == "disk"

    def as_disk(self, name: str) -> str:
        """Return the file of a volume that is a disk, not mounted on the host any more. The
        caller sees to it that no other instance uses it now."""
        from hutch.storage.locking import file_lock

        with file_lock(f"{self._volumes}/.{name}.lock"), disk_errors(f"volume {name}"):
            release_limited(f"{self._volumes}/{name}")
        return self.disk_file(name)

    def disk_file(self, name: str) -> str:
        """Return where the file of a volume that is a disk is."""
        return f"{self._volumes}/{name}/{LIMITED_FILE}"

    def note_size(self, name: str, size: int) -> None:
        """Record that a volume of a size has another one by now."""
        with self._records.write() as transaction:
            record = _require(transaction, name)
            options = {**record.options, "size": str(size)}
            transaction.put(VOLUMES, name, msgspec.structs.replace(record, options=options))
            transaction.event("volume", "update", name)

    def ensure_mounted(self, name: str) -> None:
        """Mount what a volume's driver options name, unless it is (after a reboot, say).

        A `bind` is no mount: the volume's path is the device itself.
        """
        with self._records.read() as transaction:
            record = _require(transaction, name)
        if record.options and not _is_bind(record.options):
            self._mount(name, record.options)

    def _mount(self, name: str, options: Mapping[str, str]) -> None:
        from hutch.storage.locking import file_lock
        from hutch.storage.volume_mounts import mount_volume

        with file_lock(f"{self._volumes}/.{name}.lock"):
            if "size" in options:
                ensure_limited(f"{self._volumes}/{name}")
                return
            mount_volume(
                name,
                self._path(name),
                kind=options.get("type", ""),
                device=options.get("device", ""),
                options=options.get("o", ""),
            )


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


def _make(path: str) -> None:
    os.makedirs(os.path.dirname(path), 0o711, exist_ok=True)
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        return
    os.chmod(path, 0o755)


def _users(transaction: Transaction, name: str) -> Sequence[str]:
    return [
        key.partition("/")[2] for key, _ in transaction.items(VOLUME_USERS, VolumeUser, f"{name}/")
    ]


def _require(transaction: Transaction, name: str) -> VolumeRecord:
    record = transaction.get(VOLUMES, name, VolumeRecord)
    if record is None:
        raise _missing(name)
    return record


def _missing(name: str) -> NotFound:
    return NotFound(f"volume {name}: not found", hint=f"hutch volume create {name}")


def _check_options(options: Mapping[str, str]) -> None:
    for key in options:
        if key not in _KEYS:
            raise InvalidArgument(
                f"unknown option of the local driver: {key!r}",
                field="options",
                hint="it knows type, device, o and size",
            )
    is_disk = options.get("type") == "disk"
    if is_disk and "size" not in options:
        raise InvalidArgument("a disk needs one", field="options.size", hint="add size=10G")
    if "size" in options:
        if len(options) > 1 + is_disk:
            raise InvalidArgument("goes alone, or with type=disk", field="options.size")
        check_size(parse_bytes(options["size"], field="options.size"), field="options.size")
        return
    kind = options.get("type", "")
    if not options or kind == "tmpfs":
        return
    if not options.get("device"):
        raise InvalidArgument("device is missing", field="options")
    if kind in ("nfs", "nfs4", "cifs"):
        raise Unsupported(
            f"volume type {kind!r}: network file systems are not mounted by this version",
            hint="mount it on the host and use type=none, o=bind, device=PATH",
        )
    if _is_bind(options) and not os.path.isabs(options["device"]):
        raise InvalidArgument(
            f"device must be an absolute path, got {options['device']!r}", field="options"
        )


def _is_bind(options: Mapping[str, str]) -> bool:
    flags = options.get("o", "").split(",")
    return "bind" in flags or "rbind" in flags or options.get("type") in ("none", "bind")
