"""The console's log: what the guest's kernel said of programs that it killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from hutch.drivers.vm import console

_KILLED = b"[    6.5] Out of memory: Killed process 88 (sh) total-vm:100572kB, UID:0\n"
_LIMITED = b"[    7.1] Memory cgroup out of memory: Killed process 90 (python3)\n"


def test_kills_of_this_start_are_counted(tmp_path: Path) -> None:
    log = tmp_path / console.LOG
    log.write_bytes(_KILLED)
    start = console.log_size(str(tmp_path))
    assert console.count_oom_kills(str(tmp_path), start) == 0
    log.write_bytes(_KILLED + b"something else\n" + _KILLED + _LIMITED)
    assert console.count_oom_kills(str(tmp_path), start) == 2


def test_a_machine_that_never_started_has_no_kills(tmp_path: Path) -> None:
    assert console.log_size(str(tmp_path)) == 0
    assert console.count_oom_kills(str(tmp_path), 0) == 0


@pytest.mark.parametrize(("size", "left"), [(1 << 20, 1 << 20), (5 << 20, 0)])
def test_a_long_log_is_emptied_before_a_start(tmp_path: Path, size: int, left: int) -> None:
    (tmp_path / console.LOG).write_bytes(bytes(size))
    console.trim(str(tmp_path))
    assert console.log_size(str(tmp_path)) == left
