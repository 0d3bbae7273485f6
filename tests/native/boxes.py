"""Plans for a busybox container, as the compiler makes them but for what tests leave out."""

from __future__ import annotations

import fcntl
import os
import resource
import struct
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from hutch.plan import flags, ops
from hutch.process import ExitStatus, Launcher, LaunchFailed, Supervisor, attach_flags

PLAIN = flags.MOUNT_ATTR_NOSUID | flags.MOUNT_ATTR_NODEV | flags.MOUNT_ATTR_NOEXEC
NAMESPACES = (
    flags.CLONE_NEWNS
    | flags.CLONE_NEWUTS
    | flags.CLONE_NEWIPC
    | flags.CLONE_NEWPID
    | flags.CLONE_NEWNET
)
ENV = ("PATH=/bin", "HOME=/root")
COLLECT = attach_flags(stdin=True, stdout=True, stderr=True, lossless=True)
WAIT_S = 60.0


def mounts() -> tuple[ops.AnyOp, ...]:
    return (
        ops.Mount(fstype="proc", target="/proc", source="proc", attr=PLAIN),
        ops.Mount(fstype="tmpfs", target="/dev", source="tmpfs", options=("mode=0755",)),
        ops.Mount(
            fstype="devpts",
            target="/dev/pts",
            source="devpts",
            options=("newinstance", "ptmxmode=0666", "mode=0620"),
        ),
        ops.Mknod(path="/dev/null", mode=0o020666, major=1, minor=3, fallback="/dev/null"),
        ops.Mknod(path="/dev/zero", mode=0o020666, major=1, minor=5, fallback="/dev/zero"),
        ops.Mknod(path="/dev/tty", mode=0o020666, major=5, minor=0, fallback="/dev/tty"),
        ops.Symlink(target="/proc/self/fd", path="/dev/fd"),
        ops.Symlink(target="/proc/self/fd/0", path="/dev/stdin"),
        ops.Symlink(target="/proc/self/fd/1", path="/dev/stdout"),
        ops.Symlink(target="/proc/self/fd/2", path="/dev/stderr"),
    )


def box(
    rootfs: Path,
    argv: Sequence[str],
    *,
    held: ops.Supervision | None = None,
    root: Sequence[ops.AnyOp] | None = None,
    before_pivot: Sequence[ops.AnyOp] = (),
    after_pivot: Sequence[ops.AnyOp] = (),
    prepare: Sequence[ops.AnyOp] = (),
    clone_flags: int = NAMESPACES,
    cgroup_slot: int = -1,
    slots: int = 0,
    tty: bool = False,
    init: bool = False,
    env: tuple[str, ...] = ENV,
) -> ops.Plan:
    """Return the plan of a container on `rootfs`."""
    held = held or ops.Supervision()
    child: list[ops.AnyOp] = [ops.Propagation(path="/", flags=flags.MS_REC | flags.MS_PRIVATE)]
    child += (ops.RootDir(path=str(rootfs)),) if root is None else root
    child += mounts()
    child += before_pivot
    child += [ops.PivotRoot(), ops.SetsidTty(tty=tty, console=tty, rows=24, columns=80)]
    child += after_pivot
    child.append(ops.Exec(argv=tuple(argv), env=env, init=init))
    return ops.Plan(
        prepare=tuple(prepare),
        clone_flags=clone_flags,
        cgroup_slot=cgroup_slot,
        child=tuple(child),
        slots=slots,
        supervision=held,
    )


def shell(rootfs: Path, script: str, **options: object) -> ops.Plan:
    """Return the plan of a container that runs a shell script."""
    return box(rootfs, ["sh", "-c", script], **options)  # type: ignore[arg-type]


class Runner:
    """A launcher and what its tests need most."""

    def __init__(self, launcher: Launcher, env: dict[str, str]) -> None:
        self.launcher = launcher
        self.env = env

    def start(
        self, plan: ops.Plan | bytes, fds: Sequence[int] = (), attach: int = COLLECT
    ) -> Supervisor:
        return self.launcher.start(plan, fds, attach=attach, env=self.env)

    def run(
        self, plan: ops.Plan, fds: Sequence[int] = (), input: bytes | None = None
    ) -> tuple[ExitStatus, bytes, bytes]:
        with self.start(plan, fds) as supervisor:
            return supervisor.collect(input, timeout_s=WAIT_S)

    def failure(self, plan: ops.Plan | bytes, fds: Sequence[int] = ()) -> LaunchFailed:
        """Start a plan that must fail; return how it did."""
        with self.start(plan, fds) as supervisor, pytest.raises(LaunchFailed) as failure:
            supervisor.wait_started(WAIT_S)
        return failure.value

    @contextmanager
    def running(
        self, plan: ops.Plan, fds: Sequence[int] = (), attach: int = COLLECT
    ) -> Iterator[Supervisor]:
        """Start, wait until the program runs, and kill it at the end of the block."""
        with self.start(plan, fds, attach) as supervisor:
            supervisor.wait_started(WAIT_S)
            try:
                yield supervisor
            finally:
                try:
                    supervisor.shutdown()
                    supervisor.wait(WAIT_S)
                except ProcessLookupError:
                    pass


def read_until(supervisor: Supervisor, wanted: bytes) -> bytes:
    """Read output until `wanted` has come."""
    seen = b""
    for item in supervisor.output(WAIT_S):
        seen += getattr(item, "data", b"")
        if wanted in seen:
            return seen
    raise AssertionError(f"the output ended without {wanted!r}: {seen!r}")


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait for a condition, at most `WAIT_S`."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.005)


def exists(pid: int) -> bool:
    """Tell whether a process exists and is not a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(b")")[2].split()[0] not in (b"Z", b"X")


def is_stopped(pid: int) -> bool:
    """Tell whether a signal has stopped a process."""
    stat = Path(f"/proc/{pid}/stat").read_bytes()
    return stat.rpartition(b")")[2].split()[0] == b"T"


def unread(pid: int) -> int:
    """Return how many bytes a process has written to its stdout that its supervisor has not
    read yet."""
    pipe = os.open(f"/proc/{pid}/fd/1", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        (count,) = struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))
        return int(count)
    finally:
        os.close(pipe)


def inode(fd: int) -> int:
    return os.fstat(fd).st_ino


def deny_descriptors(pid: int, another: Callable[[], object] | None = None) -> tuple[int, int]:
    """Leave a process no descriptor for another file; return the limit that it had.

    poll(2) refuses to watch more files than the limit: `another` has a process that polls open
    one more, until no number below its highest one is free.
    """
    while True:
        used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
        free = next(number for number in range(len(used) + 1) if number not in used)
        if another is None or free > max(used):
            break
        another()
    limit = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, limit[1]))
    return limit


def sleeps(pid: int) -> int:
    """Return how often a process has gone to sleep."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
