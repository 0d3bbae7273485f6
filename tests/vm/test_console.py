"""The console's log: what the guest's kernel said of programs that it killed."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from hutch.drivers.vm import console
from hutch.drivers.vm.boot import CONSOLE_SOCKET
from hutch.engine.console import Console
from hutch.errors import Busy, Unavailable

_KILLED = b"[    6.5] Out of memory: Killed process 88 (sh) total-vm:100572kB, UID:0\n"
_LIMITED = b"[    7.1] Memory cgroup out of memory: Killed process 90 (python3)\n"


def test_kills_of_this_start_are_counted(tmp_path: Path) -> None:
    log = tmp_path / console.LOG
    log.write_bytes(_KILLED)
    console.begin_logs(str(tmp_path))
    assert console.count_oom_kills(str(tmp_path)) == 0
    log.write_bytes(_KILLED + b"something else\n" + _KILLED + _LIMITED)
    assert console.count_oom_kills(str(tmp_path)) == 3


def test_a_machine_that_never_started_has_no_kills(tmp_path: Path) -> None:
    assert console.count_oom_kills(str(tmp_path)) == 0
    assert console.last_words(str(tmp_path), 100) == b""


def test_the_logs_of_the_last_two_starts_are_kept(tmp_path: Path) -> None:
    for number in range(3):
        console.begin_logs(str(tmp_path))
        (tmp_path / console.LOG).write_bytes(b"start %d\n" % number)
        (tmp_path / "qemu.log").write_bytes(b"qemu %d\n" % number)
    assert sorted(path.read_bytes() for path in tmp_path.iterdir()) == [
        b"qemu 1\n", b"qemu 2\n", b"start 1\n", b"start 2\n",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"", ""),
        (b"warning: something\n", ""),
        (b"first\nhutch-vmm: it went\n", "it went"),
        (b"hutch-vmm: it went\nterminating on signal 15\n", "it went"),
        (b"hutch-vmm: a \x1b[2J bell\x07\n", "a ?[2J bell?"),
        (b"hutch-vmm: it went\n" + b"gone\n" * 10000, "it went"),
        (b"hutch-vmm: " + b"x" * 100000 + b"\n", ""),
    ],
)
def test_why_a_machine_was_lost_is_what_its_monitor_said(
    tmp_path: Path, said: bytes, reason: str
) -> None:
    assert console.monitors_words(str(tmp_path)) == ""
    (tmp_path / console.QEMU_LOG).write_bytes(said)
    assert console.monitors_words(str(tmp_path)) == reason


@pytest.mark.parametrize(
    ("limit", "shown"), [(99, b"start 1\nstart 2\n"), (10, b"1\nstart 2\n"), (3, b" 2\n")]
)
def test_the_last_words_are_of_both(tmp_path: Path, limit: int, shown: bytes) -> None:
    for number in range(3):
        console.begin_logs(str(tmp_path))
        (tmp_path / console.LOG).write_bytes(b"start %d\n" % number)
    assert console.last_words(str(tmp_path), limit) == shown


def test_a_console_is_one_clients_and_a_guest_that_reads_nothing_holds_nobody(
    tmp_path: Path,
) -> None:
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / CONSOLE_SOCKET
    with socket.socket(socket.AF_UNIX) as qemu, ExitStack() as held:
        qemu.bind(os.path.relpath(path))
        qemu.listen(4)
        first = Console(console.connect(str(tmp_path), held), held.pop_all())
        with pytest.raises(Busy, match="somebody else"), ExitStack() as more:
            console.connect(str(tmp_path), more)
        while first.try_send(bytes(1 << 16)):
            pass
        first.close()
        with ExitStack() as more:
            console.connect(str(tmp_path), more).close()
    (tmp_path / "run" / CONSOLE_SOCKET).unlink()
    with pytest.raises(Unavailable), ExitStack() as more:
        console.connect(str(tmp_path), more)
