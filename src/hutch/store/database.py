"""Records and the event journal over SQLite in WAL mode; the only home of sqlite3.

Each thread has its own connection. Writers of several processes queue on SQLite's own lock
(BEGIN IMMEDIATE), those of one process before that on a lock of theirs.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from hutch.decoding import decode_json, encode_json, prepare
from hutch.errors import (
    AlreadyExists,
    Exhausted,
    HutchError,
    InternalError,
    Unavailable,
    Unsupported,
)
from hutch.store.reserve import Reserve

__all__ = ["EventRow", "Store", "StoreTransaction"]

S = TypeVar("S", bound=msgspec.Struct)
T = TypeVar("T")
_SCHEMA_VERSION = 1
_BUSY_TIMEOUT_S = 60.0
_LOOK_AGAIN_S = 0.01
_JOURNAL_KEPT = 10_000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    tbl TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL,
    PRIMARY KEY (tbl, key)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, time_ns INTEGER NOT NULL, kind TEXT NOT NULL,
    action TEXT NOT NULL, subject TEXT NOT NULL, attributes BLOB NOT NULL);
"""


class EventRow(msgspec.Struct, frozen=True, kw_only=True):
    """One event of the journal; `seq` grows by one or more per event."""

    seq: int
    time_ns: int
    kind: str
    action: str
    subject: str
    attributes: dict[str, str]


class StoreTransaction:
    """One transaction on one connection; see `hutch.records.Transaction`."""

    def __init__(self, connection: sqlite3.Connection, reserve: Reserve | None = None) -> None:
        self._connection = connection
        self._reserve = reserve

    def get(self, table: str, key: str, kind: type[S]) -> S | None:
        """Return the record, or None."""
        row = self._connection.execute(
            "SELECT value FROM records WHERE tbl = ? AND key = ?", (table, key)
        ).fetchone()
        return None if row is None else decode_json(row[0], kind)

    def put(self, table: str, key: str, value: msgspec.Struct) -> None:
        """Store the record, replacing what was there."""
        self._connection.execute(
            "INSERT INTO records VALUES (?, ?, ?)"
            " ON CONFLICT (tbl, key) DO UPDATE SET value = excluded.value",
            (table, key, encode_json(value)),
        )

    def insert(self, table: str, key: str, value: msgspec.Struct) -> None:
        """Store a new record; raise `AlreadyExists` where the key is taken, and `Exhausted`
        where the rest of the disk is kept for stopping and removing."""
        if self._reserve is not None and self._reserve.is_kept_for_ends():
            raise Exhausted(
                f"{table}: {key!r}: the disk is full: what is left is kept to stop and remove",
                hint="free disk space: `hutch rm`, `hutch system prune`",
            )
        self._reserve = None  # asked once, in the transaction's whole life
        try:
            self._connection.execute(
                "INSERT INTO records VALUES (?, ?, ?)", (table, key, encode_json(value))
            )
        except sqlite3.IntegrityError:
            raise AlreadyExists(f"{table}: {key!r} exists already") from None

    def delete(self, table: str, key: str) -> bool:
        """Remove the record; return whether there was one."""
        cursor = self._connection.execute(
            "DELETE FROM records WHERE tbl = ? AND key = ?", (table, key)
        )
        return cursor.rowcount > 0

    def items(self, table: str, kind: type[S], prefix: str = "") -> list[tuple[str, S]]:
        """Return the records whose key starts with `prefix`, by key."""
        rows = self._connection.execute(
            "SELECT key, value FROM records WHERE tbl = ? AND key >= ? AND key < ? ORDER BY key",
            (table, prefix, prefix + "\U0010ffff"),
        )
        decode = prepare(kind).decode
        return [(key, decode(value)) for key, value in rows.fetchall()]

    def items_after(self, table: str, kind: type[S], after: str, limit: int) -> list[tuple[str, S]]:
        """Return up to `limit` records whose key is greater than `after`, by key."""
        rows = self._connection.execute(
            "SELECT key, value FROM records WHERE tbl = ? AND key > ? ORDER BY key LIMIT ?",
            (table, after, limit),
        )
        decode = prepare(kind).decode
        return [(key, decode(value)) for key, value in rows.fetchall()]

    def count(self, table: str) -> int:
        """Return how many records a table has."""
        row = self._connection.execute(
            "SELECT count(*) FROM records WHERE tbl = ?", (table,)
        ).fetchone()
        return int(row[0])

    def event(self, kind: str, action: str, subject: str, /, **attributes: str) -> None:
        """Append an event to the journal."""
        self._connection.execute(
            "INSERT INTO events (time_ns, kind, action, subject, attributes)"
            " VALUES (?, ?, ?, ?, ?)",
            (time.time_ns(), kind, action, subject, encode_json(attributes)),
        )


