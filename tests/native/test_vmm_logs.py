"""What QEMU and the guest's console say is kept, first and last, in files of bounded size."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hutch.process import MachineFailed
from tests.native.machines import WAIT_S, Machines
from tests.requires import requires

pytestmark = [requires("root", "cc"), pytest.mark.integration]

KEPT = 1 << 20  # of the beginning, and of the end
MOST = 4 << 20
LINE = 64


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Both ends of the pipe that the console is written to."""
    ends = os.pipe2(os.O_CLOEXEC)
    yield ends
    for end in ends:
        os.close(end)


def lines(count: int) -> bytes:
    """Lines of one length, numbered."""
    return b"".join(b"%063d\n" % number for number in range(count))


def flood(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def check(log: Path, written: bytes) -> None:
    """Check what is kept of so much."""
    kept = log.read_bytes()
    assert 2 * KEPT <= len(kept) <= MOST
    assert kept[:KEPT] == written[:KEPT]
    assert kept[-KEPT:] == written[-KEPT:]
    note, _, rest = kept[KEPT + 1 :].partition(b"\n")
    left_out = int(note.removeprefix(b"[").removesuffix(b" bytes are left out here]"))
    assert written[KEPT + left_out :] == rest


def test_a_console_that_is_flooded_keeps_its_beginning_and_its_end(
    machines: Machines, pipe: tuple[int, int]
) -> None:
    written = lines(20 * KEPT // LINE)
    with machines.run(said=pipe[0], volatile=True) as machine:
        peer = machine.boot()
        flood(pipe[1], written)
        peer.exit(0)
        assert machine.supervisor.wait(WAIT_S).code == 0
    check(machines.directory / "console.log", written)


def test_a_qemu_that_floods_is_bounded_and_its_last_words_are_kept(machines: Machines) -> None:
    count = 12 * KEPT // LINE
    script = f"seq -f %063.0f 0 {count - 1}; exit 7"
    with (
        machines.run(qemu=("/bin/sh", "-c", script)) as machine,
        pytest.raises(MachineFailed, match="qemu ended with status 7"),
    ):
        machine.link.wait_started(WAIT_S)
    check(machines.directory / "qemu.log", lines(count))


def test_a_little_is_kept_whole_and_goes_on_where_the_file_ends(
    machines: Machines, pipe: tuple[int, int]
) -> None:
    (machines.directory / "console.log").write_bytes(b"before\n")
    with machines.run(said=pipe[0], volatile=True) as machine:
        peer = machine.boot()
        flood(pipe[1], b"booting\n")
        peer.exit(0)
        machine.supervisor.wait(WAIT_S)
    assert (machines.directory / "console.log").read_bytes() == b"before\nbooting\n"


def test_qemu_has_no_descriptor_of_the_files(machines: Machines) -> None:
    script = "readlink /proc/self/fd/* >&2; exit 1"
    with machines.run(qemu=("/bin/sh", "-c", script)) as machine, pytest.raises(MachineFailed):
        machine.link.wait_started(WAIT_S)
    said = (machines.directory / "qemu.log").read_text()
    assert "pipe:" in said
    assert ".log" not in said
