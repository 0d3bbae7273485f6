"""The protocol by which the lower layers keep named records, without knowing the database.

`hutch.store` implements it over SQLite; images, snapshots, volumes and networks are
written against it, so that none of them imports the store.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import msgspec

__all__ = ["Progress", "ProgressEvent", "Records", "Transaction", "silent"]

S = TypeVar("S", bound=msgspec.Struct)


class Transaction(Protocol):
    """One transaction: reads see one state; writes become visible together or not at all.

    A table is a name (`images`, `layers`, `volumes`, …), a key a string, and a value a
    msgspec Struct stored as JSON.
    """

    def get(self, table: str, key: str, kind: type[S]) -> S | None:
        """Return the record, or None."""
        ...

    def put(self, table: str, key: str, value: msgspec.Struct) -> None:
        """Store the record, replacing what was there."""
        ...

    def insert(self, table: str, key: str, value: msgspec.Struct) -> None:
        """Store a new record; raise `AlreadyExists` where the key is taken."""
        ...

    def delete(self, table: str, key: str) -> bool:
        """Remove the record; return whether there was one."""
        ...

    def items(self, table: str, kind: type[S], prefix: str = "") -> list[tuple[str, S]]:
        """Return the records of a table whose key starts with `prefix`, by key."""
        ...

    def items_after(self, table: str, kind: type[S], after: str, limit: int) -> list[tuple[str, S]]:
        """Return up to `limit` records whose key is greater than `after`, by key."""
        ...

    def count(self, table: str) -> int:
        """Return how many records a table has."""
        ...

    def event(self, kind: str, action: str, subject: str, /, **attributes: str) -> None:
        """Append an event (`image`, `pull`, `debian:bookworm`) to the journal."""
        ...


class Records(Protocol):
    """Where transactions come from."""

    def read(self) -> AbstractContextManager[Transaction]:
        """Open a read transaction."""
        ...

    def write(self, *, durable: bool = False) -> AbstractContextManager[Transaction]:
        """Open a write transaction (one writer at a time, also across processes).

        Leaving the block commits; an exception rolls back. With `durable` the commit has
        reached the disk before the block is left; otherwise it survives the end of every
        process, but a power cut may lose it.
        """
        ...


Progress = Callable[["ProgressEvent"], None]


class ProgressEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One step of long work: `done` of `total` (bytes unless `unit` says otherwise)."""

    item: str
    phase: str
    done: int = 0
    total: int | None = None
    unit: str = "bytes"


def silent(_: ProgressEvent) -> None:
    """Take a progress event and show nothing."""
