"""An engine with small machines, and what must be gone when they are."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from hutch.engine import Engine, Instance, create
from hutch.ids import InstanceId, new_instance_id
from hutch.linux.cgroup import detect
from tests.leaks import local_leaks
from tests.requires import requires

__all__ = ["DEADLINE_S", "NEEDS", "SMALL", "is_gone", "machine_root", "nothing_left", "start"]
__all__ += ["processes", "until"]

DEADLINE_S = 200.0
NEEDS = (
    requires("root", "cgroup", "seccomp", "netns", "nftables", "busybox", "qemu", "apt-mirror"),
    requires("mkfs.erofs", "mke2fs"),
    pytest.mark.integration,
)
SMALL: dict[str, Any] = {"isolation": "vm", "memory": "128m", "network": "none"}


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait until the condition holds; `what` says what did not happen."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@contextmanager
def machine_root(root: Path) -> Iterator[Engine]:
    """An engine on a root of its own, with the image `busybox`; its template ends with it."""
    with Engine(root) as engine:
        engine.images.bootstrap("busybox")
        assert engine._context.machines  # it keeps the launcher open for as long as the engine
        try:
            yield engine
        finally:
            engine._context.machines.prune_templates()
            engine._context.networks.teardown()


def start(engine: Engine, script: str = "sleep 1000", **options: Any) -> Instance:
    """Start a shell script in a small machine."""
    return engine.start("busybox", ["sh", "-c", script], **{**SMALL, **options})


def processes(engine: Engine, box: Instance) -> dict[str, int]:
    """Return the pids of a machine's `hutch-vmm` and of its QEMU, by these names."""
    found = {}
    for pid in engine._context.machines.processes(box.id):
        with suppress(FileNotFoundError):  # another, which has ended meanwhile
            comm = Path(f"/proc/{pid}/comm").read_text()
            found["qemu" if comm.startswith("qemu") else "vmm"] = pid
    return found


def is_gone(pid: int) -> bool:
    """Tell whether a process has ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


def _descriptors() -> list[str]:
    """Return what is open, but for connections to the store, which are kept for the next
    thread, and what is being deleted in the background."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue  # the descriptor of the listing itself
        if "/hutch.db" not in target and "/trash" not in target:
            found.append(target)
    return sorted(found)


@contextmanager
def nothing_left(engine: Engine) -> Iterator[None]:
    """Check that the block leaves nothing of the machines it makes: no record, directory,
    control group, address, lease, kernel in use, process or descriptor."""
    made: list[InstanceId] = []

    def remember() -> InstanceId:
        made.append(new_instance_id())
        return made[-1]

    before = _descriptors()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(create, "new_instance_id", remember)
        yield
    assert [info.name for info in engine.list(all=True)] == []
    assert list((engine.root / "instances").iterdir()) == []
    assert set(detect().list_groups()) & set(made) == set()
    assert engine.networks.members("bridge") == ()
    assert list(engine._context.leases.list()) == []
    for kernel in engine.kernels.list():
        assert engine._context.kernels.users(kernel.id) == ()
    until(lambda: local_leaks(engine.root / "instances") == set(), "processes or mounts stay")
    until(lambda: len(_descriptors()) <= len(before), f"open: {before}, then {_descriptors()}")
