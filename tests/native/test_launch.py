"""What a launched program sees and what its starter learns: output, exit, environment."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
from pathlib import Path

import pytest

from hutch.plan import flags, ops
from hutch.process import LaunchFailed
from tests.native.boxes import WAIT_S, Runner, box, exists, shell
from tests.requires import requires

pytestmark = [requires("root", "busybox", "cc"), pytest.mark.integration]


def test_output_and_exit_code_come_back(runner: Runner, rootfs: Path) -> None:
    status, out, err = runner.run(shell(rootfs, "echo one; echo two >&2; exit 3"))
    assert (status.code, status.signal, out, err) == (3, 0, b"one\n", b"two\n")


def test_times_of_start_and_exit_are_told(runner: Runner, rootfs: Path) -> None:
    status, _, _ = runner.run(box(rootfs, ["true"]))
    assert 0 < status.started_ns <= status.time_ns


def test_every_byte_of_a_large_output_arrives(runner: Runner, rootfs: Path) -> None:
    data = os.urandom(3 << 20)
    (rootfs / "data").write_bytes(data)
    _, out, _ = runner.run(box(rootfs, ["cat", "/data"]))
    assert hashlib.sha256(out).digest() == hashlib.sha256(data).digest()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1])
def test_a_signal_sent_is_the_signal_reported(
    runner: Runner, rootfs: Path, signum: signal.Signals
) -> None:
    # Without a PID namespace: process 1 of one would not die by a signal it does not handle.
    plan = box(rootfs, ["sleep", "100"], clone_flags=flags.CLONE_NEWNS)
    with runner.start(plan) as supervisor:
        supervisor.wait_started(WAIT_S)
        supervisor.signal(signum)
        status = supervisor.wait(WAIT_S)
    assert (status.code, status.signal) == (128 + signum, signum)


def test_a_signal_to_an_ended_process_is_refused(runner: Runner, rootfs: Path) -> None:
    with runner.start(box(rootfs, ["true"])) as supervisor:
        supervisor.wait(WAIT_S)
        with pytest.raises(ProcessLookupError):
            supervisor.signal(signal.SIGTERM)


@pytest.mark.parametrize("bad", [-1, 65, 4000])
def test_a_signal_number_that_is_none_is_refused(runner: Runner, rootfs: Path, bad: int) -> None:
    with runner.running(box(rootfs, ["sleep", "100"])) as supervisor:
        with pytest.raises(OSError) as error:
            supervisor.signal(bad & 0xFFFFFFFF)
        assert error.value.errno == errno.EINVAL
        supervisor.signal(0)


def test_the_program_has_only_its_own_descriptors(runner: Runner, rootfs: Path) -> None:
    extra = os.open("/", os.O_RDONLY)
    os.set_inheritable(extra, True)  # as a library of the embedding program may
    try:
        with runner.running(box(rootfs, ["sleep", "100"], slots=1), [extra]) as supervisor:
            assert sorted(os.listdir(f"/proc/{supervisor.pid}/fd")) == ["0", "1", "2"]
    finally:
        os.close(extra)


def test_no_signal_is_ignored_or_blocked_that_its_starter_has_so(
    runner: Runner, rootfs: Path
) -> None:
    before = {signum: signal.signal(signum, signal.SIG_IGN) for signum in (signal.SIGUSR1, 35)}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, 36})
    try:
        with runner.running(box(rootfs, ["sleep", "100"])) as supervisor:
            status = Path(f"/proc/{supervisor.pid}/status").read_text().splitlines()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for signum, handler in before.items():
            signal.signal(signum, handler)
    sets = {
        line.split(":")[0]: int(line.split()[1], 16)
        for line in status
        if line[:3] == "Sig" and line[3] != "Q"
    }
    assert sets == {"SigPnd": 0, "SigBlk": 0, "SigIgn": 0, "SigCgt": 0}


def test_stdio_is_pipes_and_dev_null(runner: Runner, rootfs: Path) -> None:
    _, out, _ = runner.run(
        shell(rootfs, "for n in 0 1 2; do readlink /proc/$$/fd/$n; done", held=None)
    )
    stdin, stdout, stderr = out.split()
    assert stdin == b"/dev/null"
    assert stdout.startswith(b"pipe:") and stderr.startswith(b"pipe:")


def test_signals_are_as_at_login(runner: Runner, rootfs: Path) -> None:
    _, out, _ = runner.run(box(rootfs, ["grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"]))
    assert {line.split()[1] for line in out.splitlines()} == {b"0000000000000000"}


def test_the_environment_is_the_plans(runner: Runner, rootfs: Path) -> None:
    _, out, _ = runner.run(box(rootfs, ["env"], env=("PATH=/bin", "A=b c", "EMPTY=")))
    assert sorted(out.splitlines()) == [b"A=b c", b"EMPTY=", b"PATH=/bin"]


@pytest.mark.parametrize(
    ("argv", "errno", "detail"),
    [
        (["nonesuch"], 2, "nonesuch"),
        (["/bin/nonesuch"], 2, "/bin/nonesuch"),
        (["/etc/passwd"], 13, "/etc/passwd"),
        (["/bin"], 13, "/bin"),
        ([""], 2, ""),
    ],
)
def test_a_program_that_cannot_run_is_told_from_a_failed_launch(
    runner: Runner, rootfs: Path, argv: list[str], errno: int, detail: str
) -> None:
    plan = box(rootfs, argv)
    with runner.start(plan) as supervisor, pytest.raises(LaunchFailed) as failure:
        supervisor.wait_started(WAIT_S)
    assert (failure.value.section, failure.value.errno) == ("exec", errno)
    assert failure.value.index == len(plan.child) - 1
    assert failure.value.detail == detail


def test_a_launch_waits_in_sync_for_go(runner: Runner, rootfs: Path) -> None:
    plan = shell(rootfs, "cat /note", before_pivot=[ops.Sync(number=7)])
    with runner.start(plan) as supervisor:
        assert exists(supervisor.wait_pid(WAIT_S))
        supervisor.wait_sync(7, WAIT_S)
        (rootfs / "note").write_text("written in between")
        supervisor.go(7)
        assert supervisor.collect(timeout_s=WAIT_S)[1] == b"written in between"


def test_a_go_that_nobody_waits_for_is_refused(runner: Runner, rootfs: Path) -> None:
    plan = box(rootfs, ["true"], before_pivot=[ops.Sync(number=1)])
    with runner.start(plan) as supervisor:
        supervisor.wait_sync(1, WAIT_S)
        supervisor.go(2)
        supervisor.go(1)
        assert supervisor.wait(WAIT_S).code == 0


def test_an_init_reaps_and_passes_the_status_on(runner: Runner, rootfs: Path) -> None:
    script = "(sleep 0.05 & ) ; sh -c 'kill -9 $$'; cat /proc/1/comm; exit 9"
    status, out, _ = runner.run(shell(rootfs, script, init=True))
    assert (status.code, out) == (9, b"hutch-init\n")


def test_an_init_forwards_signals(runner: Runner, rootfs: Path) -> None:
    script = "trap 'echo got; exit 5' TERM; echo ready; while :; do sleep 0.01; done"
    with runner.start(shell(rootfs, script, init=True)) as supervisor:
        output = supervisor.output(WAIT_S)
        assert next(output)
        supervisor.signal(signal.SIGTERM)
        status, out, _ = supervisor.collect(timeout_s=WAIT_S)
    assert (status.code, out) == (5, b"got\n")


def test_an_init_reports_a_missing_program(runner: Runner, rootfs: Path) -> None:
    with (
        runner.start(box(rootfs, ["nonesuch"], init=True)) as supervisor,
        pytest.raises(LaunchFailed, match="nonesuch"),
    ):
        supervisor.wait_started(WAIT_S)


def test_the_init_of_a_killed_program_reports_the_signal(runner: Runner, rootfs: Path) -> None:
    status, _, _ = runner.run(shell(rootfs, "kill -SEGV $$", init=True))
    assert status.code == 128 + signal.SIGSEGV


def test_many_launches_at_once(runner: Runner, rootfs: Path) -> None:
    started = [runner.start(shell(rootfs, f"echo {n}; exit {n}")) for n in range(64)]
    try:
        for number, supervisor in enumerate(started):
            status, out, _ = supervisor.collect(timeout_s=60)
            assert (status.code, out) == (number, b"%d\n" % number)
    finally:
        for supervisor in started:
            supervisor.close()
