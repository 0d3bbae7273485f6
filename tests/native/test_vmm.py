"""The monitor of a virtual machine: starts, stdio, signals and ends."""

from __future__ import annotations

import errno
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.errors import OutcomeUnknown
from hutch.process import LaunchFailed, MachineFailed, Output
from hutch.process import frames as fr
from tests.native.boxes import exists, read_until, wait_until
from tests.native.machines import CALL, CLOSE, COLLECT, PLAN, WAIT_S, Machine, Machines, Process
from tests.requires import requires

pytestmark = [requires("root", "cc"), pytest.mark.integration]

SETUP = struct.pack("<II", 1, 0)


def test_a_start_is_told_stage_by_stage(machines: Machines) -> None:
    with machines.run(setup=SETUP) as machine:
        assert machine.link.wait_qemu(WAIT_S) == 2
        machine.peer.welcome()
        machine.link.wait_agent(WAIT_S)
        channel = machine.peer.opened(CALL)
        assert machine.peer.to_eof(channel) == SETUP
        machine.peer.answer(channel)
        machine.link.wait_ready(WAIT_S)
        process = Process(machine.peer, PLAN)
        process.started()
        assert machine.link.wait_started(WAIT_S) > 0


def test_output_and_exit_code_are_the_process_s(machines: Machines) -> None:
    with machines.run(volatile=True) as machine:
        process = machine.boot()
        process.output(b"to stdout\n")
        process.output(b"to stderr\n", 2)
        process.exit(7)
        status, out, err = machine.supervisor.collect(timeout_s=WAIT_S)
        assert (status.code, out, err) == (7, b"to stdout\n", b"to stderr\n")


def test_the_exit_is_told_to_a_starter_that_stayed(machines: Machines) -> None:
    with machines.run(volatile=True) as machine:
        process = machine.boot()
        process.exit(9)
        machine.supervisor.wait(WAIT_S)
        with pytest.raises(OutcomeUnknown):
            machine.link._until(lambda: None, WAIT_S, "its end")
        assert machine.link.exit_code == 9


def test_a_machine_that_stays_is_put_away_first(machines: Machines) -> None:
    with machines.run() as machine:
        machine.boot().exit(3)
        machine.peer.shutdown()
        assert machine.supervisor.wait(WAIT_S).code == 3


def test_an_agent_that_does_not_put_away_is_not_waited_for(machines: Machines) -> None:
    with machines.run(shutdown_timeout_s=0.2) as machine:
        machine.boot().exit(3)
        assert machine.supervisor.wait(WAIT_S).code == 3


def test_a_qemu_that_ignores_sigterm_is_killed(machines: Machines, tmp_path: Path) -> None:
    script = "trap '' TERM; echo ready; while :; do sleep 1000; done"
    with machines.run(qemu=("/bin/sh", "-c", script), shutdown_timeout_s=0.2) as machine:
        process = machine.boot()
        wait_until(lambda: machine.log.read_text() == "ready\n", "the trap")
        process.exit(4)
        assert machine.supervisor.wait(WAIT_S).code == 4


def test_ten_megabytes_reach_a_slow_reader_whole(machines: Machines) -> None:
    data = b"".join(b"%15d\n" % number for number in range(655360))
    with machines.run(volatile=True) as machine:
        process = machine.boot()

        def write() -> None:
            process.output(data)
            process.exit(0)

        writer = threading.Thread(target=write)
        writer.start()
        # Nothing is read until nothing moves: the guest waits for credit.
        wait_until(lambda: process.peer.credit[process.channel] == 0, "a full pipe")
        assert writer.is_alive()
        seen = []
        for item in machine.supervisor.output(WAIT_S):
            assert isinstance(item, Output)
            seen.append(item.data)
        writer.join(WAIT_S)
        assert b"".join(seen) == data
        assert machine.supervisor.wait(WAIT_S).code == 0


def test_input_waits_for_the_process(machines: Machines) -> None:
    data = bytes(range(256)) * 4096
    with machines.run(volatile=True) as machine:
        process = machine.boot()
        sender = threading.Thread(target=lambda: machine.supervisor.send_stdin(data))
        sender.start()
        got = b""
        while len(got) < len(data):
            kind, _, payload = process.frame()
            assert kind == fr.STDIN
            got += payload
            process.tell(fr.ACK, struct.pack("<I", len(payload)))
        sender.join(WAIT_S)
        assert got == data
        machine.supervisor.close_stdin()
        assert process.frame() == (fr.STDIN_EOF, 0, b"")


