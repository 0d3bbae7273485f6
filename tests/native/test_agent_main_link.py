"""The main process's link standing still, and going on under another monitor."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest

from hutch.plan import guest, ops
from hutch.process import frames
from tests.native import guests
from tests.native.guests import ATTACH_ALL, Peer, Remote
from tests.requires import requires

pytestmark = [requires("root", "busybox", "cc"), pytest.mark.integration]

COUNT = "i=0; while :; do i=$((i+1)); echo $i; done"


def start(peer: Peer, script: str) -> Remote:
    plan = ops.Plan(
        supervision=ops.Supervision(linger=False, stdin_open=True),
        child=(ops.Exec(argv=("/bin/sh", "-c", script), env=("PATH=/usr/bin:/bin",)),),
    )
    remote = Remote(peer, guests.SPAWN, plan, ATTACH_ALL)
    remote.until(frames.STARTED)
    return remote


def taken(remote: Remote) -> None:
    """Take the frames that have come whole; the link stands between two of them."""
    while remote.channel.received:
        kind, flag, payload = remote.channel.supervisor_frame()
        if kind == frames.OUTPUT:
            remote.output[flag] += payload


def counted(output: bytes) -> int:
    """Return how far the counter has come, with nothing left out."""
    numbers = output.decode().split("\n")[:-1]
    assert numbers == [str(n + 1) for n in range(len(numbers))]
    return len(numbers)


@pytest.mark.parametrize("padding", [b"", guests.PADDING], ids=["at once", "after padding"])
def test_an_adopted_process_goes_on_where_its_output_stopped(peer: Peer, padding: bytes) -> None:
    before = start(peer, COUNT)
    before.until_output(b"\n5000\n")
    assert peer.call(guest.Call.QUIESCE).errno == 0
    taken(before)
    peer.send(padding)
    peer.hello(b"another!", keep=True)
    after = Remote(peer, guests.ADOPT)
    after.say(frames.QUERY)
    phase, pid, _ = struct.unpack_from("<Iii", after.until(frames.STATE))
    assert phase == 1 and pid > 0
    after.until(frames.OUTPUT)
    whole = before.output[1] + after.output[1]
    assert counted(whole[: whole.rindex(b"\n") + 1]) > 5000
    assert after.output[1]


def test_input_goes_on_as_well(peer: Peer) -> None:
    before = start(peer, "cat")
    before.say(frames.STDIN, b"first ")
    before.until_output(b"first ")
    assert peer.call(guest.Call.QUIESCE).errno == 0
    taken(before)
    peer.hello(keep=True)
    after = Remote(peer, guests.ADOPT)
    after.say(frames.STDIN, b"second")
    after.until_output(b"second")
    after.say(frames.STDIN_EOF)
    assert after.wait().code == 0


def test_a_quiet_link_says_nothing_until_it_resumes(peer: Peer) -> None:
    remote = start(peer, COUNT)
    remote.until_output(b"\n100\n")
    assert peer.call(guest.Call.QUIESCE).errno == 0
    taken(remote)
    held = len(remote.channel.received)
    assert peer.call(guest.Call.PING).errno == 0
    assert len(remote.channel.received) == held == 0
    assert peer.call(guest.Call.RESUME).errno == 0
    for _ in range(20):
        remote.until(frames.OUTPUT)
    whole = remote.output[1]
    assert counted(whole[: whole.rindex(b"\n") + 1]) > 100


def test_quiet_is_at_the_end_of_a_frame_that_waits_for_credit(peer: Peer) -> None:
    """A frame of which only a part had credit is finished before the answer."""
    remote = start(peer, "read go; yes 0123456789abcde | head -c 1000000; cat")
    remote.channel.generous = False
    remote.say(frames.STDIN, b"\n")
    while remote.channel.granted:
        peer.turn()
    asked = peer.open(guests.CALL)
    asked.write(guest.encode_call(guest.Call.QUIESCE))
    asked.eof()
    remote.channel.grant()
    assert asked.rest()[:4] == bytes(4)
    taken(remote)
    assert set(remote.output[1].split(b"\n")[:-1]) == {b"0123456789abcde"}


def test_an_ended_process_cannot_be_held(peer: Peer) -> None:
    assert peer.call(guest.Call.QUIESCE).errno == errno.ESRCH
    assert start(peer, "exit 3").wait().code == 3
    assert peer.call(guest.Call.QUIESCE).errno == errno.ESRCH


def test_without_a_kept_link_there_is_nothing_to_adopt(peer: Peer) -> None:
    start(peer, "cat")
    assert peer.open(guests.ADOPT).closed() == errno.ESRCH  # it has its channel
    peer.hello()
    assert peer.open(guests.ADOPT).closed() == errno.ESRCH


def test_a_hello_that_keeps_nothing_ends_the_process(peer: Peer, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    plan = f"exec sleep 1000 >{fifo}"
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    start(peer, plan)
    os.set_blocking(reader, True)
    peer.hello(keep=True)
    peer.hello(keep=False)
    assert os.read(reader, 1) == b""  # its only writer has ended
    os.close(reader)


def test_only_the_main_link_is_kept(peer: Peer) -> None:
    start(peer, "cat")
    files = peer.open(guests.FILES)
    beside = Remote(
        peer,
        guests.EXEC,
        ops.Plan(
            supervision=ops.Supervision(linger=False),
            child=(ops.Exec(argv=("/bin/sleep", "1000"), env=()),),
            slots=1,
        ),
        ATTACH_ALL,
    )
    beside.until(frames.STARTED)
    before = guests.descriptors(peer.pid)
    assert peer.call(guest.Call.QUIESCE).errno == 0
    peer.hello(keep=True)
    assert peer.call(guest.Call.PING).errno == 0
    assert guests.descriptors(peer.pid) == before - 2
    assert files.error == beside.channel.error == -1  # nothing more was said about them


def test_a_file_is_rewritten_where_it_is(peer: Peer, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(b"127.0.0.1 long-name\n")
    path.chmod(0o640)
    before = path.stat()
    assert peer.setup(guest.Rewrite(path=str(path), content=b"short\n")).errno == 0
    assert path.read_bytes() == b"short\n"
    assert (path.stat().st_ino, path.stat().st_mode) == (before.st_ino, before.st_mode)
    missing = guest.Rewrite(path=f"{tmp_path}/absent", content=b"")
    assert peer.setup(missing).errno == errno.ENOENT


def test_a_device_that_is_not_there_has_no_addresses_to_lose(peer: Peer) -> None:
    answer = peer.setup(guest.Flush(interface="absent0"))
    assert (answer.errno, answer.detail) == (errno.ENODEV, "absent0")
