"""Writers of one process take turns."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from hutch.errors import InternalError, Unavailable
from hutch.store import Store, database


class Count(msgspec.Struct):
    n: int


def test_nothing_that_threads_write_at_once_is_lost(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "s.db")

    def count(_: int) -> None:
        with store.write() as tx:
            before = tx.get("t", "k", Count)
            tx.put("t", "k", Count(before.n + 1 if before else 1))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(count, range(200)))
    with store.read() as tx:
        assert tx.get("t", "k", Count) == Count(200)
    store.close()


def test_who_waits_for_a_turn_that_never_comes_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(tmp_path / "s.db")
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with store.write():
            held.set()
            over.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(60)
        monkeypatch.setattr(database, "_BUSY_TIMEOUT_S", 0.01)
        with pytest.raises(Unavailable, match="has held the store"), store.write():
            raise AssertionError("two write at once")
    finally:
        over.set()
        thread.join()
    with store.write() as tx:  # and the turn has been given back
        tx.put("t", "k", Count(1))
    store.close()


def test_a_write_inside_a_read_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "s.db")
    with store.read() as outer:
        with pytest.raises(InternalError, match="inside a read"), store.write() as tx:
            tx.put("t", "k", Count(1))
        assert outer.get("t", "k", Count) is None  # it goes on
    with store.write() as outer, store.read(), store.write() as tx:
        tx.put("t", "k", Count(2))
    with store.read() as tx:
        assert tx.get("t", "k", Count) == Count(2)
    store.close()
