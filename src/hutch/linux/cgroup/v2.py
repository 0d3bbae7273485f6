"""Control groups, version 2: one tree, controllers switched on level by level."""

from __future__ import annotations

import errno
import os
import select
import time

from hutch.errors import AlreadyExists, Busy, Denied, NotFound, OperationTimeout, Unsupported
from hutch.linux.cgroup import files
from hutch.linux.cgroup.limits import Limits, check_supported, validate
from hutch.linux.cgroup.protocol import FREEZE_TIMEOUT_S, KILL_TIMEOUT_S, check_id
from hutch.linux.cgroup.stats import Stats
from hutch.linux.cgroup.v2_limits import apply_limits
from hutch.linux.cgroup.v2_stats import read_oom_kills, read_stats

__all__ = ["V2Group", "V2Hierarchy", "find_v2"]

# Built into the kernel's core rather than switched on, so cgroup.controllers has them not.
_BUILT_IN = frozenset({"freezer", "cpuacct"})
_SWITCHED = ("cpu", "memory", "pids", "io", "cpuset")
_HOST_LEAF = "hutch.host"
_SETTLES = 8
_PROMISES = ("memory.low", "memory.min")
_MOST_LOW = 1 << 62

_HINT = (
    "run inside a delegated group, as with: systemd-run --user --scope -p Delegate=yes hutch ..."
)


