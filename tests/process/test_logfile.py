"""Reading logs: tails, spans of time, rotation, half-written lines, and following."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hutch.process import LogRecord, logfile, read_log
from tests.leaks import open_files


def line(number: int, text: str = "", letter: str = "o") -> bytes:
    return b"%d %s %s\n" % (number, letter.encode(), text.encode() or b"line %d" % number)


def write(path: Path, numbers: range) -> None:
    path.write_bytes(b"".join(line(n) for n in numbers))


def numbers(records: Iterator[LogRecord]) -> list[int]:
    return [record.time_ns for record in records]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def test_a_missing_log_is_empty(log: Path) -> None:
    assert list(read_log(str(log))) == []
    assert list(read_log(str(log), tail=5)) == []
    assert list(read_log(str(log), follow=True, stop=lambda: True)) == []


def test_records_have_their_stream_and_exact_bytes(log: Path) -> None:
    log.write_bytes(
        line(1, "out") + line(2, "err", "e") + b"3 O part\n4 o \xff\x00 rest\n5 E \n6 o \n"
    )
    assert list(read_log(str(log))) == [
        LogRecord(1, 1, b"out\n"),
        LogRecord(2, 2, b"err\n"),
        LogRecord(3, 1, b"part"),
        LogRecord(4, 1, b"\xff\x00 rest\n"),
        LogRecord(5, 2, b""),
        LogRecord(6, 1, b"\n"),
    ]


@pytest.mark.parametrize("bad", [b"", b"x", b"1 o", b"1 q x", b"o x y", b" o x", b"12"])
def test_a_line_that_is_no_record_is_passed_over(log: Path, bad: bytes) -> None:
    log.write_bytes(line(1) + bad + b"\n" + line(2) + b"3 o cut sho")
    assert numbers(read_log(str(log))) == [1, 2]


def test_rotated_files_come_first(log: Path) -> None:
    for index, suffix in enumerate([".2", ".1", ""]):
        write(Path(f"{log}{suffix}"), range(index * 10, index * 10 + 10))
    assert numbers(read_log(str(log))) == list(range(30))


@pytest.mark.parametrize("tail", [0, 1, 9, 10, 11, 20, 25, 30, 99])
def test_a_tail_reaches_into_rotated_files(log: Path, tail: int) -> None:
    for index, suffix in enumerate([".2", ".1", ""]):
        write(Path(f"{log}{suffix}"), range(index * 10, index * 10 + 10))
    assert numbers(read_log(str(log), tail=tail)) == list(range(30))[30 - min(tail, 30) :]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 90000)), max_size=12),
    st.integers(0, 14),
)
def test_a_tail_counts_lines_not_pieces(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[bool, int]], tail: int
) -> None:
    log = tmp_path_factory.mktemp("log") / "log"
    records = [
        LogRecord(n, 1, b"x" * size + (b"\n" if whole else b""))
        for n, (whole, size) in enumerate(pieces)
    ]
    log.write_bytes(
        b"".join(
            b"%d %s %s\n" % (n, b"o" if whole else b"O", b"x" * size)
            for n, (whole, size) in enumerate(pieces)
        )
    )
    lines: list[list[LogRecord]] = [[]]
    for record in records:
        lines[-1].append(record)
        if record.data.endswith(b"\n"):
            lines.append([])
    if not lines[-1]:
        lines.pop()
    wanted = [
        record
        for group in lines[len(lines) - tail if tail < len(lines) else 0 :]
        for record in group
    ]
    assert list(read_log(str(log), tail=tail)) == wanted


def test_since_and_until_bound_the_time(log: Path) -> None:
    write(log, range(10))
    assert numbers(read_log(str(log), since_ns=3, until_ns=6)) == [3, 4, 5, 6]


def follower(
    log: Path, ended: threading.Event, **options: int
) -> tuple[threading.Thread, list[int]]:
    seen: list[int] = []

    def run() -> None:
        for record in read_log(str(log), follow=True, stop=ended.is_set, **options):
            seen.append(record.time_ns)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, seen


def wait_for(seen: list[int], last: int) -> None:
    import time

    deadline = time.monotonic() + 60
    while last not in seen:
        assert time.monotonic() < deadline, f"{last} never came"
        time.sleep(0.005)


def test_following_sees_what_is_appended_and_ends_when_told(log: Path) -> None:
    write(log, range(3))
    ended = threading.Event()
    thread, seen = follower(log, ended)
    wait_for(seen, 2)
    with log.open("ab") as file:
        file.write(line(3) + b"4 o hal")
        file.flush()
        wait_for(seen, 3)
        file.write(b"f\n" + line(5))
    ended.set()
    thread.join(60)
    assert not thread.is_alive()
    assert seen == [0, 1, 2, 3, 4, 5]


def test_following_begins_with_a_log_that_is_not_there_yet(log: Path) -> None:
    ended = threading.Event()
    thread, seen = follower(log, ended)
    write(log, range(2))
    wait_for(seen, 1)
    ended.set()
    thread.join(60)
    assert seen == [0, 1]


def test_following_goes_through_rotations(log: Path) -> None:
    """Rotate as the supervisor does, several times between two looks of the reader."""
    log.touch()
    ended = threading.Event()
    thread, seen = follower(log, ended)
    for start in range(0, 300, 10):
        with log.open("ab") as file:
            file.write(b"".join(line(n) for n in range(start, start + 10)))
        if start % 60 == 50:  # the reader catches up before the oldest is lost
            wait_for(seen, start + 9)
        for index in range(8, 0, -1):
            source = f"{log}.{index - 1}" if index > 1 else str(log)
            if os.path.exists(source):
                os.rename(source, f"{log}.{index}")
        log.touch()
    ended.set()
    thread.join(60)
    assert seen == list(range(300))


def renames(log: Path) -> Iterator[None]:
    """Rotate as the supervisor does, for ever, one step at a time; each file has one record."""
    number = 3
    while True:
        for index in range(8, 0, -1):
            source = f"{log}.{index - 1}" if index > 1 else str(log)
            if os.path.exists(source):
                os.rename(source, f"{log}.{index}")
                yield
        number += 1
        write(log, range(number, number + 1))
        yield


@pytest.mark.parametrize("before", range(9))
@pytest.mark.parametrize("steps", range(1, 11))
def test_a_rotation_while_the_files_are_opened_hides_none(
    log: Path, monkeypatch: pytest.MonkeyPatch, before: int, steps: int
) -> None:
    """Take `steps` of rotations when the reader has opened `before` files."""
    for index, suffix in enumerate([".3", ".2", ".1", ""]):
        write(Path(f"{log}{suffix}"), range(index, index + 1))
    rotation, opened, plain = renames(log), 0, logfile._open

    def open_and_rotate(path: str) -> int | None:
        nonlocal opened
        if opened == before:
            for _ in range(steps):
                next(rotation)
        opened += 1
        return plain(path)

    monkeypatch.setattr(logfile, "_open", open_and_rotate)
    seen = numbers(read_log(str(log), follow=True, stop=lambda: True))
    assert seen == list(range(len(seen)))
    assert seen[-1] >= 3


def test_a_follower_closes_its_files(log: Path) -> None:
    write(log, range(3))
    follow = read_log(str(log), follow=True)
    assert next(follow).time_ns == 0
    assert str(log) in open_files()
    follow.close()  # type: ignore[attr-defined]
    assert str(log) not in open_files()
