"""Machines of a root that is in memory: what their disks take there is no reason to be killed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.drivers.vm.limits import disk_in_memory, group_limits
from hutch.linux.files import is_in_memory
from hutch.spec.model import Resources

MIB = 1 << 20


@pytest.fixture
def in_memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="hutch-test-") as directory:
        assert is_in_memory(directory), "/dev/shm is a tmpfs on Linux (shm_open(3))"
        yield Path(directory)


def test_the_disk_of_a_root_in_memory_is_room_that_the_machine_has(in_memory: Path) -> None:
    disk = in_memory / "disk.raw"
    disk.touch()
    os.truncate(disk, 300 * MIB)
    assert disk_in_memory(str(in_memory)) == 300 * MIB
    (in_memory / "disk.1.qcow2").write_bytes(
        b"QFI\xfb" + bytes(20) + (400 * MIB).to_bytes(8, "big")
    )
    assert disk_in_memory(str(in_memory)) == 400 * MIB


def test_so_is_that_of_a_machine_that_starts_from_a_disk(in_memory: Path) -> None:
    head = b"QFI\xfb" + bytes(20) + (500 * MIB).to_bytes(8, "big")
    (in_memory / "disk.qcow2").write_bytes(head)
    assert disk_in_memory(str(in_memory)) == 500 * MIB


def test_a_disk_that_can_be_written_out_is_not(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").touch()
    os.truncate(tmp_path / "disk.raw", 300 * MIB)
    assert disk_in_memory(str(tmp_path)) == (300 * MIB if is_in_memory(str(tmp_path)) else 0)


def test_the_limit_of_the_group_has_room_for_it() -> None:
    asked = Resources(memory=256 * MIB)
    plain, more = (group_limits(asked, 256 * MIB, disk=disk) for disk in (0, 300 * MIB))
    assert plain.memory is not None
    assert more.memory == plain.memory + 300 * MIB
    assert more.memory_swap == 2 * more.memory
    assert group_limits(Resources(), 256 * MIB, disk=300 * MIB).memory is None
