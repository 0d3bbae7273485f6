"""Volumes of an engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO, TYPE_CHECKING, BinaryIO

from hutch.engine.context import Context
from hutch.units import parse_bytes

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from hutch.storage.diskkeys import DiskKey
    from hutch.storage.volume_copies import VolumeCopies, VolumeSnapshot
    from hutch.storage.volumes import Volume

    Key = DiskKey | bytes | str

__all__ = ["Volumes"]


class Volumes:
    """The volumes of one root.

    A key is given as bytes, or as the path of its file.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._volumes = context.volumes

    def create(
        self,
        name: str | None = None,
        *,
        driver: str = "local",
        options: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
        pool: str = "",
        size: int | str = 0,
        encrypted: bool = False,
        key: Key | None = None,
    ) -> Volume:
        """Create a volume, or return the one of that name when it was made alike.

        `options` are Docker's and hutch's own (`size`, `pool`, `encrypted`, `key-file`), which
        the arguments of the same names say too. Of a key only the path of a file is
        remembered, and no file for one given as bytes.
        """
        chosen = dict(options or {})
        if pool:
            chosen["pool"] = pool
        if size:
            chosen["size"] = str(size)
        if encrypted or key is not None:
            chosen.setdefault("encrypted", "true")
        if isinstance(key, str):
            chosen["key-file"] = os.path.abspath(key)
        return self._volumes.create(
            name or "",
            driver=driver,
            options=chosen,
            labels=dict(labels or {}),
            key=None if isinstance(key, str) else _key(key),
        )

    def get(self, name: str) -> Volume:
        """Return a volume by name."""
        return self._volumes.get(name)

    def list(self, filters: Mapping[str, Sequence[str]] | None = None) -> Sequence[Volume]:
        """Return the volumes, by name."""
        return self._volumes.list(filters=filters)

    def resize(self, name: str, size: str | int) -> None:
        """Let a volume of a size hold more: bytes, or a text such as `20G`.

        A disk (`type=disk`) grows while its machine runs, one with a quota while it is used;
        otherwise `Busy` is raised while somebody uses it.
        """
        if self._volumes.is_disk(name):
            from hutch.engine.volume_disks import resize_volume

            resize_volume(self._context, name, size)
        else:
            self._volumes.grow(name, parse_bytes(size, field="size"))

    def users(self, name: str) -> tuple[str, ...]:
        """Return the identifiers of the instances that use a volume."""
        return tuple(self._volumes.users(name))

    def remove(self, name: str, *, force: bool = False) -> None:
        """Remove a volume with its content; raise `Busy` while an instance uses it."""
        self._volumes.remove(name, force=force)

    def prune(
        self,
        *,
        all_volumes: bool = False,
        filters: Mapping[str, Sequence[str]] | None = None,
        spare: Callable[[Volume], bool] | None = None,
    ) -> tuple[Sequence[str], int]:
        """Remove unused anonymous volumes (with `all_volumes`, named ones too) but for those
        to `spare`; return their names and the bytes given back."""
        return self._volumes.prune(all_volumes=all_volumes, filters=filters, spare=spare)

    def open(self, name: str, *, key: Key | None = None) -> Volume:
        """Make a volume's files accessible on the host, until `close` or the end of the last
        instance that uses it; an encrypted one with its key."""
        from hutch.storage.diskkeys import read_key

        found = read_key(key, field="key") if isinstance(key, str) else _key(key)
        with self._shared(name):
            return self._volumes.open(name, key=found)

    def _shared(self, name: str) -> AbstractContextManager[None]:
        from hutch.engine.volume_disks import shared

        return shared(self._context, name)

    def close(self, name: str) -> None:
        """Close what `open` opened; instances that use it keep it open until they end."""
        self._volumes.close(name)
        if not self.users(name):
            self._volumes.hold_key(name, None)

    # ---- copies -----------------------------------------------------------------------

    def snapshot(self, name: str, snapshot: str) -> VolumeSnapshot:
        """Keep a volume as it is now, consistent: its writers wait meanwhile."""
        from hutch.engine.volume_disks import disk_copier

        with disk_copier(self._context, name) as copy:
            return self._copies.snapshot(name, snapshot, quiet=self._quiet(name), copy=copy)

    def snapshots(self, name: str) -> Sequence[VolumeSnapshot]:
        """Return a volume's snapshots, the oldest first."""
        return self._copies.list(name)

    def remove_snapshot(self, name: str, snapshot: str) -> None:
        """Remove a snapshot."""
        self._copies.remove(name, snapshot)

    def clone(
        self, name: str, new: str, *, snapshot: str = "", labels: Mapping[str, str] | None = None
    ) -> Volume:
        """Create a volume that begins as another one is, or was in a snapshot; who uses that
        need not stop."""
        from hutch.engine.volume_disks import disk_copier

        with disk_copier(self._context, name) as copy:
            return self._copies.clone(
                name,
                new,
                snapshot=snapshot,
                labels=self.get(name).labels if labels is None else labels,
                quiet=self._quiet(name),
                copy=copy,
            )

    @property
    def _copies(self) -> VolumeCopies:
        from hutch.storage.volume_copies import VolumeCopies

        return VolumeCopies(self._volumes, self._context.store)

    def _quiet(self, name: str) -> Callable[[], AbstractContextManager[None]]:
        from hutch.engine.quiet import quiet

        return lambda: quiet(self._context, name)

    # ---- streams ----------------------------------------------------------------------

    def backup(self, name: str, target: str | os.PathLike[str] | IO[bytes]) -> None:
        """Write a volume with what it is and a digest to a file, which appears when it is
        whole, or to a stream. Who writes to it waits meanwhile."""
        from hutch.storage.volume_backup import BackupHead, pack_backup

        record = self._volumes.record(name)
        head = BackupHead(
            name=name,
            created_at=record.created_at,
            options=_kept(record.options),
            labels=record.labels,
        )
        with self._still(name) as path, _target(target) as write:
            for piece in pack_backup(path, head):
                write(piece)

    def export(self, name: str, target: str | os.PathLike[str] | IO[bytes]) -> None:
        """Write a volume's files as a plain tar."""
        from hutch.storage.volume_backup import pack_plain

        with self._still(name) as path, _target(target) as write:
            for piece in pack_plain(path):
                write(piece)

    def restore(
        self,
        source: str | os.PathLike[str] | IO[bytes],
        name: str = "",
        *,
        pool: str = "",
        size: int | str = 0,
        encrypted: bool | None = None,
        key: Key | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Volume:
        """Create a volume from a backup, under the name that it had or another one.

        It has the size it had, and is encrypted if it was, unless told otherwise. It appears
        when all of it is there and matches its digest: nothing is left of a failure.
        """
        from hutch.storage.volume_backup import BackupReader

        with ExitStack() as held:
            stream = held.enter_context(_source(source))
            reader = BackupReader(stream)
            # What else a backup of a stranger's says may name anything of this host.
            options = _kept(reader.head.options)
            if pool:
                options["pool"] = pool
            if size:
                options["size"] = str(parse_bytes(size, field="size"))
            if encrypted is not None or key is not None:
                options["encrypted"] = "false" if encrypted is False else "true"
            if isinstance(key, str):
                options["key-file"] = os.path.abspath(key)
            return self._volumes.create_filled(
                name or reader.head.name,
                options=options,
                labels=reader.head.labels if labels is None else labels,
                key=None if isinstance(key, str) else _key(key),
                fill=reader.extract,
            )

    def import_(self, name: str, source: str | os.PathLike[str] | IO[bytes]) -> None:
        """Put a tar's files, compressed or not, into a volume that is there."""
        from hutch.storage.volume_backup import extract_tar

        with _source(source) as stream, self._shared(name), self._volumes.opened(name) as path:
            extract_tar(path, stream, label=f"volume {name}")
        self._volumes.mark_populated(name)

    @contextmanager
    def _still(self, name: str) -> Iterator[str]:
        """Hold a volume open; the value is a directory with its files to which nobody writes. Of
        a disk that a machine has it is a clone's."""
        from hutch.engine.quiet import quiet
        from hutch.engine.volume_disks import machine_of
        from hutch.storage.volume_copies import still
        from hutch.storage.volume_options import is_foreign

        if machine_of(self._context, name):
            twin = self.clone(name, f"{name[:200]}-backup-{os.urandom(4).hex()}")
            try:
                with self._still(twin.name) as tree:
                    yield tree
            finally:
                self.remove(twin.name)
            return
        with self._shared(name), self._volumes.opened(name) as path:
            record = self._volumes.record(name)
            if is_foreign(record.options):
                with quiet(self._context, name):
                    yield path
                return
            with still(self._volumes.home(name, record), self._quiet(name)) as tree:
                yield tree


def _kept(options: Mapping[str, str]) -> dict[str, str]:
    """Return the options of a volume that a backup keeps."""
    return {key: value for key, value in options.items() if key in ("size", "encrypted")}


def _key(key: DiskKey | bytes | None) -> DiskKey | None:
    from hutch.storage.diskkeys import DiskKey

    return DiskKey(key, field="key") if isinstance(key, bytes) else key


@contextmanager
def _target(target: str | os.PathLike[str] | IO[bytes]) -> Iterator[Callable[[bytes], object]]:
    """Open what is written to; a file appears when it is whole."""
    if not isinstance(target, str | os.PathLike):
        yield target.write
        return
    from hutch.storage.output import open_output

    with open_output(target) as file:
        yield file.write


@contextmanager
def _source(source: str | os.PathLike[str] | IO[bytes]) -> Iterator[IO[bytes] | BinaryIO]:
    if not isinstance(source, str | os.PathLike):
        yield source
        return
    from hutch.errors import InvalidArgument, NotFound

    try:
        file = open(source, "rb", buffering=0)  # noqa: SIM115  # closed below
    except FileNotFoundError as exc:
        raise NotFound(f"{os.fspath(source)}: no such file") from exc
    except OSError as exc:
        reason = (exc.strerror or "").lower()
        raise InvalidArgument(f"{os.fspath(source)}: {reason}", field="source") from exc
    with file:
        yield file
