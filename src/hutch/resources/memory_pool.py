"""Memory made ahead for machines that ask for it: files of a size in a memory file system of the
root's, whose pages are there before anybody needs them.

`<root>/memory/free-<bytes>-<n>` is to be had, `used-<bytes>-<instance>` belongs to a machine.
Nobody has to hold them: they stay until the host goes down, and are made anew afterwards.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import msgspec

from hutch.errors import Exhausted, Unsupported
from hutch.linux import mount as linux
from hutch.linux.files import fallocate, punch_hole
from hutch.linux.locks import lock_file
from hutch.resources.inventory import read_inventory
from hutch.resources.settings import load_settings
from hutch.units import format_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["MemoryPool", "MemorySlots"]

_POLL = (errno.ENOSPC, errno.ENOMEM)
_LOCK_S = 60.0
# Of all memory, what is left to the host: the critical watermark, unless configured.
_KEPT = 0.05


class MemorySlots(msgspec.Struct, frozen=True, kw_only=True):
    """How many pieces of a size (bytes) there are, and how many of them are free."""

    size: int
    total: int
    free: int


class MemoryPool:
    """The pool of one root; thread-safe, shared with other processes."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._directory = f"{root}/memory"
        self._lock = root / "locks" / "memory-pool"

    def prepare(self, wanted: Mapping[int, int]) -> None:
        """Make the pool what the settings say: so many pieces by their size in bytes. Pieces
        too many go when nobody has them. Raises `Exhausted` where the host has no memory for
        them: before the first is made, or when it goes meanwhile; those made so far stay."""
        if not wanted and not os.path.ismount(self._directory):
            return
        with self._locked():
            self._sweep()
            _require_memory(self._missing(wanted))
            self._mount(wanted)
            # Those that give up pieces come first: others are made of their memory.
            sizes = {*wanted, *(slots.size for slots in self.slots())}
            count = {size: wanted.get(size, 0) for size in sizes}
            for size in sorted(sizes, key=lambda size: count[size] > len(self._names(size))):
                self._settle(size, count[size])
            self._unmount_empty()

    def _unmount_empty(self) -> None:
        if os.path.ismount(self._directory) and not os.listdir(self._directory):
            linux.umount2(self._directory, linux.MNT_DETACH)

    def _sweep(self) -> None:
        """Remove what a process left that was killed at a piece."""
        with suppress(FileNotFoundError):
            for name in os.listdir(self._directory):
                if name.startswith("."):
                    os.unlink(f"{self._directory}/{name}")

    def _missing(self, wanted: Mapping[int, int]) -> int:
        """Return how many bytes more the pool will have; those that it gives up are given first."""
        have = {slots.size: slots for slots in self.slots()}
        spare = sum(
            slots.size * min(slots.free, max(0, slots.total - wanted.get(slots.size, 0)))
            for slots in have.values()
        )
        more = sum(
            size * max(0, count - (have[size].total if size in have else 0))
            for size, count in wanted.items()
        )
        return max(0, more - spare)

    def _mount(self, wanted: Mapping[int, int]) -> None:
        if os.geteuid() != 0:
            raise Unsupported("memory_pool: needs root, which may mount", hint="run as root")
        held = sum(slots.size * slots.total for slots in self.slots())
        most = max(sum(size * count for size, count in wanted.items()), held) + (1 << 20)
        os.makedirs(self._directory, 0o700, exist_ok=True)
        flags = linux.MS_NODEV | linux.MS_NOSUID | linux.MS_NOEXEC
        if os.path.ismount(self._directory):
            flags |= linux.MS_REMOUNT
        linux.mount("hutch-memory", self._directory, "tmpfs", flags, f"mode=0700,size={most}")

    def _settle(self, size: int, wanted: int) -> None:
        """Have as many pieces of a size as are wanted; what a machine has stays."""
        names = self._names(size)
        free = [name for name in names if name.startswith("free-")]
        for name in free[: max(0, len(names) - wanted)]:
            os.unlink(f"{self._directory}/{name}")
        for number in range(wanted - len(names)):
            self._make(size, f"free-{size}-{os.urandom(4).hex()}{number}")

    def _make(self, size: int, name: str) -> None:
        _require_memory(size)
        path = f"{self._directory}/.{name}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fallocate(fd, 0, 0, size)
            # QEMU opens it as a user of its own; nobody else can reach it.
            os.fchmod(fd, 0o666)
            os.rename(path, f"{self._directory}/{name}")
        except OSError as exc:
            os.unlink(path)
            if exc.errno not in _POLL:
                raise
            raise Exhausted(
                f"memory_pool: the host has no {format_bytes(size)} for another piece",
                hint="ask for fewer, or free memory first",
            ) from exc
        finally:
            os.close(fd)

    def slots(self) -> tuple[MemorySlots, ...]:
        """Return what there is, by size."""
        found: dict[int, list[int]] = {}
        for name in self._names():
            kind, size, _ = name.split("-", 2)
            counts = found.setdefault(int(size), [0, 0])
            counts[0] += 1
            counts[1] += kind == "free"
        return tuple(
            MemorySlots(size=size, total=total, free=free)
            for size, (total, free) in sorted(found.items())
        )

    def _names(self, size: int = 0) -> list[str]:
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return []
        kinds = ("free-", "used-") if not size else (f"free-{size}-", f"used-{size}-")
        return sorted(name for name in names if name.startswith(kinds))

    def take(self, size: int, instance: str) -> int:
        """Return a descriptor of memory for a machine, which is its own until `give_back`; the
        caller closes it. Raises `Exhausted` where no piece of that size is free."""
        with self._locked():
            mine = f"{self._directory}/used-{size}-{instance}"
            free = [name for name in self._names(size) if name.startswith("free-")]
            if not os.path.exists(mine):
                if not free:
                    raise Exhausted(
                        f"memory_pool: no piece of {format_bytes(size)} is free",
                        hint="see `hutch system resources`; hutch system configure"
                        f" memory_pool={format_bytes(size)}:N",
                    )
                os.rename(f"{self._directory}/{free[0]}", mine)
            return os.open(mine, os.O_RDWR | os.O_CLOEXEC)

    def give_back(self, instance: str) -> None:
        """Empty what a machine had and keep it for the next; safe to repeat. A piece that the
        settings no longer have goes. Where the host has no memory for it any more, the piece is
        lost until `prepare`."""
        if not any(name.endswith(f"-{instance}") for name in self._names()):
            return
        with self._locked():
            wanted = load_settings(self._root).memory_pool
            for name in self._names():
                kind, size, holder = name.split("-", 2)
                if kind != "used" or holder != instance:
                    continue
                if len(self._names(int(size))) > wanted.get(int(size), 0):
                    os.unlink(f"{self._directory}/{name}")
                else:
                    self._renew(name, int(size))
            self._unmount_empty()

    def _renew(self, name: str, size: int) -> None:
        path = f"{self._directory}/{name}"
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            # Nothing of one machine is ever seen by another: its pages go, and others come.
            punch_hole(fd, 0, size)
            os.ftruncate(fd, size)
            fallocate(fd, 0, 0, size)
            os.rename(path, f"{self._directory}/free-{size}-{os.urandom(6).hex()}")
        except OSError as exc:
            os.unlink(path)
            if exc.errno not in _POLL:
                raise
        finally:
            os.close(fd)

    def reconcile(self, wanted: Mapping[int, int], running: set[str]) -> None:
        """Take back what machines had that do not run, and make what a reboot took."""
        for name in self._names():
            kind, _, holder = name.split("-", 2)
            if kind == "used" and holder not in running:
                self.give_back(holder)
        with suppress(Exhausted, Unsupported):
            self.prepare(wanted)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with lock_file(self._lock, timeout_s=_LOCK_S):
            yield


def _require_memory(more: int) -> None:
    """Refuse what the host has not: the kernel does not, it kills for memory instead."""
    host = read_inventory()
    room = max(0, host.available - int(host.memory * _KEPT))
    if more > room:
        raise Exhausted(
            f"memory_pool: needs {format_bytes(more)} more; "
            f"the host can spare {format_bytes(room)}",
            hint="ask for fewer, or free memory first",
        )
