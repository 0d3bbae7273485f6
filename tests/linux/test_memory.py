"""Another process's memory: reading it, and telling its own pages from those of a file."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator

import pytest

from hutch.linux.memory import PAGE, own_pages, process_vm_readv

COUNT = 16


@pytest.fixture
def private() -> Iterator[tuple[mmap.mmap, int]]:
    """A private mapping of a file with a letter for every page, and its address."""
    fd = os.memfd_create("test")
    os.write(fd, b"".join(bytes((65 + number,)) * PAGE for number in range(COUNT)))
    mapped = mmap.mmap(fd, COUNT * PAGE, flags=mmap.MAP_PRIVATE)
    os.close(fd)
    view = ctypes.c_char.from_buffer(mapped)
    address = ctypes.addressof(view)
    del view
    yield mapped, address
    mapped.close()


def test_pages_that_were_written_to_are_a_process_s_own(private: tuple[mmap.mmap, int]) -> None:
    mapped, address = private
    assert mapped[PAGE * 2] == 67  # read: it is there, and is the file's
    for page in (3, 4, 9):
        mapped[page * PAGE] = 0
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        found = own_pages(pagemap.fileno(), address, COUNT * PAGE)
    assert [((at - address) // PAGE, length // PAGE) for at, length in found] == [(3, 2), (9, 1)]


def test_pieces_are_read_to_their_places(private: tuple[mmap.mmap, int]) -> None:
    mapped, address = private
    mapped[5 * PAGE] = 1
    # More pieces than one call takes.
    pieces = [(address + 5 * PAGE + number, 1, 2000 - number) for number in range(2000)]
    with mmap.mmap(-1, PAGE) as target:
        process_vm_readv(os.getpid(), target, pieces)
        assert target[1:2001] == b"F" * 1999 + b"\x01"


def test_what_is_not_there_or_does_not_fit_is_refused(private: tuple[mmap.mmap, int]) -> None:
    _, address = private
    with mmap.mmap(-1, PAGE) as target:
        for piece in ((address, PAGE + 1, 0), (address, 1, -1), (0, 1, 0)):
            with pytest.raises(OSError, match="address"):
                process_vm_readv(os.getpid(), target, [piece])
        target.flush()
