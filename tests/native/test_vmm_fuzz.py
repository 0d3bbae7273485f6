"""A guest that sends anything at all: the monitor goes on or ends the machine, and no more."""

from __future__ import annotations

import signal
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hutch.process import frames as fr
from tests.fuzzing import thorough
from tests.native.machines import WAIT_S, Frame, Machine, Machines
from tests.requires import requires

pytestmark = [requires("root", "cc"), pytest.mark.integration]

fuzzed = thorough(
    settings(
        max_examples=25,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
)

FRAMES = st.builds(
    Frame,
    channel=st.sampled_from([0, 1, 2, 3, 600, 2**32 - 1]),
    type=st.integers(0, 8),
    flag=st.sampled_from([0, 0, 0, 1, 255]),
    payload=st.one_of(
        st.sampled_from([b"", bytes(4), b"\xff" * 4, bytes(24), bytes(32 << 10)]),
        st.binary(max_size=80),
    ),
)
RULES = st.lists(FRAMES, max_size=12)
SUPERVISOR = st.lists(
    st.one_of(
        st.builds(
            fr.encode_frame,
            kind=st.sampled_from([*range(63, 78), 0, 255]),
            payload=st.binary(max_size=600),
            flag=st.sampled_from([0, 1, 2, 3, 255]),
        ),
        st.builds(
            struct.pack,
            st.just("<BBHI"),
            st.integers(60, 80),
            st.integers(0, 3),
            st.just(0),
            st.sampled_from([0, 1, 600, 64 << 10, (64 << 10) + 1, 2**31, 2**32 - 1]),
        ),
        st.binary(max_size=40),
    ),
    max_size=10,
)


def survived(machine: Machine) -> None:
    """Ask for the end and see it come: nothing may hang, whatever was sent."""
    try:
        machine.supervisor.shutdown()
    except ProcessLookupError:
        pass
    assert machine.supervisor.wait(WAIT_S).signal in (0, signal.SIGKILL)


def send(machine: Machine, data: bytes) -> None:
    try:
        machine.peer.sock.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        pass  # it has had enough


@fuzzed
@given(data=st.binary(max_size=4000))
def test_bytes_before_the_greeting(machines: Machines, data: bytes) -> None:
    with machines.run(volatile=True) as machine:
        send(machine, data)
        machine.boot().exit(0)
        assert machine.supervisor.wait(WAIT_S).code == 0


@fuzzed
@given(frames=RULES)
def test_frames_without_rules(machines: Machines, frames: list[Frame]) -> None:
    with machines.run(volatile=True) as machine:
        machine.boot()
        for frame in frames:
            send(machine, frame.encoded())
        with machine.guest._open(1) as client:
            client.send(b"request")
        survived(machine)


@fuzzed
@given(frames=RULES, tail=st.binary(max_size=30))
def test_answers_to_a_setup_without_rules(
    machines: Machines, frames: list[Frame], tail: bytes
) -> None:
    with machines.run(volatile=True, setup=b"\1\0\0\0\0\0\0\0") as machine:
        machine.peer.welcome()
        for frame in frames:
            send(machine, frame.encoded())
        send(machine, tail)
        survived(machine)


@fuzzed
@given(pieces=SUPERVISOR, started=st.booleans())
def test_a_supervisor_without_rules(machines: Machines, pieces: list[bytes], started: bool) -> None:
    with machines.run(volatile=True) as machine:
        machine.peer.welcome()
        channel = machine.peer.opened(2)
        data = (fr.encode_frame(fr.STARTED, bytes(8)) if started else b"") + b"".join(pieces)
        for at in range(0, len(data), 1000):
            send(machine, Frame(channel, 3, 0, data[at : at + 1000]).encoded())
        survived(machine)
