"""Virtual machines go to another hutch: at rest, suspended, and running."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from hutch.engine import Engine
from hutch.engine import migrate as migrating
from hutch.engine.session import Session
from hutch.errors import WrongState
from hutch.process import Output
from hutch.storage.snapshots import DISK_FILE
from tests.migration.conftest import Other, die_migrating
from tests.requires import requires
from tests.vm.bootdisks import sector_disk

pytestmark = [
    requires("root", "qemu", "apt-mirror", "busybox", "cgroup", "netns", "erofs", "mke2fs"),
    pytest.mark.integration,
    pytest.mark.timeout(600),
]

COUNT = "i=0; while :; do i=$((i+1)); echo $i; usleep 20000; done"
WAIT_S = 200.0
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


def read(session: Session, words: bytes) -> None:
    """Read a serial console up to these words."""
    seen = b""
    for item in session.output(WAIT_S):
        assert isinstance(item, Output), item
        seen += item.data
        if words in seen:
            return
    raise AssertionError(f"no {words!r} in {seen!r}")


@requires("qemu-img", "cc", "swtpm")
def test_a_machine_that_starts_from_a_disk_runs_on_with_all_that_it_stands_on(
    source: Engine, target: Other, tmp_path: Path
) -> None:
    base = sector_disk(tmp_path / "base.raw")
    box = source.machines.create(
        base, name="moved", memory="128M", network="none", size="64M", tpm=True
    )
    with box.start_attached() as session:
        read(session, b"disk A runs")
        session.send(b"w")
        read(session, b"written")
    done = source.migrate("moved", target.destination)
    assert (done.way, done.problem) == ("stop-and-copy", "")
    base.unlink()
    files = target.root / "instances" / done.id
    assert (files / "tpm/tpm2-00.permall").exists()
    with target.engine() as there:
        moved = there.get("moved")
        with moved.attach(stdin=True) as session:
            session.send(b"on")
            read(session, b"on")  # its memory came
            session.send(b"r")
            read(session, b"disk B runs")  # and what it has written to its disk
        moved.kill()
        machine = moved.info().spec.machine.from_disk
        assert machine is not None
        assert (machine.path, machine.identity) == (str(files / "base.disk"), box.id)
        exported = there.machines.export_disk("moved", tmp_path / "whole.qcow2")
        assert exported.size == 64 << 20
    target.hutch("rm", "moved")


@requires("qemu-img", "cc", "ovmf")
def test_a_machine_that_starts_from_a_disk_moves_at_rest(
    source: Engine, target: Other, tmp_path: Path
) -> None:
    base, cdrom = sector_disk(tmp_path / "base.raw"), tmp_path / "cd.iso"
    cdrom.write_bytes(bytes(4096))
    box = source.machines.create(
        base, name="moved", memory="128M", network="none", uefi=True, cdroms=[cdrom],
        user_data=b"#cloud-config\n",
    )  # fmt: skip
    own = source.root / "instances" / box.id
    names = ("uefi-variables.fd", "user-data", "disk.qcow2")
    kept = {name: (own / name).read_bytes() for name in names[:2]}
    cdrom.rename(tmp_path / "away.iso")
    with pytest.raises(WrongState, match=r"cd\.iso, which is attached to it, is not at the target"):
        source.migrate("moved", target.destination)
    (tmp_path / "away.iso").rename(cdrom)
    before = os.stat(base)
    os.utime(base)
    with pytest.raises(WrongState, match="was changed since moved was made of it"):
        source.migrate("moved", target.destination)
    os.utime(base, ns=(before.st_atime_ns, before.st_mtime_ns))
    done = source.migrate("moved", target.destination)
    assert done.way == "cold"
    there = target.root / "instances" / done.id
    assert {name: (there / name).read_bytes() for name in names[:2]} == kept
    assert (there / "base.disk").read_bytes() == base.read_bytes()
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
    die_migrating(source, target, DECIDE, "before")
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
