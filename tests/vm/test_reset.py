"""A root given up while its machines run, wait or are on disk: no process of them is left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hutch.engine import Engine
from tests.native.boxes import wait_until
from tests.requires import requires

pytestmark = [
    requires("root", "qemu", "apt-mirror", "busybox", "cgroup", "netns", "erofs", "mke2fs"),
    pytest.mark.integration,
    pytest.mark.serial,
    pytest.mark.timeout(600),
]

SLEEP = ["sleep", "100000"]


def descendants(root: Path) -> set[int]:
    """Return the processes whose command line, root or open files are of a root of hutch."""
    found = set()
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal() or int(process.name) == os.getpid():
            continue
        try:
            opened = [os.readlink(one) for one in (process / "fd").iterdir()]
            opened += [os.readlink(process / "root"), os.readlink(process / "cwd")]
            said = (process / "cmdline").read_text(errors="replace")
        except OSError:
            continue
        if str(root) in said or any(one.startswith(str(root)) for one in opened):
            found.add(int(process.name))
    return found


def test_a_reset_ends_machines_in_every_state(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with Engine(root) as engine:
        try:
            engine.images.bootstrap("busybox")
            boxes = [
                engine.start(
                    "busybox", SLEEP, name=name, isolation="vm", memory="96M", network="none"
                )
                for name in ("runs", "paused", "suspended")
            ]
            boxes[0].snapshot("then")
            boxes[1].pause()
            boxes[2].suspend()
            with engine.jobs.dispatching():
                job = engine.jobs.submit(
                    "busybox", SLEEP, isolation="vm", memory="96M", network="none"
                )
                wait_until(lambda: job.info().state == "running", "no job runs")
            assert descendants(root)
        finally:
            done = engine.reset()
    assert {"runs", "paused", "suspended"} < set(done.instances) and len(done.instances) == 4
    assert not root.exists()
    wait_until(lambda: not descendants(root), "a process has outlived its root")
