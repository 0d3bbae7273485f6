"""Writable layers and volumes of a size: the writer gets ENOSPC, and nobody else."""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress
from pathlib import Path

import pytest

from hutch.engine import Engine
from hutch.errors import AlreadyExists, HutchError, InvalidArgument
from hutch.linux.mount import MNT_DETACH, umount2
from hutch.storage import limited
from hutch.storage.disks import Disks
from tests.requires import requires

pytestmark = [
    requires("root", "cgroup", "overlayfs", "seccomp", "busybox", "mke2fs"),
    pytest.mark.integration,
]

MIB = 1 << 20
FILL = "dd if=/dev/zero of=$0 bs=1M count=200 2>&1 | grep -o 'No space left'"


def mounts(engine: Engine) -> list[str]:
    text = Path("/proc/self/mountinfo").read_text()
    return [line.split()[4] for line in text.splitlines() if str(engine.root) in line]


def loops(engine: Engine) -> list[str]:
    """The loop devices that stay: one goes when the last mount namespace has let go of it."""
    deadline = time.monotonic() + 60.0
    while True:
        found = []
        for path in Path("/sys/block").glob("loop*/loop/backing_file"):
            with suppress(OSError):
                found.append(path.read_text().strip())
        found = [name for name in found if str(engine.root) in name]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def test_a_layer_of_a_size_is_full_for_its_writer_alone(engine: Engine) -> None:
    options: dict[str, object] = {"network": "none", "storage_opts": {"size": "64M"}}
    script = f"{FILL.replace('$0', '/big')}; df -k / | tail -1"
    with engine.start("busybox", ["sleep", "1000"], **options) as other:  # type: ignore[arg-type]
        done = engine.run("busybox", ["sh", "-c", script], **options)  # type: ignore[arg-type]
        assert "No space left" in done.text
        size = int(done.text.splitlines()[-1].split()[1])
        assert 40_000 < size <= 65_536
        assert other.exec(["dd", "if=/dev/zero", "of=/x", "bs=1M", "count=40"]).exit_code == 0
        assert len(mounts(engine)) == 1
    assert mounts(engine) == [] and loops(engine) == []


def test_what_was_written_is_there_after_a_reboot(engine: Engine) -> None:
    options: dict[str, object] = {"network": "none", "storage_opts": "size=64M"}
    box = engine.create("busybox", ["sh", "-c", "cat /f || echo new > /f"], **options)  # type: ignore[arg-type]
    box.start()
    assert box.wait(timeout=60) == 0
    # As if the host had been started anew.
    (point,) = mounts(engine)
    umount2(point, MNT_DETACH)
    assert box.files.read("/f") == b"new\n"
    assert "/f" in [change.path for change in box.diff()]
    umount2(point, MNT_DETACH)
    box.start()
    assert box.wait(timeout=60) == 0
    assert [record.data for record in box.logs()][-1:] == [b"new\n"]
    assert 0 < box.disk_size().writable < 16 * MIB
    box.remove()
    assert mounts(engine) == [] and loops(engine) == []


@pytest.mark.parametrize("size", ["1M", "x", "100T"])
def test_an_impossible_size_is_refused_and_nothing_is_left(engine: Engine, size: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        engine.create("busybox", storage_opts={"size": size})
    assert caught.value.field == "storage_opts.size"
    with pytest.raises(InvalidArgument):
        engine.volumes.create("v", options={"size": size})
    assert engine.volumes.list() == []


@pytest.mark.parametrize("step", ["mount_file", "os.makedirs"])
def test_a_failure_while_it_is_made_leaves_nothing(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.EIO, "no")

    disks = Disks(tmp_path)
    Disks(tmp_path).empty(64 * MIB)
    directory = tmp_path / "d"
    directory.mkdir()
    monkeypatch.setattr(limited if step == "mount_file" else os, step.rpartition(".")[2], fail)
    with pytest.raises((HutchError, OSError)):
        limited.make_limited(disks, str(directory), 64 * MIB, field="size")
    monkeypatch.undo()
    assert not (directory / "limited.raw").exists()


def test_a_volume_of_a_size(engine: Engine) -> None:
    volume = engine.volumes.create("v", options={"size": "64M"})
    try:
        assert engine.volumes.create("v", options={"size": "64M"}) == volume
        with pytest.raises(AlreadyExists):
            engine.volumes.create("v", options={"size": "65M"})
        script = FILL.replace("$0", "/v/big")
        done = engine.run("busybox", ["sh", "-c", script], volumes="v:/v", network="none")
        assert "No space left" in done.text
        # Filled from the image at its first use, and mounted again after a reboot.
        (point,) = mounts(engine)
        umount2(point, MNT_DETACH)
        done = engine.run("busybox", ["ls", "/v"], volumes="v:/v", network="none")
        assert done.text == "big\n"
    finally:
        engine.volumes.remove("v")
    assert mounts(engine) == [] and loops(engine) == []


def test_a_size_goes_alone(engine: Engine) -> None:
    with pytest.raises(InvalidArgument, match="size does not go with type"):
        engine.volumes.create("v", options={"size": "64M", "type": "tmpfs"})
