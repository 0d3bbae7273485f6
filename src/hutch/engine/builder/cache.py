"""The build cache: which layer a step made, by the key of all that decided it.

Tables: `build_cache` (key: the step's key) holds `CacheRecord`. A record keeps its layer's
blob and its unpacked tree from garbage collection; the layers below are their own steps' or
the base image's. What a lost layer was is found out when it is asked for, and forgotten.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from hutch.image.records import LayerRecord
from hutch.records import Transaction
from hutch.storage.layers import chain_id_of

if TYPE_CHECKING:
    from hutch.engine.context import Context

__all__ = ["BUILD_CACHE", "Cache", "CachePrune", "CacheRecord", "cache_roots"]

BUILD_CACHE = "build_cache"
_LOCK_WAIT_S = 0.2


class CacheRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A step that was done. `layer` has what it made (its chainID upon `parent`), None for a
    step that only leads to another (`leads_to`). Times in seconds since the epoch."""

    description: str
    kind: str = ""
    parent: str = ""
    layer: LayerRecord | None = None
    leads_to: str = ""
    created_at: float = 0
    used_at: float = 0
    uses: int = 0
    size: int = 0


class CachePrune(msgspec.Struct, frozen=True, kw_only=True):
    """What a prune took away: records, directories of cache mounts, and bytes."""

    records: tuple[str, ...] = ()
    mounts: tuple[str, ...] = ()
    reclaimed: int = 0


def cache_roots(transaction: Transaction) -> Iterator[str]:
    """Yield the digests and chainIDs that the build cache keeps."""
    for _, record in transaction.items(BUILD_CACHE, CacheRecord):
        if record.layer is not None:
            yield record.layer.digest
            yield record.layer.chain_id


class Cache:
    """The build cache of one root; thread-safe."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def find(self, key: str, parent: str) -> CacheRecord | None:
        """Return what the step of this key made, unpacked upon `parent`; None where it has to
        be done. The caller holds a lease."""
        record = self._get(key)
        if record is not None and record.leads_to:
            key = record.leads_to
            record = self._get(key)
        if record is None or record.layer is None:
            return None
        layer = record.layer
        if not self._context.content.has(layer.digest):
            self._forget(key)
            return None
        chain_id = chain_id_of(parent, layer.diff_id)
        if not self._context.layers.has(chain_id) and not self._unpack(layer, parent, chain_id):
            return None
        placed = msgspec.structs.replace(layer, chain_id=chain_id)
        self._touch(key, record)
        return msgspec.structs.replace(record, layer=placed)

    def _unpack(self, layer: LayerRecord, parent: str, chain_id: str) -> bool:
        from hutch.errors import IntegrityError

        try:
            with self._context.content.open(layer.digest) as stream:
                self._context.layers.unpack(
                    stream, diff_id=layer.diff_id, parent_chain_id=parent, chain_id=chain_id
                )
        except IntegrityError:
            return False
        return True

    def _get(self, key: str) -> CacheRecord | None:
        with self._context.store.read() as tx:
            return tx.get(BUILD_CACHE, key, CacheRecord)

    def _touch(self, key: str, record: CacheRecord) -> None:
        now = time.time()
        # Once a minute is often enough to tell what was used last.
        if now - record.used_at < 60 and record.uses:
            return
        with self._context.store.write() as tx:
            tx.put(
                BUILD_CACHE,
                key,
                msgspec.structs.replace(record, used_at=now, uses=record.uses + 1),
            )

    def _forget(self, key: str) -> None:
        with self._context.store.write() as tx:
            tx.delete(BUILD_CACHE, key)

    def store(self, key: str, record: CacheRecord, *, also: Iterable[str] = ()) -> None:
        """Keep what a step made; the keys in `also` lead to it."""
        now = time.time()
        made = msgspec.structs.replace(record, created_at=record.created_at or now, used_at=now)
        with self._context.store.write() as tx:
            tx.put(BUILD_CACHE, key, made)
            for other in also:
                tx.put(BUILD_CACHE, other, CacheRecord(
                    description=record.description, kind="link", leads_to=key,
                    created_at=now, used_at=now,
                ))  # fmt: skip

    def link(self, key: str, target: str, description: str) -> None:
        """Let a key lead to another."""
        now = time.time()
        with self._context.store.write() as tx:
            tx.put(
                BUILD_CACHE,
                key,
                CacheRecord(
                    description=description,
                    kind="link",
                    leads_to=target,
                    created_at=now,
                    used_at=now,
                ),
            )

    @contextmanager
    def making(self, key: str, cancelled: Iterable[bool]) -> Iterator[None]:
        """Hold the right to do the step of a key: another build that does the same is waited
        for. `cancelled` is asked now and then, and ends the wait by raising."""
        from hutch.errors import Busy
        from hutch.linux.locks import lock_file

        path = self._context.root / "locks" / f"build-{key[:32]}"
        asked = iter(cancelled)
        while True:
            next(asked, None)
            try:
                with lock_file(path, timeout_s=_LOCK_WAIT_S):
                    try:
                        yield
                    finally:
                        _unlink(path)
                return
            except Busy as busy:
                if str(path) not in busy.message:
                    raise

    def records(self) -> list[tuple[str, CacheRecord]]:
        """Return all records, those used last first."""
        with self._context.store.read() as tx:
            found = tx.items(BUILD_CACHE, CacheRecord)
        return sorted(found, key=lambda item: item[1].used_at, reverse=True)

    def prune(
        self, *, older_than_s: float = 0, keep_bytes: int = 0, keys: Iterable[str] | None = None
    ) -> tuple[str, ...]:
        """Forget records not used for `older_than_s`, until no more than `keep_bytes` are
        kept; return their keys. What they kept is then free to be collected."""
        wanted = set(keys) if keys is not None else None
        now = time.time()
        gone: list[str] = []
        kept = 0
        for key, record in self.records():
            if wanted is not None and key not in wanted:
                continue
            kept += record.size
            if now - record.used_at >= older_than_s and (not keep_bytes or kept > keep_bytes):
                kept -= record.size
                gone.append(key)
        with self._context.store.write() as tx:
            for key in gone:
                tx.delete(BUILD_CACHE, key)
            left = {key for key, _ in tx.items(BUILD_CACHE, CacheRecord)}
            for key, record in tx.items(BUILD_CACHE, CacheRecord):
                if record.leads_to and record.leads_to not in left:
                    tx.delete(BUILD_CACHE, key)
        return tuple(gone)


def _unlink(path: os.PathLike[str]) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
