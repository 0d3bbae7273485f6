"""Devices by name in real containers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hutch.engine import Engine
from hutch.errors import InvalidArgument, NotFound, Unsupported
from tests.requires import requires

pytestmark = [
    requires("root", "cgroup", "overlayfs", "seccomp", "busybox"),
    pytest.mark.integration,
]


@pytest.fixture
def vendor(engine: Engine, tmp_path: Path) -> Path:
    """A directory with a file of two devices, that the root's settings name."""
    directory = tmp_path / "cdi"
    directory.mkdir()
    (tmp_path / "driver.txt").write_text("of the vendor\n")
    edits = {
        "env": ["VENDOR=here"],
        "mounts": [
            {
                "hostPath": str(tmp_path / "driver.txt"),
                "containerPath": "/opt/driver.txt",
                "options": ["ro", "nosuid", "nodev", "rbind"],
            }
        ],
        "additionalGids": [4242],
    }
    node = {
        "path": "/dev/vendor0",
        "hostPath": "/dev/loop-control",
        "permissions": "r",
        "fileMode": 0o640,
    }
    devices = [
        {"name": "0", "containerEdits": {"deviceNodes": [{**node, "gid": 4242}]}},
        {"name": "gone", "containerEdits": {"deviceNodes": [{"path": "/dev/no-such-node"}]}},
    ]
    content = {
        "cdiVersion": "0.7.0",
        "kind": "vendor.com/gpu",
        "devices": devices,
        "containerEdits": edits,
    }
    (directory / "vendor.json").write_text(json.dumps(content))
    engine.resources.configure({"cdi": str(directory)})
    return directory


@pytest.mark.parametrize("options", [{"devices": ["vendor.com/gpu=0"]}, {"gpus": "device=0"}])
def test_a_container_gets_nodes_mounts_variables_and_groups(
    engine: Engine, vendor: Path, options: dict[str, object]
) -> None:
    script = (
        "echo $VENDOR; cat /opt/driver.txt; id -G; stat -c '%a %g %t:%T' /dev/vendor0;"
        ": < /dev/vendor0 && echo read; touch /opt/driver.txt; : > /dev/vendor0"
    )
    done = engine.run("busybox", ["sh", "-c", script], network="none", **options)  # type: ignore[arg-type]
    lines = done.text.splitlines()
    assert lines[:2] == ["here", "of the vendor"]
    assert "4242" in lines[2].split()
    assert lines[3:5] == ["640 4242 a:ed", "read"]
    errors = done.stderr.decode()
    # The group's rules let it be read only, and the mount be written to by nobody.
    assert "/dev/vendor0" in errors and "Read-only file system" in errors


def test_an_inspection_shows_what_was_asked_for(engine: Engine, vendor: Path) -> None:
    from hutch.cli.shapes import instance_shape

    box = engine.create("busybox", devices=["vendor.com/gpu=0"], gpus="device=0", network="none")
    try:
        found = instance_shape(box.info())["HostConfig"]["DeviceRequests"]
        assert [request["DeviceIDs"] for request in found] == [["vendor.com/gpu=0"], ["0"]]
    finally:
        box.remove()


def test_a_device_that_is_not_there_is_refused_before_anything_is_made(
    engine: Engine, vendor: Path
) -> None:
    with pytest.raises(NotFound, match=r"vendor\.com/gpu=1") as caught:
        engine.run("busybox", ["true"], devices=["vendor.com/gpu=1"], network="none")
    assert "vendor.com/gpu=0" in (caught.value.hint or "")
    with pytest.raises(InvalidArgument, match="no-such-node"):
        engine.run("busybox", ["true"], devices=["vendor.com/gpu=gone"], network="none")
    assert list((engine.root / "instances").iterdir()) == []


def test_whole_devices_are_for_machines_and_names_for_containers(
    engine: Engine, vendor: Path
) -> None:
    with pytest.raises(InvalidArgument, match="virtual machines"):
        engine.create("busybox", devices=["vfio=0000:00:00.0"])
    with pytest.raises(Unsupported, match="containers"):
        engine.create("busybox", devices=["vendor.com/gpu=0"], isolation="vm")
    with pytest.raises(NotFound, match="no such PCI device"):
        engine.create("busybox", devices=["vfio=ffff:00:00.0"], isolation="vm")


def test_a_machine_has_what_a_vendor_lists_for_machines(engine: Engine, tmp_path: Path) -> None:
    def listed(*nodes: str) -> dict[str, object]:
        return {"containerEdits": {"deviceNodes": [{"path": node} for node in nodes]}}

    devices = [
        {"name": "vf", **listed("/dev/vfio/vfio", "/dev/vfio/999999")},
        {"name": "part", **listed("/dev/vfio/999999", "/dev/null")},
    ]
    content = {"cdiVersion": "0.7.0", "kind": "vendor.com/card", "devices": devices}
    (tmp_path / "cdi").mkdir()
    (tmp_path / "cdi/vendor.json").write_text(json.dumps(content))
    engine.resources.configure({"cdi": str(tmp_path / "cdi")})
    with pytest.raises(NotFound, match="nothing behind /dev/vfio/vfio, /dev/vfio/999999"):
        engine.create("busybox", devices=["vendor.com/card=vf"], isolation="vm")
    with pytest.raises(Unsupported, match="described for containers"):
        engine.create("busybox", devices=["vendor.com/card=part"], isolation="vm")
    assert list((engine.root / "instances").iterdir()) == []


def test_a_microvm_has_no_place_for_a_device(engine: Engine) -> None:
    with pytest.raises(Unsupported, match="microvm has none"):
        engine.create("busybox", devices=["vfio=0000:00:00.0"], isolation="vm", machine="microvm")
