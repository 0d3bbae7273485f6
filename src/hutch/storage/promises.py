"""What volumes and pools may come to take of the disk that they lie on, and the hook by which
an engine says whether there is room for that."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import msgspec

from hutch.records import Transaction
from hutch.storage.volume_options import home_of, is_foreign
from hutch.storage.volume_records import POOLS, VOLUMES, PoolRecord, VolumeRecord

__all__ = ["Admit", "Promise", "admit_all", "is_beside", "promises"]
__all__ += ["room_of_pool", "room_of_volume"]


class Promise(msgspec.Struct, frozen=True, kw_only=True):
    """What a volume or pool may come to take: `size` in bytes, of the disk that has `place`
    (empty: the root's). `key` is its own among all of a root."""

    key: str
    name: str
    size: int
    place: str = ""


Admit = Callable[[Promise], AbstractContextManager[None]]
"""Holds room for a promise while its block makes it good. Raises `Exhausted`."""


def admit_all(promise: Promise) -> AbstractContextManager[None]:
    """Take whatever is promised: the hook where nobody counts."""
    return nullcontext()


def room_of_volume(name: str, record: VolumeRecord, pool: PoolRecord | None) -> Promise:
    """Return what a volume may take; nothing for one without a size, the host's, or one in a
    pool that has its room already."""
    key, title = f"volume/{name}", f"volume {name}"
    if is_foreign(record.options) or (pool is not None and pool.size):
        return Promise(key=key, name=title, size=0)
    place = pool.source if pool is not None else ""
    return Promise(key=key, name=title, size=home_of(name, record, "", pool).size, place=place)


def room_of_pool(name: str, size: int, source: str) -> Promise:
    """Return what a pool may take; `size` is 0 for a pool that is a mere directory."""
    return Promise(key=f"pool/{name}", name=f"pool {name}", size=size, place=source)


def promises(transaction: Transaction, root: str) -> list[Promise]:
    """Return what the volumes and pools of a root may take of the disk that the root is on."""
    pools = dict(transaction.items(POOLS, PoolRecord))
    found = [room_of_pool(name, pool.size, pool.source) for name, pool in pools.items()]
    for name, record in transaction.items(VOLUMES, VolumeRecord):
        found.append(room_of_volume(name, record, pools.get(record.pool)))
    return [one for one in found if one.size and is_beside(root, one.place)]


def is_beside(root: str, place: str) -> bool:
    """Tell whether a directory is on the disk that the root is on; one that is not there, of a
    disk that is not mounted, is on none."""
    if not place:
        return True
    try:
        return os.stat(place).st_dev == os.stat(root).st_dev
    except OSError:
        return False
