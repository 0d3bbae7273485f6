"""Credentials: users, capabilities, no_new_privs, seccomp, limits."""

from __future__ import annotations

import resource
import struct
from pathlib import Path

import pytest

from hutch.plan import ops
from hutch.process import LaunchFailed
from tests.native.boxes import Runner, shell
from tests.requires import requires

pytestmark = [requires("root", "busybox", "cc"), pytest.mark.integration]

CHOWN, SETUID, NET_BIND, SYS_ADMIN = 1 << 0, 1 << 7, 1 << 10, 1 << 21
STATUS = "cat /proc/self/status"
ALL = 2**64 - 1


def caps(
    bounding: int, permitted: int | None = None, inheritable: int = 0, ambient: int = 0
) -> ops.Capabilities:
    held = bounding if permitted is None else permitted
    return ops.Capabilities(
        bounding=bounding,
        permitted=held,
        effective=held,
        inheritable=inheritable,
        ambient=ambient,
    )


def status_of(runner: Runner, rootfs: Path, *operations: ops.AnyOp) -> dict[str, str]:
    _, out, err = runner.run(shell(rootfs, STATUS, after_pivot=operations))
    assert err == b""
    pairs = (line.split(":", 1) for line in out.decode().splitlines())
    return {name: value.strip() for name, value in pairs}


def deny(number: int, errno: int) -> bytes:
    """Return a seccomp program that refuses one system call of this machine."""
    rows = [
        (0x20, 0, 0, 0),  # load the number
        (0x15, 0, 1, number),
        (0x06, 0, 0, 0x00050000 | errno),
        (0x06, 0, 0, 0x7FFF0000),
    ]
    return b"".join(struct.pack("<HBBI", *row) for row in rows)


def test_a_user_has_the_plans_ids_and_groups(runner: Runner, rootfs: Path) -> None:
    status = status_of(runner, rootfs, ops.User(uid=1000, gid=100, groups=(4, 24, 100)))
    assert status["Uid"].split() == ["1000"] * 4
    assert status["Gid"].split() == ["100"] * 4
    assert status["Groups"].split() == ["4", "24", "100"]
    assert int(status["CapPrm"], 16) == 0


@pytest.mark.parametrize("user_first", [False, True])
def test_root_keeps_the_bounding_set_only(runner: Runner, rootfs: Path, user_first: bool) -> None:
    pair = [caps(CHOWN | SETUID), ops.User(uid=0, gid=0)]
    status = status_of(runner, rootfs, *(reversed(pair) if user_first else pair))
    for name in ("CapBnd", "CapPrm", "CapEff"):
        assert int(status[name], 16) == CHOWN | SETUID
    assert int(status["CapInh"], 16) == 0


@pytest.mark.parametrize("user_first", [False, True])
def test_a_user_holds_ambient_capabilities(runner: Runner, rootfs: Path, user_first: bool) -> None:
    wanted = caps(CHOWN | NET_BIND, NET_BIND, NET_BIND, NET_BIND)
    pair = [wanted, ops.User(uid=7, gid=7)]
    status = status_of(runner, rootfs, *(reversed(pair) if user_first else pair))
    for name in ("CapAmb", "CapPrm", "CapEff", "CapInh"):
        assert int(status[name], 16) == NET_BIND
    assert int(status["CapBnd"], 16) == CHOWN | NET_BIND


def test_capabilities_that_the_launcher_lacks_are_left_out(runner: Runner, rootfs: Path) -> None:
    held = int(Path("/proc/self/status").read_text().split("CapPrm:")[1].split()[0], 16)
    status = status_of(runner, rootfs, caps(ALL, ALL, ALL, ALL), ops.User(uid=0, gid=0))
    assert int(status["CapPrm"], 16) == held


def test_without_capabilities_in_the_plan_a_user_has_none(runner: Runner, rootfs: Path) -> None:
    status = status_of(runner, rootfs, ops.User(uid=5, gid=5))
    assert int(status["CapEff"], 16) == 0


def test_a_filter_denies_its_call(runner: Runner, rootfs: Path) -> None:
    mkdir = 83
    plan = shell(
        rootfs,
        "mkdir /tmp/x; grep -E 'NoNewPrivs|Seccomp:' /proc/self/status",
        after_pivot=[
            caps(CHOWN),
            ops.User(uid=0, gid=0),
            ops.NoNewPrivs(),
            ops.Seccomp(program=deny(mkdir, 38)),
        ],
    )
    _, out, err = runner.run(plan)
    assert out.split() == [b"NoNewPrivs:", b"1", b"Seccomp:", b"2"]
    assert b"Function not implemented" in err


@pytest.mark.parametrize("uid", [0, 1000])
def test_a_filter_without_no_new_privs(runner: Runner, rootfs: Path, uid: int) -> None:
    status = status_of(
        runner,
        rootfs,
        caps(CHOWN, 0 if uid else CHOWN),
        ops.User(uid=uid, gid=uid),
        ops.Seccomp(program=deny(83, 1)),
    )
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("0", "2")
    assert int(status["CapEff"], 16) == (0 if uid else CHOWN)


def test_a_filter_that_forbids_exec_fails_the_launch(runner: Runner, rootfs: Path) -> None:
    plan = shell(
        rootfs,
        "true",
        after_pivot=[ops.NoNewPrivs(), ops.Seccomp(program=deny(59, 13))],
    )
    with runner.start(plan) as supervisor, pytest.raises(LaunchFailed) as failure:
        supervisor.wait_started(20)
    assert (failure.value.section, failure.value.errno) == ("exec", 13)


def test_limits_and_umask(runner: Runner, rootfs: Path) -> None:
    plan = shell(
        rootfs,
        "ulimit -n; ulimit -Hn; umask; cat /proc/self/oom_score_adj",
        after_pivot=[
            ops.Rlimit(resource=resource.RLIMIT_NOFILE, soft=100, hard=200),
            ops.Umask(mask=0o077),
            ops.Scheduler(oom_score_adj=500),
        ],
    )
    assert runner.run(plan)[1].split() == [b"100", b"200", b"0077", b"500"]


def test_the_umask_is_022_unless_told(runner: Runner, rootfs: Path) -> None:
    assert runner.run(shell(rootfs, "umask"))[1] == b"0022\n"


def test_a_limit_above_the_present_one_is_clamped(runner: Runner, rootfs: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    plan = shell(
        rootfs,
        "ulimit -Hn",
        after_pivot=[
            caps(CHOWN),
            ops.User(uid=1000, gid=1000),
            ops.Rlimit(resource=resource.RLIMIT_NOFILE, soft=hard + 10, hard=hard + 10, clamp=True),
        ],
    )
    assert int(runner.run(plan)[1]) == hard


def test_a_working_directory_is_made_for_its_user(runner: Runner, rootfs: Path) -> None:
    plan = shell(
        rootfs,
        "pwd; stat -c '%u %g %a' .",
        after_pivot=[
            ops.Chdir(path="/home/new", create=True, uid=1000, gid=100),
            ops.User(uid=1000, gid=100),
        ],
    )
    assert runner.run(plan)[1].splitlines() == [b"/home/new", b"1000 100 755"]
