"""Volumes of an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hutch.engine.context import Context

if TYPE_CHECKING:
    from hutch.storage.volumes import Volume

__all__ = ["Volumes"]


class Volumes:
    """The volumes of one root."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._volumes = context.volumes

    def create(
        self,
        name: str | None = None,
        *,
        driver: str = "local",
        options: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Volume:
        """Create a volume, or return the one of that name when it was made alike."""
        return self._volumes.create(
            name or "", driver=driver, options=dict(options or {}), labels=dict(labels or {})
        )

    def get(self, name: str) -> Volume:
        """Return a volume by name."""
        return self._volumes.get(name)

    def list(self, filters: Mapping[str, Sequence[str]] | None = None) -> Sequence[Volume]:
        """Return the volumes, by name."""
        return self._volumes.list(filters=filters)

    def resize(self, name: str, size: str | int) -> None:
        """Let a volume that is a disk (`type=disk`) grow, with its file system, also while the
        machine that has it runs. `size` in bytes, or a text such as `20G`."""
        from hutch.engine.volume_disks import resize_volume

        resize_volume(self._context, name, size)

    def clone(self, name: str, new: str) -> Volume:
        """Make a volume with what a disk has now, which the machine that has it need not stop
        for: a snapshot that can be used as any volume."""
        from hutch.engine.volume_disks import clone_volume

        return clone_volume(self._context, name, new)

    def users(self, name: str) -> tuple[str, ...]:
        """Return the identifiers of the instances that use a volume."""
        return tuple(self._volumes.users(name))

    def remove(self, name: str, *, force: bool = False) -> None:
        """Remove a volume with its content; raise `Busy` while an instance uses it."""
        self._volumes.remove(name, force=force)

    def prune(
        self, *, all_volumes: bool = False, filters: Mapping[str, Sequence[str]] | None = None
    ) -> tuple[Sequence[str], int]:
        """Remove unused anonymous volumes (with `all_volumes`, named ones too); return
        their names and the bytes given back."""
        return self._volumes.prune(all_volumes=all_volumes, filters=filters)