class Store:
    """The database of one root."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._current = threading.local()
        self._idle: list[sqlite3.Connection] = []
        self._guard = threading.Lock()
        # Who finds SQLite's lock taken sleeps and looks again: among threads there is better.
        self._turn = threading.Lock()
        self._closed = False
        self._reserve = Reserve(path)

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open or make the database file (0600); raise `Unsupported` for a newer schema."""
        store = cls(path)
        with store._connection() as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > _SCHEMA_VERSION:
                raise Unsupported(
                    f"{path}: written by a newer hutch (schema {version})",
                    hint="upgrade hutch, or name another root",
                )
            if version < _SCHEMA_VERSION:
                connection.executescript(_SCHEMA)
                connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        store._reserve.ensure()
        return store

    def close(self) -> None:
        """Close the idle connections; the store takes no further transaction."""
        with self._guard:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Lend an idle connection, or a new one: there are as many as were used at once."""
        with _translated(self._path):
            with self._guard:
                if self._closed:
                    raise Unavailable(f"{self._path}: the store is closed")
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                connection = self._with_room(self._connect)
            try:
                yield connection
            finally:
                with self._guard:
                    # One whose rollback failed is of no use to anybody.
                    keep = not self._closed and not connection.in_transaction
                    if keep:
                        self._idle.append(connection)
                if not keep:
                    connection.close()

    def _with_room(self, act: Callable[[], T]) -> T:
        """Do something that needs a little room; on a full disk the reserve gives it, once."""
        try:
            return act()
        except sqlite3.OperationalError as exc:
            if not _is_full(exc) or not self._reserve.give_up():
                raise
        return act()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        try:
            if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                self._path.chmod(0o600)
                _begin_log(connection)
            connection.execute("PRAGMA synchronous = NORMAL")
            # The first look at the file makes its log and index, or finds no room for them.
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection

    @contextlib.contextmanager
    def read(self) -> Iterator[StoreTransaction]:
        """Open a read transaction; nested in another of the same thread it joins it."""
        outer: sqlite3.Connection | None = getattr(self._current, "connection", None)
        if outer is not None:
            yield StoreTransaction(outer)
            return
        with self._connection() as connection:
            connection.execute("BEGIN")
            self._current.connection, self._current.writes = connection, False
            try:
                yield StoreTransaction(connection)
            finally:
                self._current.connection = None
                if connection.in_transaction:  # after an error SQLite may have ended it
                    connection.execute("ROLLBACK")

    @contextlib.contextmanager
    def write(self, *, durable: bool = False) -> Iterator[StoreTransaction]:
        """Open a write transaction; nested in another of the same thread it joins it.

        Raise `InternalError` inside a read transaction: that one is rolled back at its end.
        """
        outer: sqlite3.Connection | None = getattr(self._current, "connection", None)
        if outer is not None:
            if not self._current.writes:
                raise InternalError(f"{self._path}: a write inside a read transaction")
            yield StoreTransaction(outer, self._reserve)
            return
        with self._in_turn(), self._connection() as connection:
            connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._with_room(lambda: connection.execute("BEGIN IMMEDIATE"))
            self._current.connection, self._current.writes = connection, True
            try:
                yield StoreTransaction(connection, self._reserve)
                self._commit(connection)
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            finally:
                self._current.connection = None

    def _commit(self, connection: sqlite3.Connection) -> None:
        """Commit; once more with the room of the reserve where SQLite has not rolled back."""
        # A commit that finds no room may lose its transaction: it is too late by then.
        if self._reserve.is_needed():
            self._reserve.give_up()
        try:
            connection.execute("COMMIT")
        except sqlite3.OperationalError as exc:
            if not connection.in_transaction or not _is_full(exc) or not self._reserve.give_up():
                raise
            connection.execute("COMMIT")

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        """Be the only writer of this process; wait as long for that as for another process."""
        if not self._turn.acquire(timeout=_BUSY_TIMEOUT_S):
            raise _held_by_another(self._path)
        try:
            yield
        finally:
            self._turn.release()

    def events(self, after: int = 0, limit: int = 1000) -> list[EventRow]:
        """Return up to `limit` events with a sequence number above `after`, oldest first."""
        with self._connection() as connection:
            rows = connection.execute(
                "SELECT seq, time_ns, kind, action, subject, attributes FROM events"
                " WHERE seq > ? ORDER BY seq LIMIT ?",
                (after, limit),
            ).fetchall()
        return [
            EventRow(
                seq=seq,
                time_ns=time_ns,
                kind=kind,
                action=action,
                subject=subject,
                attributes=decode_json(attributes, dict[str, str]),
            )
            for seq, time_ns, kind, action, subject, attributes in rows
        ]

    def last_event(self) -> int:
        """Return the sequence number of the newest event, 0 where there is none."""
        with self._connection() as connection:
            row = connection.execute("SELECT max(seq) FROM events").fetchone()
            return row[0] or 0

    def trim_events(self, keep: int = _JOURNAL_KEPT) -> None:
        """Drop all but the newest `keep` events."""
        last = self.last_event()
        with self._connection() as connection:
            connection.execute("DELETE FROM events WHERE seq <= ?", (last - keep,))


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours, once."""
    try:
        yield
    except HutchError:
        raise
    except sqlite3.OperationalError as exc:
        raise _translate(path, exc) from exc
    except sqlite3.DatabaseError as exc:
        raise Unavailable(
            f"{path}: {exc}", hint="restore the file from a backup, or name another root"
        ) from exc


