"""Clients of agent.sock: the monitor with the real agent in the place of QEMU."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hutch.errors import OutcomeUnknown, Unavailable
from hutch.plan import guest as asks
from hutch.plan import ops, wire
from hutch.process import Guest, GuestCallFailed, LaunchFailed, Supervisor
from tests.native.boxes import deny_descriptors, read_until, sleeps, wait_until
from tests.native.machines import (
    CALL,
    COLLECT,
    EXEC,
    FILES,
    WAIT_S,
    Machine,
    Machines,
)
from tests.requires import requires

pytestmark = [requires("root", "cc"), pytest.mark.integration]

ENV = ("PATH=/usr/bin:/bin",)


def plan(script: str, *, slots: int = 0, stdin: bool = True) -> ops.Plan:
    """Return the plan of a shell in the guest."""
    return ops.Plan(
        child=(ops.SetsidTty(), ops.Exec(argv=("sh", "-c", script), env=ENV)),
        slots=slots,
        supervision=ops.Supervision(linger=False, stdin_open=stdin),
    )


@pytest.fixture
def agent(static_agent: str, static_launcher_path: str, tmp_path: Path) -> tuple[str, ...]:
    """The command that serves as a guest."""
    root = tmp_path / "guest"
    (root / "tmp").mkdir(parents=True)
    return (static_agent, "--serve", "11", "--launcher", static_launcher_path, "--root", str(root))


@pytest.fixture
def box(machines: Machines, agent: tuple[str, ...]) -> Iterator[Machine]:
    """A machine whose process waits for its input to end."""
    with machines.run(
        qemu=agent, plan=wire.encode(plan("cat; exit 5")), qemu_has_agent=True, volatile=True
    ) as machine:
        machine.link.wait_started(WAIT_S)
        yield machine


def test_the_process_runs_behind_two_supervisors(box: Machine) -> None:
    status, out, err = box.supervisor.collect(b"through both\n" * 10000, timeout_s=WAIT_S)
    assert (status.code, out, err) == (5, b"through both\n" * 10000, b"")


def test_a_signal_reaches_the_process(box: Machine) -> None:
    box.supervisor.signal(signal.SIGTERM)
    assert box.supervisor.wait(WAIT_S).code == 128 + signal.SIGTERM


def test_a_machine_whose_process_is_killed_in_the_guest_ends_as_any(
    machines: Machines, agent: tuple[str, ...]
) -> None:
    stubborn = wire.encode(plan("trap '' TERM; echo deaf; cat; echo gone"))
    with machines.run(qemu=agent, plan=stubborn, qemu_has_agent=True) as machine:
        machine.link.wait_started(WAIT_S)
        machine.guest.end_process()
        assert machine.supervisor.wait(WAIT_S).code == 128 + signal.SIGKILL


def test_a_program_that_is_not_there_fails_as_on_the_host(
    machines: Machines, agent: tuple[str, ...]
) -> None:
    absent = ops.Plan(child=(ops.Exec(argv=("/absent",), env=ENV),))
    with machines.run(qemu=agent, plan=wire.encode(absent), qemu_has_agent=True) as machine:
        with pytest.raises(LaunchFailed) as failed:
            machine.link.wait_started(WAIT_S)
        assert (failed.value.section, failed.value.errno) == ("exec", errno.ENOENT)
        assert machine.supervisor.wait(WAIT_S).code == 255


def test_a_machine_that_stays_is_put_away_by_its_agent(
    machines: Machines, agent: tuple[str, ...]
) -> None:
    with machines.run(qemu=agent, plan=wire.encode(plan("exit 6")), qemu_has_agent=True) as machine:
        assert machine.supervisor.wait(WAIT_S).code == 6


def test_exec_feeds_a_process_and_returns_its_output(box: Machine) -> None:
    with box.guest.exec(plan("cat; echo done >&2; exit 3", slots=1), attach=COLLECT) as process:
        status, out, err = process.collect(b"x" * 300000, timeout_s=WAIT_S)
    assert (status.code, out, err) == (3, b"x" * 300000, b"done\n")


def test_fifty_execs_at_once(box: Machine) -> None:
    with ExitStack() as stack:
        running = [
            stack.enter_context(
                box.guest.exec(plan(f"read line; echo $line; exit {n}", slots=1), attach=COLLECT)
            )
            for n in range(50)
        ]
        for process in running:
            process.wait_started(WAIT_S)
        for n, process in enumerate(running):
            status, out, _ = process.collect(b"to %d\n" % n, timeout_s=WAIT_S)
            assert (status.code, out) == (n, b"to %d\n" % n)


def test_an_exec_whose_client_leaves_is_ended(box: Machine, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    process = box.guest.exec(plan(f"exec sleep 1000 >{fifo}", slots=1))
    with process, open(fifo, "rb") as reader:
        process.wait_started(WAIT_S)
        process.close()
        assert reader.read() == b""  # its only writer has ended


def test_a_client_that_does_not_read_stops_nobody_else(box: Machine) -> None:
    with box.guest.exec(plan("yes", slots=1), attach=COLLECT) as flood:
        flood.wait_started(WAIT_S)
        for _ in range(5):
            with box.guest.exec(plan("echo here", slots=1), attach=COLLECT) as process:
                assert process.collect(timeout_s=WAIT_S)[1] == b"here\n"
        box.supervisor.send_stdin(b"and here\n")
        read_until(box.supervisor, b"and here\n")


def test_an_exec_before_there_is_a_process_is_refused(
    machines: Machines, agent: tuple[str, ...]
) -> None:
    with machines.run(qemu=agent, plan=b"", qemu_has_agent=True, volatile=True) as machine:
        machine.link.wait_ready(WAIT_S)
        refused = machine.guest.exec(plan("true", slots=1))
        with refused, pytest.raises(LaunchFailed) as failed:
            refused.wait_started(WAIT_S)
        assert (failed.value.section, failed.value.errno) == ("supervise", errno.ESRCH)


def test_calls_are_answered_or_refused(box: Machine) -> None:
    assert box.guest.call(asks.Call.PING) == b""
    with pytest.raises(GuestCallFailed) as failed:
        box.guest.call(99)
    assert failed.value.op == 99 and failed.value.errno


def test_files_are_written_and_read(box: Machine, tmp_path: Path) -> None:
    content = os.urandom(1 << 20)
    with box.guest.files() as stream:
        stream.send(asks.encode_files(asks.WriteContent(path=str(tmp_path / "new"), mode=0o600)))
        stream.send(content)
        stream.end()
        assert stream.receive_all()[:4] == bytes(4)
    assert (tmp_path / "new").read_bytes() == content


def test_without_a_machine_there_is_no_agent(tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        Guest(str(tmp_path)).call(asks.Call.PING)


# ---- with the guest's end in our hands --------------------------------------------------


@pytest.mark.parametrize("kind", [CALL, EXEC, FILES])
def test_bytes_and_ends_are_passed_on_unchanged(machines: Machines, kind: int) -> None:
    with machines.run(plan=b"", volatile=True) as machine:
        machine.template()
        with machine.guest._open(kind) as client:
            channel = machine.peer.opened(kind)
            client.send(b"asked")
            assert machine.peer.collected(channel, 5) == b"asked"
            client.end()
            assert machine.peer.to_eof(channel) == b""
            machine.peer.data(channel, b"answered")
            machine.peer.send(channel, 4)
            assert client.receive_all() == b"answered"


def test_what_the_guest_said_before_it_closed_still_arrives(machines: Machines) -> None:
    with machines.run(plan=b"", volatile=True) as machine:
        machine.template()
        with machine.guest._open(FILES) as client:
            client._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            channel = machine.peer.opened(FILES)
            machine.peer.data(channel, b"y" * 65536)
            machine.peer.close(channel)
            assert client.receive_all() == b"y" * 65536


@pytest.mark.parametrize("head", [b"HVA1\2\0\0\0", b"HVA1\5\0\0\0", b"HVA1\1\0\0\1", b"GET / HT"])
def test_a_client_with_another_language_is_dropped(machines: Machines, head: bytes) -> None:
    with machines.run(plan=b"", volatile=True) as machine:
        machine.template()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(machines.directory / "agent.sock"))
            client.sendall(head)
            assert client.recv(1) == b""


def test_more_clients_than_there_is_room_for_wait(machines: Machines) -> None:
    with machines.run(plan=b"", volatile=True) as machine, ExitStack() as stack:
        machine.template()
        clients = [stack.enter_context(machine.guest._open(CALL)) for _ in range(260)]
        channels = [machine.peer.opened(CALL) for _ in range(256)]
        clients[0].close()
        gone = {machine.peer.frame() for _ in range(2)}  # EOF, CLOSE
        assert {frame.channel for frame in gone} == {channels[0]}
        machine.peer.close(channels[0])
        machine.peer.ending.clear()
        assert machine.peer.opened(CALL) not in channels[1:]


def test_a_machine_that_ends_leaves_a_call_without_an_answer(machines: Machines) -> None:
    with machines.run(plan=b"", volatile=True) as machine:
        machine.template()
        failed: list[BaseException] = []

        def call() -> None:
            try:
                machine.guest.call(2)
            except OutcomeUnknown as exc:
                failed.append(exc)

        caller = threading.Thread(target=call)
        caller.start()
        machine.peer.opened(CALL)
        machine.supervisor.shutdown()
        caller.join(WAIT_S)
        assert len(failed) == 1


# ---- a hostile guest --------------------------------------------------------------------


def ended_with(supervisor: Supervisor, problem: bytes) -> None:
    status, _, err = supervisor.collect(timeout_s=WAIT_S)
    assert status.code == 255
    assert problem in err, err


@pytest.mark.parametrize(
    ("kind", "flag", "payload"),
    [
        (69, 3, b"x"),  # output of no stream
        (76, 0, struct.pack("<I", 1)),  # more input taken than given
        (76, 0, b""),
        (71, 0, b"1"),
    ],
)
def test_a_supervisor_that_breaks_the_rules_ends_the_machine(
    machines: Machines, kind: int, flag: int, payload: bytes
) -> None:
    with machines.run() as machine:
        process = machine.boot()
        process.tell(kind, payload, flag)
        ended_with(machine.supervisor, b"supervisor" if kind != 76 or not payload else b"input")


def test_frames_that_mean_nothing_here_are_ignored(machines: Machines) -> None:
    with machines.run(volatile=True) as machine:
        process = machine.boot()
        for kind in (*range(1, 12), 65, 66, 67, 68, 70, 72, 73, 74, 75, 200, 255):
            process.tell(kind, bytes(5000))
        process.exit(1)
        assert machine.supervisor.wait(WAIT_S).code == 1


def test_a_start_before_the_plan_was_sent_is_refused(machines: Machines) -> None:
    with machines.run(plan=bytes(1 << 20)) as machine:
        machine.peer.welcome()
        channel = machine.peer.opened(2)
        machine.peer.data(channel, struct.pack("<BBHIQ", 67, 0, 0, 8, 1))
        with pytest.raises(Exception, match="too early"):
            machine.link.wait_started(WAIT_S)


def test_more_than_the_credit_ends_the_machine(machines: Machines) -> None:
    with machines.run(plan=b"", volatile=True) as machine:
        machine.template()
        with machine.guest._open(CALL):
            channel = machine.peer.opened(CALL)
            for _ in range(20):  # the client takes what fits its socket, and no more
                try:
                    machine.peer.send(channel, 3, bytes(32 << 10))
                except (BrokenPipeError, ConnectionResetError):
                    break
            ended_with(machine.supervisor, b"credit")


def test_a_flood_from_the_guest_starves_nobody(machines: Machines) -> None:
    with machines.run(volatile=True) as machine:
        process = machine.boot()
        stop = threading.Event()
        flood = struct.pack("<IBBHII", process.channel, 6, 0, 0, 4, 0) * 4000

        def run() -> None:
            machine.peer.sock.settimeout(0.2)
            while not stop.is_set():
                try:
                    machine.peer.sock.send(flood[: len(flood) // 16 * 16])
                except (TimeoutError, BrokenPipeError, ConnectionResetError):
                    return

        thread = threading.Thread(target=run)
        thread.start()
        for _ in range(20):
            with machine.guest._open(CALL) as client:
                client.send(b"still served")
        machine.supervisor.shutdown()
        machine.supervisor.wait(WAIT_S)
        stop.set()
        thread.join(WAIT_S)


def test_clients_wait_while_there_is_no_descriptor_for_them(machines: Machines) -> None:
    with machines.run(plan=b"", volatile=True) as machine, ExitStack() as stack:
        machine.template()
        pid = machine.supervisor.wait_pid(WAIT_S)
        limit = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        first = stack.enter_context(machine.guest._open(CALL))
        channel = machine.peer.opened(CALL)
        fds = [int(name) for name in os.listdir(f"/proc/{pid}/fd")]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (max(fds) + 1, limit[1]))
        stack.enter_context(machine.guest._open(CALL))
        machine.peer.data(channel, b"the last")
        machine.peer.close(channel)
        assert first.receive_all() == b"the last"
        machine.peer.opened(CALL)


def test_a_client_is_let_in_when_the_host_has_a_descriptor_again(machines: Machines) -> None:
    with machines.run(plan=b"", volatile=True) as machine, ExitStack() as stack:
        machine.template()
        pid = machine.supervisor.wait_pid(WAIT_S)

        def another() -> None:
            stack.enter_context(machine.guest._open(CALL))
            machine.peer.opened(CALL)

        another()
        limit = deny_descriptors(pid, another)
        before = sleeps(pid)
        stack.enter_context(machine.guest._open(CALL))
        wait_until(lambda: sleeps(pid) > before, "the attempt")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)
        machine.peer.opened(CALL)  # and nobody has left


def test_a_client_gives_one_descriptor_at_most(machines: Machines) -> None:
    with machines.run(plan=b"", volatile=True) as machine, socket.socket(socket.AF_UNIX) as client:
        machine.template()
        pid = machine.supervisor.wait_pid(WAIT_S)
        before = len(os.listdir(f"/proc/{pid}/fd"))
        client.connect(str(machines.directory / "agent.sock"))
        socket.send_fds(client, [b"HVA1\x01\0\0\0"], [0, 1, 2])
        machine.peer.opened(CALL)
        assert len(os.listdir(f"/proc/{pid}/fd")) <= before + 2
