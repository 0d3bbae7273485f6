"""Control groups, version 1: one hierarchy of directories per controller."""

from __future__ import annotations

import errno
import os
import signal
import time

from hutch.errors import AlreadyExists, Denied, NotFound, OperationTimeout, Unsupported
from hutch.linux.cgroup import files
from hutch.linux.cgroup.limits import Limits, check_supported, requested, validate
from hutch.linux.cgroup.protocol import FREEZE_TIMEOUT_S, KILL_TIMEOUT_S, check_id
from hutch.linux.cgroup.stats import Stats
from hutch.linux.cgroup.v1_limits import apply_limits
from hutch.linux.cgroup.v1_stats import read_oom_kills, read_stats

__all__ = ["ALWAYS", "V1Group", "V1Hierarchy"]

# What every group has: accounting, the freezer, and the limits most often changed later.
# Each directory costs 30 to 60 µs to make, so the others are made when first needed.
ALWAYS = ("memory", "cpu", "cpuacct", "pids", "freezer", "io")
TRACKING = "name=systemd"

_HINT = "mount the controller under /sys/fs/cgroup, or enable it on the kernel command line"


class V1Hierarchy:
    """Groups beneath `<mount of each controller>/<parent>/<id>`.

    `mounts` maps controllers (v2 names: `io`, not `blkio`) to where each is mounted;
    controllers mounted together share a directory. `track` also makes the directory in
    systemd's own hierarchy, without which systemd counts the instance to its starter's
    session or service and kills it with that.
    """

    version = "v1"

    def __init__(self, mounts: dict[str, str], parent: str, *, track: bool = False) -> None:
        self._mounts = mounts
        self._parent = parent
        self._track = track and TRACKING in mounts
        self.controllers = frozenset(mounts) - {TRACKING}

    @property
    def parent(self) -> dict[str, str]:
        """The directories of the group above all these, by controller."""
        mounts = ((name, mount) for name, mount in self._mounts.items() if name != TRACKING)
        return {name: f"{mount}/{self._parent}" for name, mount in mounts}

    def ensure_parent(self) -> dict[str, str]:
        """Make the group above where it is missing, for memory; return its directories."""
        if "memory" in self._mounts:
            self._make_parent("memory")
        return self.parent

    def remove_parent(self) -> None:
        """Remove the group above if nothing is in it, from each hierarchy."""
        files.remove_empty(f"{mount}/{self._parent}" for mount in self._mounts.values())

    def create(self, identifier: str, limits: Limits) -> V1Group:
        """Make the group and set its limits; nothing is left when it raises."""
        check_id(identifier)
        validate(limits)
        check_supported(limits, self.controllers, _HINT)
        group = V1Group(self, identifier, {})
        try:
            for controller in self._wanted(limits):
                group.ensure_controller(controller, exclusive=True)
            apply_limits(group.directories, limits, fresh=True)
        except BaseException:
            group.remove()
            raise
        return group

    def _wanted(self, limits: Limits) -> list[str]:
        wanted = [name for name in ALWAYS if name in self._mounts]
        wanted += sorted({c for c in requested(limits).values() if c not in ALWAYS})
        if self._track:
            wanted.append(TRACKING)
        return wanted

    def load(self, identifier: str) -> V1Group:
        """Return an existing group; `NotFound` when there is none."""
        check_id(identifier)
        found = {}
        for controller in self._mounts:
            path = self.directory(controller, identifier)
            if os.path.isdir(path):
                found[controller] = path
        if not found:
            raise NotFound(f"no control group {identifier}")
        return V1Group(self, identifier, found)

    def oom_kills(self, identifier: str) -> int:
        """Return the count of a group and those beneath; 0 where there is none."""
        check_id(identifier)
        if "memory" not in self._mounts:
            return 0
        return read_oom_kills(self.directory("memory", identifier))

    def remove(self, identifier: str) -> None:
        """Remove a group, where it is there: in whichever hierarchies it may be."""
        check_id(identifier)
        found = {name: self.directory(name, identifier) for name in self._mounts}
        V1Group(self, identifier, found).remove()

    def list_groups(self) -> list[str]:
        """Return the identifiers of all groups here, half-removed ones too."""
        found: set[str] = set()
        for mount in set(self._mounts.values()):
            found.update(files.child_names(f"{mount}/{self._parent}"))
        return sorted(found)

    def directory(self, controller: str, identifier: str) -> str:
        """Return where a group's directory of a controller is, or would be."""
        return f"{self._mounts[controller]}/{self._parent}/{identifier}"

    def make_directory(self, controller: str, identifier: str) -> str:
        """Make a group's directory of a controller, and the parent if missing."""
        path = self.directory(controller, identifier)
        try:
            os.mkdir(path, 0o755)
        except FileNotFoundError:
            self._make_parent(controller)
            os.mkdir(path, 0o755)
        if controller == "cpuset":
            _inherit_cpuset(os.path.dirname(path), path)
        return path

    def _make_parent(self, controller: str) -> None:
        mount = self._mounts[controller]
        path = mount
        for name in self._parent.split("/"):
            upper, path = path, f"{path}/{name}"
            try:
                os.mkdir(path, 0o755)
            except FileExistsError:
                continue
            except PermissionError as exc:
                raise Denied(
                    f"not allowed to make control group {path}",
                    hint="run as root, or on a host with cgroup v2 and delegation",
                ) from exc
            except OSError as exc:
                if exc.errno == errno.EROFS:
                    raise Unsupported(f"{mount} is mounted read-only") from exc
                raise
            if controller == "cpuset":
                _inherit_cpuset(upper, path)


