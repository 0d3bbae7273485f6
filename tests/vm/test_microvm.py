"""Machines of type microvm: what they can do, and what they say that they cannot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hutch.engine import Engine, Instance
from hutch.errors import Unsupported, WrongState
from tests.requires import requires
from tests.vm.machines import NEEDS, SMALL, machine_root

pytestmark = [*NEEDS, pytest.mark.timeout(600)]

MICRO: dict[str, Any] = {**SMALL, "machine": "microvm"}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with machine_root(tmp_path_factory.mktemp("microvm") / "root") as engine:
        yield engine


@pytest.fixture(scope="module")
def box(engine: Engine) -> Iterator[Instance]:
    options = {**MICRO, "network": "bridge", "cpus": 2}
    box = engine.start("busybox", ["sleep", "10000"], **options)
    yield box
    box.remove(force=True)


def says(box: Instance, script: str) -> list[str]:
    return box.exec(["sh", "-c", script]).text.split()


@pytest.mark.versions
def test_it_starts_from_a_template_with_processors_disk_and_network(box: Instance) -> None:
    machine = box.info().machine
    assert machine is not None
    assert machine.machine == "microvm" and machine.template
    assert (machine.vcpus_max, machine.memory_max) == (2, 128 << 20)
    assert says(box, "nproc; echo kept >/x; cat /x; ls /sys/class/net") == [
        "2",
        "kept",
        "eth0",
        "lo",
    ]
    address = box.info().endpoints[0].addresses[0].address  # type: ignore[attr-defined]
    assert address in says(box, "ip -o addr show dev eth0 | grep -o '[0-9.]*/' | tr -d /")
    assert says(box, "ls /sys/bus | grep -c '^virtio$'; ls /sys/bus/pci/devices | wc -l") == [
        "1",
        "0",
    ]


def test_it_has_no_hotplug(box: Instance, engine: Engine) -> None:
    for change in ({"cpus": 1}, {"memory": "256M"}):
        with pytest.raises(WrongState, match="microvm gets neither") as caught:
            box.update(**change)
        assert caught.value.hint
    engine.networks.create("further")
    try:
        with pytest.raises(Unsupported, match="no hot-plug") as refused:
            engine.networks.connect("further", box.id)
        assert refused.value.hint and "q35" in refused.value.hint
    finally:
        engine.networks.remove("further")


def test_a_twin_and_a_suspended_one_go_on(engine: Engine) -> None:
    box = engine.start("busybox", ["sleep", "10000"], **MICRO)
    try:
        box.exec(["sh", "-c", "echo mine >/dev/shm/x"])
        twin = box.fork()
        assert isinstance(twin, Instance)
        try:
            assert says(twin, "cat /dev/shm/x") == ["mine"]
            twin.suspend()
            twin.start()
            assert says(twin, "cat /dev/shm/x") == ["mine"]
        finally:
            twin.remove(force=True)
        box.stop(timeout=1)
        assert box.info().state == "exited"
    finally:
        box.remove(force=True)


@requires("virtiofsd")
def test_it_has_directories_of_the_host(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("from the host")
    options = {**MICRO, "volumes": [f"{tmp_path}:/data"]}
    assert (
        engine.run("busybox", ["cat", "/data/file"], remove=True, **options).text == "from the host"
    )


def test_a_disk_of_its_own_is_refused(engine: Engine, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"\0" * (1 << 20))
    with pytest.raises(Unsupported, match="microvm starts no disk"):
        engine.machines.create(disk, machine="microvm")
