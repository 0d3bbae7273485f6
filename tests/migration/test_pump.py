"""How fast a stream of QEMU's is carried."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from hutch.migration.pace import Pace
from hutch.migration.pump import Pump


def test_a_pace_lets_the_first_go_and_makes_the_next_wait() -> None:
    now = [100.0]
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    pace = Pace(1000, clock=lambda: now[0], sleep=sleep)
    pace.wait(500)
    assert slept == []
    pace.wait(2000)
    assert slept == pytest.approx([0.5])
    now[0] += 60  # what was not sent for long is not made up for
    pace.wait(1000)
    pace.wait(1)
    assert slept == pytest.approx([0.5, 1.0])


def test_a_bounded_stream_arrives_whole_and_by_small_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts: list[int] = []
    monkeypatch.setattr(Pace, "wait", lambda self, count: counts.append(count))
    local, qemu = socket.socketpair()
    link, there = socket.socketpair()
    sent = bytes(range(256)) * 4096
    with local, qemu, link, there, Pump(local, link, bandwidth=1 << 20) as pump:

        def write() -> None:
            qemu.sendall(sent)
            qemu.close()

        writer = threading.Thread(target=write)
        writer.start()
        arrived = bytearray()
        while piece := there.recv(1 << 16):
            arrived += piece
        writer.join()
        assert arrived == sent
        assert pump.sent == sum(counts) == len(sent)
        assert max(counts) <= (1 << 20) // 20


def test_a_stream_that_waits_for_its_turn_can_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    local, qemu = socket.socketpair()
    link, there = socket.socketpair()
    with local, qemu, link, there:
        pump = Pump(local, link, bandwidth=1)  # a page would take over an hour
        # Who waits is woken before the ends are shut down: nothing may go in between.
        close = pump._closed.set

        def close_slowly() -> None:
            close()
            time.sleep(0.2)

        monkeypatch.setattr(pump._closed, "set", close_slowly)
        with pump:
            qemu.sendall(bytes(8192))
            assert there.recv(8192) == bytes(4096)
        assert there.recv(8192) == b""
        assert pump.sent == 4096
