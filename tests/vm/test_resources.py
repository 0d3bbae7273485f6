"""What a machine's program may use: memory, processes, disk, file systems in memory, limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.engine import Engine, Instance
from hutch.errors import InvalidArgument, Unsupported, WrongState
from tests.requires import requires
from tests.vm.machines import until

pytestmark = [pytest.mark.integration, requires("root", "qemu", "busybox", "apt-mirror")]


@pytest.fixture(scope="module")
def box(machines: Engine) -> Iterator[Instance]:
    box = machines.start(
        "busybox",
        ["sleep", "1000"],
        isolation="vm",
        memory="192M",
        network="none",
        disk="128M",
        read_only=True,
        user="1000:1001",
        tmpfs=["/scratch:size=8m,mode=1777"],
        shm_size="4m",
        ulimits=["nofile=123:456"],
        sysctls={"net.ipv4.ip_forward": "1"},
        pids_limit=50,
    )
    yield box
    box.remove(force=True)


def _sh(box: Instance, script: str, user: str = "") -> str:
    return box.exec(["sh", "-c", script], user=user or None).text.strip()


def test_file_systems_in_memory_have_their_sizes(box: Instance) -> None:
    sizes = _sh(box, "df -k /scratch /dev/shm | awk 'NR>1 {print $2}'").split()
    assert sizes == ["8192", "4096"]
    assert _sh(box, "echo x >/scratch/x && cat /scratch/x") == "x"


def test_a_read_only_root_is_read_only(box: Instance) -> None:
    assert box.exec(["touch", "/new"], user="0").exit_code != 0


def test_user_limits_and_kernel_parameters_hold_in_the_guest(box: Instance) -> None:
    assert _sh(box, "id -u; id -g").split() == ["1000", "1001"]
    assert _sh(box, "awk '/open files/ {print $4, $5}' /proc/1/limits") == "123 456"
    assert _sh(box, "cat /proc/sys/net/ipv4/ip_forward") == "1"


def test_a_device_of_the_host_is_refused_by_name(machines: Engine) -> None:
    with pytest.raises(Unsupported, match="devices"):
        machines.create("busybox", isolation="vm", devices=["/dev/null:/dev/x"])


def test_memory_is_taken_and_given_back_while_it_runs(box: Instance) -> None:
    free = "awk '/MemFree/ {print $2}' /proc/meminfo"
    half = int(_sh(box, free)) - 32 * 1024
    box.update(memory="128M")
    _sh(box, f"until [ $({free}) -lt {half} ]; do usleep 20000; done")
    box.update(memory="192M")
    _sh(box, f"until [ $({free}) -gt {half} ]; do usleep 20000; done")


def test_more_memory_than_there_is_room_for_is_refused(box: Instance) -> None:
    with pytest.raises(WrongState, match="room for") as caught:
        box.update(memory="1T")
    assert caught.value.hint and "--memory-max" in caught.value.hint


def test_a_disk_grows_while_it_runs_and_does_not_shrink(box: Instance) -> None:
    before = int(_sh(box, "df -k / | awk 'NR>1 {print $2}'"))
    box.update(disk="1G")
    after = int(_sh(box, "df -k / | awk 'NR>1 {print $2}'"))
    assert before < 128 * 1024 < 900 * 1024 < after
    with pytest.raises(InvalidArgument, match="cannot shrink"):
        box.update(disk="128M")


def test_the_host_gets_back_what_a_program_removes(machines: Engine) -> None:
    box = machines.start(
        "busybox", ["sleep", "1000"], isolation="vm", memory="160M", network="none", disk="256M"
    )
    try:
        disk = Path(box.info().directory, "disk.raw")

        def taken() -> int:
            return disk.stat().st_blocks * 512

        _sh(box, "dd if=/dev/urandom of=/big bs=1M count=32 2>/dev/null; sync")
        assert taken() > 30 << 20
        _sh(box, "rm /big; sync")
        until(lambda: taken() < 8 << 20, "the room of a removed file is not given back")
    finally:
        box.remove(force=True)


def test_a_disk_grows_while_the_machine_is_stopped(machines: Engine) -> None:
    box = machines.create("busybox", isolation="vm", disk="64M")
    try:
        box.update(disk="256M")
        disk = Path(machines.root, "instances", box.id, "disk.raw")
        assert disk.stat().st_size == 256 << 20
    finally:
        box.remove()


def test_a_container_has_no_disk_to_grow(machines: Engine) -> None:
    box = machines.create("busybox")
    try:
        with pytest.raises(InvalidArgument, match="option of virtual machines"):
            box.update(disk="1G")
    finally:
        box.remove()