def _begin_log(connection: sqlite3.Connection) -> None:
    """Switch to WAL mode. Of several who do so at once SQLite refuses all but one without
    waiting, whatever the timeout: the wait is ours."""
    until = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as exc:
            if "locked" not in str(exc) or time.monotonic() >= until:
                raise
        time.sleep(_LOOK_AGAIN_S)


def _is_full(exc: sqlite3.OperationalError) -> bool:
    # Where memory is mapped to a file without room SQLite just has an error of the disk.
    return "full" in str(exc) or "disk I/O" in str(exc)


def _held_by_another(path: Path) -> Unavailable:
    return Unavailable(f"{path}: another writer has held the store for {_BUSY_TIMEOUT_S:.0f} s")


def _translate(path: Path, exc: sqlite3.OperationalError) -> HutchError:
    text = str(exc)
    if "full" in text:
        return Exhausted(f"{path}: no space left for the store", hint="free disk space and retry")
    if "locked" in text or "busy" in text:
        return _held_by_another(path)
    if "readonly" in text or "read-only" in text or "unable to open" in text:
        return Unavailable(
            f"{path}: cannot be written ({text})",
            hint="name a writable directory with --root or HUTCH_ROOT",
        )
    if "disk I/O" in text:
        return Exhausted(f"{path}: {text}", hint="check that the disk has space and works")
    return Unavailable(f"{path}: {text}")
