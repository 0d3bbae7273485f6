"""Storage pools of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hutch.engine.context import Context
from hutch.units import parse_bytes

if TYPE_CHECKING:
    from hutch.storage.pools import Pool

__all__ = ["Pools"]


class Pools:
    """The storage pools of one root: places for volumes with a size of their own."""

    def __init__(self, context: Context) -> None:
        self._pools = context.volumes.pools

    def create(
        self,
        name: str,
        kind: str = "directory",
        *,
        size: int | str = 0,
        source: str = "",
        reserved: bool = False,
    ) -> Pool:
        """Create a pool of kind directory, ext4, xfs, btrfs or qcow2.

        `size` is for those with a file system, `source` an empty directory to keep it in
        (default: in the root), `reserved` that the host's disk keeps room for all of it.
        """
        size = parse_bytes(size, field="size") if size else 0
        return self._pools.create(name, kind, size=size, source=source, reserved=reserved)

    def get(self, name: str) -> Pool:
        """Return a pool as it is now."""
        return self._pools.get(name)

    def list(self) -> Sequence[Pool]:
        """Return the pools, by name."""
        return self._pools.list()

    def grow(self, name: str, size: int | str) -> Pool:
        """Give a pool more room, while it is used where the kernel lets us."""
        return self._pools.grow(name, parse_bytes(size, field="size"))

    def trim(self, name: str) -> int:
        """Give what a pool does not use back to the host's disk; return the bytes of it."""
        return self._pools.trim(name)

    def remove(self, name: str) -> None:
        """Remove an empty pool; raise `Busy` while it has volumes."""
        self._pools.remove(name)
