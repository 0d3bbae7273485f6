"""What an instance has said, sent while it goes on to say more."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hutch.engine.migrate_send import Sender
from hutch.errors import Busy
from hutch.migration.messages import Stream


class Copied(Sender):
    """A sender whose streams end up in `there`, as `take_tail` has it."""

    def __init__(self, directory: Path) -> None:
        context: Any = SimpleNamespace(directory=lambda _: directory)
        record: Any = SimpleNamespace(id="box", name="box")
        super().__init__(context, cast(Any, None), record, progress=lambda _: None)
        self.there: dict[str, bytes] = {}

    def _stream(self, head: Stream, pieces: Iterator[bytes]) -> None:
        assert head.kind == "tail"
        self.there[head.name] = self.there.get(head.name, b"")[: head.size] + b"".join(pieces)


def record(second: int, text: str) -> bytes:
    return b"%d o %s\n" % (1_700_000_000_000_000_000 + second, text.encode())


@pytest.mark.parametrize("rotated", [False, True], ids=["grown", "rotated"])
def test_a_log_comes_whole_whatever_becomes_of_it_meanwhile(tmp_path: Path, rotated: bool) -> None:
    log = tmp_path / "log"
    log.write_bytes(record(1, "first") + record(2, "second"))
    sender = Copied(tmp_path)
    sender.send_logs()
    if rotated:
        # In place: a new file may get the inode of the one that was removed for it.
        log.write_bytes(b"".join(record(n, "later") for n in range(3, 9)))
    else:
        log.write_bytes(log.read_bytes() + record(3, "third"))
    sender.send_tails()
    assert sender.there == {"log": log.read_bytes()}


def test_a_supervisor_that_cannot_be_asked_is_not_taken_for_one_that_has_ended(
    tmp_path: Path,
) -> None:
    (tmp_path / "run").mkdir()
    sender = Copied(tmp_path)
    with socket.socket(socket.AF_UNIX) as supervisor:
        # A short name: a socket's path has room for 107 bytes only.
        handle = os.open(tmp_path / "run", os.O_PATH)
        supervisor.bind(f"/proc/self/fd/{handle}/ctl.sock")
        os.close(handle)
        supervisor.listen()

        def turn_away() -> None:
            with supervisor.accept()[0]:
                pass

        full = threading.Thread(target=turn_away)
        full.start()
        with pytest.raises(Busy, match="clients"):
            sender.send_tails()
        full.join()
    sender.send_tails()  # it has ended now
