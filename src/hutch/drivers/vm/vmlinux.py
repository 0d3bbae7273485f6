"""From the kernel that a distribution ships (bzImage) to the ELF file that QEMU boots.

QEMU enters an ELF kernel directly by its PVH note. That saves the firmware, the real-mode
code and the kernel's own unpacking, which software emulation makes slow. Pure.
"""

from __future__ import annotations

import re
import struct

from hutch.errors import IntegrityError, InvalidArgument, Unsupported
from hutch.linux.lz4 import decompress_block

__all__ = ["extract_vmlinux", "has_pvh_entry", "release_of"]

# Documentation/arch/x86/boot.rst
_SETUP_MAGIC = 0x202
_SETUP_SECTS, _VERSION, _PAYLOAD = 0x1F1, 0x206, 0x248
_PAYLOAD_SINCE = 0x0208
_ELF = b"\x7fELF\x02\x01"
_EM_X86_64 = 62
_PT_NOTE = 4
_XEN_PHYS32_ENTRY = 18
_LZ4_LEGACY = b"\x02\x21\x4c\x18"
_LZ4_BLOCK = 8 << 20
_LIMIT = 512 << 20
_BANNER = re.compile(rb"Linux version ([0-9][0-9A-Za-z.+~_-]{0,63}) \(")


def extract_vmlinux(data: bytes) -> bytes:
    """Return the ELF kernel within a bzImage; an ELF kernel is returned as it is.

    Raises `InvalidArgument` for what is no x86-64 kernel, `Unsupported` for one that QEMU
    cannot enter or whose compression is unknown, `IntegrityError` for a damaged one.
    """
    kernel = data if data.startswith(_ELF) else _unpack(_payload(data))
    if not kernel.startswith(_ELF) or struct.unpack_from("<H", kernel, 18)[0] != _EM_X86_64:
        raise InvalidArgument("not a kernel for x86-64", field="kernel")
    if not has_pvh_entry(kernel):
        raise Unsupported(
            "kernel: has no PVH entry point", hint="use a kernel built with CONFIG_PVH=y"
        )
    return kernel


def _payload(data: bytes) -> bytes:
    """Return the compressed kernel within a bzImage, by the setup header's own words."""
    if len(data) < 0x260 or data[_SETUP_MAGIC : _SETUP_MAGIC + 4] != b"HdrS":
        raise InvalidArgument(
            "neither a bzImage nor an ELF file",
            field="kernel",
            hint="give the vmlinuz (or vmlinux) of an x86-64 kernel",
        )
    (version,) = struct.unpack_from("<H", data, _VERSION)
    if version < _PAYLOAD_SINCE:
        raise Unsupported(f"kernel: boot protocol {version:#06x} is older than 2.08")
    start = (data[_SETUP_SECTS] or 4) * 512 + 512
    offset, length = struct.unpack_from("<II", data, _PAYLOAD)
    if length < 8 or start + offset + length > len(data):
        raise IntegrityError("kernel: the file is cut off")
    return data[start + offset : start + offset + length]


def _unpack(payload: bytes) -> bytes:
    # The build appends the plain size, except to gzip, which ends in it anyway.
    (size,) = struct.unpack_from("<I", payload, len(payload) - 4)
    if not 0 < size <= _LIMIT:
        raise IntegrityError(f"kernel: its size is said to be {size} bytes")
    is_lz4 = payload.startswith(_LZ4_LEGACY)
    kernel = _unlz4(payload[:-4]) if is_lz4 else _by_stream(payload, size)
    if len(kernel) != size:
        raise IntegrityError(f"kernel: unpacked to {len(kernel)} of {size} bytes")
    return kernel


def _unlz4(data: bytes) -> bytes:
    """Unpack LZ4's legacy frame: blocks of up to 8 MiB, each after its size."""
    blocks = []
    at = 4
    while at + 4 <= len(data):
        (length,) = struct.unpack_from("<I", data, at)
        at += 4
        if not 0 < length <= len(data) - at:
            raise IntegrityError("kernel: an LZ4 block is cut off")
        blocks.append(decompress_block(data[at : at + length], _LZ4_BLOCK))
        at += length
    return b"".join(blocks)


def _by_stream(payload: bytes, size: int) -> bytes:
    """Unpack one stream of gzip, xz, lzma, bzip2 or zstd; at most `size` bytes of it."""
    import bz2
    import lzma
    import zlib

    import zstandard

    try:
        if payload.startswith(b"\x1f\x8b"):
            return zlib.decompressobj(31).decompress(payload, size)
        if payload.startswith(b"\x28\xb5\x2f\xfd"):
            return zstandard.ZstdDecompressor().stream_reader(payload[:-4]).read(size)
        if payload.startswith(b"BZh"):
            return bz2.BZ2Decompressor().decompress(payload, size)
        if payload.startswith((b"\xfd7zXZ\x00", b"\x5d\x00\x00")):
            return lzma.LZMADecompressor(memlimit=_LIMIT).decompress(payload, size)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as exc:
        raise IntegrityError(f"kernel: its compressed part is damaged: {exc}") from exc
    raise Unsupported(
        f"kernel: unknown compression (begins with {payload[:4].hex()})",
        hint="give the plain vmlinux",
    )


def has_pvh_entry(kernel: bytes) -> bool:
    """Tell whether an ELF kernel has the note by which QEMU enters it."""
    if len(kernel) < 64:
        return False
    (table,) = struct.unpack_from("<Q", kernel, 32)
    size, count = struct.unpack_from("<HH", kernel, 54)
    for index in range(min(count, 256)):
        at = table + index * size
        if size < 56 or at + 56 > len(kernel):
            return False
        kind = struct.unpack_from("<I", kernel, at)[0]
        offset, length = (struct.unpack_from("<Q", kernel, at + k)[0] for k in (8, 32))
        if kind == _PT_NOTE and _has_note(kernel[offset : offset + min(length, 1 << 16)]):
            return True
    return False


def _has_note(notes: bytes) -> bool:
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        name = notes[at + 12 : at + 12 + name_size]
        if kind == _XEN_PHYS32_ENTRY and name == b"Xen\x00":
            return True
        at += 12 + (name_size + 3 & ~3) + (size + 3 & ~3)
    return False


def release_of(kernel: bytes) -> str:
    """Return what the kernel calls itself (`uname -r`), or an empty text."""
    match = _BANNER.search(kernel)
    return match[1].decode() if match else ""
