"""A machine whose state is saved, and one that goes on under another monitor."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.errors import Busy, WrongState
from hutch.plan import ops, wire
from hutch.process import frames as fr
from tests.native.boxes import read_until
from tests.native.machines import ADOPT, CALL, HELLO, WAIT_S, Machine, Machines
from tests.requires import requires

pytestmark = [requires("root", "cc"), pytest.mark.integration]

COUNT = "i=0; while :; do i=$((i+1)); echo $i; done"


def shell(script: str) -> bytes:
    return wire.encode(
        ops.Plan(
            child=(
                ops.SetsidTty(),
                ops.Exec(argv=("sh", "-c", script), env=("PATH=/usr/bin:/bin",)),
            ),
            supervision=ops.Supervision(linger=False, stdin_open=True),
        )
    )


@pytest.fixture
def agent(static_agent: str, static_launcher_path: str, tmp_path: Path) -> tuple[str, ...]:
    root = tmp_path / "guest"
    (root / "tmp").mkdir(parents=True)
    return (static_agent, "--serve", "11", "--launcher", static_launcher_path, "--root", str(root))


@pytest.fixture
def counter(machines: Machines, agent: tuple[str, ...]) -> Iterator[Machine]:
    """A machine, served by the real agent, whose process counts."""
    with machines.run(qemu=agent, plan=shell(COUNT), qemu_has_agent=True, volatile=True) as machine:
        machine.link.wait_started(WAIT_S)
        yield machine


@pytest.fixture
def monitor() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The client's connection to QEMU, and QEMU's end of it."""
    ours, qemu = socket.socketpair()
    qemu.settimeout(WAIT_S)
    with ours, qemu:
        yield ours, qemu


def test_nothing_of_the_output_is_lost_over_a_stand_still(
    counter: Machine, monitor: tuple[socket.socket, socket.socket]
) -> None:
    output = read_until(counter.supervisor, b"\n1000\n")
    for _ in range(3):
        with counter.guest.quiesce(monitor[0].fileno(), WAIT_S) as quiet:
            assert quiet.unacked == 0
            assert counter.guest.call(2) == b""  # the agent serves on
        output += read_until(counter.supervisor, b"00\n")
    numbers = output.decode().split("\n")[:-1]
    assert numbers == [str(n + 1) for n in range(len(numbers))]


def test_input_that_the_process_did_not_take_is_told(
    machines: Machines, monitor: tuple[socket.socket, socket.socket]
) -> None:
    with machines.run(volatile=True) as machine:
        process = machine.boot()
        machine.supervisor.send_stdin(b"0123456789")
        assert process.frame() == (fr.STDIN, 0, b"0123456789")
        process.tell(fr.ACK, struct.pack("<I", 4))
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(machines.directory / "agent.sock"))
        socket.send_fds(client, [b"HVA1\x80\0\0\0"], [monitor[0].fileno()])
        channel = machine.peer.opened(CALL)
        assert machine.peer.to_eof(channel) == struct.pack("<I", 8)
        machine.peer.answer(channel)
        assert client.recv(8) == struct.pack("<II", 0, 6)
        client.close()


def test_a_dismissed_monitor_is_told_nothing(
    counter: Machine, monitor: tuple[socket.socket, socket.socket]
) -> None:
    ours, qemu = monitor
    with counter.guest.quiesce(ours.fileno(), WAIT_S):
        pass
    ours.close()
    assert qemu.recv(100) == b""


def test_qemu_goes_on_when_the_client_is_killed(
    counter: Machine, monitor: tuple[socket.socket, socket.socket]
) -> None:
    ours, qemu = monitor
    with pytest.raises(KeyboardInterrupt), counter.guest.quiesce(ours.fileno(), WAIT_S):
        ours.close()
        raise KeyboardInterrupt
    told = b""
    while not told.endswith(b'"go-on"}\n'):
        told += qemu.recv(1000)
    assert told[:1] == b"\xff" and b'"migrate_cancel"' in told
    assert told.index(b'"migrate_cancel"') < told.index(b'"cont"')
    qemu.sendall(b'{"return": {}}\r\n{"return": {}, "id": "go')
    qemu.sendall(b'-on"}\r\n')
    assert qemu.recv(100) == b""  # let go, once obeyed
    read_until(counter.supervisor, b"00\n")


