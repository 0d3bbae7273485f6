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

__all__ = ["awaken", "check_savable", "fork_container", "save_container", "save_files"]

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


def save_container(
    root: Path, group: Group, identifier: str, target: str, *, end_as: str = ""
) -> None:
    """Save a container to an empty directory; see `hutch.drivers.base.Savable.save`."""
    marker = _marker(root, identifier)
    with _held(marker) as lock:
        ended = False
        try:
            group.freeze()
            _save(root, group, identifier, target, files=not end_as, lock=lock)
            if end_as:
                _sync_tree(target)
                _sync_files(f"{root}/instances/{identifier}")
                os.rename(target, end_as)
                _sync(os.path.dirname(end_as))
                ended = True
                group.kill_all()
        finally:
            if not ended:
                group.thaw()
            os.unlink(marker)


def save_files(root: Path, group: Group, identifier: str, target: str) -> None:
    """Copy the files of a running container to an empty directory, all of one moment."""
    marker = _marker(root, identifier)
    with _held(marker):
        try:
            group.freeze()
            copy_tree(Snapshots.upper_of(f"{root}/instances/{identifier}"), f"{target}/{UPPER}")
        finally:
            group.thaw()
            os.unlink(marker)


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


def _save(
    root: Path, group: Group, identifier: str, target: str, *, files: bool, lock: int
) -> None:
    directory = f"{root}/instances/{identifier}"
    run = f"{directory}/run"
    dump(
        load_criu(root / "cache"),
        run,
        target,
        freezer=_freezer(group),
        pids=group.pids(),
        network=_has_network(run),
        lock=lock,
    )
    if files:
        upper = Snapshots.upper_of(directory)
        copy_tree(upper, f"{target}/{UPPER}")


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
