"""Kernel modules: which of them a guest needs, what they depend on, and in which order.

Read from the modules themselves (their `.modinfo`), as a package that is not installed has
no `modules.dep` yet.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from hutch.errors import IntegrityError, InvalidArgument, Unsupported

__all__ = ["BOOT", "LATE", "Modules", "builtin_names", "read_modinfo"]

BOOT = ("virtio_pci", "virtio_mmio", "virtio_console")
"""What the guest needs before its agent can be spoken to."""

LATE = (
    *("virtio_blk", "virtio_net", "virtio_rng", "virtio_balloon", "virtio_mem"),
    *("ext4", "erofs", "overlay", "fuse", "virtiofs"),
)
"""What may be loaded once it can: block devices, networks, file systems."""

_REQUIRED = ("virtio_pci", "virtio_console", "virtio_blk", "overlay", "erofs", "ext4")
_SUFFIXES = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")
_LIMIT = 64 << 20


class Modules:
    """The modules of one kernel: its files' names, how one is read, and what is built in."""

    def __init__(
        self, names: Iterable[str], read: Callable[[str], bytes], builtin: Iterable[str] = ()
    ) -> None:
        self._files = {_name(name): name for name in names if name.endswith(_SUFFIXES)}
        self._read = read
        self.builtin = frozenset(_name(name) for name in builtin)

    @classmethod
    def from_directory(cls, directory: Path) -> Modules:
        """Return those beneath `/lib/modules/VERSION`, or any directory that has them."""
        paths = {
            name: Path(top, name)
            for top, _, names in os.walk(directory)
            for name in names
            if name.endswith(_SUFFIXES) and not Path(top, name).is_symlink()
        }
        if not paths:
            raise InvalidArgument(
                f"no kernel modules beneath {directory}",
                field="modules",
                hint="give the directory /lib/modules/VERSION of that kernel",
            )
        try:
            builtin = (directory / "modules.builtin").read_text(errors="replace")
        except FileNotFoundError:
            builtin = ""
        return cls(paths, lambda name: _head(paths[name]), builtin_names(builtin))

    def content(self, name: str) -> bytes:
        """Return a module as the kernel loads it, unpacked."""
        file = self._files[name]
        return _unpacked(file, self._read(file))

    def order(self, wanted: Sequence[str], *, known: Sequence[str] = ()) -> dict[str, bytes]:
        """Return the modules for `wanted` with all they need, each after what it needs.

        What is built in, not there at all or among `known` is left out.
        """
        found: dict[str, bytes] = {}
        under_way: set[str] = set()

        def visit(name: str) -> None:
            if name in found or name in known or name not in self._files or name in under_way:
                return
            under_way.add(name)
            content = self.content(name)
            for need in _needs(read_modinfo(content)):
                visit(self._named(need))
            found[name] = content

        for name in wanted:
            visit(name)
        return found

    def _named(self, name: str) -> str:
        """Return the module that is meant: `softdep` may give an alias, as that of libcrc32c
        gives `crc32c` for crc32c_generic. Only those that begin so are looked into."""
        if name in self._files or name in self.builtin:
            return name
        alike = sorted(n for n in (*self._files, *self.builtin) if n.startswith(f"{name}_"))
        # The one that runs on every processor before those for some.
        for other in sorted(alike, key=lambda n: not n.endswith("_generic")):
            if other in self.builtin:
                return other
            if name in read_modinfo(self.content(other)).get("alias", ()):
                return other
        return name

    def check(self) -> None:
        """Raise `Unsupported` unless a guest can be run with this kernel."""
        missing = [n for n in _REQUIRED if n not in self._files and n not in self.builtin]
        if missing:
            raise Unsupported(
                f"kernel: has no {', '.join(missing)}, neither built in nor as a module",
                hint="use a kernel with virtio, erofs, overlay and ext4",
            )


def _needs(info: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for line in info.get("softdep", ()):
        before = line.partition("pre:")[2].partition("post:")[0]
        yield from (_name(word) for word in before.split())
    for line in info.get("depends", ()):
        yield from (_name(word) for word in line.split(",") if word)


def _name(text: str) -> str:
    """Return a module's name as the kernel has it: no suffix, underscores."""
    return text.partition(".ko")[0].replace("-", "_")


def builtin_names(text: str) -> list[str]:
    """Return the modules that a `modules.builtin` lists."""
    return [line.strip().rpartition("/")[2] for line in text.splitlines() if line.strip()]


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(_LIMIT)


def _unpacked(name: str, data: bytes) -> bytes:
    if name.endswith(".ko"):
        return data
    from hutch.storage.compression import decompress

    content = bytearray()
    for chunk in decompress(io.BytesIO(data)):
        content += chunk
        if len(content) > _LIMIT:
            raise IntegrityError(f"kernel module {name}: larger than {_LIMIT} bytes")
    return bytes(content)


def read_modinfo(content: bytes) -> dict[str, list[str]]:
    """Return the key=value pairs of a module's `.modinfo` section, in their order.

    Raises `IntegrityError` for what is no relocatable ELF file of 64 bits.
    """
    info: dict[str, list[str]] = {}
    try:
        section = _section(content, b".modinfo")
    except (struct.error, OverflowError) as exc:
        raise IntegrityError("kernel module: its sections are damaged") from exc
    for entry in section.split(b"\0"):
        key, equals, value = entry.decode("utf-8", "replace").partition("=")
        if equals:
            info.setdefault(key, []).append(value)
    return info


def _section(content: bytes, name: bytes) -> bytes:
    if content[:6] != b"\x7fELF\x02\x01":
        raise IntegrityError("kernel module: not an ELF file of 64 bits")
    (table,) = struct.unpack_from("<Q", content, 40)
    size, count, names_index = struct.unpack_from("<HHH", content, 58)

    def header(index: int) -> tuple[int, int, int]:
        label = struct.unpack_from("<I", content, table + index * size)[0]
        offset, length = struct.unpack_from("<QQ", content, table + index * size + 24)
        return label, offset, length

    _, names, names_length = header(names_index)
    labels = content[names : names + names_length]
    for index in range(count):
        label, offset, length = header(index)
        if labels[label : labels.find(b"\0", label)] == name:
            return content[offset : offset + length]
    return b""
