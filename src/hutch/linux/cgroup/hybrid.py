"""Hosts that mount both versions (v1 with the controllers, v2 beside), and hosts with none."""

from __future__ import annotations

import time

from hutch.errors import Denied, NotFound, Unsupported
from hutch.linux.cgroup.limits import Limits, requested, without
from hutch.linux.cgroup.protocol import FREEZE_TIMEOUT_S, KILL_TIMEOUT_S
from hutch.linux.cgroup.stats import Stats
from hutch.linux.cgroup.v1 import V1Group, V1Hierarchy
from hutch.linux.cgroup.v2 import V2Group, V2Hierarchy

__all__ = ["HybridGroup", "HybridHierarchy", "NoGroup", "NoHierarchy"]

_HINT = (
    "run as root, or inside a delegated cgroup v2 group, as with: "
    "systemd-run --user --scope -p Delegate=yes hutch ..."
)


class HybridHierarchy:
    """Version 1 for the controllers it has; a v2 group only where one is needed.

    That is with `track` (systemd follows its services by v2 groups in hybrid mode), and
    for a limit whose controller only v2 has.
    """

    version = "hybrid"

    def __init__(self, v1: V1Hierarchy, v2: V2Hierarchy, *, track: bool = False) -> None:
        self._v1 = v1
        self._v2 = v2
        self._track = track
        self._only_v2 = v2.controllers - v1.controllers
        self.controllers = v1.controllers | v2.controllers

    @property
    def parent(self) -> dict[str, str]:
        """The group above all these: its v1 directories by controller, that of v2 under ""."""
        return {**self._v1.parent, **self._v2.parent}

    def ensure_parent(self) -> dict[str, str]:
        """Make the group above where it is missing, for memory; return its directories."""
        if "memory" in self._v1.controllers:
            self._v1.ensure_parent()
        else:
            self._v2.ensure_parent()
        return self.parent

    def remove_parent(self) -> None:
        """Remove the group above from both, where nothing is in it."""
        self._v1.remove_parent()
        self._v2.remove_parent()

    def create(self, identifier: str, limits: Limits) -> HybridGroup:
        """Make the group and set its limits; nothing is left when it raises."""
        v1 = self._v1.create(identifier, without(limits, self._only_v2))
        group = HybridGroup(self, v1, None)
        try:
            if self._track or self._only_v2 & set(requested(limits).values()):
                group.v2 = self._v2.create(identifier, without(limits, self._v1.controllers))
        except BaseException:
            v1.remove()
            raise
        return group

    def load(self, identifier: str) -> HybridGroup:
        """Return an existing group; `NotFound` when there is none."""
        v1: V1Group | None = None
        v2: V2Group | None = None
        try:
            v1 = self._v1.load(identifier)
        except NotFound:
            pass
        try:
            v2 = self._v2.load(identifier)
        except NotFound:
            if v1 is None:
                raise
        return HybridGroup(self, v1 or V1Group(self._v1, identifier, {}), v2)

    def oom_kills(self, identifier: str) -> int:
        """Return the count of a group and those beneath; 0 where there is none."""
        return self._v1.oom_kills(identifier)

    def remove(self, identifier: str) -> None:
        """Remove a group from both, where it is there."""
        self._v1.remove(identifier)
        self._v2.remove(identifier)

    def list_groups(self) -> list[str]:
        """Return the identifiers of all groups here, half-removed ones too."""
        return sorted({*self._v1.list_groups(), *self._v2.list_groups()})

    def split(self, limits: Limits) -> tuple[Limits, Limits]:
        """Return the limits for v1 and those for v2."""
        return without(limits, self._only_v2), without(limits, self._v1.controllers)


