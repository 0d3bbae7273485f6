"""Save a running container, with its memory and its files, and let it go on or end.

It is frozen from before CRIU looks at it until all is saved: memory and files are of one
moment. Whoever is killed meanwhile leaves it frozen at worst, and `awaken` undoes that.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hutch.drivers.base import ForkedState
from hutch.drivers.container.checkpoint import dump
from hutch.errors import Unsupported
from hutch.host.criu import load_criu
from hutch.linux.cgroup import Group
from hutch.linux.files import syncfs
from hutch.process.records import read_pid
from hutch.spec.model import InstanceSpec
from hutch.storage.copying import copy_tree
from hutch.storage.snapshots import Snapshots

__all__ = ["HeldContainer", "awaken", "check_savable", "fork_container", "held_still"]
__all__ += ["save_container", "save_files"]

UPPER = "upper"


def check_savable(root: Path, spec: InstanceSpec) -> None:
    """Raise `Unsupported` where a container cannot be saved: no CRIU, or what it shares."""
    load_criu(root / "cache")
    if spec.init:
        raise Unsupported(
            "CRIU: --init: its first process runs from memory, where CRIU cannot put it again",
            hint="run it without --init, or with --vm",
        )
    if spec.userns not in ("", "host"):
        raise Unsupported(
            f"CRIU: --userns {spec.userns}: its processes cannot join a network that was made for "
            "them from outside of their user namespace",
            hint="run it without a user namespace, or with --vm",
        )
    for option, mode in (
        ("pid", spec.pid_mode),
        ("ipc", spec.ipc_mode),
        ("network", spec.network_mode),
        ("uts", spec.uts_mode),
    ):
        if mode.startswith("container:") or (option == "pid" and mode == "host"):
            raise Unsupported(
                f"CRIU: --{option} {mode}: its processes share a namespace that it does not own",
                hint="run it without, or with --vm",
            )


class HeldContainer:
    """A container that stands still; see `held_still`."""

    def __init__(self, root: Path, group: Group, identifier: str, lock: int) -> None:
        self._root = root
        self._group = group
        self._identifier = identifier
        self._lock = lock
        self.is_let_go = False

    def save_memory(self, target: str) -> None:
        """Save its processes to an empty directory."""
        run = f"{self._root}/instances/{self._identifier}/run"
        dump(
            load_criu(self._root / "cache"),
            run,
            target,
            freezer=_freezer(self._group),
            pids=self._group.pids(),
            network=_has_network(run),
            lock=self._lock,
        )

    def let_go(self) -> None:
        """Leave it standing still from now on, until somebody ends or awakens it."""
        self.is_let_go = True


@contextmanager
def held_still(root: Path, group: Group, identifier: str) -> Iterator[HeldContainer]:
    """Freeze a container; it goes on at the end of the block unless it was let go."""
    marker = _marker(root, identifier)
    with _held(marker) as lock:
        held = HeldContainer(root, group, identifier, lock)
        try:
            group.freeze()
            yield held
        finally:
            if not held.is_let_go:
                group.thaw()
                os.unlink(marker)


def save_container(
    root: Path, group: Group, identifier: str, target: str, *, end_as: str = ""
) -> None:
    """Save a container to an empty directory; see `hutch.drivers.base.Savable.save`."""
    directory = f"{root}/instances/{identifier}"
    with held_still(root, group, identifier) as held:
        held.save_memory(target)
        if not end_as:
            copy_tree(Snapshots.upper_of(directory), f"{target}/{UPPER}")
            return
        _sync_tree(target)
        _sync_files(directory)
        os.rename(target, end_as)
        _sync(os.path.dirname(end_as))
        held.let_go()
        group.kill_all()
    os.unlink(_marker(root, identifier))


def save_files(root: Path, group: Group, identifier: str, target: str) -> None:
    """Copy the files of a running container to an empty directory, all of one moment."""
    with held_still(root, group, identifier):
        copy_tree(Snapshots.upper_of(f"{root}/instances/{identifier}"), f"{target}/{UPPER}")


@contextmanager
def _held(marker: str) -> Iterator[int]:
    """Hold the lock of the file that says that a container is being saved."""
    fd = os.open(marker, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)


def fork_container(root: Path, group: Group, identifier: str, target: str) -> ForkedState:
    """Save a container for twins; see `hutch.drivers.base.Savable.fork`."""
    save_container(root, group, identifier, target)
    state = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return ForkedState(state=state, memory=-1, saved=os.fsencode(target))


def awaken(root: Path, group: Group, identifier: str) -> bool:
    """Thaw a running container whose saver was killed; tell whether there was one. CRIU, which
    may still be at work on it, is let finish first."""
    marker = _marker(root, identifier)
    try:
        fd = os.open(marker, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        group.thaw()
        os.unlink(marker)
    finally:
        os.close(fd)
    return True


def _marker(root: Path, identifier: str) -> str:
    """Return the file that is there while a container is being saved."""
    return f"{root}/instances/{identifier}/run/saving"


def _has_network(run: str) -> bool:
    record = read_pid(run)
    assert record is not None
    theirs = os.stat(f"/proc/{record.pid}/ns/net").st_ino
    return theirs != os.stat("/proc/self/ns/net").st_ino


def _freezer(group: Group) -> str:
    directories = group.directories
    found = directories.get("freezer") or directories.get("")
    if found is None:
        raise Unsupported(
            "CRIU: this host has no freezer for control groups", hint="see `hutch doctor`"
        )
    return found


def _sync_tree(directory: str) -> None:
    """See a saved state onto the disk."""
    for path, _, names in os.walk(directory):
        for name in names:
            _sync(f"{path}/{name}")
        _sync(path)


def _sync_files(directory: str) -> None:
    """See what the container wrote onto the disk, also one whose files may be lost (--rm)."""
    fd = os.open(Snapshots.upper_of(directory), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syncfs(fd)
    finally:
        os.close(fd)


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
