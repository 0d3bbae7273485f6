"""Any process of the three may be killed at any time: nothing is left and nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from hutch.errors import OutcomeUnknown
from hutch.plan import flags, ops, wire
from hutch.process import (
    Launcher,
    Supervisor,
    is_alive,
    is_supervised,
    read_exit,
    read_log,
    read_pid,
)
from tests.native.boxes import NAMESPACES, WAIT_S, Runner, box, exists, shell, wait_until
from tests.requires import requires

pytestmark = [requires("root", "busybox", "cc"), pytest.mark.integration]

STARTER = """
import sys
from hutch.process import Launcher
with Launcher(sys.argv[1]) as launcher:
    supervisor = launcher.start(open(sys.argv[2], "rb").read())
    supervisor.wait_pid(20)
    if sys.argv[3] == "sync":
        supervisor.wait_sync(1, 20)
    else:
        supervisor.wait_started(20)
    print(supervisor.pid, supervisor.supervisor_pid, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def launcher_file(static_launcher: Launcher) -> str:
    return str(Path(__file__).parents[2] / "native" / "build" / "hutch-launcher")


def start_and_kill_starter(
    launcher: str, plan: ops.Plan, at: str, tmp_path: Path, *, stop: bool = False
) -> list[int]:
    """Start `plan` from a process that is killed when the launch has come to `at`; with
    `stop` the supervisor stands still when that happens."""
    file = tmp_path / "plan"
    file.write_bytes(wire.encode(plan))
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, launcher, str(file), at],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert starter.stdout is not None and starter.stdin is not None
    pids = [int(word) for word in starter.stdout.readline().split()]
    if stop:
        os.kill(pids[1], signal.SIGSTOP)
    starter.kill()
    starter.wait()
    starter.stdout.close()
    starter.stdin.close()
    assert len(pids) == 2
    return pids


def test_a_starter_killed_in_sync_takes_the_launch_with_it(
    launcher_file: str, rootfs: Path, held: ops.Supervision, tmp_path: Path
) -> None:
    plan = box(rootfs, ["true"], held=held, before_pivot=[ops.Sync(number=1)])
    pids = start_and_kill_starter(launcher_file, plan, "sync", tmp_path)
    wait_until(lambda: not any(map(exists, pids)), "the launch to be undone")
    assert {p.name for p in Path(held.directory).iterdir()} == {"log"}


def test_a_process_that_may_linger_outlives_its_starter(
    launcher_file: str, rootfs: Path, held: ops.Supervision, tmp_path: Path
) -> None:
    script = "while [ ! -e /go ]; do sleep 0.01; done; echo alone; exit 8"
    start_and_kill_starter(launcher_file, shell(rootfs, script, held=held), "started", tmp_path)
    assert is_alive(held.directory) and is_supervised(held.directory)
    (rootfs / "go").touch()
    wait_until(lambda: read_exit(held.directory), "the exit to be recorded")
    status = read_exit(held.directory)
    assert status is not None and status.code == 8
    assert [r.data for r in read_log(held.log_path)] == [b"alone\n"]
    assert not is_alive(held.directory)
    wait_until(lambda: not is_supervised(held.directory), "the supervisor to leave")


def test_a_process_that_may_not_linger_dies_with_its_starter(
    launcher_file: str, rootfs: Path, tmp_path: Path
) -> None:
    plan = box(rootfs, ["sleep", "100"], held=ops.Supervision(linger=False))
    pids = start_and_kill_starter(launcher_file, plan, "started", tmp_path)
    wait_until(lambda: not any(map(exists, pids)), "the process to be killed")


def test_closing_before_the_start_abandons_the_launch(
    runner: Runner, rootfs: Path, held: ops.Supervision
) -> None:
    plan = box(rootfs, ["sleep", "100"], held=held, before_pivot=[ops.Sync(number=1)])
    with runner.start(plan) as supervisor:
        pid = supervisor.wait_pid(WAIT_S)
        supervisor.wait_sync(1, WAIT_S)
    wait_until(lambda: not exists(pid), "the child to be killed")
    wait_until(lambda: not (Path(held.directory) / "ctl.sock").exists(), "the socket to go")


@pytest.mark.parametrize(
    ("uid", "clone_flags", "init"),
    [
        (0, NAMESPACES, False),
        (1000, NAMESPACES, False),
        (1000, NAMESPACES, True),
        (1000, flags.CLONE_NEWNS, False),
        (1000, flags.CLONE_NEWNS, True),
    ],
)
def test_a_killed_supervisor_takes_its_process_with_it(
    runner: Runner, rootfs: Path, held: ops.Supervision, uid: int, clone_flags: int, init: bool
) -> None:
    plan = box(
        rootfs,
        ["sleep", "100"],
        held=held,
        clone_flags=clone_flags,
        init=init,
        after_pivot=[
            ops.Capabilities(bounding=0, permitted=0, effective=0, inheritable=0, ambient=0),
            ops.User(uid=uid, gid=uid),
            ops.NoNewPrivs(),
        ],
    )
    with runner.start(plan) as supervisor:
        supervisor.wait_started(WAIT_S)
        assert supervisor.supervisor_pid is not None and supervisor.pid is not None
        os.kill(supervisor.supervisor_pid, signal.SIGKILL)
        with pytest.raises(OutcomeUnknown):
            supervisor.wait(WAIT_S)
        wait_until(lambda: not exists(supervisor.pid or 0), "the process to die")
    assert not is_alive(held.directory)
    assert read_exit(held.directory) is None