def test_two_cannot_save_one_machine_at_once(
    counter: Machine, monitor: tuple[socket.socket, socket.socket]
) -> None:
    fd = monitor[0].fileno()
    with counter.guest.quiesce(fd, WAIT_S), pytest.raises(Busy), counter.guest.quiesce(fd):
        pass
    with counter.guest.quiesce(fd, WAIT_S):
        pass


def test_a_machine_without_a_process_cannot_be_held(
    machines: Machines, agent: tuple[str, ...], monitor: tuple[socket.socket, socket.socket]
) -> None:
    with machines.run(qemu=agent, plan=b"", qemu_has_agent=True) as machine:
        machine.link.wait_ready(WAIT_S)
        with pytest.raises(WrongState), machine.guest.quiesce(monitor[0].fileno()):
            pass


def test_a_machine_that_is_quit_while_it_is_quiet_was_saved(
    machines: Machines, monitor: tuple[socket.socket, socket.socket], tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    script = f"while ! test -e {gate}; do sleep 0.01; done; exit 0"
    with machines.run(qemu=("/bin/sh", "-c", script)) as machine:
        process = machine.boot()
        process.output(b"before")
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(machines.directory / "agent.sock"))
        socket.send_fds(client, [b"HVA1\x80\0\0\0"], [monitor[0].fileno()])
        channel = machine.peer.opened(CALL)
        assert machine.peer.to_eof(channel) == struct.pack("<I", 8)
        machine.peer.answer(channel)
        assert client.recv(8) == bytes(8)
        gate.touch()
        status, out, err = machine.supervisor.collect(timeout_s=WAIT_S)
        client.close()
    assert (status.code, out, err) == (254, b"before", b"")


def test_a_process_is_adopted_with_its_input(machines: Machines) -> None:
    with machines.run(plan=b"", adopt=True, unacked=65530, volatile=True) as machine:
        peer = machine.peer
        hello = peer.expect(HELLO, 0)
        assert hello.flag == 1
        peer.send(0, HELLO, hello.payload[:8] + struct.pack("<IIQ", 1, 512, 123))
        channel = peer.opened(ADOPT)
        assert peer.collected(channel, 8) == fr.encode_frame(fr.QUERY)
        peer.data(channel, fr.encode_frame(fr.STATE, struct.pack("<IiiIQQ", 1, 7, 6, 0, 5, 0)))
        machine.link.wait_started(WAIT_S)
        machine.supervisor.send_stdin(b"0123456789")
        assert peer.collected(channel, 14) == fr.encode_frame(fr.STDIN, b"012345")
        peer.data(channel, fr.encode_frame(fr.ACK, struct.pack("<I", 65530)))
        assert peer.collected(channel, 12) == fr.encode_frame(fr.STDIN, b"6789")
        peer.data(channel, fr.encode_frame(fr.OUTPUT, b"on", 1))
        peer.data(channel, fr.encode_frame(fr.EXIT, struct.pack("<iiQQ", 3, 0, 1, 2)))
        status, out, _ = machine.supervisor.collect(timeout_s=WAIT_S)
    assert (status.code, out) == (3, b"on")


def test_a_process_that_ended_meanwhile_is_adopted_with_its_exit(machines: Machines) -> None:
    with machines.run(plan=b"", adopt=True, volatile=True) as machine:
        peer = machine.peer
        hello = peer.expect(HELLO, 0)
        peer.send(0, HELLO, hello.payload[:8] + struct.pack("<IIQ", 1, 512, 123))
        channel = peer.opened(ADOPT)
        peer.data(channel, fr.encode_frame(fr.OUTPUT, b"last", 2))
        peer.data(channel, fr.encode_frame(fr.EXIT, struct.pack("<iiQQ", 4, 0, 1, 2)))
        status, _, err = machine.supervisor.collect(timeout_s=WAIT_S)
    assert (status.code, err) == (4, b"last")


def test_a_link_that_is_not_there_cannot_be_adopted(machines: Machines) -> None:
    with machines.run(plan=b"", adopt=True) as machine:
        peer = machine.peer
        hello = peer.expect(HELLO, 0)
        peer.send(0, HELLO, hello.payload[:8] + struct.pack("<IIQ", 1, 512, 123))
        channel = peer.opened(ADOPT)
        peer.close(channel, errno.ESRCH)
        status = machine.supervisor.wait(WAIT_S)
    assert status.code == 255
