"""Virtual machines go to another hutch: at rest, suspended, and running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from hutch.engine import Engine
from hutch.engine import migrate as migrating
from hutch.storage.snapshots import DISK_FILE
from tests.migration.conftest import Other, killed
from tests.requires import requires

pytestmark = [
    requires("root", "qemu", "apt-mirror", "busybox", "cgroup", "netns", "erofs", "mke2fs"),
    pytest.mark.integration,
]

COUNT = "i=0; while :; do i=$((i+1)); echo $i; usleep 20000; done"
WAIT_S = 60.0
DECIDE = "hutch.engine.migrate:_decide"


def numbers(text: str) -> list[int]:
    return [int(line) for line in text.split()]


def until_more(target: Other, count: int) -> list[int]:
    """Read the target's log until it has more numbers than `count`."""
    deadline = time.monotonic() + WAIT_S
    with target.engine() as there:
        box = there.get("moved")
        seen = 0
        for record in box.logs(follow=True):
            assert time.monotonic() < deadline
            seen += len(record.data.split())
            if seen > count:
                break
    return numbers(target.hutch("logs", "moved"))


def test_a_machine_at_rest_comes_with_its_kernel_and_disk(source: Engine, target: Other) -> None:
    box = source.create("busybox", ["true"], name="moved", isolation="vm", disk="64M")
    disk = source.root / "instances" / box.id / DISK_FILE
    with open(disk, "r+b") as file:
        os.pwrite(file.fileno(), b"written", 48 << 20)
    content = disk.read_bytes()
    kernels = [kernel.id for kernel in source.kernels.list()]
    done = source.migrate("moved", target.destination)
    there = target.root / "instances" / done.id / DISK_FILE
    assert there.read_bytes() == content
    assert there.stat().st_blocks * 512 < 32 << 20
    with target.engine() as engine:
        assert [kernel.id for kernel in engine.kernels.list()] == kernels
    target.hutch("rm", "moved")


def test_a_machine_runs_on_at_the_target_and_here_after_a_failure_and_a_kill(
    source: Engine, target: Other, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = source.start(
        "busybox", ["sh", "-c", COUNT], name="moved", isolation="vm", memory="128M", template=False
    )
    box.exec(["sh", "-c", "echo kept > /root/file; sync; echo 7 > /dev/shm/ram"], check=True)

    def fail(*_: object) -> None:
        raise OSError(5, "injected")

    with monkeypatch.context() as patch:
        patch.setattr(migrating, "_decide", fail)
        with pytest.raises(OSError, match="injected"):
            source.migrate("moved", target.destination)
    assert box.info().state == "running"
    assert json.loads(target.hutch("-o", "json", "ps", "-a")) == []
    here = [sys.executable, "-m", "hutch", "--root", str(source.root)]
    command = killed([*here, "migrate", "moved", target.destination], DECIDE, "before")
    done_with = subprocess.run(command, capture_output=True, timeout=100, check=False)
    assert done_with.returncode == -signal.SIGKILL, done_with.stderr.decode()
    assert box.info().state == "migrating"
    source.reconcile()
    assert box.info().state == "running"
    assert json.loads(target.hutch("-o", "json", "ps", "-a")) == []
    before = len([line for record in box.logs() for line in record.data.split()])
    done = source.migrate("moved", target.destination)
    assert done.problem == ""
    assert done.downtime_s > 0
    counted = until_more(target, before + 5)
    assert counted == list(range(1, len(counted) + 1))
    shown = target.hutch("exec", "moved", "cat", "/root/file", "/dev/shm/ram").split()
    assert shown == ["kept", "7"]
    address = json.loads(target.hutch("-o", "json", "inspect", "moved"))[0]["NetworkSettings"]
    inside = target.hutch("exec", "moved", "ip", "-4", "-o", "addr", "show", "eth0")
    assert address["IPAddress"] in inside
    target.hutch("stop", "-t", "1", "moved")
    with target.engine() as there:
        assert there.get("moved").info().state == "exited"
    target.hutch("rm", "-f", "moved")
