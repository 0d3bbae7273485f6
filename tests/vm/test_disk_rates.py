"""Rates of machines' disks: kept by QEMU, changed while the machine runs. Bytes are counted,
in QEMU, over so long that a limit and none cannot be confused."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hutch.drivers.vm.boot import QMP_SOCKET
from hutch.engine import Engine, Instance
from hutch.errors import InvalidArgument
from hutch.qmp import conversation
from hutch.qmp.blocks import query_blockstats
from hutch.storage.diskimages import create_disk
from tests.requires import requires
from tests.vm.bootdisks import SIZE, sector_disk

pytestmark = [pytest.mark.integration, requires("root", "qemu", "busybox", "apt-mirror", "cc")]

RATE = 256 << 10


@pytest.fixture(scope="module")
def box(machines: Engine) -> Iterator[Instance]:
    box = machines.start(
        "busybox",
        ["sleep", "1000"],
        isolation="vm",
        memory="192M",
        network="none",
        disk="1G",
        device_write_bps=[f"disk:{RATE}"],
        device_read_iops=["disk:1000"],
    )
    yield box
    box.remove(force=True)


def _monitor(box: Instance) -> Any:
    return conversation(Path(box.info().directory, "run", QMP_SOCKET))


def _written(box: Instance) -> int:
    with _monitor(box) as monitor:
        return sum(entry.written_bytes for entry in query_blockstats(monitor))


def _limits(box: Instance) -> list[tuple[int, int, str]]:
    """Bytes written and reads per second that each disk may do, and its group."""
    with _monitor(box) as monitor:
        found = (entry["inserted"] for entry in monitor.execute("query-block"))
        return [(one["bps_wr"], one["iops_rd"], one.get("group", "")) for one in found]


def _seconds_to_write(box: Instance, size: int) -> float:
    began, before = time.monotonic(), _written(box)
    script = f"dd if=/dev/urandom of=/big bs=64k count={size >> 16} conv=fsync 2>/dev/null"
    assert box.exec(["sh", "-c", script]).exit_code == 0
    assert _written(box) - before >= size
    return time.monotonic() - began


def test_a_limit_holds_from_the_start_and_is_lifted_while_it_runs(box: Instance) -> None:
    assert _limits(box) == [(RATE, 1000, "disk-rates")] * 2
    # It may be slower for any reason, and faster only by what the bucket holds.
    assert _seconds_to_write(box, 4 * RATE) > 2.0
    box.update(device_write_bps=[], device_read_iops=["disk:0"])
    assert {limit[:2] for limit in _limits(box)} == {(0, 0)}
    assert _seconds_to_write(box, 4 * RATE) > 0
    box.update(device_write_bps=["disk:1G"])
    assert {limit[:2] for limit in _limits(box)} == {(1 << 30, 0)}
    assert box.info().spec.resources.device_write_bps[0].rate == 1 << 30


def test_every_disk_of_a_machine_that_starts_from_one_has_its_own(
    machines: Engine, tmp_path: Path
) -> None:
    create_disk(str(tmp_path / "data.raw"), SIZE, format="raw")
    with machines.machines.start(
        sector_disk(tmp_path / "base.raw"),
        disks=[tmp_path / "data.raw"],
        memory="128M",
        network="none",
        device_write_bps=["disk:1M", "disk1:2M"],
    ) as machine:
        assert [limit[0] for limit in _limits(machine)] == [1 << 20, 2 << 20]
        machine.update(device_write_bps=["disk1:3M"], device_read_iops=["disk:7"])
        assert [limit[:2] for limit in _limits(machine)] == [(0, 7), (3 << 20, 0)]
        with pytest.raises(InvalidArgument, match=r"device_read_bps\[0\]: .*no 'disk2'"):
            machine.update(device_read_bps=["disk2:1M"])


def test_a_container_has_no_such_disk(machines: Engine) -> None:
    with pytest.raises(InvalidArgument, match=r"device_write_bps\[0\]: 'disk' is a disk of a v"):
        machines.create("busybox", device_write_bps=["disk:1M"])
