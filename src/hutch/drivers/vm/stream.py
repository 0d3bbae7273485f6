"""QEMU's migration stream as far as hutch writes it: memory before the devices that QEMU saved.

The format is QEMU's (docs/devel/migration/main.rst: "Stream structure"; migration/ram.c), which
every later QEMU loads for a machine type of a version. `write_stream` makes a whole one of the
pages of a memory block and of what `xen-save-devices-state` wrote, which has no memory in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from struct import Struct

from hutch.errors import IntegrityError

__all__ = ["BLOCK", "PAGE", "write_stream"]

PAGE = 4096
BLOCK = "ram"
"""What QEMU calls the guest's memory: the id of its backend."""

_MAGIC = b"QEVM\x00\x00\x00\x03"
_SECTION_START, _CONFIGURATION, _DESCRIPTION, _FOOTER = b"\x01", b"\x07", b"\x06", b"\x7e"
# No device has this number: QEMU counts its sections from 0.
_SECTION = 0x68757463
_RAM_VERSION = 4
_SIZES, _PAGE, _END, _CONTINUE = 0x04, 0x08, 0x10, 0x20
_U32, _U64 = Struct(">I"), Struct(">Q")
_BATCH = 1000  # pieces of one writev(2), which takes 1024
_ZERO = bytes(PAGE)


def write_stream(
    fd: int,
    *,
    machine: str,
    size: int,
    pages: Iterable[tuple[int, memoryview]],
    devices: bytes,
    keep_zero: bool,
) -> None:
    """Write a stream to a file's position: memory of `size` bytes, then the devices.

    `pages` are (offset, bytes) of whole pages; what is in none of them stays what the memory
    of the QEMU that loads it begins with. Where that is not zeros, `keep_zero` writes pages
    of zeros too. Raise `IntegrityError` for devices that are no stream.
    """
    if devices[: len(_MAGIC)] != _MAGIC:
        raise IntegrityError("what QEMU wrote of its devices is not a stream of version 3")
    name = machine.encode()
    head = _MAGIC + _CONFIGURATION + _U32.pack(len(name)) + name + _ram_head(size)
    _write_all(fd, head)
    _write_batches(fd, _page_records(pages, keep_zero))
    footer = _U64.pack(_END) + _FOOTER + _U32.pack(_SECTION)
    # An empty description ends it: QEMU looks for one.
    _write_all(fd, footer + devices[len(_MAGIC) :] + _DESCRIPTION + _U32.pack(0))


def _ram_head(size: int) -> bytes:
    block = BLOCK.encode()
    return b"".join(
        (
            _SECTION_START,
            _U32.pack(_SECTION),
            *(bytes((len(block),)), block, _U32.pack(0), _U32.pack(_RAM_VERSION)),
            _U64.pack(size | _SIZES),
            *(bytes((len(block),)), block, _U64.pack(size)),
        )
    )


def _page_records(
    pages: Iterable[tuple[int, memoryview]], keep_zero: bool
) -> Iterator[bytes | memoryview]:
    pack, same = _U64.pack, _PAGE | _CONTINUE
    block = BLOCK.encode()
    first = bytes((len(block),)) + block
    for offset, data in pages:
        for at in range(0, len(data), PAGE):
            page = data[at : at + PAGE]
            if not keep_zero and page == _ZERO:
                continue
            if first:
                yield pack(offset + at | _PAGE) + first
                first = b""
            else:
                yield pack(offset + at | same)
            yield page


def _write_batches(fd: int, pieces: Iterable[bytes | memoryview]) -> None:
    batch: list[bytes | memoryview] = []
    for piece in pieces:
        batch.append(piece)
        if len(batch) >= _BATCH:
            _write_vector(fd, batch)
            batch = []
    _write_vector(fd, batch)


def _write_vector(fd: int, batch: list[bytes | memoryview]) -> None:
    if not batch:
        return
    done = os.writev(fd, batch)
    if done < sum(map(len, batch)):
        _write_all(fd, b"".join(batch)[done:])


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
