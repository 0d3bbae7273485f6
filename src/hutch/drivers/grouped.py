"""What a driver does by an instance's control group alone, whatever is in it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from hutch.errors import NotFound, WrongState
from hutch.linux.cgroup import Group, Hierarchy
from hutch.resources.groups import InstanceGroups

__all__ = ["Grouped"]


class Grouped:
    """The part of a driver that is the same for containers and machines."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._groups = InstanceGroups(root)

    @property
    def _hierarchy(self) -> Hierarchy:
        return self._groups.hierarchy

    def _group(self, identifier: str) -> Group:
        """Return the group of an instance that runs; raise `WrongState` where there is none."""
        try:
            return self._hierarchy.load(identifier)
        except NotFound as exc:
            raise WrongState(
                f"instance {identifier[:12]} has no control group: it is not running"
            ) from exc

    def processes(self, identifier: str) -> list[int]:
        """Return the host's pids of what is in the group: of a machine its monitor and QEMU."""
        return list(self._group(identifier).pids())

    def oom_kills(self, identifier: str) -> int:
        """Return the count of processes killed for lack of memory, 0 where nobody counts."""
        return self._hierarchy.oom_kills(identifier)

    def kill_all(self, identifier: str) -> None:
        """Kill what is left in the group."""
        with suppress(NotFound):
            self._hierarchy.load(identifier).kill_all()

    def cleanup(self, identifier: str) -> None:
        """Remove the group."""
        self._hierarchy.remove(identifier)
