"""From bzImage to the ELF file that QEMU boots, whatever it was packed with."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import subprocess
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from hutch.drivers.vm.vmlinux import extract_vmlinux, has_pvh_entry, release_of
from hutch.errors import HutchError, IntegrityError, InvalidArgument, Unsupported
from tests.requires import requires
from tests.vm.elves import KERNEL, bzimage, kernel

SIZE = struct.pack("<I", len(KERNEL))
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": lambda data: bz2.compress(data) + SIZE,
    "xz": lambda data: lzma.compress(data) + SIZE,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE) + SIZE,
    "zstd": lambda data: zstandard.compress(data) + SIZE,
}


@pytest.mark.parametrize("name", PACKED)
def test_a_kernel_is_unpacked(name: str) -> None:
    assert extract_vmlinux(bzimage(PACKED[name](KERNEL))) == KERNEL


@requires("lz4")
def test_a_kernel_of_several_lz4_blocks_is_unpacked() -> None:
    plain = KERNEL + bytes(9 << 20)
    packed = subprocess.run(["lz4", "-lc"], input=plain, capture_output=True, check=True).stdout
    assert extract_vmlinux(bzimage(packed + struct.pack("<I", len(plain)))) == plain


def test_an_elf_kernel_is_taken_as_it_is() -> None:
    assert extract_vmlinux(KERNEL) == KERNEL
    assert release_of(KERNEL) == "6.9.0-test"


def test_a_kernel_that_qemu_cannot_enter_is_refused() -> None:
    assert not has_pvh_entry(kernel(note=17))
    with pytest.raises(Unsupported, match="no PVH entry"):
        extract_vmlinux(kernel(note=17))


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"", InvalidArgument, "neither a bzImage nor an ELF file"),
        (b"#!/bin/sh\n" * 100, InvalidArgument, "neither a bzImage nor an ELF file"),
        (kernel(machine=183), InvalidArgument, "not a kernel for x86-64"),
        (bzimage(gzip.compress(b"no kernel at all")), InvalidArgument, "not a kernel for x86-64"),
        (bzimage(b"x" * 64, version=0x0203), Unsupported, "older than 2.08"),
        (bzimage(b"\x89LZO" + bytes(60) + SIZE), Unsupported, "unknown compression"),
        (bzimage(gzip.compress(KERNEL))[:-9], IntegrityError, "cut off"),
        (bzimage(lzma.compress(KERNEL)[:-20] + SIZE), IntegrityError, "damaged"),
        (bzimage(bz2.compress(KERNEL[:150]) + SIZE), IntegrityError, "150 of [0-9]+ bytes"),
        (bzimage(b"\x02\x21\x4c\x18\x10\0\0\0" + bytes(16) + SIZE), IntegrityError, "kernel|lz4"),
    ],
)
def test_what_is_no_kernel_is_refused(data: bytes, error: type[HutchError], words: str) -> None:
    with pytest.raises(error, match=words):
        extract_vmlinux(data)


def test_a_kernel_that_unpacks_to_more_than_it_says_is_refused() -> None:
    bomb = lzma.compress(bytes(64 << 20)) + struct.pack("<I", 1 << 20)
    with pytest.raises((IntegrityError, InvalidArgument)):
        extract_vmlinux(bzimage(bomb))


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, 1200))
def test_no_damage_breaks_the_reader(junk: bytes, at: int) -> None:
    image = bytearray(bzimage(gzip.compress(KERNEL)))
    image[at : at + len(junk)] = junk
    try:
        extract_vmlinux(bytes(image))
    except HutchError:
        pass
