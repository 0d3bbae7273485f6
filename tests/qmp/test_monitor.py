"""The monitor against a QEMU that hangs, lies, floods or goes away."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hutch.errors import Busy, HutchError, OperationTimeout, OutcomeUnknown, Unavailable
from hutch.qmp import CommandFailed, Event, Monitor, conversation
from hutch.qmp import machine as machine_commands
from hutch.qmp.messages import (
    ANSWER_MAX,
    EVENT_MAX,
    Answer,
    BadMessage,
    Failure,
    decode_greeting,
    decode_message,
)
from hutch.qmp.monitor import EVENTS_MAX
from tests.qmp.machines import GREETING, OK, Talk, fake_qemu

EVENT = b'{"timestamp": {"seconds": 5, "microseconds": 500000}, "event": "%s", "data": %s}\r\n'


@contextmanager
def monitor_of(after: Talk) -> Iterator[Monitor]:
    """A monitor that has negotiated with a fake which then goes on with `after`."""

    def talk(peer: socket.socket) -> None:
        peer.sendall(GREETING)
        peer.recv(4096)
        peer.sendall(OK % 1)
        after(peer)

    # A copy, so that the monitor may close its own.
    with fake_qemu(talk) as sock, Monitor(sock.dup(), timeout_s=60) as monitor:
        yield monitor


def answering(*lines: bytes) -> Talk:
    """Answer the next command with these lines, then wait for the end."""

    def talk(peer: socket.socket) -> None:
        peer.recv(4096)
        peer.sendall(b"".join(lines))
        peer.recv(4096)

    return talk


def silent(peer: socket.socket) -> None:
    while peer.recv(4096):
        pass


def test_the_version_comes_from_the_greeting() -> None:
    with monitor_of(silent) as monitor:
        assert str(monitor.version) == "7.2.22"
        assert monitor.greeting.capabilities == ("oob",)


def test_an_answer_is_found_among_events_which_are_kept() -> None:
    lines = (EVENT % (b"STOP", b"{}"), b'{"return": {"x": 1}, "id": 2}\r\n')
    with monitor_of(answering(*lines)) as monitor:
        assert monitor.execute("query-x") == {"x": 1}
        assert monitor.wait_event(["STOP"], timeout_s=0).time == 5.5


def test_waiting_for_one_event_leaves_the_others() -> None:
    lines = (EVENT % (b"A", b"{}"), EVENT % (b"B", b'{"n": 1}'), EVENT % (b"B", b'{"n": 2}'))
    with monitor_of(answering(*lines, OK % 2)) as monitor:
        monitor.execute("x")
        found = monitor.wait_event(["B"], timeout_s=0, match=lambda e: e.data["n"] == 2)
        assert found.data == {"n": 2}
        assert [e.name for e in monitor.next_events()] == ["A", "B"]


def test_a_refused_command_says_which_and_why_and_the_monitor_goes_on() -> None:
    refusal = b'{"error": {"class": "DeviceNotFound", "desc": "Device \'x\' not found"}, "id": 2}\n'

    def talk(peer: socket.socket) -> None:
        peer.recv(4096)
        peer.sendall(refusal)
        peer.recv(4096)
        peer.sendall(OK % 3)
        peer.recv(4096)

    with monitor_of(talk) as monitor:
        with pytest.raises(CommandFailed, match="device_del: Device 'x' not found") as caught:
            monitor.execute("device_del", {"id": "x"})
        assert caught.value.kind == "DeviceNotFound"
        assert monitor.execute("next") == {}


def test_a_refusal_without_an_id_is_of_the_command_at_hand() -> None:
    with (
        monitor_of(answering(b'{"error": {"class": "GenericError", "desc": "no"}}\n')) as monitor,
        pytest.raises(CommandFailed, match="no"),
    ):
        monitor.execute("x")


def test_a_late_answer_is_not_taken_for_the_next_command() -> None:
    asked_again = threading.Event()

    def talk(peer: socket.socket) -> None:
        peer.recv(4096)
        assert asked_again.wait(30)
        peer.recv(4096)
        peer.sendall(b'{"return": "late", "id": 2}\n{"return": "right", "id": 3}\n')
        peer.recv(4096)

    with monitor_of(talk) as monitor:
        with pytest.raises(OperationTimeout, match="slow"):
            monitor.execute("slow", timeout_s=0.05)
        asked_again.set()
        assert monitor.execute("quick", timeout_s=60) == "right"


@pytest.mark.parametrize("greeting", [b"", b"hello\n", b"{}\n", b'{"QMP": 1}\n', b"\xff\xfe\n"])
def test_what_is_no_monitor_is_unavailable(greeting: bytes) -> None:
    with fake_qemu(lambda peer: peer.sendall(greeting)) as sock, pytest.raises(Unavailable):
        Monitor(sock.dup())


def test_a_qemu_that_says_nothing_is_given_up() -> None:
    with fake_qemu(silent) as sock, pytest.raises(OperationTimeout):
        Monitor(sock.dup(), timeout_s=0.05)


def test_a_hanging_command_is_given_up() -> None:
    with monitor_of(silent) as monitor, pytest.raises(OperationTimeout, match="query-status"):
        monitor.execute("query-status", timeout_s=0.05)


def test_a_qemu_that_does_not_read_is_given_up() -> None:
    waiting = threading.Event()

    def deaf(peer: socket.socket) -> None:
        waiting.wait(30)

    with monitor_of(deaf) as monitor:
        with pytest.raises(OperationTimeout, match="does not read"):
            monitor.execute("x", {"filler": "y" * (8 << 20)}, timeout_s=0.2)
        waiting.set()


def test_a_lost_connection_leaves_the_outcome_unknown() -> None:
    with monitor_of(lambda peer: peer.recv(4096) and None) as monitor:
        with pytest.raises(OutcomeUnknown, match="quit: connection lost"):
            monitor.execute("quit")
        with pytest.raises(Unavailable, match="closed"):
            monitor.execute("query-status")
        with pytest.raises(Unavailable, match="closed"):
            monitor.wait_event(["STOP"], timeout_s=1)


@pytest.mark.parametrize(
    "line",
    [
        b"garbage\n",
        b"[]\n",
        b"{}\n",
        b'{"return": {}, "id": 77}\n',
        b'{"return": {}}\n',
        b'{"return": {}, "error": {"class": "a", "desc": "b"}, "id": 2}\n',
        b'{"event": 3}\n',
        b'{"return": ' + b"[" * 100_000 + b"]" * 100_000 + b', "id": 2}\n',
        b'{"event": "X", "data": {"x": "' + b"y" * EVENT_MAX + b'"}}\n',
        b"\x00\xff\n",
    ],
)
def test_garbage_ends_the_connection(line: bytes) -> None:
    with monitor_of(answering(line)) as monitor, pytest.raises(OutcomeUnknown) as caught:
        monitor.execute("x", timeout_s=60)
    assert len(caught.value.message) < 1000


def test_an_answer_of_another_shape_ends_the_connection() -> None:
    with (
        monitor_of(answering(b'{"return": [1], "id": 2}\n')) as monitor,
        pytest.raises(OutcomeUnknown),
    ):
        machine_commands.query_status(monitor)


def test_an_answer_without_end_is_cut_off() -> None:
    def talk(peer: socket.socket) -> None:
        peer.recv(4096)
        while True:
            peer.sendall(b"x" * 65536)

    with monitor_of(talk) as monitor, pytest.raises(OutcomeUnknown, match=str(ANSWER_MAX)):
        monitor.execute("x", timeout_s=60)


def flood(peer: socket.socket) -> None:
    while True:
        peer.sendall(EVENT % (b"NOISE", b"{}") * 100)


def test_events_without_end_keep_no_command_waiting_and_fill_no_memory() -> None:
    with monitor_of(flood) as monitor:
        with pytest.raises(OperationTimeout):
            monitor.execute("x", timeout_s=0.2)
        assert len(monitor.next_events()) <= EVENTS_MAX


def test_the_end_of_qemu_is_waited_for() -> None:
    with monitor_of(answering(EVENT % (b"SHUTDOWN", b"{}"), OK % 2)) as monitor:
        monitor.execute("x")
        with pytest.raises(OperationTimeout):
            monitor.wait_closed(timeout_s=0.05)
    with monitor_of(lambda peer: None) as monitor:
        monitor.wait_closed(timeout_s=60)


def test_a_socket_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no such file"):
        Monitor.connect(tmp_path / "qmp.sock")


def test_nobody_listening_is_unavailable(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "qmp.sock"))
    with pytest.raises(Unavailable, match="refused"):
        Monitor.connect(tmp_path / "qmp.sock")


def test_a_full_queue_does_not_block_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as first:
        listening.bind(str(path))
        listening.listen(0)
        first.connect(str(path))
        with pytest.raises(OperationTimeout, match="no connection"):
            Monitor.connect(path, timeout_s=0.05)


def test_a_conversation_keeps_others_out(tmp_path: Path) -> None:
    path = tmp_path / "qmp.sock"

    def serve(listening: socket.socket) -> None:
        peer, _ = listening.accept()
        with peer:
            peer.sendall(GREETING)
            peer.recv(4096)
            peer.sendall(OK % 1)
            peer.recv(4096)

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(1)
        thread = threading.Thread(target=serve, args=[listening])
        thread.start()
        with conversation(path, timeout_s=60), pytest.raises(Busy), conversation(path, wait_s=0):
            pass
        thread.join()


# ---- the decoder ----------------------------------------------------------------------


@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_a_bad_one(line: bytes) -> None:
    try:
        assert isinstance(decode_message(line), Event | Answer | Failure)
    except BadMessage:
        pass
    try:
        decode_greeting(line)
    except BadMessage:
        pass


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
_keys = st.sampled_from(["event", "data", "timestamp", "return", "error", "id", "QMP", "class"])


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(_keys, _json | st.dictionaries(_keys, _json)), st.booleans())
def test_any_json_from_qemu_is_an_error_of_ours_at_worst(body: object, cut: bool) -> None:
    import json

    line = json.dumps(body).encode() + b"\n"

    def talk(peer: socket.socket) -> None:
        peer.recv(4096)
        peer.sendall(line[: len(line) // 2] if cut else line)

    with monitor_of(talk) as monitor:
        try:
            monitor.execute("x", timeout_s=60)
        except HutchError:
            pass
