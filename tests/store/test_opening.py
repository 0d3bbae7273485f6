"""The first use of a root, by several at once."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest

from hutch.store import Store

pytestmark = pytest.mark.unit


def test_who_opens_a_new_root_waits_for_another_who_does(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    other.execute("CREATE TABLE under_way (x)")
    failures: list[Exception] = []

    def begin() -> None:
        try:
            Store.open(path).close()
        except Exception as exc:
            failures.append(exc)

    opener = threading.Thread(target=begin)
    opener.start()
    opener.join(0.2)  # where it does not wait it has failed by now
    other.execute("COMMIT")
    other.close()
    opener.join()
    assert failures == []
