"""The monitor of a machine without an agent: serial port, power button, screen."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator

import msgspec
import pytest

from hutch.process import MachineFailed
from tests.native.machines import WAIT_S, Machine, Machines
from tests.requires import requires

pytestmark = [requires("root", "cc"), pytest.mark.integration]

# Descriptor 12 is the test's copy of the serial port; 11 is kept from QEMU.
_ENDS = ("/bin/bash", "-c", "[ -e /proc/self/fd/11 ] && echo leaked >&2; read -r _ <&12; exit 0")


@pytest.fixture
def qmp() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of the monitor's connection to QEMU."""
    ours, theirs = socket.socketpair()
    ours.settimeout(WAIT_S)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def no_screen() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


def _commands(sock: socket.socket, count: int) -> list[str]:
    """Return what so many lines for QEMU ask for."""
    data = b""
    while data.count(b"\n") < count:
        data += sock.recv(4096)
    return [msgspec.json.decode(line)["execute"] for line in data.splitlines()]


def _received(machine: Machine, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = machine.peer.sock.recv(1 << 16)
        assert piece
        data += piece
    return data


def test_the_serial_port_is_stdin_and_stdout(
    machines: Machines, qmp: tuple[socket.socket, socket.socket], no_screen: int
) -> None:
    typed = bytes(range(256)) * 512
    with machines.run(screen=no_screen, connection=qmp[1], console=True) as machine:
        machine.link.wait_started(WAIT_S)
        machine.peer.raw(b"login: ")
        out = next(iter(machine.supervisor.output(WAIT_S)))
        assert getattr(out, "data", None) == b"login: "
        machine.supervisor.send_stdin(typed)
        assert _received(machine, len(typed)) == typed


def test_all_that_a_machine_said_before_it_switched_off_is_there(
    machines: Machines, qmp: tuple[socket.socket, socket.socket], no_screen: int
) -> None:
    data = b"".join(b"%15d\n" % number for number in range(4096))
    script = ("/bin/bash", "-c", f"seq -f %15.0f 0 {4095} >&12; exit 0")
    with machines.run(
        qemu=script, screen=no_screen, connection=qmp[1], console=True, qemu_has_agent=True
    ) as machine:
        status, out, _ = machine.supervisor.collect(timeout_s=WAIT_S)
    assert (status.code, out == data) == (0, True)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_to_end_presses_the_power_button(
    machines: Machines, qmp: tuple[socket.socket, socket.socket], no_screen: int, signum: int
) -> None:
    with machines.run(
        qemu=_ENDS, screen=no_screen, connection=qmp[1], console=True, qemu_has_agent=True
    ) as machine:
        machine.link.wait_started(WAIT_S)
        machine.supervisor.signal(signum)
        assert _commands(qmp[0], 2) == ["qmp_capabilities", "system_powerdown"]
        machine.supervisor.send_stdin(b"off\n")
        assert machine.supervisor.wait(WAIT_S).code == 0
    assert machine.log.read_text() == ""


def test_other_signals_do_nothing(
    machines: Machines, qmp: tuple[socket.socket, socket.socket], no_screen: int
) -> None:
    with machines.run(screen=no_screen, connection=qmp[1], console=True) as machine:
        machine.link.wait_started(WAIT_S)
        machine.supervisor.signal(signal.SIGUSR1)
        machine.supervisor.signal(signal.SIGTERM)
        assert _commands(qmp[0], 2) == ["qmp_capabilities", "system_powerdown"]


def test_who_calls_for_the_screen_is_handed_to_qemu(
    machines: Machines, qmp: tuple[socket.socket, socket.socket]
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        machines.run(screen=server.fileno(), connection=qmp[1], console=True) as machine,
    ):
        machine.link.wait_started(WAIT_S)
        with socket.create_connection(server.getsockname()) as client:
            client.settimeout(WAIT_S)
            said, fds = b"", list[int]()
            while said.count(b"\n") < 3:
                data, more, _, _ = socket.recv_fds(qmp[0], 4096, 4)
                said, fds = said + data, fds + more
            names = [msgspec.json.decode(line)["execute"] for line in said.splitlines()]
            assert names == ["qmp_capabilities", "getfd", "add_client"]
            with socket.socket(fileno=fds[0]) as handed:
                handed.sendall(b"RFB")
            assert client.recv(16) == b"RFB"


def test_a_qemu_that_fails_before_go_is_told(
    machines: Machines, qmp: tuple[socket.socket, socket.socket], no_screen: int
) -> None:
    script = ("/bin/sh", "-c", "echo no such disk >&2; exit 1")
    with machines.run(
        qemu=script, screen=no_screen, connection=qmp[1], console=True, hold=True
    ) as machine:
        with pytest.raises(MachineFailed, match="status 1") as caught:
            machine.link.wait_started(WAIT_S)
        assert caught.value.stage == "qemu"
        assert machine.log.read_text() == "no such disk\n"


_EVENT = '{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "%s", "data": {%s}}\r\n'
_STATUS = '{"return": {"status": "%s", "singlestep": false, "running": false}}\r\n'
_NO_ROOM = '"device": "", "nospace": true, "reason": "x", "action": "stop"'


@pytest.mark.parametrize("console", [True, False])
def test_a_machine_without_room_on_the_host_is_told_to_go_on(
    machines: Machines, qmp: tuple[socket.socket, socket.socket], no_screen: int, console: bool
) -> None:
    options: dict[str, object] = {"screen": no_screen, "console": True} if console else {}
    with machines.run(connection=qmp[1], control=not console, **options) as machine:  # type: ignore[arg-type]
        if not console:
            machine.boot()
        machine.link.wait_started(WAIT_S)
        assert _commands(qmp[0], 1) == ["qmp_capabilities"]
        other = _NO_ROOM.replace("true", "false")
        words = _EVENT % ("BLOCK_IO_ERROR", other) + _EVENT % ("STOP", "")
        words += _EVENT % ("BLOCK_IO_ERROR", "x" * 5000) + _EVENT % ("BLOCK_IO_ERROR", _NO_ROOM)
        qmp[0].sendall(words.encode())
        # As it fails again it is told again, and the log has it once.
        for again in (True, True, False):
            assert _commands(qmp[0], 1) == ["query-status"]
            qmp[0].sendall((_STATUS % "io-error").encode())
            assert _commands(qmp[0], 1) == ["cont"]
            qmp[0].sendall((_EVENT % ("BLOCK_IO_ERROR", _NO_ROOM)).encode() * again)


def test_what_stands_still_for_another_reason_is_left_alone(
    machines: Machines, qmp: tuple[socket.socket, socket.socket], no_screen: int
) -> None:
    with machines.run(connection=qmp[1], screen=no_screen, console=True) as machine:
        machine.link.wait_started(WAIT_S)
        assert _commands(qmp[0], 1) == ["qmp_capabilities"]
        for status in (
            "paused",
            "finish-migrate",
        ):  # had it said more than its question, that would come first
            qmp[0].sendall((_EVENT % ("BLOCK_IO_ERROR", _NO_ROOM)).encode())
            assert _commands(qmp[0], 1) == ["query-status"]
            qmp[0].sendall((_STATUS % status).encode())


def test_a_machine_that_was_ended_through_its_monitor_was_saved(
    machines: Machines, qmp: tuple[socket.socket, socket.socket], no_screen: int
) -> None:
    with machines.run(
        qemu=_ENDS, screen=no_screen, connection=qmp[1], console=True, qemu_has_agent=True
    ) as machine:
        machine.link.wait_started(WAIT_S)
        words = '"guest": false, "reason": "host-qmp-quit"'
        qmp[0].sendall((_EVENT % ("SHUTDOWN", words)).encode())
        machine.supervisor.send_stdin(b"off\n")
        assert machine.supervisor.wait(WAIT_S).code == 254
