"""What an instance has said, sent while it goes on to say more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hutch.engine.migrate_send import Sender
from hutch.migration.messages import Stream


class Copied(Sender):
    """A sender whose streams end up in `there`, as `take_tail` has it."""

    def __init__(self, directory: Path) -> None:
        context: Any = SimpleNamespace(directory=lambda _: directory)
        record: Any = SimpleNamespace(id="box")
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
