"""A supervisor in a guest may be anybody: what it says is bounded in time and in memory."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hutch.errors import HutchError, IntegrityError, OperationTimeout
from hutch.process import frames as fr
from hutch.process.supervisor import Supervisor
from tests.fuzzing import thorough

SHORT_S = 0.2

fuzzed = thorough(
    settings(
        max_examples=150,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
)

# Frames that mean something, those that do not, and heads that lie about what follows.
FRAMES = st.lists(
    st.one_of(
        st.builds(
            fr.encode_frame,
            kind=st.sampled_from([*range(63, 79), 0, 1, 255]),
            payload=st.one_of(st.binary(max_size=64), st.sampled_from([bytes(8), bytes(24)])),
            flag=st.sampled_from([0, 1, 2, 3, 8, 255]),
        ),
        st.builds(
            struct.pack,
            st.just("<BBHI"),
            st.integers(60, 80),
            st.integers(0, 3),
            st.just(0),
            st.sampled_from([0, 1, 64 << 10, (64 << 10) + 1, 2**31, 2**32 - 1]),
        ),
        st.binary(max_size=40),
    ),
    max_size=30,
)

WAITS: dict[str, Callable[[Supervisor], object]] = {
    "started": lambda s: s.wait_started(SHORT_S),
    "pid": lambda s: s.wait_pid(SHORT_S),
    "exit": lambda s: s.wait(SHORT_S),
    "collect": lambda s: s.collect(b"input", timeout_s=SHORT_S, limit_bytes=1 << 20),
    "output": lambda s: list(s.output(SHORT_S)),
    "event": lambda s: s.next_event(0),
}


@fuzzed
@given(pieces=FRAMES, wait=st.sampled_from(sorted(WAITS)), attach=st.sampled_from([0, 7, 15]))
def test_whatever_it_says_a_wait_ends_in_an_answer_or_an_error_of_ours(
    pieces: list[bytes], wait: str, attach: int
) -> None:
    ours, theirs = socket.socketpair()
    with theirs, Supervisor(ours, attached=attach) as supervisor:
        theirs.sendall(b"".join(pieces))
        theirs.shutdown(socket.SHUT_WR)
        try:
            WAITS[wait](supervisor)
        except (HutchError, OSError):
            pass


@pytest.fixture
def flooded() -> Iterator[Callable[[bytes], Supervisor]]:
    """Makes supervisors that say one thing without end."""
    stop = threading.Event()
    running: list[tuple[threading.Thread, socket.socket, Supervisor]] = []

    def flood(data: bytes) -> Supervisor:
        ours, theirs = socket.socketpair()

        def speak() -> None:
            many = data * max(1, (256 << 10) // len(data))
            try:
                while not stop.is_set():
                    theirs.sendall(many)
            except OSError:
                pass

        thread = threading.Thread(target=speak)
        supervisor = Supervisor(ours)
        running.append((thread, theirs, supervisor))
        thread.start()
        return supervisor

    yield flood
    stop.set()
    for thread, theirs, supervisor in running:
        supervisor.close()
        thread.join()
        theirs.close()


OUTPUT = fr.encode_frame(fr.OUTPUT, b"x" * 1000, flag=1)
NOTHING = fr.encode_frame(fr.OUTPUT, b"", flag=1)
ACKS = fr.encode_frame(fr.ACK, struct.pack("<I", 0))
ANSWERS = fr.encode_frame(fr.OK, b"", flag=fr.SIGNAL)
PIDS = fr.encode_frame(fr.PID, struct.pack("<ii", 1, 2))


@pytest.mark.parametrize("data", [OUTPUT, NOTHING, ACKS, ANSWERS, PIDS], ids=range(5))
def test_a_start_is_not_awaited_for_ever(
    flooded: Callable[[bytes], Supervisor], data: bytes
) -> None:
    with pytest.raises((OperationTimeout, IntegrityError)):
        flooded(data).wait_started(SHORT_S)


@pytest.mark.parametrize("data", [NOTHING, ACKS, ANSWERS, PIDS], ids=range(4))
@pytest.mark.parametrize("wait", ["exit", "collect"])
def test_an_end_that_does_not_come_is_given_up(
    flooded: Callable[[bytes], Supervisor], wait: str, data: bytes
) -> None:
    with pytest.raises((OperationTimeout, IntegrityError)):
        WAITS[wait](flooded(data))


@pytest.mark.parametrize("data", [ANSWERS, PIDS], ids=range(2))
def test_what_nobody_takes_is_not_kept_without_end(
    flooded: Callable[[bytes], Supervisor], data: bytes
) -> None:
    with pytest.raises(IntegrityError, match="without end"):
        flooded(data).wait()
