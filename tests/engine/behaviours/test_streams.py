"""What goes in and comes out: standard streams, terminals, attaching, logs."""

from __future__ import annotations

import time

import pytest

from hutch.engine import Session
from hutch.process.frames import Output
from tests.engine.behaviours.conftest import Maker
from tests.engine.behaviours.waiting import DEADLINE_S, until


def _read_until(session: Session, end: bytes) -> bytes:
    """Return what a session shows up to and with `end`."""
    seen = b""
    for piece in session.output(DEADLINE_S):
        if isinstance(piece, Output):
            seen += piece.data
        if end in seen:
            return seen
    return seen


def test_output_and_errors_are_apart(make: Maker) -> None:
    done = make.sh("echo out; echo err >&2")
    assert (done.stdout, done.stderr) == (b"out\n", b"err\n")


def test_input_reaches_the_program_whole(make: Maker) -> None:
    data = bytes(range(256)) * 2048
    done = make.run("cat", input=data)
    assert done.stdout == data


def test_without_input_the_program_reads_its_end(make: Maker) -> None:
    assert make.sh("wc -c").text.strip() == "0"


def test_a_lot_of_output_arrives_whole(make: Maker) -> None:
    done = make.sh("dd if=/dev/zero bs=64k count=64 2>/dev/null | tr '\\0' x; echo end >&2")
    assert (len(done.stdout), done.stdout[:1], done.stderr) == (4 << 20, b"x", b"end\n")


def test_a_terminal_has_the_size_that_was_asked_for_and_follows(make: Maker) -> None:
    script = "stty size; trap 'stty size; exit 0' WINCH; echo ready; while :; do sleep 0.1; done"
    with (
        make.create(script, tty=True, interactive=True) as one,
        one.start_attached(rows=33, columns=101) as session,
    ):
        assert b"33 101\r\n" in _read_until(session, b"ready\r\n")
        session.resize(44, 120)
        assert b"44 120\r\n" in _read_until(session, b"44 120\r\n")
        assert session.wait(DEADLINE_S) == 0


def test_a_terminal_sends_its_signals(make: Maker) -> None:
    script = "trap 'exit 77' INT; echo up; while :; do sleep 0.1; done"
    with (
        make.create(script, tty=True, interactive=True) as one,
        one.start_attached(rows=24, columns=80) as session,
    ):
        _read_until(session, b"up\r\n")
        session.send(b"\x03")
        assert session.wait(DEADLINE_S) == 77


def test_attaching_shows_what_comes_and_detaching_ends_nothing(make: Maker) -> None:
    with make.start("while read line; do echo got $line; done", interactive=True) as one:
        with one.attach() as session:
            session.send(b"first\n")
            assert b"got first\n" in _read_until(session, b"got first\n")
        with one.attach() as session:
            session.send(b"second\n")
            assert b"got second\n" in _read_until(session, b"got second\n")
            session.close_stdin()
            assert session.wait(DEADLINE_S) == 0


def test_two_who_are_attached_see_the_same(make: Maker) -> None:
    with (
        make.start("read line; echo got $line", interactive=True) as one,
        one.attach() as left,
        one.attach(stdin=False) as right,
    ):
        left.send(b"it\n")
        assert _read_until(left, b"got it\n") == _read_until(right, b"got it\n")


def test_logs_are_both_streams_in_order_with_their_times(make: Maker) -> None:
    # Whoever reads two pipes late cannot tell which was written to first.
    script = (
        "echo one; until test -e /a; do sleep 0.01; done; echo two >&2;"
        "until test -e /b; do sleep 0.01; done; echo three"
    )
    with make.start(script) as one:
        before = time.time_ns() - int(3600e9)
        for number, name in enumerate(("/a", "/b"), 1):
            until(lambda wanted=number: len(list(one.logs())) == wanted, "not logged")  # type: ignore[misc]
            one.files.write(name, b"")
        one.wait(timeout=DEADLINE_S)
        records = list(one.logs())
        assert [(r.stream, r.data) for r in records] == [
            (1, b"one\n"),
            (2, b"two\n"),
            (1, b"three\n"),
        ]
        times = [record.time_ns for record in records]
        assert before < times[0] and times == sorted(times)
        assert [r.data for r in one.logs(tail=1)] == [b"three\n"]
        assert [r.data for r in one.logs(stdout=False)] == [b"two\n"]
        # A float of seconds is less than exact: half a microsecond later.
        assert [r.data for r in one.logs(since=times[0] / 1e9 + 0.001)] == [b"two\n", b"three\n"]


def test_following_the_logs_ends_with_the_program(make: Maker) -> None:
    with make.start("for i in 1 2 3; do echo $i; sleep 0.05; done") as one:
        assert [record.data for record in one.logs(follow=True)] == [b"1\n", b"2\n", b"3\n"]


def test_no_log_is_kept_when_none_is_wanted(make: Maker) -> None:
    with make.start("echo unseen", log_driver="none") as one:
        one.wait(timeout=DEADLINE_S)
        assert not list((make.engine.root / "instances" / one.id).glob("log*"))


@pytest.mark.parametrize("streams", ["stdout", "stderr"])
def test_one_stream_alone_can_be_attached(make: Maker, streams: str) -> None:
    with make.start("read line; echo out; echo err >&2", interactive=True) as one:
        wanted = {"stdout": streams == "stdout", "stderr": streams == "stderr"}
        with one.attach(**wanted) as session, one.attach() as feeder:
            feeder.send(b"\n")
            seen = b"".join(p.data for p in session.output(DEADLINE_S) if isinstance(p, Output))
        assert seen == (b"out\n" if streams == "stdout" else b"err\n")
        until(lambda: one.info().exit_code == 0, "still running")