class HybridGroup:
    """A v1 group and, where one was needed, its v2 twin."""

    def __init__(self, owner: HybridHierarchy, v1: V1Group, v2: V2Group | None) -> None:
        self.id = v1.id
        self._owner = owner
        self._v1 = v1
        self.v2 = v2

    @property
    def directories(self) -> dict[str, str]:
        """The v1 directory of each v1 controller, and under "" that of cgroup v2, if any."""
        return {**self._v1.directories, **(self.v2.directories if self.v2 else {})}

    @property
    def controllers(self) -> frozenset[str]:
        """The controllers in which this group has a directory, by their v2 names."""
        return self._v1.controllers | (self.v2.controllers if self.v2 else frozenset())

    def join_files(self) -> tuple[str, ...]:
        """The v1 `tasks` files into which a single-threaded process writes `0` to join."""
        return self._v1.join_files()

    def open_dir(self) -> int | None:
        """Open the v2 directory for CLONE_INTO_CGROUP (caller closes); None without v2."""
        return self.v2.open_dir() if self.v2 else None

    def add(self, pid: int) -> None:
        """Move a process, with all its threads, into the group."""
        self._v1.add(pid)
        if self.v2:
            self.v2.add(pid)

    def update(self, limits: Limits) -> None:
        """Change the limits that are set in `limits`, live."""
        first, second = self._owner.split(limits)
        if requested(second):
            if self.v2 is None:
                raise Unsupported(
                    f"{next(iter(requested(second)))}: cannot be added to a running instance here"
                )
            self.v2.update(second)
        self._v1.update(first)

    def stats(self) -> Stats:
        """Read all counters once; `NotFound` when the group is gone."""
        return self._v1.stats()

    def oom_kills(self) -> int:
        """Return how many processes the kernel killed for want of memory in the group."""
        return self._v1.oom_kills()

    def pids(self) -> set[int]:
        """Return the processes in the group and in groups made beneath it."""
        return self._v1.pids() | (self.v2.pids() if self.v2 else set())

    def freeze(self, timeout_s: float = FREEZE_TIMEOUT_S) -> None:
        """Stop every process and wait until all are stopped; on `OperationTimeout` none is."""
        if "freezer" in self._v1.controllers or self.v2 is None:
            self._v1.freeze(timeout_s)
        else:
            self.v2.freeze(timeout_s)

    def thaw(self, timeout_s: float = FREEZE_TIMEOUT_S) -> None:
        """Let the processes go on."""
        if "freezer" in self._v1.controllers or self.v2 is None:
            self._v1.thaw(timeout_s)
        else:
            self.v2.thaw(timeout_s)

    def is_frozen(self) -> bool:
        """Return whether the group is (being) frozen."""
        return self._v1.is_frozen() or bool(self.v2 and self.v2.is_frozen())

    def kill_all(self, timeout_s: float = KILL_TIMEOUT_S) -> None:
        """Kill every process, a frozen one too, and wait until none is left."""
        deadline = time.monotonic() + timeout_s
        self._v1.kill_all(timeout_s)
        if self.v2:
            self.v2.kill_all(max(0.1, deadline - time.monotonic()))

    def remove(self, timeout_s: float = 2.0) -> None:
        """Remove the group and those beneath; fine if gone, `Busy` while processes stay."""
        deadline = time.monotonic() + timeout_s
        self._v1.remove(timeout_s)
        if self.v2:
            self.v2.remove(max(0.1, deadline - time.monotonic()))
            self.v2 = None


class NoHierarchy:
    """A host on which this process may make no group: instances run without limits."""

    version = "none"
    controllers: frozenset[str] = frozenset()

    @property
    def parent(self) -> dict[str, str]:
        """Nothing."""
        return {}

    def ensure_parent(self) -> dict[str, str]:
        """Return nothing."""
        return {}

    def remove_parent(self) -> None:
        """Do nothing."""

    def create(self, identifier: str, limits: Limits) -> NoGroup:
        """Return a group without effect; `Unsupported` when a limit is asked for.

        Device rules are let pass: who may make no group may make no device node either.
        """
        _refuse(limits)
        return NoGroup(identifier)

    def load(self, identifier: str) -> NoGroup:
        """Return a group without effect."""
        return NoGroup(identifier)

    def oom_kills(self, identifier: str) -> int:
        """Return 0."""
        return 0

    def remove(self, identifier: str) -> None:
        """Do nothing."""

    def list_groups(self) -> list[str]:
        """Return nothing."""
        return []


def _refuse(limits: Limits) -> None:
    for field in requested(limits):
        if field != "devices":
            raise Unsupported(f"{field}: no control group can be made here", hint=_HINT)


class NoGroup:
    """The group of an instance on a host without usable control groups."""

    controllers: frozenset[str] = frozenset()

    def __init__(self, identifier: str) -> None:
        self.id = identifier
        self.directories: dict[str, str] = {}

    def join_files(self) -> tuple[str, ...]:
        """Return nothing."""
        return ()

    def open_dir(self) -> int | None:
        """Return None."""
        return None

    def add(self, pid: int) -> None:
        """Do nothing."""

    def update(self, limits: Limits) -> None:
        """Refuse any limit."""
        _refuse(limits)

    def stats(self) -> Stats:
        """Return zeros."""
        return Stats(time_ns=time.time_ns())

    def oom_kills(self) -> int:
        """Return 0: nobody counts them."""
        return 0

    def pids(self) -> set[int]:
        """Return nothing: nobody counts them."""
        return set()

    def freeze(self, timeout_s: float = FREEZE_TIMEOUT_S) -> None:
        """Raise `Denied`."""
        raise Denied("cannot pause: no control group can be made here", hint=_HINT)

    def thaw(self, timeout_s: float = FREEZE_TIMEOUT_S) -> None:
        """Do nothing."""

    def is_frozen(self) -> bool:
        """Return False."""
        return False

    def kill_all(self, timeout_s: float = KILL_TIMEOUT_S) -> None:
        """Do nothing: the instance's processes end with its PID namespace."""

    def remove(self, timeout_s: float = 2.0) -> None:
        """Do nothing."""
