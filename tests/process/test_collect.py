"""A program that is given up has not written in vain: the error has its output."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from hutch.engine.session import collect
from hutch.errors import Exhausted, OperationTimeout
from hutch.process import frames as fr
from hutch.process import supervisor as supervising
from hutch.process.supervisor import Supervisor

WRITTEN = fr.encode_frame(fr.OUTPUT, b"early\n", flag=1) + fr.encode_frame(fr.OUTPUT, b"oh", flag=2)


@pytest.fixture
def speaker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    """A supervisor whose program has written something and does not end; it takes no orders."""
    monkeypatch.setattr(supervising, "_ANSWER_S", 0.1)
    ours, theirs = socket.socketpair()
    with theirs, Supervisor(ours) as supervisor:
        theirs.sendall(WRITTEN)
        theirs.shutdown(socket.SHUT_RD)
        yield supervisor


def test_what_was_written_before_the_time_was_up_is_in_the_error(speaker: Supervisor) -> None:
    with pytest.raises(OperationTimeout, match=r"did not end within 0\.1 s") as caught:
        collect(speaker, input=None, timeout_s=0.1, limit=100, identifier="x")
    assert (caught.value.stdout, caught.value.stderr) == (b"early\n", b"oh")


def test_what_was_written_up_to_the_limit_is_in_the_error(speaker: Supervisor) -> None:
    with pytest.raises(Exhausted, match="more than 4 bytes") as caught:
        collect(speaker, input=None, timeout_s=None, limit=4, identifier="x")
    assert (caught.value.stdout, caught.value.stderr[:2]) in ((b"earl", b"oh"), (b"earl", b""))
