"""Garbage collection: free the blobs, layers and root disks that no image, instance or
lease names.

Marking and taking away happen in one write transaction, which only one process has at a
time: whoever records a use of something (an image, a snapshot, a lease) does it before or
after, never in between. Deleting what was taken away happens later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set

import msgspec

from hutch.records import Records, Transaction
from hutch.storage.content import ContentStore
from hutch.storage.layers import Layers
from hutch.storage.leases import leased
from hutch.storage.rootdisk import RootDisks, disk_key
from hutch.storage.snapshots import SNAPSHOTS, SnapshotRecord, Snapshots
from hutch.storage.trash import Trash
from hutch.storage.volumes import Volumes

__all__ = ["Collected", "Collector", "DiskUsage", "Part"]

# File times come from the kernel's tick and may lie a little before the clock's.
_CLOCK_S = 1.0

Roots = Callable[[Transaction], Iterable[str]]


class Collected(msgspec.Struct, frozen=True, kw_only=True):
    """What was freed; `bytes` counts blobs, the plain size of layers, root disks, and stale
    parts. `disks` are named by the chainID of their topmost layer."""

    blobs: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    disks: tuple[str, ...] = ()
    bytes: int = 0


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `df`: how many there are, how many in use, bytes (`size`), bytes to be had."""

    total: int
    active: int
    size: int
    reclaimable: int


class DiskUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What the root takes: blobs, unpacked layers and root disks, writable layers, volumes."""

    layers: Part
    blobs: Part
    disks: Part
    instances: Part
    volumes: Part


class Collector:
    """Mark and sweep over one root.

    `roots` yields the digests, chainIDs and keys of root disks (`disk_key`) that records
    need (`image_roots`, and whatever else keeps images); snapshots and leases are marked
    here. A lease on its topmost layer keeps a root disk too.
    """

    def __init__(
        self,
        records: Records,
        content: ContentStore,
        layers: Layers,
        trash: Trash,
        *roots: Roots,
        disks: RootDisks | None = None,
    ) -> None:
        self._records = records
        self._content = content
        self._layers = layers
        self._trash = trash
        self._roots = roots
        self._disks = disks

    def _marked(self, transaction: Transaction) -> set[str]:
        marked: set[str] = set()
        for roots in self._roots:
            marked.update(roots(transaction))
        for _, snapshot in transaction.items(SNAPSHOTS, SnapshotRecord):
            marked.update(snapshot.chain_ids)
            marked.add(disk_key(snapshot.chain_ids))
        return marked

    def collect(
        self, *, dry_run: bool = False, only: Set[str] | None = None, parts: bool = False
    ) -> Collected:
        """Free what nothing names; with `dry_run` only tell what that would be.

        `only` narrows it to these digests and chainIDs. With `parts` interrupted downloads
        go whatever their age, unless somebody writes them just now.
        """
        blobs: list[str] = []
        layers: list[str] = []
        disks: list[str] = []
        freed = 0
        if not dry_run and only is None:
            age = {"older_than_s": -1.0} if parts else {}
            freed += self._content.clean_ingest(**age)
        with self._records.write() as transaction:
            named, since = leased(transaction)
            marked = self._marked(transaction) | named
            for blob in self._content.list():
                if only is not None and blob.digest not in only:
                    continue
                if blob.digest not in marked and blob.changed_at < since - _CLOCK_S:
                    blobs.append(blob.digest)
                    freed += blob.size
                    if not dry_run:
                        self._trash.discard(self._content.path(blob.digest))
            for layer in self._layers.list():
                if only is not None and layer.chain_id not in only:
                    continue
                made_at = self._layers.made_at(layer.chain_id)
                if layer.chain_id not in marked and made_at < since - _CLOCK_S:
                    layers.append(layer.chain_id)
                    freed += layer.size
                    if not dry_run:
                        self._layers.remove(layer.chain_id)
            for chain_id, size in self._idle_disks(marked, named, since):
                if only is not None and chain_id not in only:
                    continue
                disks.append(chain_id)
                freed += size
                if self._disks is not None and not dry_run:
                    self._disks.remove(chain_id)
        return Collected(blobs=tuple(blobs), layers=tuple(layers), disks=tuple(disks), bytes=freed)

    def _idle_disks(
        self, marked: set[str], leased: set[str], since: float
    ) -> list[tuple[str, int]]:
        """Return the root disks that nothing names, made before `since`: chainID and size."""
        if self._disks is None:
            return []
        return [
            (disk.chain_id, disk.size)
            for disk in self._disks.list()
            if disk_key([disk.chain_id]) not in marked
            and disk.chain_id not in leased
            and self._disks.made_at(disk.chain_id) < since - _CLOCK_S
        ]

    def reconcile(self, snapshots: Snapshots, instances: Iterable[str]) -> tuple[str, ...]:
        """Put right what dead processes left; return the chainIDs of layers that went.

        `instances` are the identifiers that exist: records of other snapshots go.
        """
        known = set(instances)
        with self._records.read() as transaction:
            orphans = [
                key for key, _ in transaction.items(SNAPSHOTS, SnapshotRecord) if key not in known
            ]
        for orphan in orphans:
            snapshots.remove(orphan)
        removed = self._layers.reconcile()
        self._layers.sync()
        if self._disks is not None:
            self._disks.reconcile()
            self._disks.sync()
        self._trash.empty()
        return removed

    def usage(
        self, snapshots: Snapshots, volumes: Volumes, *, running: Iterable[str] = ()
    ) -> DiskUsage:
        """Return what the root takes; `running` are the instances that count as active."""
        with self._records.read() as transaction:
            marked = self._marked(transaction)
            instances = [key for key, _ in transaction.items(SNAPSHOTS, SnapshotRecord)]
        layers = [(layer.chain_id in marked, layer.size) for layer in self._layers.list()]
        blobs = [(blob.digest in marked, blob.size) for blob in self._content.list()]
        found = self._disks.list() if self._disks is not None else ()
        disks = [(disk_key([disk.chain_id]) in marked, disk.size) for disk in found]
        active = set(running)
        written = [(key in active, snapshots.usage(key).bytes) for key in instances]
        kept = [(bool(volumes.users(v.name)), volumes.usage(v.name).bytes) for v in volumes.list()]
        return DiskUsage(
            layers=_part(layers),
            blobs=_part(blobs),
            disks=_part(disks),
            instances=_part(written),
            volumes=_part(kept),
        )


def _part(items: list[tuple[bool, int]]) -> Part:
    return Part(
        total=len(items),
        active=sum(1 for active, _ in items if active),
        size=sum(size for _, size in items),
        reclaimable=sum(size for active, size in items if not active),
    )
