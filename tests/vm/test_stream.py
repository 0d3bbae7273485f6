"""The stream that a machine's memory and devices are saved in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hutch.drivers.vm.capture import without
from hutch.drivers.vm.stream import PAGE, write_stream
from hutch.errors import IntegrityError

DEVICES = b"QEVM\x00\x00\x00\x03" + b"devices\x00"
A, ZERO = b"a" * PAGE, bytes(PAGE)


def stream(tmp_path: Path, *pages: tuple[int, bytes], keep_zero: bool = False) -> bytes:
    with open(tmp_path / "state", "wb", buffering=0) as file:
        write_stream(
            file.fileno(),
            machine="pc-q35-7.2",
            size=0x10000,
            pages=[(offset, memoryview(data)) for offset, data in pages],
            devices=DEVICES,
            keep_zero=keep_zero,
        )
    return (tmp_path / "state").read_bytes()


HEAD = bytes.fromhex(
    "5145564d 00000003"  # magic, version
    "07 0000000a 70632d7133352d372e32"  # the machine's type
    "01 68757463 03 72616d 00000000 00000004"  # a section of ram, instance 0, version 4
    "0000000000010004 03 72616d 0000000000010000"  # its blocks and their sizes
)
TAIL = bytes.fromhex("0000000000000010 7e 68757463") + b"devices\x00" + bytes.fromhex("06 00000000")


def test_a_stream_is_memory_before_devices(tmp_path: Path) -> None:
    made = stream(tmp_path, (0x2000, A + A), (0x8000, ZERO), (0x9000, A))
    pages = (
        bytes.fromhex("0000000000002008 03 72616d")
        + A
        + bytes.fromhex("0000000000003028")
        + A
        + bytes.fromhex("0000000000009028")
        + A
    )
    assert made == HEAD + pages + TAIL


def test_pages_of_zeros_are_kept_where_others_lie_beneath(tmp_path: Path) -> None:
    made = stream(tmp_path, (0x8000, ZERO), keep_zero=True)
    assert made == HEAD + bytes.fromhex("0000000000008008 03 72616d") + ZERO + TAIL
    assert stream(tmp_path) == HEAD + TAIL


def test_many_pages_are_written_whole(tmp_path: Path) -> None:
    pages = os.urandom(PAGE * 3000)
    made = stream(tmp_path, (0, pages))
    body = made[len(HEAD) : -len(TAIL)]
    assert len(body) == 3000 * (PAGE + 8) + 4
    assert body[12 : 12 + PAGE] + body[12 + PAGE + 8 : 12 + 2 * PAGE + 8] == pages[: 2 * PAGE]


def test_devices_of_another_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="version 3"), open(tmp_path / "x", "wb") as file:
        write_stream(
            file.fileno(), machine="q", size=0, pages=(), devices=b"QEVM2", keep_zero=False
        )


@pytest.mark.parametrize(
    ("ranges", "taken", "rest"),
    [
        ([], [(0, 5)], []),
        ([(0, 5)], [], [(0, 5)]),
        ([(0, 5)], [(0, 5)], []),
        ([(0, 9), (20, 9)], [(2, 2), (6, 16)], [(0, 2), (4, 2), (22, 7)]),
        ([(0, 2), (4, 2), (8, 2)], [(1, 8)], [(0, 1), (9, 1)]),
        ([(10, 5)], [(0, 2), (3, 4), (30, 2)], [(10, 5)]),
    ],
)
def test_ranges_without_others(
    ranges: list[tuple[int, int]], taken: list[tuple[int, int]], rest: list[tuple[int, int]]
) -> None:
    assert list(without(ranges, taken)) == rest
