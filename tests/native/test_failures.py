"""Every operation can fail: the failure is named, and nothing of the launch is left."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import msgspec
import pytest

from hutch.drivers.failures import from_oserror
from hutch.errors import Denied
from hutch.plan import flags, ops, wire
from hutch.process import LaunchFailed
from tests.native.boxes import NAMESPACES, WAIT_S, Runner, box, wait_until
from tests.requires import requires

pytestmark = [requires("root", "busybox", "cc"), pytest.mark.integration]

ENOENT, EBADF, EINVAL, ENOTDIR, ENODEV = 2, 9, 22, 20, 19

FAILING: list[tuple[ops.AnyOp, int]] = [
    (ops.CgroupJoin(files=("/nonexistent/tasks",)), ENOENT),
    (ops.Unshare(flags=1), EINVAL),
    (ops.Setns(slot=40, nstype=0), EBADF),
    (ops.Setns(slot=-3, nstype=0), EBADF),
    (ops.Setns(slot=0, nstype=flags.CLONE_NEWNET), EINVAL),
    (ops.Propagation(path="/nonexistent", flags=flags.MS_PRIVATE), ENOENT),
    (ops.Overlay(slot=3, lower=("/nonexistent",)), ENOENT),
    (ops.Overlay(slot=3, lower=("@9",)), EBADF),
    (ops.Overlay(slot=64, lower=("/usr", "/etc")), EBADF),
    (ops.OpenTree(slot=3, path="/nonexistent"), ENOENT),
    (ops.OpenTree(slot=3, source=30), EBADF),
    (ops.OpenTree(slot=3, path="/", userns=31), EBADF),
    (ops.MoveMount(slot=31, target="/x"), EBADF),
    (ops.RootDir(path="/nonexistent"), ENOENT),
    (ops.Mount(fstype="nonesuchfs", target="/x"), ENODEV),
    (ops.Mount(fstype="tmpfs", target="/x", options=("nonesuch=1",)), EINVAL),
    (ops.Mount(fstype="tmpfs", target="/etc/passwd"), ENOTDIR),
    (ops.Remount(target="/nonexistent", attr_set=1), ENOENT),
    (ops.Mkdir(path="/etc/passwd/x"), ENOTDIR),
    (ops.Mknod(path="/etc/passwd/x", mode=0o020666), ENOTDIR),
    (ops.Symlink(target="x", path="/etc/passwd/x"), ENOTDIR),
    (ops.WriteFile(path="/etc", content=b"x"), 21),
    (ops.WriteFile(path="/dev/null", content=b"x"), EINVAL),
    (ops.ReadOnly(paths=("/" + "x" * 300,)), 36),
    (ops.Hostname(name="x" * 100), EINVAL),
    (ops.Sysctl(key="nonesuch/key", value="1"), ENOENT),
    (ops.LinkUp(name="none0"), ENODEV),
    (ops.Netlink(messages=(b"\x14\0\0\0\xff\xff\x05\0" + bytes(12),)), 95),
    (ops.Rlimit(resource=999, soft=1, hard=1), EINVAL),
    (ops.Scheduler(oom_score_adj=5000), EINVAL),
    (ops.Seccomp(program=b"123"), EINVAL),
    (ops.Seccomp(program=bytes(8)), EINVAL),
    (ops.Chdir(path="/nonexistent"), ENOENT),
]


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != "log")


@pytest.mark.parametrize(
    ("failing", "errno"),
    FAILING,
    ids=[f"{type(o).__name__}-{n}" for n, (o, _) in enumerate(FAILING)],
)
def test_a_failing_operation_is_named_and_nothing_stays(
    runner: Runner, rootfs: Path, held: ops.Supervision, failing: ops.AnyOp, errno: int
) -> None:
    file = os.open("/etc/hostname", os.O_RDONLY)
    plan = box(rootfs, ["true"], held=held, before_pivot=[failing], slots=1)
    try:
        failure = runner.failure(plan, [file])
    finally:
        os.close(file)
    assert failure.section == "child"
    assert plan.child[failure.index] is failing
    assert failure.errno == errno
    # Told only after it was undone.
    assert leftovers(Path(held.directory)) == []


@pytest.mark.parametrize(
    "failing", [ops.Overlay(slot=3, lower=("/nonexistent",)), ops.OpenTree(slot=3, path="/none")]
)
def test_a_failing_preparation_is_named(
    runner: Runner, rootfs: Path, held: ops.Supervision, failing: ops.AnyOp
) -> None:
    plan = box(rootfs, ["true"], held=held, prepare=[ops.OpenTree(slot=1, path="/"), failing])
    failure = runner.failure(plan)
    assert (failure.section, failure.index) == ("prepare", 1)
    assert failure.errno == ENOENT
    assert leftovers(Path(held.directory)) == []


def test_what_only_a_child_can_do_is_refused_in_prepare(runner: Runner, rootfs: Path) -> None:
    for op in (ops.Fork(), ops.Sync(number=1), ops.SetsidTty(), ops.Exec(argv=("x",), env=())):
        plan = box(rootfs, ["true"], prepare=[op])
        failure = runner.failure(plan)
        assert failure.section == "prepare"


def test_a_clone_that_fails_is_named(runner: Runner, rootfs: Path, held: ops.Supervision) -> None:
    plan = box(rootfs, ["true"], held=held, clone_flags=NAMESPACES, cgroup_slot=0, slots=1)
    with open("/etc/hostname") as file:
        failure = runner.failure(plan, [file.fileno()])
    assert failure.section == "clone"
    assert leftovers(Path(held.directory)) == []


@pytest.mark.parametrize("what", ["directory", "log_path"])
def test_a_run_directory_that_cannot_be_used_is_named(
    runner: Runner, rootfs: Path, tmp_path: Path, what: str
) -> None:
    held = msgspec.structs.replace(ops.Supervision(), **{what: str(tmp_path / "none" / "x")})
    failure = runner.failure(box(rootfs, ["true"], held=held))
    assert "none/x" in failure.detail
    assert (failure.section, failure.errno) == ("supervise", ENOENT)


def test_the_kernels_own_words_are_in_the_error(runner: Runner, rootfs: Path) -> None:
    plan = box(rootfs, ["true"], prepare=[ops.Overlay(slot=1, lower=("/usr",), options=("x=1",))])
    with runner.start(plan) as supervisor, pytest.raises(LaunchFailed, match=r"(?i)unknown"):
        supervisor.wait_started(WAIT_S)


def good_plan(rootfs: Path) -> bytes:
    return wire.encode(box(rootfs, ["true"]))


@pytest.mark.parametrize("cut", [0, 1, 31, 32, 60, 200, -1])
def test_a_plan_cut_short_is_refused(runner: Runner, rootfs: Path, cut: int) -> None:
    failure = runner.failure(good_plan(rootfs)[:cut])
    assert failure.section == "plan"


def named(name: str) -> list[str]:
    """Return the processes with this argv[0]."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(name.encode() + b"\0"):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def test_a_starter_that_has_no_plan_leaves_nothing(runner: Runner) -> None:
    name = f"planless-{os.getpid()}"
    supervisor = runner.launcher.spawn(name, runner.env)
    wait_until(lambda: named(name), "the process")
    supervisor.close()
    supervisor.close()
    wait_until(lambda: not named(name), "its end")


