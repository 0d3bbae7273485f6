"""The configuration of a machine's monitor, and what its status frames mean."""

from __future__ import annotations

import _socket
import errno
import struct
from collections.abc import Iterator

import pytest

from hutch.errors import InternalError, InvalidArgument, OperationTimeout, OutcomeUnknown
from hutch.process import LaunchFailed, MachineFailed, MonitorConfig, MonitorLink, encode_config

pytestmark = pytest.mark.unit


def frame(kind: int, payload: bytes = b"", flag: int = 0) -> bytes:
    return struct.pack("<BBHI", kind, flag, 0, len(payload)) + payload


@pytest.fixture
def ends() -> Iterator[tuple[MonitorLink, _socket.socket]]:
    link, theirs = MonitorLink.create()
    with link:
        yield link, theirs
    theirs.close()


def test_the_configuration_has_its_documented_shape() -> None:
    config = MonitorConfig(
        argv=("/q", "-a"),
        env=("A=b",),
        qemu_fds=2,
        setup=b"set",
        plan=b"plan",
        boot_timeout_s=1.5,
        shutdown_timeout_s=2,
        volatile=True,
        hold=True,
    )
    assert encode_config(config) == (
        b"HVC1"
        + struct.pack("<IIIIII", 73, 5, 2, 1500, 2000, 0)
        + b"\2\0\0\0\2\0\0\0/q\0\2\0\0\0-a\0"
        + b"\1\0\0\0\3\0\0\0A=b\0"
        + b"\3\0\0\0set\4\0\0\0plan"
    )


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"argv": ()}, "argv"),
        ({"argv": ("a\0b",)}, "NUL"),
        ({"qemu_fds": 65}, "qemu_fds"),
        ({"plan": bytes((4 << 20) + 1)}, "plan"),
        ({"boot_timeout_s": 1e9}, "timeout"),
        ({"shutdown_timeout_s": -1}, "timeout"),
        ({"adopt": True, "plan": bytes(65537)}, "plan"),
        ({"adopt": True, "unacked": 65537}, "unacked"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict[str, object], word: str) -> None:
    with pytest.raises(InvalidArgument, match=word):
        encode_config(MonitorConfig(**{"argv": ("/q",), **change}))  # type: ignore[arg-type]


def test_each_wait_returns_what_was_told(ends: tuple[MonitorLink, _socket.socket]) -> None:
    link, theirs = ends
    told = frame(1, struct.pack("<I", 7)) + frame(2) + frame(3) + frame(4, struct.pack("<Q", 99))
    for byte in told + frame(6, struct.pack("<i", 3)):  # in pieces, as a stream may come
        theirs.send(bytes((byte,)))
    assert link.wait_started(5) == 99
    link.wait_agent(0)
    link.wait_ready(0)
    assert link.wait_qemu(0) == 7
    theirs.close()
    with pytest.raises(OutcomeUnknown):
        link._until(lambda: None, 5, "more")
    assert link.exit_code == 3


def test_a_failure_ends_every_wait_that_is_not_over(
    ends: tuple[MonitorLink, _socket.socket],
) -> None:
    link, theirs = ends
    theirs.send(frame(1, struct.pack("<I", 7)))
    theirs.send(frame(5, struct.pack("<III", 0, 2, errno.ENOENT) + b"/dev/vda", flag=3))
    with pytest.raises(MachineFailed) as failed:
        link.wait_agent(5)
    assert str(failed.value) == "machine: setup[2]: /dev/vda: no such file or directory"
    assert link.wait_qemu(5) == 7


def test_a_failed_launch_is_told_as_the_launcher_tells_it(
    ends: tuple[MonitorLink, _socket.socket],
) -> None:
    link, theirs = ends
    theirs.send(frame(5, struct.pack("<III", 3, 9, errno.EPERM) + b"/proc", flag=4))
    with pytest.raises(LaunchFailed) as failed:
        link.wait_started(5)
    assert (failed.value.section, failed.value.index, failed.value.detail) == ("child", 9, "/proc")


def test_silence_and_an_early_end_are_told_apart(
    ends: tuple[MonitorLink, _socket.socket],
) -> None:
    link, theirs = ends
    with pytest.raises(OperationTimeout):
        link.wait_agent(0)
    theirs.close()
    with pytest.raises(OutcomeUnknown, match="the agent's answer"):
        link.wait_agent(5)


@pytest.mark.parametrize(
    "data",
    [frame(9), frame(1), frame(5, b"x"), frame(5, bytes(12), flag=9), b"\1\0\0\0\0\0\1\0"],
)
def test_a_malformed_frame_is_our_own_error(
    ends: tuple[MonitorLink, _socket.socket], data: bytes
) -> None:
    link, theirs = ends
    theirs.send(data)
    with pytest.raises(InternalError):
        link.wait_agent(5)


def test_go_is_one_frame(ends: tuple[MonitorLink, _socket.socket]) -> None:
    link, theirs = ends
    link.go()
    assert theirs.recv(100) == frame(1)
    link.go(unacked=7)
    assert theirs.recv(100) == frame(1, bytes([7, 0, 0, 0]))
