"""Files as block devices: which device is made of which file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hutch.linux import mount as linux
from hutch.linux.loop import attached_device, held_device, loop_device
from tests.requires import requires

MIB = 1 << 20


def _file(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.truncate(fd, MIB)
    return fd


@requires("root", "loop")
@pytest.mark.integration
def test_a_device_is_that_of_its_file_and_of_no_other_of_the_same_path(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    path = str(tmp_path / "here/disk.raw")
    first, second = _file(tmp_path / "here/disk.raw"), _file(tmp_path / "there/disk.raw")
    try:
        with loop_device(first) as device:
            assert attached_device(path) == device
            with held_device(path) as held:
                assert held == device
            linux.mount(str(tmp_path / "there"), str(tmp_path / "here"), None, linux.MS_BIND)
            try:
                assert attached_device(path) == ""
                with held_device(path) as held:
                    assert held == ""
            finally:
                linux.umount2(str(tmp_path / "here"), linux.MNT_DETACH)
            assert attached_device(path) == device
        assert attached_device(path) == ""
    finally:
        os.close(first)
        os.close(second)
