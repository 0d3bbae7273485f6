"""Volumes open for use: what is to be mounted is, with its pool; an image with its key, until
the last one who uses it is gone."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property

import msgspec

from hutch.errors import HutchError, NotFound, Unsupported, WrongState
from hutch.linux.boot import boot_id
from hutch.records import Records, Transaction
from hutch.storage import homes
from hutch.storage.diskkeys import DiskKey, read_key
from hutch.storage.faults import disk_errors
from hutch.storage.homes import Form, Home
from hutch.storage.locking import file_lock
from hutch.storage.promises import Admit, admit_all
from hutch.storage.volume_options import home_of, is_bind, is_foreign
from hutch.storage.volume_records import (
    VOLUME_OPENINGS,
    VOLUMES,
    VolumeOpening,
    VolumeRecord,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

    from hutch.storage.pools import Pools

__all__ = ["BY_HAND", "Openings", "Volume", "require"]

BY_HAND = "@"
"""Who has a volume open that no instance has opened."""


class Volume(msgspec.Struct, frozen=True, kw_only=True):
    """A volume; `path` is its directory on the host."""

    name: str
    path: str
    created_at: float
    driver: str = "local"
    options: dict[str, str] = {}
    labels: dict[str, str] = {}
    anonymous: bool = False


class Openings:
    """Where the volumes of one root lie, and which of them are open for whom."""

    def __init__(self, root: str | Path, records: Records, *, admit: Admit = admit_all) -> None:
        self._admit = admit
        self._root = os.fspath(root)
        self._volumes = os.path.join(self._root, "volumes")
        self._records = records
        self._keys: dict[str, DiskKey] = {}

    @cached_property
    def pools(self) -> Pools:
        """The pools that volumes may lie in."""
        from hutch.storage.pools import Pools

        return Pools(self._root, self._records, admit=self._admit)

    def _volume(self, name: str, record: VolumeRecord) -> Volume:
        if is_bind(record.options):
            path = record.options["device"]
        elif is_foreign(record.options):
            path = self._point(name)
        else:
            path = homes.path_of(self.home(name, record))
        return Volume(
            name=name,
            path=path,
            created_at=record.created_at,
            driver=record.driver,
            options=record.options,
            labels=record.labels,
            anonymous=record.anonymous,
        )

    def _point(self, name: str) -> str:
        return f"{self._volumes}/{name}/_data"

    def home(self, name: str, record: VolumeRecord | None = None) -> Home:
        """Return where a volume lies; raise `Unsupported` for one that is foreign."""
        record = record or self.record(name)
        if is_foreign(record.options):
            raise Unsupported(
                f"volume {name}: is a {record.options.get('type') or 'mount'} of the host's",
                hint="this is done with volumes that hutch keeps",
            )
        if not record.pool:
            return home_of(name, record, self._root, None)
        pool, base = self.pools.load(record.pool)
        return home_of(name, record, base, pool)

    def record(self, name: str) -> VolumeRecord:
        """Return what the store knows of a volume; raise `NotFound`."""
        with self._records.read() as transaction:
            return require(transaction, name)

    @contextmanager
    def locked(self, name: str, *, timeout_s: float | None = None) -> Iterator[None]:
        """Hold a volume's lock: nobody opens, closes, fills or removes it meanwhile."""
        os.makedirs(self._volumes, 0o711, exist_ok=True)
        with file_lock(f"{self._volumes}/.{name}.lock", timeout_s=timeout_s):
            yield

    # ---- keys -------------------------------------------------------------------------

    def hold_key(self, name: str, key: DiskKey | None) -> None:
        """Keep a volume's key in this process for further openings, or forget it."""
        if key is not None:
            self._keys[name] = key
        else:
            self._keys.pop(name, None)

    def key_of(self, name: str, record: VolumeRecord) -> DiskKey | None:
        """Return the key that is at hand: from the file that was named, or held."""
        if "encrypted" not in record.options:
            return None
        path = record.options.get("key-file", "")
        return read_key(path, field="options.key-file") if path else self._keys.get(name)

    def require_key(self, name: str, record: VolumeRecord) -> DiskKey | None:
        """The same; raise `WrongState` where an encrypted volume has none."""
        key = self.key_of(name, record)
        if key is None and "encrypted" in record.options:
            raise WrongState(
                f"volume {name}: is encrypted, and its key is not at hand",
                hint=f"hutch volume open --key prompt {name}",
            )
        return key

    # ---- open and closed --------------------------------------------------------------

    def open(self, name: str, user: str = BY_HAND, *, key: DiskKey | None = None) -> Volume:
        """Make a volume's files accessible: mount what is to be mounted, with its pool.

        An image stays open until `close` says so for everybody who opened it. Raises
        `WrongState` where its key is not at hand, `Denied` where it does not open it.
        """
        record = self.record(name)
        if record.options and not is_bind(record.options):
            with self.locked(name):
                record = self.record(name)
                if is_foreign(record.options):
                    self._mount(name, record.options)
                else:
                    self._open_home(name, record, user, key)
        return self._volume(name, record)

    def _open_home(self, name: str, record: VolumeRecord, user: str, key: DiskKey | None) -> None:
        if record.pool:
            self.pools.ensure(record.pool)
        home = self.home(name, record)
        if home.form != Form.IMAGE:
            homes.ensure(home)
            return
        opening = VolumeOpening(boot_id=boot_id())
        with self._records.write() as transaction:
            fresh = transaction.get(VOLUME_OPENINGS, f"{name}/{user}", VolumeOpening) != opening
            transaction.put(VOLUME_OPENINGS, f"{name}/{user}", opening)
        try:
            self._ensure(home, record, key)
        except BaseException:
            if fresh:
                with self._records.write() as transaction:
                    transaction.delete(VOLUME_OPENINGS, f"{name}/{user}")
            raise

    def _ensure(self, home: Home, record: VolumeRecord, key: DiskKey | None) -> None:
        """Open an image; the key is asked for only where it is closed."""
        from hutch.storage.exports import is_served

        if homes.is_open(home) and is_served(home.directory):
            homes.thaw(home)
            return
        key = key or self.require_key(home.name, record)
        homes.ensure(home, key=key)
        if key is not None:
            self.hold_key(home.name, key)

    def close(self, name: str, user: str = BY_HAND) -> None:
        """Say that somebody does not use an open volume any more: an image is closed after its
        last use, and what was opened by hand with the last instance that used it. Safe to
        repeat, and for volumes that need no closing."""
        with suppress(NotFound):
            record = self.record(name)
            if not is_foreign(record.options) and self.home(name, record).form == Form.IMAGE:
                with self.locked(name):
                    self._close(name, self.record(name), user)

    def _close(self, name: str, record: VolumeRecord, user: str, *, by_hand: bool = True) -> None:
        """Close it for one; with `by_hand` what was opened so counts for nothing."""
        boot = boot_id()
        with self._records.write() as transaction:
            transaction.delete(VOLUME_OPENINGS, f"{name}/{user}")
            left = transaction.items(VOLUME_OPENINGS, VolumeOpening, f"{name}/")
            spared = f"{name}/{BY_HAND}" if by_hand else ""
            if any(o.boot_id == boot and key != spared for key, o in left):
                return
            for key, _ in left:
                transaction.delete(VOLUME_OPENINGS, key)
        with disk_errors(f"volume {name}"):
            homes.release(self.home(name, record))

    @contextmanager
    def opened(self, name: str) -> Iterator[str]:
        """Hold a volume open, and its lock, for the length of the block; the value is its
        directory. An image that nobody else has open is closed afterwards."""
        with self.locked(name):
            record = self.record(name)
            if is_foreign(record.options):
                if not is_bind(record.options):
                    self._mount(name, record.options)
                yield self._volume(name, record).path
                return
            user = f"+{os.urandom(8).hex()}"
            self._open_home(name, record, user, None)
            home = self.home(name, record)
            try:
                yield homes.path_of(home)
            finally:
                if home.form == Form.IMAGE:
                    self._close(name, record, user, by_hand=False)

    def reconcile_openings(self, live: Collection[str]) -> None:
        """Close what is open for none of `live` any more, or was before a reboot."""
        boot = boot_id()
        with self._records.read() as transaction:
            found = transaction.items(VOLUME_OPENINGS, VolumeOpening)
        for key, opening in found:
            name, _, user = key.partition("/")
            if opening.boot_id != boot or user not in {*live, BY_HAND}:
                with suppress(HutchError, OSError):
                    self.close(name, user)

    def _mount(self, name: str, options: Mapping[str, str]) -> None:
        from hutch.storage.volume_mounts import mount_volume

        mount_volume(
            name,
            self._point(name),
            kind=options.get("type", ""),
            device=options.get("device", ""),
            options=options.get("o", ""),
        )


def require(transaction: Transaction, name: str) -> VolumeRecord:
    """Return the record of a volume; raise `NotFound`."""
    record = transaction.get(VOLUMES, name, VolumeRecord)
    if record is None:
        raise NotFound(f"volume {name}: not found", hint=f"hutch volume create {name}")
    return record
