"""Leases: what must not be collected while somebody works on it.

A lease protects the digests of blobs and the chainIDs that it names, and everything that
was made since it began: a digest may only be known when the blob is there. It ends with
its block, with its process, or when its time is up, whichever comes first.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import msgspec

from hutch.errors import Exhausted
from hutch.ids import new_id
from hutch.linux.boot import boot_id, boot_time
from hutch.records import Records, Transaction

__all__ = ["LEASES", "Lease", "LeaseRecord", "Leases", "leased", "started"]

LEASES = "leases"
_TTL_S = 24 * 3600.0


class LeaseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A lease as the store has it; `started` is the owner's start time in clock ticks, `since`
    is by the wall clock, as files' times are, `expires_at` by `boot_time`."""

    pid: int
    started: int
    boot_id: str
    since: float
    expires_at: float
    references: tuple[str, ...]
    purpose: str = ""


class Lease:
    """A lease in force; `add` protects more."""

    def __init__(self, records: Records, key: str, record: LeaseRecord, ttl_s: float) -> None:
        self._records = records
        self._key = key
        self._record = record
        self._ttl_s = ttl_s

    def add(self, *references: str) -> None:
        """Protect these digests and chainIDs too, and begin the time anew."""
        self._record = msgspec.structs.replace(
            self._record,
            references=tuple(dict.fromkeys((*self._record.references, *references))),
            expires_at=boot_time() + self._ttl_s,
        )
        with self._records.write() as transaction:
            transaction.put(LEASES, self._key, self._record)


class Leases:
    """The leases of one root."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._over: set[str] = set()

    @contextmanager
    def hold(self, *references: str, purpose: str = "", ttl_s: float = _TTL_S) -> Iterator[Lease]:
        """Protect `references`, and what is made in the block, until it ends.

        Take the lease before looking whether a thing is there: what is there afterwards
        stays there. Where the disk is too full to end it, it ends by `end_over`, or with
        the process.
        """
        key = new_id()
        record = LeaseRecord(
            pid=os.getpid(),
            started=started(os.getpid()) or 0,
            boot_id=boot_id(),
            since=time.time(),
            expires_at=boot_time() + ttl_s,
            references=references,
            purpose=purpose,
        )
        with self._records.write() as transaction:
            transaction.put(LEASES, key, record)
        try:
            yield Lease(self._records, key, record, ttl_s)
        finally:
            self._over.add(key)
            with suppress(Exhausted):
                self.end_over()

    def end_over(self) -> None:
        """End the leases whose block is over."""
        keys = tuple(self._over)
        if keys:
            with self._records.write() as transaction:
                for key in keys:
                    transaction.delete(LEASES, key)
            self._over.difference_update(keys)

    def list(self) -> Iterable[LeaseRecord]:
        """Return the leases in force."""
        with self._records.read() as transaction:
            items = transaction.items(LEASES, LeaseRecord)
        now, boot = boot_time(), boot_id()
        return [record for _, record in items if _in_force(record, now, boot)]


def leased(transaction: Transaction) -> tuple[set[str], float]:
    """Return what leases name and since when they protect what is made (seconds since the
    epoch); drop those that have ended (a write transaction)."""
    found: set[str] = set()
    since = float("inf")
    now, boot = boot_time(), boot_id()
    for key, record in transaction.items(LEASES, LeaseRecord):
        if _in_force(record, now, boot):
            found.update(record.references)
            since = min(since, record.since)
        else:
            transaction.delete(LEASES, key)
    return found, since


def _in_force(record: LeaseRecord, now: float, boot: str) -> bool:
    if record.expires_at <= now or record.boot_id != boot:
        return False
    return started(record.pid) == record.started


def started(pid: int) -> int | None:
    """Return when the process started (field 22 of /proc/PID/stat), None for no process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name in parentheses may itself hold spaces and parentheses.
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == b"Z" else int(fields[19])
