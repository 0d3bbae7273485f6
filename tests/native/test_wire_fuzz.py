"""Plans that nobody meant: the launcher refuses or fails them, and never breaks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from hutch.plan import ops, wire
from hutch.process import LaunchFailed
from tests import fuzzing
from tests.native.boxes import Runner, box
from tests.requires import requires

pytestmark = [requires("root", "busybox", "cc"), pytest.mark.integration]

ROUNDS = fuzzing.rounds(120)


def one_of_each(rootfs: Path) -> ops.Plan:
    """Return a plan with every kind of field in it, that does no harm when it is run."""
    return box(
        rootfs,
        ["true"],
        prepare=[ops.OpenTree(slot=0, path=str(rootfs)), ops.Overlay(slot=1, lower=("/etc", "@0"))],
        before_pivot=[
            ops.Mask(paths=("/etc",)),
            ops.WriteFile(path="/tmp/x", content=b"content"),
            ops.Netlink(messages=(bytes(16),), ignore=(1, 2)),
        ],
        after_pivot=[
            ops.User(uid=1, gid=1, groups=(1, 2, 3)),
            ops.Rlimit(resource=7, soft=100, hard=100),
        ],
    )


def structural(data: bytes, seed: int) -> bytes:
    """Return `data` with one length or count replaced."""
    dice = random.Random(seed)
    changed = bytearray(data)
    at = dice.randrange(24, len(changed) - 4)
    changed[at : at + 4] = dice.choice(
        [b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\xff\xff\xff\x7f", b"\0\0\x40\0", bytes(4)]
    )
    return bytes(changed)


def attempt(runner: Runner, plan: bytes) -> None:
    with runner.start(plan) as supervisor:
        try:
            supervisor.wait(60)
        except LaunchFailed:
            pass


def test_changed_lengths_are_refused(runner: Runner, rootfs: Path) -> None:
    # The operations are cut off, so that nothing runs whatever the change makes of it.
    data = wire.encode(ops.Plan(child=(ops.Exec(argv=("/nonexistent",), env=("A=b",)),)))
    for seed in range(ROUNDS):
        attempt(runner, structural(data, seed))


def test_truncated_plans_are_refused(runner: Runner, rootfs: Path) -> None:
    data = wire.encode(one_of_each(rootfs))
    for cut in range(0, len(data), max(1, len(data) // ROUNDS)):
        with runner.start(data[:cut]) as supervisor, pytest.raises(LaunchFailed) as failure:
            supervisor.wait_started(20)
        assert failure.value.section == "plan"


def test_every_section_may_be_missing_its_end(runner: Runner, rootfs: Path) -> None:
    data = wire.encode(one_of_each(rootfs))
    for extra in (b"\0", b"\0" * 8, b"\xff" * 64):
        longer = data[:4] + (len(data) + len(extra)).to_bytes(4, "little") + data[8:] + extra
        with runner.start(longer) as supervisor, pytest.raises(LaunchFailed) as failure:
            supervisor.wait_started(20)
        assert failure.value.section == "plan"
