"""Volumes that a virtual machine has as disks."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hutch.engine import Engine, Instance
from hutch.errors import AlreadyExists, Busy, InvalidArgument, Unsupported
from tests.requires import requires
from tests.vm.machines import NEEDS, SMALL, start

pytestmark = [*NEEDS, requires("virtiofsd")]

MIB = 1 << 20


@pytest.fixture
def volume(machines: Engine) -> Iterator[str]:
    """A volume that is a disk, in which a container has written."""
    machines.volumes.create("db", options={"type": "disk", "size": "256M"})
    script = "echo container > /data/by; chown 12:34 /data/by"
    done = machines.run("busybox", ["sh", "-c", script], network="none", volumes=["db:/data"])
    assert done.exit_code == 0, done.stderr
    yield "db"
    for name in ("db", "copy"):
        machines.volumes.remove(name, force=True)


def sh(box: Instance, script: str) -> str:
    done = box.exec(["sh", "-c", script])
    assert done.exit_code == 0, done.stderr
    return done.text.strip()


def read(machines: Engine, name: str, path: str) -> str:
    """Return a file of a volume as a container has it."""
    done = machines.run("busybox", ["cat", f"/v/{path}"], network="none", volumes=[f"{name}:/v"])
    return done.text.strip()


def test_a_machine_has_a_volume_to_itself(machines: Engine, volume: str, tmp_path: Path) -> None:
    (tmp_path / "seen").write_text("host")
    with start(machines, volumes=["db:/data"], name="owner") as box:
        assert sh(box, "cat /data/by; stat -c %u:%g /data/by").split() == ["container", "12:34"]
        assert "/dev/disk-volume0 on /data type ext4" in sh(box, "mount")

        # Nobody else: neither a machine nor a container, nor while it is suspended.
        for isolation in ("vm", "container"):
            with pytest.raises(Busy, match="instance owner has it"):
                machines.run(
                    "busybox", ["true"], isolation=isolation, network="none", volumes="db:/data"
                )
        with pytest.raises(Unsupported, match="volume as a disk"):
            box.fork()

        # It grows, and is copied, while the machine runs.
        before = int(sh(box, "df -k /data | tail -1 | awk '{print $2}'"))
        machines.volumes.resize("db", "512M")
        assert int(sh(box, "df -k /data | tail -1 | awk '{print $2}'")) > before * 1.8
        sh(box, "echo machine > /data/by")
        machines.volumes.clone("db", "copy")
        sh(box, "echo later > /data/by")
        assert read(machines, "copy", "by") == "machine"
        with pytest.raises(AlreadyExists):
            machines.volumes.clone("db", "copy")
        machines.volumes.snapshot("db", "later")
        out = io.BytesIO()
        machines.volumes.backup("db", out)
        with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
            found = tar.extractfile("data/by")
            assert found is not None and found.read() == b"later\n"
        with pytest.raises(Busy, match="instance owner has it"):
            machines.volumes.open("db")
        assert not any("-backup-" in volume.name for volume in machines.volumes.list())

        box.suspend()
        with pytest.raises(Busy, match="suspended"):
            read(machines, "db", "by")
        box.resume()
        assert sh(box, "cat /data/by") == "later"
        sh(box, "echo kept > /data/by")
        box.stop(timeout=0)  # its program is killed: what it wrote is on the disk all the same

    # Beside a directory of the host, read-only, and in a machine that is thrown away.
    script = "cat /data/by /db/by /host/seen; touch /data/new || echo refused; echo last > /db/by"
    options: dict[str, Any] = {**SMALL, "volumes": ["copy:/data:ro", "db:/db", f"{tmp_path}:/host"]}
    done = machines.run("busybox", ["sh", "-c", script], **options)
    assert done.text.split() == ["machine", "kept", "hostrefused"]
    assert read(machines, "db", "by") == "last"
    machines.volumes.resize("db", "600M")
    assert machines.volumes.get("db").options["size"] == str(600 * MIB)
    assert read(machines, "db", "by") == "last"


def test_what_a_volume_that_is_a_disk_cannot_be_is_refused(machines: Engine) -> None:
    with pytest.raises(InvalidArgument, match=r"options\.size"):
        machines.volumes.create("db", options={"type": "disk"})
    with pytest.raises(InvalidArgument, match="size"):
        machines.volumes.create("db", options={"type": "disk", "size": "1G", "o": "ro"})
    machines.volumes.create("plain")
    machines.volumes.create("small", options={"type": "disk", "size": "64M"})
    try:
        with pytest.raises(InvalidArgument, match="has no size"):
            machines.volumes.resize("plain", "1G")
        with pytest.raises(InvalidArgument, match="cannot shrink"):
            machines.volumes.resize("small", 65 * MIB)
            machines.volumes.resize("small", "64M")
        with pytest.raises(Unsupported, match="microvm"):
            start(machines, volumes=["small:/data"], machine="microvm")
        with pytest.raises(InvalidArgument, match="volume-subpath"):
            start(machines, mounts=["type=volume,src=small,dst=/data,volume-subpath=a"])
    finally:
        machines.volumes.remove("plain")
        machines.volumes.remove("small")
    assert machines.list(all=True) == []