def test_a_supervisor_killed_in_the_launch_leaves_no_process(runner: Runner, rootfs: Path) -> None:
    plan = box(rootfs, ["sleep", "100"], before_pivot=[ops.Sync(number=1)])
    with runner.start(plan) as supervisor:
        pid = supervisor.wait_pid(WAIT_S)
        supervisor.wait_sync(1, WAIT_S)
        os.kill(supervisor.supervisor_pid or 0, signal.SIGKILL)
        wait_until(lambda: not exists(pid), "the child to die")


def test_a_child_killed_in_the_launch_fails_it(runner: Runner, rootfs: Path) -> None:
    from hutch.process import LaunchFailed

    plan = box(rootfs, ["sleep", "100"], before_pivot=[ops.Sync(number=1)])
    with runner.start(plan) as supervisor:
        pid = supervisor.wait_pid(WAIT_S)
        supervisor.wait_sync(1, WAIT_S)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(LaunchFailed, match="ended before exec"):
            supervisor.wait_started(WAIT_S)


def test_a_terminal_outlives_its_starter(
    launcher_file: str, rootfs: Path, held: ops.Supervision, tmp_path: Path
) -> None:
    held = msgspec.structs.replace(held, tty=True, stdin_open=True)
    plan = shell(rootfs, "read x; echo got $x; exit 3", held=held, tty=True)
    start_and_kill_starter(launcher_file, plan, "started", tmp_path)
    with Supervisor.connect(held.directory) as client:
        client.attach(stdin=True)
        client.send_stdin(b"words\r")
        status, out, _ = client.collect(timeout_s=WAIT_S)
    assert status.code == 3
    assert b"got words" in out


def test_the_exit_command_runs_when_nobody_is_told(
    launcher_file: str, rootfs: Path, held: ops.Supervision, tmp_path: Path
) -> None:
    note = tmp_path / "note"
    held = msgspec.structs.replace(held, exit_command=("/bin/busybox", "touch", str(note)))
    script = "while [ ! -e /go ]; do sleep 0.01; done"
    start_and_kill_starter(launcher_file, shell(rootfs, script, held=held), "started", tmp_path)
    assert not note.exists()
    (rootfs / "go").touch()
    wait_until(note.exists, "the exit command")
    assert read_exit(held.directory) is not None


def test_a_starter_that_dies_with_its_process_is_absent(
    launcher_file: str, rootfs: Path, held: ops.Supervision, tmp_path: Path
) -> None:
    """The supervisor learns of both ends at the same moment."""
    note = tmp_path / "note"
    held = msgspec.structs.replace(held, exit_command=("/bin/busybox", "touch", str(note)))
    plan = box(rootfs, ["sleep", "1000"], held=held)
    pid, supervisor = start_and_kill_starter(launcher_file, plan, "started", tmp_path, stop=True)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not exists(pid), "the process to end")
    os.kill(supervisor, signal.SIGCONT)
    wait_until(note.exists, "the exit command")


@pytest.mark.parametrize("always", [False, True])
def test_the_exit_command_is_for_absent_starters(
    runner: Runner, rootfs: Path, held: ops.Supervision, tmp_path: Path, always: bool
) -> None:
    note = tmp_path / "note"
    held = msgspec.structs.replace(
        held, exit_command=("/bin/busybox", "touch", str(note)), exit_command_always=always
    )
    with runner.start(box(rootfs, ["true"], held=held)) as supervisor:
        supervisor.wait(WAIT_S)
    wait_until(lambda: not is_supervised(held.directory), "the supervisor to leave")
    if always:
        wait_until(note.exists, "the exit command")
    assert note.exists() == always


def test_the_records_name_the_processes(
    runner: Runner, rootfs: Path, held: ops.Supervision
) -> None:
    with runner.running(box(rootfs, ["sleep", "100"], held=held)) as supervisor:
        record = read_pid(held.directory)
        assert record is not None
        assert (record.pid, record.supervisor) == (supervisor.pid, supervisor.supervisor_pid)
        assert is_alive(held.directory)
        mode = (Path(held.directory) / "ctl.sock").stat().st_mode
        assert mode & 0o777 & ~0o700 == 0
    wait_until(lambda: not is_supervised(held.directory), "the supervisor to leave")
    assert {p.name for p in Path(held.directory).iterdir()} == {"log", "pid", "exit"}


def test_nothing_is_a_zombie(runner: Runner, rootfs: Path) -> None:
    def dead() -> set[str]:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return {child for child in children if not exists(int(child))}

    before = dead()
    with runner.start(box(rootfs, ["true"])) as supervisor:
        supervisor.wait(WAIT_S)
    assert dead() <= before


def test_the_embedding_programs_children_are_left_alone(runner: Runner, rootfs: Path) -> None:
    child = subprocess.Popen(["true"])
    runner.run(box(rootfs, ["true"]))
    assert child.wait() == 0


def test_a_directory_is_free_for_the_next_start_when_the_exit_is_told(
    runner: Runner, rootfs: Path, held: ops.Supervision
) -> None:
    directory = Path(held.directory)
    for _ in range(20):
        with runner.start(box(rootfs, ["true"], held=held)) as supervisor:
            assert supervisor.wait(WAIT_S).code == 0
            assert not (directory / "ctl.sock").exists()
            assert read_exit(held.directory) is not None
            with runner.running(box(rootfs, ["sleep", "100"], held=held)):
                assert read_exit(held.directory) is None
                with Supervisor.connect(held.directory) as client:
                    assert client.query().phase == "running"