def test_unread_input_is_bounded(machines: Machines) -> None:
    with machines.run(volatile=True) as machine:
        process = machine.boot()
        machine.supervisor.send_stdin(bytes(64 << 10))
        sender = threading.Thread(target=lambda: machine.supervisor.send_stdin(bytes(64 << 10)))
        sender.start()
        got = 0
        while got < 64 << 10:
            got += len(process.frame()[2])
        assert got == 64 << 10  # the window: no more, whatever else waits
        machine.supervisor.signal(signal.SIGUSR1)
        assert process.frame() == (fr.SIGNAL, 0, struct.pack("<I", signal.SIGUSR1))
        process.exit(0)
        machine.supervisor.wait(WAIT_S)
        sender.join(WAIT_S)


def test_without_stdin_the_process_reads_the_end(machines: Machines) -> None:
    with machines.run(stdin=False, volatile=True) as machine:
        assert machine.boot().frame() == (fr.STDIN_EOF, 0, b"")


@pytest.mark.parametrize(
    "signum",
    [signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE, signal.SIGWINCH, 34, 64],
)
def test_signals_are_forwarded(machines: Machines, signum: int) -> None:
    with machines.run(volatile=True) as machine:
        process = machine.boot()
        machine.supervisor.signal(signum)
        assert process.frame() == (fr.SIGNAL, 0, struct.pack("<I", signum))


def test_a_signal_before_the_start_is_sent_after_it(machines: Machines) -> None:
    with machines.run(volatile=True) as machine:
        machine.link.wait_qemu(WAIT_S)
        machine.supervisor.signal(signal.SIGTERM)
        process = machine.boot()
        assert process.frame() == (fr.SIGNAL, 0, struct.pack("<I", signal.SIGTERM))


def test_the_terminal_is_raw_and_its_size_follows(machines: Machines) -> None:
    with machines.run(tty=True, volatile=True) as machine:
        process = machine.boot()
        assert process.frame() == (fr.RESIZE, 0, struct.pack("<HH", 24, 80))
        machine.supervisor.send_stdin(b"\x03\x04\r")  # no signal, no end, no newline
        assert process.frame() == (fr.STDIN, 0, b"\x03\x04\r")
        process.tell(fr.ACK, struct.pack("<I", 3))
        machine.supervisor.resize(50, 132)
        assert process.frame() == (fr.RESIZE, 0, struct.pack("<HH", 50, 132))
        process.output(b"one\ntwo\r\n")
        assert read_until(machine.supervisor, b"\r\n") == b"one\ntwo\r\n"
        process.exit(0)
        assert machine.supervisor.wait(WAIT_S).code == 0


def qemu_pid(machine: Machine) -> int:
    """Return QEMU's process id as the host counts."""
    monitor = machine.supervisor.wait_pid(WAIT_S)
    children = Path(f"/proc/{monitor}/task/{monitor}/children")
    wait_until(children.read_text, "QEMU")
    return int(children.read_text().split()[0])


def test_killing_the_monitor_ends_qemu(machines: Machines) -> None:
    with machines.run() as machine:
        machine.boot()
        pid = qemu_pid(machine)
        machine.supervisor.shutdown()
        assert machine.supervisor.wait(WAIT_S).signal == signal.SIGKILL
        wait_until(lambda: not exists(pid), "the end of QEMU")


# ---- what goes wrong ------------------------------------------------------------------


def failure(machine: Machine) -> MachineFailed:
    with pytest.raises(MachineFailed) as failed:
        machine.link.wait_started(WAIT_S)
    assert machine.supervisor.wait(WAIT_S).code == 255
    return failed.value


def test_a_missing_qemu_is_named(machines: Machines) -> None:
    with machines.run(qemu=("/absent/qemu",)) as machine:
        failed = failure(machine)
    assert (failed.stage, failed.errno, failed.text) == ("qemu", errno.ENOENT, "/absent/qemu")


@pytest.mark.parametrize("stage", ["agent", "setup", "launch"])
def test_a_qemu_that_ends_early_is_told(machines: Machines, tmp_path: Path, stage: str) -> None:
    gate = tmp_path / "gate"
    script = f"while ! test -e {gate}; do sleep 0.01; done; exit 3"
    with machines.run(qemu=("/bin/sh", "-c", script), setup=SETUP) as machine:
        machine.link.wait_qemu(WAIT_S)
        if stage != "agent":
            machine.peer.welcome()
            channel = machine.peer.opened(CALL)
            if stage == "launch":
                machine.peer.to_eof(channel)
                machine.peer.answer(channel)
                machine.link.wait_ready(WAIT_S)
        gate.touch()
        failed = failure(machine)
    assert (failed.stage, failed.errno) == ("qemu", errno.ECHILD)
    assert failed.text == "qemu ended with status 3"