def test_a_starter_must_begin_with_the_plan(runner: Runner) -> None:
    with runner.launcher.spawn("hurried", runner.env) as supervisor:
        supervisor.go(1)
        with pytest.raises(LaunchFailed) as failure:
            supervisor.wait_started(WAIT_S)
    assert failure.value.section == "plan"


def test_a_plan_without_exec_is_refused(runner: Runner) -> None:
    for child in ((), (ops.Umask(mask=0),), (ops.Exec(argv=("x",), env=()), ops.Umask(mask=0))):
        plan = ops.Plan(child=child)
        failure = runner.failure(plan)
        assert failure.section == "plan"


def test_the_process_of_a_failed_launch_is_gone_when_it_is_told(
    runner: Runner, rootfs: Path
) -> None:
    plan = box(rootfs, ["true"], after_pivot=[ops.Chdir(path="/none")])
    with runner.start(plan) as supervisor:
        pid = supervisor.wait_pid(WAIT_S)
        with pytest.raises(LaunchFailed):
            supervisor.wait_started(WAIT_S)
        assert not Path(f"/proc/{pid}").exists()
        wait_until(lambda: not Path(f"/proc/{supervisor.supervisor_pid}").exists(), "its end")


def test_an_oom_score_below_the_callers_own_is_refused_with_its_cure() -> None:
    error = from_oserror("start: Scheduler oom_score_adj", OSError(errno.EPERM, "no"))
    assert isinstance(error, Denied) and "CAP_SYS_RESOURCE" in (error.hint or "")
    other = from_oserror("start: Mount", OSError(errno.EPERM, "no"))
    assert "CAP_SYS_RESOURCE" not in (other.hint or "")
