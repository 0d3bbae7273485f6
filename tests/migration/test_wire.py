"""The frames and streams of the protocol, and what breaks it."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hutch.engine.migrate_live import resumed_after
from hutch.errors import (
    Exhausted,
    HutchError,
    IntegrityError,
    InvalidArgument,
    OperationTimeout,
    Unavailable,
)
from hutch.linux.files import punch_hole
from hutch.migration.links import parse_destination
from hutch.migration.messages import Commit, Committed, Failed, Forget, Hello, failure
from hutch.migration.streams import (
    Pieces,
    SentBlocks,
    pack_ahead,
    pack_changes,
    pack_file,
    unpack_changes,
    unpack_file,
)
from hutch.migration.wire import DATA_LIMIT, Ended, Wire


class Ends:
    """A wire, and the descriptors of the other side."""

    def __init__(self, timeout_s: float) -> None:
        read, self.write = os.pipe()
        self.read, write = os.pipe()
        self.fds = [read, write, self.read, self.write]
        self.wire = Wire(read, write, peer="peer", timeout_s=timeout_s)
        os.set_blocking(self.write, False)

    def end(self) -> None:
        os.close(self.write)
        self.fds.remove(self.write)


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends(5.0)
    yield made
    for fd in made.fds:
        os.close(fd)


def frame(kind: int, payload: bytes, zero: bytes = b"\0\0\0", length: int | None = None) -> bytes:
    return struct.pack("<B3sI", kind, zero, len(payload) if length is None else length) + payload


def test_a_message_and_a_stream_come_as_they_were_sent(ends: Ends) -> None:
    ends.wire.greet()
    ends.wire.send(Commit(token="t"))
    ends.wire.send_stream([b"one", b"", b"x" * (DATA_LIMIT // 8)])
    os.write(ends.write, os.read(ends.read, 1 << 20))
    ends.wire.meet()
    assert ends.wire.expect(Commit) == Commit(token="t")
    assert b"".join(ends.wire.stream()) == b"one" + b"x" * (DATA_LIMIT // 8)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (frame(9, b""), "frame of kind 9"),
        (frame(2, b"data"), "where a message was due"),
        (frame(1, b"{}", zero=b"\0\1\0"), "frame of kind 1"),
        (frame(1, b"", length=(8 << 20) + 1), "8388609 bytes"),
        (frame(2, b"", length=DATA_LIMIT + 1), "262145 bytes"),
        (frame(1, b"{"), "message"),
        (frame(1, b'{"type":"commit","token":"\xff"}'), "message: .*UTF-8"),
        (frame(1, b'{"type":"commit","x":' + b"[" * 20_000), "message: nested too deeply"),
        (frame(1, b'{"type":"other"}'), "message"),
        (frame(1, b'{"type":"commit","token":7}'), "message"),
        (frame(1, b'{"type":"forget","token":"t"}'), "Forget where Commit was due"),
    ],
)
def test_a_broken_peer_is_told_by_what_it_broke(ends: Ends, data: bytes, told: str) -> None:
    os.write(ends.write, data)
    with pytest.raises(IntegrityError, match=told):
        ends.wire.expect(Commit)


def test_a_message_in_a_stream_that_is_none_is_the_peers_fault(ends: Ends) -> None:
    os.write(ends.write, frame(2, b"data") + frame(1, b"{"))
    with pytest.raises(IntegrityError, match="message: "):
        list(ends.wire.stream())


def test_what_the_other_side_failed_with_is_raised_here(ends: Ends) -> None:
    payload = b'{"type":"failed","kind":"Exhausted","message":"no room","hint":"make some"}'
    os.write(ends.write, frame(1, payload))
    with pytest.raises(Exhausted, match="peer: no room") as caught:
        ends.wire.expect(Hello)
    assert caught.value.hint == "make some"


def test_its_reason_goes_before_a_broken_pipe(ends: Ends) -> None:
    os.write(ends.write, frame(1, b'{"type":"failed","kind":"Exhausted","message":"no room"}'))
    ends.end()
    os.close(ends.read)
    ends.fds.remove(ends.read)
    with pytest.raises(Exhausted, match="no room"):
        ends.wire.send_stream([b"x"])


def test_the_end_of_the_link_is_told_from_its_loss(ends: Ends) -> None:
    os.write(ends.write, frame(1, b'{"type":"commit","token":"t"}')[:12])
    ends.end()
    with pytest.raises(Unavailable, match="closed the link") as caught:
        ends.wire.receive()
    assert not isinstance(caught.value, Ended)
    with pytest.raises(Ended):
        ends.wire.receive()


def test_a_silent_peer_is_given_up() -> None:
    made = Ends(0.01)
    with pytest.raises(OperationTimeout, match="nothing came"):
        made.wire.receive()
    for fd in made.fds:
        os.close(fd)


@pytest.mark.parametrize(
    "error",
    [Exhausted("full", hint="room"), InvalidArgument("bad"), KeyboardInterrupt(), OSError()],
)
def test_every_failure_can_be_told(error: BaseException) -> None:
    told = failure(error)
    assert isinstance(told, Failed)
    assert told.message
    if isinstance(error, HutchError):
        assert told.kind == type(error).__name__


def test_a_message_that_names_no_error_of_ours_is_still_a_failure(ends: Ends) -> None:
    os.write(ends.write, frame(1, b'{"type":"failed","kind":"SystemExit","message":"x"}'))
    with pytest.raises(Unavailable, match="x"):
        ends.wire.receive()
    assert Forget(token="t").token == "t"


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 40), st.binary(min_size=1, max_size=5000)), max_size=6))
def test_a_sparse_file_comes_with_its_bytes_and_holes(
    tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[int, bytes]]
) -> None:
    directory = tmp_path_factory.mktemp("sparse")
    with open(directory / "a", "wb+") as file:
        os.truncate(file.fileno(), 1 << 20)
        for at, data in writes:
            os.pwrite(file.fileno(), data, at * 16384)
        unpack_file(pack_file(file.fileno()), str(directory / "b"), limit=1 << 20)
    assert (directory / "a").read_bytes() == (directory / "b").read_bytes()


Writes = list[tuple[int, bytes]]
WRITES = st.lists(
    st.tuples(st.integers(0, 1 << 20), st.binary(max_size=5000).map(lambda b: b * 30)), max_size=5
)


@settings(deadline=None, max_examples=40)
@given(WRITES, WRITES, st.lists(st.integers(0, 15), max_size=4), st.booleans())
@example([(0, b"x" * 30)], [(1048574, b"grown" * 200)], [], False)
def test_changes_after_a_copy_that_was_written_to_make_it_whole(
    tmp_path_factory: pytest.TempPathFactory,
    before: Writes,
    meanwhile: Writes,
    punched: list[int],
    longer: bool,
) -> None:
    directory = tmp_path_factory.mktemp("ahead")
    sent: SentBlocks = {}
    with open(directory / "a", "wb+") as file:
        fd = file.fileno()
        os.truncate(fd, (1 << 20) + 777)
        for at, data in before:
            os.pwrite(fd, data, at)
        pieces = pack_ahead(fd, sent)
        first = [next(pieces)]
        for at, data in meanwhile:
            first += [piece for piece in (next(pieces, b""),) if piece]
            os.pwrite(fd, data, at)
        unpack_file([*first, *pieces], str(directory / "b"), limit=1 << 30)
        for number in punched:
            punch_hole(fd, number << 16, 1 << 16)
        if longer:
            os.truncate(fd, 1 << 22)
        unpack_changes(pack_changes(fd, sent), str(directory / "b"), limit=1 << 30)
        assert sum(map(len, pack_changes(fd, blocks_of(fd)))) < 100
    assert (directory / "a").read_bytes() == (directory / "b").read_bytes()


def blocks_of(fd: int) -> SentBlocks:
    sent: SentBlocks = {}
    for _ in pack_ahead(fd, sent):
        pass
    return sent


def test_a_hole_takes_no_room(tmp_path: Path) -> None:
    with open(tmp_path / "a", "wb+") as file:
        os.truncate(file.fileno(), 1 << 40)
        os.pwrite(file.fileno(), b"x", 1 << 39)
        sent = list(pack_file(file.fileno()))
    unpack_file(sent, str(tmp_path / "b"), limit=1 << 40)
    assert sum(map(len, sent)) < 1 << 20
    assert (tmp_path / "b").stat().st_blocks * 512 < 1 << 20


def run(*parts: int) -> bytes:
    return struct.pack(f"<{len(parts)}Q", *parts)


@pytest.mark.parametrize(
    "data",
    [
        b"short",
        run(1 << 41),
        run(100, 90, 20) + b"x" * 20 + run(100, 0),
        run(100, 50, 10) + b"x" * 10 + run(40, 10) + b"x" * 10 + run(100, 0),
        run(100, 0, 10) + b"x" * 10,
        run(100, 100, 0) + b"more",
        run(1 << 30, 0, 1 << 29),
        run(100, 2**64 - 5, 10) + b"x" * 10,
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(IntegrityError):
        unpack_file([data], str(tmp_path / "file"), limit=1 << 40)


def test_pieces_read_like_a_file() -> None:
    stream = Pieces([b"ab", b"", b"cdef"])
    assert [stream.read(1), stream.read(5), stream.read(3), stream.read()] == [
        b"a",
        b"b",
        b"cde",
        b"f",
    ]
    assert stream.read(1) == b""


@pytest.mark.parametrize(
    ("text", "argv"),
    [
        ("ssh://host", "host hutch _migrate_target"),
        ("ssh://user@host:22/srv/a b", "-p22 user@host hutch --root '/srv/a b' _migrate_target"),
    ],
)
def test_ssh_destinations_quote_what_a_shell_there_sees(text: str, argv: str) -> None:
    found = parse_destination(text).argv
    shown = " ".join(word for word in found[5:] if word != "--")
    assert found[0] == "ssh"
    assert shown.replace("  ", " ") == argv


def test_a_host_that_looks_like_an_option_stays_a_host() -> None:
    argv = parse_destination("ssh://-oProxyCommand=x/").argv
    assert argv[argv.index("--") + 1].lower() == "-oproxycommand=x"


@pytest.mark.parametrize(
    ("answered_s", "expected"), [(0.05, 0.06), (0.25, 0.01), (0.0, 0.01)], ids=str
)
def test_the_way_of_the_commit_counts_as_downtime(answered_s: float, expected: float) -> None:
    """Half of what the answer was under way for beside what the target took; nothing where
    the target does not say how long that was."""
    committed = Committed(resumed_s=0.01, answered_s=answered_s)
    assert resumed_after(committed, 0.15) == pytest.approx(expected)