def find_v2(mount: str, proc: str, parent: str) -> V2Hierarchy | None:
    """Return the hierarchy beneath the highest group above this process that it may change.

    For root this is the mount itself; for a user the group delegated to them (systemd's
    `user@UID.service`, or a scope with Delegate=yes). None where there is none.
    """
    own = ""
    with open(f"{proc}/self/cgroup", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            if line.startswith("0::"):
                own = line[3:].rstrip("\n").strip("/")
    base = mount
    for name in ["", *(own.split("/") if own else [])]:
        base = f"{base}/{name}" if name else base
        if _is_writable(base):
            return V2Hierarchy(base, parent)
        if not os.path.isdir(base):
            return None
    return None


def _is_writable(base: str) -> bool:
    return os.access(base, os.W_OK) and os.access(f"{base}/cgroup.procs", os.W_OK)


class V2Hierarchy:
    """Groups at `<base>/<parent>/<id>`, where `base` is the root or was delegated to us."""

    version = "v2"

    def __init__(self, base: str, parent: str) -> None:
        self._base = base
        self._root = f"{base}/{parent}"
        self._parent = parent
        switched = frozenset(files.read_text(f"{base}/cgroup.controllers").split())
        # A BPF program on the group controls devices; loading one takes privileges, and
        # without them nobody can make a device node anyway.
        privileged = os.geteuid() == 0
        self.controllers = switched | _BUILT_IN | ({"devices"} if privileged else set())
        self._enforces_devices = privileged

    @property
    def parent(self) -> dict[str, str]:
        """The directory of the group above all these, under the empty name."""
        return {"": self._root}

    def ensure_parent(self) -> dict[str, str]:
        """Make the group above where it is missing; return its directory."""
        self._make_parent()
        return self.parent

    def remove_parent(self) -> None:
        """Remove the group above if nothing is in it."""
        files.remove_empty([self._root])

    def create(self, identifier: str, limits: Limits) -> V2Group:
        """Make the group and set its limits; nothing is left when it raises."""
        check_id(identifier)
        validate(limits)
        self.check(limits)
        path = f"{self._root}/{identifier}"
        try:
            os.mkdir(path, 0o755)
        except FileExistsError:
            raise AlreadyExists(f"control group {path} exists") from None
        except FileNotFoundError:
            self._make_parent()
            os.mkdir(path, 0o755)
        group = V2Group(self, identifier, path)
        try:
            apply_limits(path, limits, fresh=True, devices=self._enforces_devices)
            if limits.memory_reservation or limits.memory_min:
                self.settle_protection()
        except BaseException:
            group.remove()
            raise
        return group

    def settle_protection(self) -> None:
        """Give the groups above what their children were promised: what a group has of
        `memory.low` and `memory.min` counts only as far as those above it have it too
        (cgroup-v2.rst)."""
        path = self._root
        while path != self._base:
            if not all(_settle(path, name) for name in _PROMISES):
                return
            path = os.path.dirname(path)

    def check(self, limits: Limits) -> None:
        """Raise `Unsupported` for a limit whose controller this process cannot use."""
        wanted = self.controllers | {"devices"}
        check_supported(limits, frozenset(wanted), _HINT)

    def load(self, identifier: str) -> V2Group:
        """Return an existing group; `NotFound` when there is none."""
        check_id(identifier)
        path = f"{self._root}/{identifier}"
        if not os.path.isdir(path):
            raise NotFound(f"no control group {identifier}")
        return V2Group(self, identifier, path)

    def oom_kills(self, identifier: str) -> int:
        """Return the count of a group and those beneath; 0 where there is none."""
        check_id(identifier)
        return read_oom_kills(f"{self._root}/{identifier}")

    def remove(self, identifier: str) -> None:
        """Remove a group, where it is there."""
        check_id(identifier)
        if os.path.isdir(path := f"{self._root}/{identifier}"):
            V2Group(self, identifier, path).remove()

    def list_groups(self) -> list[str]:
        """Return the identifiers of all groups here."""
        return sorted(files.child_names(self._root))

    def enforces_devices(self) -> bool:
        """Return whether device rules can be attached."""
        return self._enforces_devices

    def _make_parent(self) -> None:
        path = self._base
        self._switch_on(path)
        for name in self._parent.split("/"):
            path = f"{path}/{name}"
            try:
                os.mkdir(path, 0o755)
            except FileExistsError:
                pass
            except OSError as exc:
                if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise Denied(f"not allowed to make control group {path}", hint=_HINT) from exc
                raise
            self._switch_on(path)

    def _switch_on(self, path: str) -> None:
        """Give the children of a group its controllers, those that can be given."""
        offered = files.read_text(f"{path}/cgroup.controllers").split()
        given = files.read_text(f"{path}/cgroup.subtree_control").split()
        wanted = [name for name in _SWITCHED if name in offered and name not in given]
        # Beneath the real root, which has no type, some can be switched on with processes in
        # the group, which then becomes a threaded one: nothing beneath it may have memory.
        if wanted and os.path.exists(f"{path}/cgroup.type") and self._has_processes(path):
            self._vacate(path)
        for controller in wanted:
            try:
                files.write_text(f"{path}/cgroup.subtree_control", f"+{controller}")
            except OSError as exc:
                if exc.errno != errno.EBUSY:
                    continue
                # Only the real root may have both processes and controllers below it;
                # see "No Internal Process Constraint" in cgroup-v2.rst.
                self._vacate(path)
                files.write_text(f"{path}/cgroup.subtree_control", f"+{controller}")

    @staticmethod
    def _has_processes(path: str) -> bool:
        try:
            return bool(files.read_text(f"{path}/cgroup.procs").split())
        except OSError as exc:
            if exc.errno != errno.EOPNOTSUPP:  # it is a threaded one already
                raise
            return False

    def _vacate(self, path: str) -> None:
        leaf = f"{path}/{_HOST_LEAF}"
        try:
            os.mkdir(leaf, 0o755)
        except FileExistsError:
            pass
        for _ in range(100):
            pids = [pid for pid in files.read_text(f"{path}/cgroup.procs").split() if pid != "0"]
            if not pids:
                return
            for pid in pids:
                try:
                    files.write_text(f"{leaf}/cgroup.procs", pid)
                except ProcessLookupError:
                    continue
        raise Busy(f"processes keep appearing in control group {path}")


class V2Group:
    """One instance's directory."""

    def __init__(self, owner: V2Hierarchy, identifier: str, path: str) -> None:
        self.id = identifier
        self._owner = owner
        self._path = path

    @property
    def directories(self) -> dict[str, str]:
        """The directory, under the empty name."""
        return {"": self._path}

    @property
    def controllers(self) -> frozenset[str]:
        """The controllers that work in this group."""
        found = files.read_text(f"{self._path}/cgroup.controllers").split()
        return frozenset(found) | _BUILT_IN

    def join_files(self) -> tuple[str, ...]:
        """Return nothing: a process is made inside by CLONE_INTO_CGROUP."""
        return ()

    def open_dir(self) -> int | None:
        """Open the directory for CLONE_INTO_CGROUP; the caller closes it."""
        return os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def add(self, pid: int) -> None:
        """Move a process, with all its threads, into the group."""
        files.write_text(f"{self._path}/cgroup.procs", str(pid))

    def update(self, limits: Limits) -> None:
        """Change the limits that are set in `limits`, live."""
        validate(limits)
        self._owner.check(limits)
        devices = self._owner.enforces_devices()
        apply_limits(self._path, limits, fresh=False, devices=devices)
        if limits.memory_reservation is not None or limits.memory_min is not None:
            self._owner.settle_protection()

    def stats(self) -> Stats:
        """Read all counters once; `NotFound` when the group is gone."""
        return read_stats(self.id, self._path)

    def oom_kills(self) -> int:
        """Return how many processes the kernel killed for want of memory in the group."""
        return read_oom_kills(self._path)

    def pids(self) -> set[int]:
        """Return the processes in the group and in groups made beneath it."""
        return files.pids_below(self._path)

    def is_frozen(self) -> bool:
        """Return whether the group is (being) frozen."""
        return files.read_int(f"{self._path}/cgroup.freeze", 0) == 1

    def freeze(self, timeout_s: float = FREEZE_TIMEOUT_S) -> None:
        """Stop every process and wait until all are stopped; on `OperationTimeout` none is."""
        self._set_frozen(1)
        try:
            self._wait_event("frozen", 1, timeout_s)
        except BaseException:
            self._set_frozen(0)
            raise

    def thaw(self, timeout_s: float = FREEZE_TIMEOUT_S) -> None:
        """Let the processes go on."""
        self._set_frozen(0)
        self._wait_event("frozen", 0, timeout_s)

    def _set_frozen(self, value: int) -> None:
        try:
            files.write_text(f"{self._path}/cgroup.freeze", str(value))
        except FileNotFoundError as exc:
            if os.path.isdir(self._path):
                raise Unsupported("this kernel cannot freeze a v2 group (before 5.2)") from exc
            raise NotFound(f"control group {self._path} is gone") from exc

    def _wait_event(self, key: str, value: int, timeout_s: float) -> None:
        """Wait until cgroup.events says `key value`; the kernel wakes poll(2) on changes."""
        deadline = time.monotonic() + timeout_s
        try:
            fd = os.open(f"{self._path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as exc:
            raise NotFound(f"control group {self._path} is gone") from exc
        try:
            poller = select.poll()
            poller.register(fd, select.POLLPRI)
            while True:
                events = files.parse_keyed(os.pread(fd, 4096, 0).decode())
                if events.get(key) == value:
                    return
                left = deadline - time.monotonic()
                if left <= 0:
                    raise OperationTimeout(f"control group {self.id}: {key} did not become {value}")
                poller.poll(max(1, int(left * 1000)))
        finally:
            os.close(fd)

    def kill_all(self, timeout_s: float = KILL_TIMEOUT_S) -> None:
        """Kill every process, a frozen one too, and wait until none is left."""
        try:
            try:
                files.write_text(f"{self._path}/cgroup.kill", "1")
            except FileNotFoundError:
                self._kill_one_by_one()
            self._wait_event("populated", 0, timeout_s)
        except NotFound:
            return

    def _kill_one_by_one(self) -> None:
        # Before Linux 5.14. Frozen, the group cannot fork faster than we kill.
        import signal

        try:
            self._set_frozen(1)
        except Unsupported:
            pass
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            self._set_frozen(0)
        except Unsupported:
            pass

    def remove(self, timeout_s: float = 2.0) -> None:
        """Remove the group and those beneath; fine if gone, `Busy` while processes stay."""
        promised = files.read_int(f"{self._path}/memory.low", 0)
        files.remove_tree(self._path, timeout_s)
        if promised:
            self._owner.settle_protection()


def _settle(path: str, name: str) -> bool:
    """Give one group what its children have of a promise; False where it cannot have any."""
    # Another process may do the same: done when nothing has changed meanwhile.
    for _ in range(_SETTLES):
        promised = _promised(path, name)
        if files.read_int(f"{path}/{name}", 0) == promised:
            break
        try:
            files.write_text(f"{path}/{name}", str(promised))
        except FileNotFoundError:
            return False  # no memory controller, or the last one here has just gone
    return True


def _promised(path: str, promise: str) -> int:
    """Return what the groups in one were promised together, in bytes."""
    found = (files.read_int(f"{path}/{name}/{promise}", 0) for name in files.child_names(path))
    return min(sum(size or 0 for size in found), _MOST_LOW)
