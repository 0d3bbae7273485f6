"""Processes added to a running container, and its health probe."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from hutch.plan import flags, ops, wire
from hutch.process import Supervisor, read_health
from tests.native.boxes import ENV, NAMESPACES, WAIT_S, Runner, box, exists, shell, wait_until
from tests.requires import requires

pytestmark = [requires("root", "busybox", "cc"), pytest.mark.integration]


def exec_plan(
    script: str, *, held: ops.Supervision | None = None, tty: bool = False, early: bool = False
) -> ops.Plan:
    """Return the plan of a shell in the container whose pidfd is slot 0."""
    joined: tuple[ops.AnyOp, ...] = (ops.Setns(slot=0, nstype=NAMESPACES), ops.Fork())
    prepare: tuple[ops.AnyOp, ...] = ()
    if early:  # the PID namespace joined before the clone: one process less
        prepare = (ops.Setns(slot=0, nstype=flags.CLONE_NEWPID),)
        joined = (ops.Setns(slot=0, nstype=NAMESPACES & ~flags.CLONE_NEWPID),)
    return ops.Plan(
        prepare=prepare,
        child=(
            *joined,
            ops.SetsidTty(tty=tty, rows=10, columns=20),
            ops.Chdir(path="/tmp"),
            ops.Exec(argv=("sh", "-c", script), env=ENV),
        ),
        slots=1,
        supervision=held or ops.Supervision(linger=False),
    )


@contextmanager
def pidfd_of(supervisor: Supervisor) -> Iterator[int]:
    assert supervisor.pid is not None
    fd = os.pidfd_open(supervisor.pid)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def target(runner: Runner, rootfs: Path) -> Iterator[tuple[Supervisor, int]]:
    plan = box(rootfs, ["sleep", "1000"], before_pivot=[ops.Hostname(name="inside")])
    with runner.running(plan) as supervisor, pidfd_of(supervisor) as pidfd:
        yield supervisor, pidfd


@pytest.mark.parametrize("early", [False, True])
def test_an_exec_runs_inside(runner: Runner, target: tuple[Supervisor, int], early: bool) -> None:
    script = (
        "hostname; pwd; ps -o comm | tail -n +2 | sort | tr '\\n' ' '; echo; echo $PPID; exit 5"
    )
    status, out, err = runner.run(exec_plan(script, early=early), [target[1]])
    assert (status.code, err) == (5, b"")
    lines = out.splitlines()
    assert lines[:2] == [b"inside", b"/tmp"]
    assert b"sleep" in lines[2]
    assert lines[3] == b"0"  # its parent is outside


def test_an_exec_has_a_terminal(runner: Runner, target: tuple[Supervisor, int]) -> None:
    held = ops.Supervision(tty=True, linger=False)
    status, out, _ = runner.run(exec_plan("tty; stty size", held=held, tty=True), [target[1]])
    assert (status.code, out.splitlines()) == (0, [b"/dev/pts/0", b"10 20"])


def test_an_exec_follows_the_process_that_fork_made(
    runner: Runner, target: tuple[Supervisor, int]
) -> None:
    with runner.start(exec_plan("exec sleep 100"), [target[1]]) as supervisor:
        supervisor.wait_started(WAIT_S)
        assert supervisor.pid is not None
        # Started means that execve(2) closed the report pipe; the kernel fills in the new
        # command line a little later, and reads as empty until then.
        cmdline = Path(f"/proc/{supervisor.pid}/cmdline")
        wait_until(lambda: b"sleep" in cmdline.read_bytes(), "the program to be sleep")
        supervisor.signal(signal.SIGKILL)
        assert supervisor.wait(WAIT_S).signal == signal.SIGKILL


def test_an_exec_dies_with_its_starter(runner: Runner, target: tuple[Supervisor, int]) -> None:
    with runner.start(exec_plan("exec sleep 100"), [target[1]]) as supervisor:
        supervisor.wait_started(WAIT_S)
        pid = supervisor.pid
    assert pid is not None
    wait_until(lambda: not exists(pid), "the process to be killed")


def test_an_exec_ends_with_its_container(runner: Runner, rootfs: Path) -> None:
    with (
        runner.running(box(rootfs, ["sleep", "1000"])) as container,
        pidfd_of(container) as pidfd,
        runner.start(exec_plan("exec sleep 100"), [pidfd]) as supervisor,
    ):
        supervisor.wait_started(WAIT_S)
        container.shutdown()
        assert supervisor.wait(WAIT_S).signal == signal.SIGKILL


def test_a_daemon_left_by_an_exec_does_not_delay_its_exit(
    runner: Runner, target: tuple[Supervisor, int]
) -> None:
    status, out, _ = runner.run(exec_plan("sleep 500 & echo started"), [target[1]])
    assert (status.code, out) == (0, b"started\n")


def test_an_exec_has_only_its_own_descriptors(
    runner: Runner, target: tuple[Supervisor, int]
) -> None:
    with runner.start(exec_plan("exec sleep 100"), [target[1]]) as supervisor:
        supervisor.wait_started(WAIT_S)
        assert sorted(os.listdir(f"/proc/{supervisor.pid}/fd")) == ["0", "1", "2"]


def test_many_execs_at_once(runner: Runner, target: tuple[Supervisor, int]) -> None:
    started = [runner.start(exec_plan(f"echo {n}; exit {n}"), [target[1]]) for n in range(48)]
    for number, supervisor in enumerate(started):
        with supervisor:
            status, out, _ = supervisor.collect(timeout_s=60)
            assert (status.code, out) == (number, b"%d\n" % number)


# ---- health ---------------------------------------------------------------------------


def probe(script: str, **changes: object) -> ops.HealthProbe:
    values: dict[str, object] = {
        "plan": wire.encode(exec_plan(script)),
        "interval_s": 0.02,
        "timeout_s": 5.0,
        "retries": 2,
        "start_period_s": 0.0,
    }
    return ops.HealthProbe(**(values | changes))  # type: ignore[arg-type]


def wait_health(held: ops.Supervision, status: str) -> dict[str, object]:
    seen: dict[str, object] = {}

    def is_there() -> bool:
        seen.update(read_health(held.directory) or {})
        return seen.get("status") == status

    wait_until(is_there, f"the health to be {status}: {seen}")
    return seen


def test_health_follows_the_probe(runner: Runner, rootfs: Path, held: ops.Supervision) -> None:
    check = probe('printf "caf\\303\\251 \\377"; [ ! -e /sick ] || exit 3')
    held = msgspec.structs.replace(held, health=check)
    with runner.running(box(rootfs, ["sleep", "1000"], held=held)):
        good = wait_health(held, "healthy")
        entries = good["log"]
        assert isinstance(entries, list)
        assert entries[-1]["exit_code"] == 0
        assert entries[-1]["output"] == "café \ufffd"
        (rootfs / "sick").touch()
        bad = wait_health(held, "unhealthy")
        assert isinstance(bad["failing_streak"], int) and bad["failing_streak"] >= 2
        (rootfs / "sick").unlink()
        wait_health(held, "healthy")

        def five() -> bool:
            record = read_health(held.directory) or {}
            return len(record["log"]) == 5  # type: ignore[arg-type]

        wait_until(five, "five probes kept")


def test_clients_are_told_of_health(runner: Runner, rootfs: Path, held: ops.Supervision) -> None:
    held = msgspec.structs.replace(held, health=probe("exit 1"))
    with runner.running(box(rootfs, ["sleep", "1000"], held=held)) as supervisor:
        while supervisor.health is None:
            assert supervisor.next_event(WAIT_S) is not None
        assert supervisor.health == "unhealthy"


def test_a_probe_that_hangs_is_killed(runner: Runner, rootfs: Path, held: ops.Supervision) -> None:
    held = msgspec.structs.replace(
        held, health=probe("echo $$ >/probe; exec sleep 1000", timeout_s=0.3, retries=1)
    )
    with runner.running(box(rootfs, ["sleep", "1000"], held=held)) as supervisor:
        record = wait_health(held, "unhealthy")
        entries = record["log"]
        assert isinstance(entries, list) and entries[0]["exit_code"] == -1
        with pidfd_of(supervisor) as pidfd:
            script = "kill -0 $(cat /probe) 2>/dev/null || echo gone"
            seen: list[bytes] = []

            def gone() -> bool:
                seen.append(runner.run(exec_plan(script), [pidfd])[1])
                return seen[-1] == b"gone\n"

            wait_until(gone, "the probe's end")


def test_failures_in_the_start_period_do_not_count_and_probes_come_at_its_own_interval(
    runner: Runner, rootfs: Path, held: ops.Supervision
) -> None:
    times = {"interval_s": 1000.0, "start_period_s": 1000.0, "start_interval_s": 0.02}
    check = probe("[ -e /ready ] || exit 1", retries=1, **times)
    held = msgspec.structs.replace(held, health=check)
    with runner.running(box(rootfs, ["sleep", "1000"], held=held)):
        wait_until(
            lambda: len((read_health(held.directory) or {}).get("log", [])) >= 3,  # type: ignore[arg-type]
            "three probes",
        )
        record = read_health(held.directory) or {}
        assert (record["status"], record["failing_streak"]) == ("starting", 0)
        (rootfs / "ready").touch()
        wait_health(held, "healthy")


def test_a_running_probe_does_not_outlive_its_container(
    runner: Runner, rootfs: Path, held: ops.Supervision
) -> None:
    held = msgspec.structs.replace(held, health=probe("sleep 1000", timeout_s=1000.0))
    with runner.running(shell(rootfs, "sleep 1000", held=held)) as supervisor:
        wait_until(
            lambda: (
                len(Path(f"/proc/{supervisor.pid}/status").read_text()) and _members(supervisor) > 1
            ),
            "the probe to run",
        )


def _members(supervisor: Supervisor) -> int:
    """Count the processes of the container's PID namespace."""
    own = os.readlink(f"/proc/{supervisor.pid}/ns/pid")
    count = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                count += os.readlink(entry / "ns/pid") == own
            except OSError:
                continue
    return count