def test_a_qemu_that_a_signal_ends_is_told(machines: Machines) -> None:
    with machines.run(qemu=("/bin/sh", "-c", "kill -9 $$")) as machine:
        assert failure(machine).text == "qemu was killed by signal 9"


def test_the_end_of_qemu_while_the_process_runs(machines: Machines, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    script = f"while ! test -e {gate}; do sleep 0.01; done; kill -9 $$"
    with machines.run(qemu=("/bin/sh", "-c", script)) as machine:
        machine.boot()
        gate.touch()
        status, _, err = machine.supervisor.collect(timeout_s=WAIT_S)
    assert (status.code, err) == (255, b"hutch-vmm: qemu was killed by signal 9\n")


def test_why_a_machine_was_lost_stands_on_a_line_of_its_own(
    machines: Machines, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    script = f"while ! test -e {gate}; do sleep 0.01; done; printf 'half a line' >&2; kill -9 $$"
    with machines.run(qemu=("/bin/sh", "-c", script)) as machine:
        machine.boot()
        gate.touch()
        assert machine.supervisor.wait(WAIT_S).code == 255
        said = machine.log.read_bytes()
    assert said == b"half a line\nhutch-vmm: qemu was killed by signal 9\n"


@pytest.fixture
def shares() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The server's end of a connection, and the machine's."""
    ends = socket.socketpair()
    yield ends
    for end in ends:
        end.close()


def test_a_machine_that_loses_its_shares_is_put_away(
    machines: Machines, shares: tuple[socket.socket, socket.socket]
) -> None:
    with machines.run(shares=shares[1]) as machine:
        machine.boot()
        shares[0].close()
        machine.peer.shutdown()
        status, _, err = machine.supervisor.collect(timeout_s=WAIT_S)
    said = b"hutch-vmm: the server of the shared directories (virtiofsd) has ended\n"
    assert (status.code, err, machine.log.read_bytes()) == (255, said, said)


def test_a_machine_whose_guest_waits_for_its_shares_ends_too(
    machines: Machines, shares: tuple[socket.socket, socket.socket]
) -> None:
    with machines.run(shares=shares[1], shutdown_timeout_s=0.2) as machine:
        machine.boot()
        shares[0].close()
        assert machine.supervisor.wait(WAIT_S).code == 255


def test_a_machine_that_loses_its_shares_before_it_runs_has_failed(
    machines: Machines, shares: tuple[socket.socket, socket.socket]
) -> None:
    with machines.run(shares=shares[1]) as machine:
        machine.link.wait_qemu(WAIT_S)
        shares[0].close()
        failed = failure(machine)
    assert (failed.stage, failed.errno) == ("qemu", errno.EPIPE)
    assert "virtiofsd" in failed.text


def test_an_agent_that_never_answers_is_given_up(machines: Machines) -> None:
    with machines.run(boot_timeout_s=0.2) as machine:
        failed = failure(machine)
    assert (failed.stage, failed.errno) == ("agent", errno.ETIMEDOUT)


def test_a_setup_that_never_ends_is_given_up(machines: Machines) -> None:
    with machines.run(boot_timeout_s=4, setup=SETUP) as machine:
        machine.peer.welcome()
        failed = failure(machine)
    assert (failed.stage, failed.errno) == ("setup", errno.ETIMEDOUT)


def test_a_launch_that_never_ends_is_given_up(machines: Machines) -> None:
    with machines.run(boot_timeout_s=4) as machine:
        machine.peer.welcome()
        failed = failure(machine)
    assert (failed.stage, failed.errno) == ("agent", errno.ETIMEDOUT)


def test_a_setup_that_fails_names_its_operation(machines: Machines) -> None:
    with machines.run(setup=SETUP) as machine:
        machine.peer.welcome()
        channel = machine.peer.opened(CALL)
        machine.peer.to_eof(channel)
        machine.peer.data(channel, struct.pack("<III", errno.ENODEV, 5, 4) + b"eth0\0")
        machine.peer.close(channel)
        failed = failure(machine)
    assert (failed.stage, failed.index, failed.errno) == ("setup", 5, errno.ENODEV)
    assert failed.message == "machine: setup[5]: eth0: no such device"


def test_a_plan_that_fails_in_the_guest_fails_as_on_the_host(machines: Machines) -> None:
    with machines.run() as machine:
        machine.peer.welcome()
        process = Process(machine.peer, PLAN)
        process.tell(fr.FAILED, struct.pack("<Ii", 2, errno.ENOENT) + b"/bin/absent", 4)
        with pytest.raises(LaunchFailed) as failed:
            machine.link.wait_started(WAIT_S)
        assert machine.supervisor.wait(WAIT_S).code == 255
    assert (failed.value.section, failed.value.index) == ("exec", 2)
    assert (failed.value.errno, failed.value.detail) == (errno.ENOENT, "/bin/absent")


def test_an_agent_that_cannot_spawn_is_told(machines: Machines) -> None:
    with machines.run() as machine:
        machine.peer.welcome()
        machine.peer.close(Process(machine.peer, PLAN).channel, errno.ENOMEM)
        failed = failure(machine)
    assert (failed.stage, failed.errno) == ("agent", errno.ENOMEM)


def test_the_loss_of_the_guest_s_supervisor_ends_the_machine(machines: Machines) -> None:
    with machines.run() as machine:
        machine.peer.close(machine.boot().channel)
        status, _, err = machine.supervisor.collect(timeout_s=WAIT_S)
    assert status.code == 255
    assert err == b"hutch-vmm: the process's supervisor in the guest ended\n"


def test_output_before_the_loss_still_arrives(machines: Machines) -> None:
    with machines.run() as machine:
        process = machine.boot()
        process.output(b"x" * 60000)
        process.peer.send(process.channel, CLOSE, struct.pack("<I", 0))
        status, out, _ = machine.supervisor.collect(timeout_s=WAIT_S)
    assert (status.code, len(out)) == (255, 60000)


@pytest.mark.parametrize("stage", ["qemu", "agent", "ready"])
def test_a_starter_that_leaves_early_abandons_the_machine(machines: Machines, stage: str) -> None:
    with machines.run() as machine:
        pid = qemu_pid(machine)
        if stage == "qemu":
            machine.link.wait_qemu(WAIT_S)
        else:
            machine.peer.welcome()
            machine.link.wait_agent(WAIT_S)
            if stage == "ready":
                machine.link.wait_ready(WAIT_S)
        machine.link.close()
        assert machine.supervisor.wait(WAIT_S).code == 255
        wait_until(lambda: not exists(pid), "the end of QEMU")


def test_a_starter_that_leaves_after_the_start_is_not_missed(machines: Machines) -> None:
    with machines.run(volatile=True) as machine:
        process = machine.boot()
        machine.link.close()
        process.output(b"still here")
        process.exit(0)
        status, out, _ = machine.supervisor.collect(timeout_s=WAIT_S)
    assert (status.code, out) == (0, b"still here")


# ---- templates ------------------------------------------------------------------------


def test_a_held_monitor_greets_when_it_is_told_to(machines: Machines) -> None:
    with machines.run(hold=True, volatile=True) as machine:
        machine.link.wait_qemu(WAIT_S)
        machine.peer.raw(b"what the template's agent had under way")
        machine.link.go()
        assert isinstance(machine.boot(), Process)


def test_a_monitor_without_a_plan_serves_until_it_is_told_to_end(machines: Machines) -> None:
    with machines.run(plan=b"", attach=COLLECT, volatile=True) as machine:
        machine.template()
        machine.link.close()
        machine.supervisor.signal(signal.SIGTERM)
        assert machine.supervisor.wait(WAIT_S).code == 0


def test_a_template_whose_qemu_is_quit_has_ended_well(machines: Machines, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    script = f"while ! test -e {gate}; do sleep 0.01; done"
    with machines.run(qemu=("/bin/sh", "-c", script), plan=b"") as machine:
        machine.template()
        gate.touch()
        assert machine.supervisor.wait(WAIT_S).code == 0


# ---- the configuration ----------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 3, 20, 24, 30, -1])
def test_a_configuration_cut_short_is_refused(machines: Machines, cut: int) -> None:
    from hutch.process import MonitorConfig, encode_config

    whole = encode_config(MonitorConfig(argv=("/bin/true",), plan=PLAN))
    with machines.run(configuration=whole[:cut]) as machine:
        assert failure(machine).stage == "configuration"


def test_a_descriptor_that_is_missing_is_told(machines: Machines) -> None:
    from hutch.process import MonitorConfig, encode_config

    config = encode_config(MonitorConfig(argv=("/bin/true",), qemu_fds=3))
    with machines.run(configuration=config) as machine:
        failed = failure(machine)
    assert (failed.stage, failed.errno) == ("configuration", errno.EBADF)
