"""Small ELF files and bzImages for the tests: kernels and modules with just what is read."""

from __future__ import annotations

import struct
from pathlib import Path

__all__ = ["KERNEL", "bzimage", "kernel", "module", "own_kernel"]

_WANTED = "virtio virtio_ring virtio_pci virtio_console virtio_blk ext4 erofs overlay".split()


def kernel(*, note: int = 18, machine: int = 62, release: str = "6.9.0-test") -> bytes:
    """Return an ELF kernel of one note segment."""
    body = struct.pack("<III4sI", 4, 4, note, b"Xen\0", 0x1000000)
    banner = f"Linux version {release} (a@b) #1".encode()
    head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 4, 0, 120, 0, 0, len(body), len(body), 4)
    return head + segment + body + banner


KERNEL = kernel()


def bzimage(payload: bytes, *, version: int = 0x020F) -> bytes:
    """Return a bzImage with this compressed part, one setup sector after the boot sector."""
    image = bytearray(1024)
    image[0x1F1] = 1
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, version)
    struct.pack_into("<II", image, 0x248, 16, len(payload))
    return bytes(image) + b"\x90" * 16 + payload


def module(name: str, depends: str = "", *, softdep: str = "", alias: str = "") -> bytes:
    """Return a module that has a `.modinfo` section."""
    entries = [f"name={name}", f"depends={depends}", *([f"softdep={softdep}"] if softdep else [])]
    entries += [f"alias={alias}"] if alias else []
    info = b"".join(entry.encode() + b"\0" for entry in entries)
    names = b"\0.modinfo\0.shstrtab\0"
    table = 64 + len(info) + len(names)

    def section(label: int, offset: int, size: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", label, 1, 0, 0, offset, size, 0, 0, 1, 0)

    head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 2)
    sections = section(0, 0, 0) + section(1, 64, len(info))
    return head + info + names + sections + section(10, 64 + len(info), len(names))


def own_kernel(directory: Path, content: bytes = KERNEL) -> tuple[Path, Path]:
    """Write a kernel with all that a guest needs; return its file and its modules."""
    modules = directory / "modules"
    (modules / "kernel").mkdir(parents=True)
    for name in _WANTED:
        depends = "" if name == "virtio" else "virtio"
        (modules / "kernel" / f"{name.replace('_', '-')}.ko").write_bytes(module(name, depends))
    (directory / "vmlinux").write_bytes(content)
    return directory / "vmlinux", modules
