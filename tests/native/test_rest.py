"""A launch that waits in the middle of its plan, and is told the rest of it later."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from hutch.plan import ops
from hutch.plan.wire import MAX_REST_BYTES, encode_rest
from hutch.process import LaunchFailed, Supervisor
from tests.native.boxes import COLLECT, ENV, WAIT_S, Runner, box
from tests.requires import requires

pytestmark = [requires("root", "busybox", "cc"), pytest.mark.integration]

NUMBER = 7


def parked(rootfs: Path) -> ops.Plan:
    plan = box(rootfs, ["true"])
    return msgspec.structs.replace(plan, child=(*plan.child[:-1], ops.Rest(number=NUMBER)))


def started(runner: Runner, rootfs: Path) -> Supervisor:
    supervisor = runner.start(parked(rootfs), attach=COLLECT)
    supervisor.wait_sync(NUMBER, WAIT_S)
    return supervisor


def program(script: str, *before: ops.AnyOp, padding: str = "") -> Sequence[ops.AnyOp]:
    env = (*ENV, f"PADDING={padding}") if padding else ENV
    return (*before, ops.Exec(argv=("sh", "-c", script), env=env))


def test_the_program_comes_with_the_rest(runner: Runner, rootfs: Path) -> None:
    with started(runner, rootfs) as supervisor:
        rest = program("hostname; umask; exit 3", ops.Hostname(name="late"), ops.Umask(mask=0o27))
        supervisor.go(NUMBER, encode_rest(rest))
        status, out, _ = supervisor.collect(timeout_s=WAIT_S)
    assert (status.code, out) == (3, b"late\n0027\n")


def test_the_rest_may_fill_a_frame(runner: Runner, rootfs: Path) -> None:
    room = MAX_REST_BYTES - len(encode_rest(program("echo ${#PADDING}", padding="x"))) + 1
    with started(runner, rootfs) as supervisor:
        supervisor.go(NUMBER, encode_rest(program("echo ${#PADDING}", padding="x" * room)))
        status, out, _ = supervisor.collect(timeout_s=WAIT_S)
    assert (status.code, out) == (0, f"{room}\n".encode())


def test_capabilities_of_the_rest_are_raised_in_it(runner: Runner, rootfs: Path) -> None:
    none = ops.Capabilities(bounding=0, permitted=0, effective=0, inheritable=0, ambient=0)
    with started(runner, rootfs) as supervisor:
        rest = program("grep -E 'Cap(Eff|Bnd)' /proc/self/status; id -u", none)
        user = ops.User(uid=7, gid=7, groups=())
        supervisor.go(NUMBER, encode_rest((user, *rest)))
        _, out, _ = supervisor.collect(timeout_s=WAIT_S)
    assert out.split() == [b"CapEff:", b"0" * 16, b"CapBnd:", b"0" * 16, b"7"]


def test_a_failure_in_the_rest_has_its_place_in_the_whole_plan(
    runner: Runner, rootfs: Path
) -> None:
    place = len(parked(rootfs).child) - 1
    with started(runner, rootfs) as supervisor:
        rest = program("true", ops.Hostname(name="fine"), ops.Chdir(path="/missing"))
        supervisor.go(NUMBER, encode_rest(rest))
        with pytest.raises(LaunchFailed) as caught:
            supervisor.wait_started(WAIT_S)
    assert (caught.value.section, caught.value.index) == ("child", place + 1)
    assert caught.value.detail == "/missing"


def _truncated() -> list[bytes]:
    whole = encode_rest(program("true", ops.Hostname(name="x")))
    chosen = random.Random(5).sample(range(len(whole)), 12)
    return [whole[:size] for size in (0, *chosen)]


@pytest.mark.parametrize(
    "rest",
    [
        *_truncated(),
        struct.pack("<I", 1 << 31),
        encode_rest((ops.Hostname(name="no end"),)),
        encode_rest((ops.Rest(number=NUMBER),)),
        encode_rest((ops.Fork(), ops.Exec(argv=("true",), env=ENV))),
        encode_rest(program("true")) + b"more",
    ],
)
def test_a_rest_that_is_none_ends_the_launch(runner: Runner, rootfs: Path, rest: bytes) -> None:
    with started(runner, rootfs) as supervisor:
        supervisor.go(NUMBER, rest)
        with pytest.raises(LaunchFailed) as caught:
            supervisor.wait_started(WAIT_S)
    assert caught.value.section == "child"
    assert os.strerror(caught.value.errno) == "Protocol error"


def test_a_starter_that_leaves_ends_what_waits(runner: Runner, rootfs: Path) -> None:
    with started(runner, rootfs) as supervisor:
        pid = supervisor.wait_pid(WAIT_S)
        handle = os.pidfd_open(pid)
    try:
        import select

        assert select.select([handle], [], [], WAIT_S)[0]
    finally:
        os.close(handle)
