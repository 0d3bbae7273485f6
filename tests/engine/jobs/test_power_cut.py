"""The power fails at any moment: what was acknowledged is there, and no job runs twice.

The store's log is only appended to here, so the disk after a power cut is a prefix of it: all
that was synced by then, and of what was written after that as much as a tear has left.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from hutch.engine import Engine
from hutch.engine import context as contexts
from hutch.engine.jobs.records import ACTIVE, DONE, WAITING, JobState
from hutch.store import Store
from hutch.store.database import StoreTransaction
from tests.engine.jobs.queues import cancel_all, until
from tests.requires import requires

pytestmark = [requires("root", "overlayfs", "cgroup", "busybox")]

_JOBS = 10


class Cut(msgspec.Struct, frozen=True):
    """A moment: the jobs that had run, how much of the log was synced, and written."""

    ran: tuple[int, ...]
    synced: int
    written: int


class Watched:
    """Looks at the log of a store after each of its transactions."""

    def __init__(self, root: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log, self.ran = root / "hutch.db-wal", ran
        self.cuts: list[Cut] = []
        self.acknowledged = 0
        self._synced = 0
        write, connect = Store.write, Store._connect

        @contextlib.contextmanager
        def watched(store: Store, *, durable: bool = False) -> Iterator[StoreTransaction]:
            inner = getattr(store._current, "connection", None) is not None
            with write(store, durable=durable) as tx:
                yield tx
            if not inner:
                self._look(durable)

        def connected(store: Store) -> sqlite3.Connection:
            connection = connect(store)
            connection.execute("PRAGMA wal_autocheckpoint = 0")
            return connection

        monkeypatch.setattr(Store, "write", watched)
        monkeypatch.setattr(Store, "_connect", connected)

    def _look(self, durable: bool) -> None:
        if durable:
            self._synced = max(self._synced, self.log.stat().st_size)
        # What ran before what was synced: who has run was noted, and synced, before it began.
        ran = numbers(self.ran)
        self.cuts.append(Cut(ran, self._synced, self.log.stat().st_size))

    def acknowledge(self) -> None:
        self.acknowledged = self._synced


def numbers(path: Path) -> tuple[int, ...]:
    return tuple(int(line) for line in path.read_text().split()) if path.exists() else ()


def _after(root: Path, log: bytes, kept: int, target: Path) -> Path:
    """Make the root as it is after a power cut; directories of instances were never synced."""
    lost = shutil.ignore_patterns("instances", "*.fifo", "hutch.db-*")
    shutil.copytree(root, target, symlinks=True, ignore=lost)
    (target / "hutch.db-wal").write_bytes(log[:kept])
    return target


def test_a_torn_log_loses_no_job_and_runs_none_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    root = tmp_path / "root"
    with monkeypatch.context() as patch:
        with Engine(root) as engine:  # its log is written back to the file when it is closed
            engine.images.bootstrap("busybox")
        watched = Watched(root, ran, patch)
        with Engine(root) as engine, engine.jobs.dispatching(cores=3):
            command = ["sh", "-c", "echo $HUTCH_ARRAY_INDEX >>/s/ran"]
            volumes = [f"{tmp_path}:/s"]
            jobs = engine.jobs.submit_array(
                "busybox", command, array=_JOBS, network="none", volumes=volumes
            )
            watched.acknowledge()
            for job in jobs:
                assert job.wait(60).state == JobState.COMPLETED
            log = watched.log.read_bytes()
            until(lambda: not engine.list(all=True))
        shutil.rmtree(root / "jobs", ignore_errors=True)
    assert sorted(numbers(ran)) == list(range(_JOBS))

    chance = random.Random(7)
    cuts = [cut for cut in watched.cuts if cut.synced >= watched.acknowledged]
    assert len(cuts) > 2 * _JOBS
    monkeypatch.setattr(contexts, "boot_id", lambda: "after the cut")
    for number, cut in enumerate(cuts):
        kept = chance.randint(cut.synced, cut.written)
        _is_whole(_after_log_only(root, log, kept, tmp_path / "look"))
        if number % (len(cuts) // 2) == len(cuts) // 4:
            again = _after(root, log, kept, tmp_path / f"root-{number}")
            _goes_on(again, cut, ran)


def _after_log_only(root: Path, log: bytes, kept: int, target: Path) -> Path:
    """Make the store alone as it is after a power cut."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    shutil.copy(root / "hutch.db", target)
    (target / "hutch.db-wal").write_bytes(log[:kept])
    return target


def _is_whole(root: Path) -> None:
    """Every job is there, in one place."""
    connection = sqlite3.connect(root / "hutch.db")
    rows = connection.execute(
        "SELECT key FROM records WHERE tbl IN (?, ?, ?)", (WAITING, ACTIVE, DONE)
    ).fetchall()
    connection.close()
    assert sorted(int(key) for (key,) in rows) == list(range(1, _JOBS + 1))


def _goes_on(root: Path, cut: Cut, ran: Path) -> None:
    """The next dispatcher brings every job to an end; what had run does not run again."""
    ran.unlink(missing_ok=True)
    with Engine(root) as engine:
        with engine.jobs.dispatching():
            until(lambda: not engine.jobs.list())
        records = engine.jobs.list(all=True)
        cancel_all(engine)
        engine.reconcile()
        engine._context.networks.teardown()
    runs = [*cut.ran, *numbers(ran)]
    assert [r.index for r in records] == list(range(_JOBS))
    for record in records:
        assert record.state in (JobState.COMPLETED, JobState.UNKNOWN), record
        times = runs.count(record.index)
        assert times <= 1, f"{record.index} ran {times} times: {record}"
        assert times == 1 or record.state == JobState.UNKNOWN, record
