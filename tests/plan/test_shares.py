"""The plan of the server of shared directories, for either program of that name."""

from __future__ import annotations

from typing import Literal

import pytest

from hutch.plan import flags, ops
from hutch.plan.shares import ServerAssets, SharedPath, compile_server


def _plan(flavor: Literal["c", "rust"] = "c", *paths: SharedPath) -> ops.Plan:
    return compile_server(
        ServerAssets(
            program="/usr/lib/qemu/virtiofsd",
            flavor=flavor,
            skeleton="/cache/machine-root",
            log_path="/i/shares.log",
            binds=(("/usr", "/usr"),),
            paths=paths or (SharedPath(path="/data"),),
        )
    )


@pytest.mark.parametrize(
    ("flavor", "words"),
    [
        ("c", ["--fd=3", "source=/run/share", "modcaps=-mknod", "announce_submounts"]),
        ("rust", ["--fd=3", "--shared-dir=/run/share", "--modcaps=-mknod"]),
    ],
)
def test_each_program_gets_its_own_command_line(
    flavor: Literal["c", "rust"], words: list[str]
) -> None:
    last = _plan(flavor).child[-1]
    assert isinstance(last, ops.Exec)
    assert [word for word in words if word not in last.argv] == []


def test_a_read_only_share_is_read_only_for_the_server_itself() -> None:
    plan = _plan("c", SharedPath(path="/a"), SharedPath(path="/b", read_only=True))
    opened = {op.path: op.attr for op in plan.prepare if isinstance(op, ops.OpenTree)}
    assert not opened["/a"] & flags.MOUNT_ATTR_RDONLY
    assert opened["/b"] & flags.MOUNT_ATTR_RDONLY


def test_shares_are_numbered_and_files_are_files() -> None:
    plan = _plan("c", SharedPath(path="/a"), SharedPath(path="/b", is_dir=False))
    moved = {op.target: op.create for op in plan.child if isinstance(op, ops.MoveMount)}
    assert moved["/run/share/0"] == "dir"
    assert moved["/run/share/1"] == "file"


def test_no_way_to_new_privileges_and_no_network() -> None:
    plan = _plan()
    assert ops.NoNewPrivs() in plan.child
    assert plan.clone_flags & flags.CLONE_NEWNET
