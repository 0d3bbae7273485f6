"""Descriptors that a program is given beside its stdio."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hutch.plan import ops
from tests.native.boxes import Runner, shell
from tests.requires import requires

pytestmark = [requires("root", "busybox", "cc"), pytest.mark.integration]


@contextmanager
def files(directory: Path, count: int) -> Iterator[list[int]]:
    """Open `count` files that contain their own number."""
    opened: list[int] = []
    try:
        for number in range(count):
            path = directory / f"file{number}"
            path.write_text(f"{number}\n")
            opened.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        yield opened
    finally:
        for fd in opened:
            os.close(fd)


@pytest.mark.parametrize("order", [(0,), (1, 0), (3, 2, 1, 0), tuple(range(9, -1, -1))])
def test_slots_become_descriptors_in_the_order_named(
    runner: Runner, rootfs: Path, tmp_path: Path, order: tuple[int, ...]
) -> None:
    # The launcher's own descriptors and the slots are among the numbers to be filled.
    script = " ".join(f"cat <&{3 + place};" for place in range(len(order)))
    plan = shell(rootfs, script, after_pivot=[ops.Inherit(slots=order)], slots=len(order))
    with files(tmp_path, len(order)) as fds:
        status, out, err = runner.run(plan, fds)
    assert (status.code, err) == (0, b"")
    assert [int(line) for line in out.split()] == list(order)


def test_one_slot_may_be_given_twice(runner: Runner, rootfs: Path, tmp_path: Path) -> None:
    plan = shell(rootfs, "cat <&3; cat <&4", after_pivot=[ops.Inherit(slots=(1, 1))], slots=2)
    with files(tmp_path, 2) as fds:
        assert runner.run(plan, fds)[1] == b"1\n"  # one open file: read once to its end


def test_nothing_else_is_open_in_the_program(runner: Runner, rootfs: Path, tmp_path: Path) -> None:
    after = [ops.Inherit(slots=(2, 4)), ops.CloseRange(first=50)]
    plan = shell(rootfs, "exec ls /proc/self/fd", after_pivot=after, slots=6)
    with files(tmp_path, 6) as fds:
        _, out, _ = runner.run(plan, fds)
    assert out.split() == [b"0", b"1", b"2", b"3", b"4", b"5"]  # 5 is the listing's own


def test_with_an_init_only_the_program_has_them(
    runner: Runner, rootfs: Path, tmp_path: Path
) -> None:
    script = "cat <&3; ls /proc/1/fd | wc -l"
    plan = shell(rootfs, script, after_pivot=[ops.Inherit(slots=(0,))], slots=1, init=True)
    with files(tmp_path, 1) as fds:
        assert runner.run(plan, fds)[1] == b"0\n0\n"


def test_a_program_that_cannot_be_run_is_told(runner: Runner, rootfs: Path, tmp_path: Path) -> None:
    plan = shell(rootfs, "", after_pivot=[ops.Inherit(slots=(0, 1, 2, 3))], slots=4)
    child = (*plan.child[:-1], ops.Exec(argv=("/bin/absent",), env=()))
    with files(tmp_path, 4) as fds:
        failure = runner.failure(ops.Plan(child=child, slots=4, clone_flags=plan.clone_flags), fds)
    assert (failure.section, failure.errno) == ("exec", errno.ENOENT)


def test_an_empty_slot_is_refused(runner: Runner, rootfs: Path) -> None:
    plan = shell(rootfs, "true", after_pivot=[ops.Inherit(slots=(7,))])
    failure = runner.failure(plan)
    assert (failure.section, failure.errno) == ("child", errno.EBADF)


def test_it_stands_once_in_a_plan(runner: Runner, rootfs: Path, tmp_path: Path) -> None:
    twice = [ops.Inherit(slots=(0,)), ops.Inherit(slots=(0,))]
    with files(tmp_path, 1) as fds:
        failure = runner.failure(shell(rootfs, "true", after_pivot=twice, slots=1), fds)
    assert (failure.section, failure.errno) == ("child", errno.EINVAL)


def test_it_has_no_place_in_prepare(runner: Runner, rootfs: Path, tmp_path: Path) -> None:
    plan = shell(rootfs, "true", prepare=[ops.Inherit(slots=(0,))], slots=1)
    with files(tmp_path, 1) as fds:
        failure = runner.failure(plan, fds)
    assert (failure.section, failure.errno) == ("prepare", errno.EINVAL)