def _inherit_cpuset(upper: str, path: str) -> None:
    # A new v1 cpuset is empty, and no task may join an empty one; see cpuset(7).
    for name in ("cpuset.cpus", "cpuset.mems"):
        files.write_text(f"{path}/{name}", files.read_text(f"{upper}/{name}"))


class V1Group:
    """One instance's directories, by controller."""

    def __init__(self, owner: V1Hierarchy, identifier: str, found: dict[str, str]) -> None:
        self.id = identifier
        self._owner = owner
        self.directories = found

    @property
    def controllers(self) -> frozenset[str]:
        """The controllers in which this group has a directory, by their v2 names."""
        return frozenset(self.directories) - {TRACKING}

    def ensure_controller(self, controller: str, *, exclusive: bool = False) -> None:
        """Make the directory of a controller; `AlreadyExists` if `exclusive` and it is there."""
        if controller in self.directories:
            return
        path = self._owner.directory(controller, self.id)
        if path not in self.directories.values():
            try:
                self._owner.make_directory(controller, self.id)
            except FileExistsError:
                if exclusive:
                    raise AlreadyExists(f"control group {path} exists") from None
        self.directories[controller] = path

    def join_files(self) -> tuple[str, ...]:
        """The `tasks` files into which a single-threaded process writes `0` to join."""
        return tuple(f"{path}/tasks" for path in dict.fromkeys(self.directories.values()))

    def open_dir(self) -> int | None:
        """Return None: version 1 has no CLONE_INTO_CGROUP."""
        return None

    def add(self, pid: int) -> None:
        """Move a process, with all its threads, into the group."""
        for path in dict.fromkeys(self.directories.values()):
            files.write_text(f"{path}/cgroup.procs", str(pid))

    def update(self, limits: Limits) -> None:
        """Change the limits that are set in `limits`, live."""
        validate(limits)
        check_supported(limits, self._owner.controllers, _HINT)
        for controller in dict.fromkeys(requested(limits).values()):
            if controller not in self.directories:
                self.ensure_controller(controller)
                self._move_members(self.directories[controller])
        apply_limits(self.directories, limits, fresh=False)

    def _move_members(self, target: str) -> None:
        # A member may fork while others are moved; its child is then still outside.
        moved: set[int] = set()
        while waiting := self.pids() - moved:
            for pid in waiting:
                moved.add(pid)
                try:
                    files.write_text(f"{target}/cgroup.procs", str(pid))
                except ProcessLookupError:
                    continue

    def stats(self) -> Stats:
        """Read all counters once; `NotFound` when the group is gone."""
        return read_stats(self.id, self.directories)

    def oom_kills(self) -> int:
        """Return how many processes the kernel killed for want of memory in the group."""
        return read_oom_kills(self.directories.get("memory"))

    def pids(self) -> set[int]:
        """Return the processes in the group and in groups made beneath it."""
        for controller in ("freezer", "pids", *self.directories):
            if controller in self.directories:
                return files.pids_below(self.directories[controller])
        return set()

    def freeze(self, timeout_s: float = FREEZE_TIMEOUT_S) -> None:
        """Stop every process and wait until all are stopped; on `OperationTimeout` none is."""
        try:
            self._set_state("FROZEN", timeout_s)
        except BaseException:
            self._write_state("THAWED")
            raise

    def thaw(self, timeout_s: float = FREEZE_TIMEOUT_S) -> None:
        """Let the processes go on."""
        self._set_state("THAWED", timeout_s)

    def is_frozen(self) -> bool:
        """Return whether the group is (being) frozen."""
        path = self.directories.get("freezer")
        return path is not None and files.read_text(f"{path}/freezer.state") != "THAWED"

    def _write_state(self, state: str) -> None:
        path = self.directories.get("freezer")
        if path is None:
            raise Unsupported("this host has no freezer controller", hint=_HINT)
        try:
            files.write_text(f"{path}/freezer.state", state)
        except FileNotFoundError as exc:
            raise NotFound(f"control group {path} is gone") from exc

    def _set_state(self, state: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        pause = 0.0002
        while True:
            # Written again each time: a task that was joining or forking may have been
            # missed by the round before. See cgroup-v1/freezer-subsystem.rst.
            self._write_state(state)
            if files.read_text(f"{self.directories['freezer']}/freezer.state") == state:
                return
            if time.monotonic() >= deadline:
                raise OperationTimeout(f"control group {self.id} did not become {state.lower()}")
            time.sleep(pause)
            pause = min(pause * 2, 0.02)

    def kill_all(self, timeout_s: float = KILL_TIMEOUT_S) -> None:
        """Kill every process, a frozen one too, and wait until none is left."""
        deadline = time.monotonic() + timeout_s
        while pids := self.pids():
            # Frozen, the group cannot fork faster than we kill. A process that cannot be
            # frozen (in the D state) must not keep the others alive.
            if "freezer" in self.directories:
                try:
                    self.freeze(min(0.2, timeout_s))
                except OperationTimeout:
                    pass
                pids = self.pids()
            pidfds = _kill(pids)
            if "freezer" in self.directories:
                self._write_state("THAWED")
            _wait_all(pidfds, deadline)
            if time.monotonic() >= deadline and (left := self.pids()):
                raise OperationTimeout(f"control group {self.id} keeps processes: {sorted(left)}")

    def remove(self, timeout_s: float = 2.0) -> None:
        """Remove the group and those beneath; fine if gone, `Busy` while processes stay."""
        deadline = time.monotonic() + timeout_s
        for path in dict.fromkeys(self.directories.values()):
            files.remove_tree(path, deadline - time.monotonic())
        self.directories.clear()


def _kill(pids: set[int]) -> list[int]:
    pidfds: list[int] = []
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            # Gone, or no descriptor left: the caller's loop looks again.
            continue
        pidfds.append(pidfd)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return pidfds


def _wait_all(pidfds: list[int], deadline: float) -> None:
    from hutch.linux.pidfd import wait_pidfd

    for pidfd in pidfds:
        wait_pidfd(pidfd, max(0.0, deadline - time.monotonic()))
        os.close(pidfd)
