"""What a control group and a hierarchy of them can do, whatever the version of the kernel's
interface."""

from __future__ import annotations

import re
from typing import Protocol

from hutch.errors import InvalidArgument
from hutch.linux.cgroup.limits import Limits
from hutch.linux.cgroup.stats import Stats

__all__ = ["FREEZE_TIMEOUT_S", "KILL_TIMEOUT_S", "Group", "Hierarchy", "check_id"]

FREEZE_TIMEOUT_S = 10.0
KILL_TIMEOUT_S = 10.0

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")


def check_id(identifier: str) -> None:
    """Raise `InvalidArgument` unless the identifier can be a group's directory name."""
    if not _ID.fullmatch(identifier):
        raise InvalidArgument(f"not a usable group name: {identifier!r}", field="id")


class Group(Protocol):
    """One instance's group: a directory in each hierarchy that the instance needs."""

    @property
    def id(self) -> str:
        """The instance's identifier."""
        ...

    @property
    def controllers(self) -> frozenset[str]:
        """The controllers in which this group has a directory, by their v2 names."""
        ...

    @property
    def directories(self) -> dict[str, str]:
        """The v1 directory of each v1 controller, and under "" that of cgroup v2, if any."""
        ...

    def join_files(self) -> tuple[str, ...]:
        """The v1 `tasks` files into which a single-threaded process writes `0` to join."""
        ...

    def open_dir(self) -> int | None:
        """Open the v2 directory for CLONE_INTO_CGROUP (caller closes); None without v2."""
        ...

    def add(self, pid: int) -> None:
        """Move a process, with all its threads, into the group."""
        ...

    def update(self, limits: Limits) -> None:
        """Change the limits that are set in `limits`, live."""
        ...

    def stats(self) -> Stats:
        """Read all counters once; `NotFound` when the group is gone."""
        ...

    def freeze(self, timeout_s: float = FREEZE_TIMEOUT_S) -> None:
        """Stop every process and wait until all are stopped; on `OperationTimeout` none is."""
        ...

    def thaw(self, timeout_s: float = FREEZE_TIMEOUT_S) -> None:
        """Let the processes go on."""
        ...

    def is_frozen(self) -> bool:
        """Return whether the group is (being) frozen."""
        ...

    def pids(self) -> set[int]:
        """Return the processes in the group and in groups made beneath it."""
        ...

    def kill_all(self, timeout_s: float = KILL_TIMEOUT_S) -> None:
        """Kill every process, a frozen one too, and wait until none is left."""
        ...

    def oom_kills(self) -> int:
        """Return how many processes the kernel killed for want of memory in the group."""
        ...

    def remove(self, timeout_s: float = 2.0) -> None:
        """Remove the group and those beneath; fine if gone, `Busy` while processes stay."""
        ...


class Hierarchy(Protocol):
    """Where this process may make groups."""

    @property
    def version(self) -> str:
        """`v1`, `v2`, `hybrid`, or `none` where no group can be made."""
        ...

    @property
    def controllers(self) -> frozenset[str]:
        """The usable controllers, by their v2 names, `devices` and `freezer` included."""
        ...

    @property
    def parent(self) -> dict[str, str]:
        """The group above all these: its v1 directories by controller, and under "" that of
        cgroup v2. It may not be there yet."""
        ...

    def ensure_parent(self) -> dict[str, str]:
        """Make the group above where it is missing, for memory; return its directories."""
        ...

    def remove_parent(self) -> None:
        """Remove the group above if nothing is in it; another's groups keep it."""
        ...

    def create(self, identifier: str, limits: Limits) -> Group:
        """Make the group and set its limits; nothing is left when it raises."""
        ...

    def load(self, identifier: str) -> Group:
        """Return an existing group; `NotFound` when there is none."""
        ...

    def oom_kills(self, identifier: str) -> int:
        """Return what the group's own `oom_kills` does; 0 where there is none."""
        ...

    def remove(self, identifier: str) -> None:
        """Remove a group and those beneath; fine if gone, `Busy` while processes stay."""
        ...

    def list_groups(self) -> list[str]:
        """Return the identifiers of all groups here."""
        ...
