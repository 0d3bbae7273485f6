"""Processes on the host: their identity, their namespaces, and joining them for an exec."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from hutch.drivers.base import ExecRequest
from hutch.drivers.confinement import apparmor, environment
from hutch.drivers.users import read_beneath, resolve_user
from hutch.errors import WrongState
from hutch.linux.cgroup import Group
from hutch.plan import flags
from hutch.plan.assets import ExecAssets
from hutch.plan.ops import Supervision
from hutch.process.records import read_stat

if TYPE_CHECKING:
    from hutch.drivers.container.assets import AssetBuilder
    from hutch.spec.model import InstanceSpec

__all__ = [
    "exec_assets",
    "is_same_process",
    "open_process",
    "open_root",
    "process_start_time",
]

_NAMESPACES = (
    ("user", flags.CLONE_NEWUSER),
    ("mnt", flags.CLONE_NEWNS),
    ("uts", flags.CLONE_NEWUTS),
    ("ipc", flags.CLONE_NEWIPC),
    ("pid", flags.CLONE_NEWPID),
    ("net", flags.CLONE_NEWNET),
    ("cgroup", flags.CLONE_NEWCGROUP),
)


def process_start_time(pid: int) -> int:
    """Return when a process started (clock ticks since boot), 0 if it is gone."""
    stat = read_stat(pid)
    return 0 if stat is None else stat.start_time


def is_same_process(pid: int, start_time: int) -> bool:
    """Tell whether `pid` still is the process that started at `start_time`."""
    return pid > 0 and start_time != 0 and process_start_time(pid) == start_time


@contextmanager
def open_process(pid: int, start_time: int) -> Iterator[int]:
    """Hold a pidfd of exactly that process; raise `WrongState` when it has ended."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        raise WrongState("the instance is not running") from None
    try:
        if not is_same_process(pid, start_time):
            raise WrongState("the instance is not running")
        yield pidfd
    finally:
        os.close(pidfd)


def open_root(pid: int) -> int:
    """Return an O_PATH descriptor of a process's root directory; the caller closes it."""
    return os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _made_namespaces(spec: InstanceSpec) -> int:
    """Return the CLONE_NEW* flags of the namespaces that were made for an instance."""
    net = spec.network_mode
    made = flags.CLONE_NEWNS
    for flag, mode in (
        (flags.CLONE_NEWPID, spec.pid_mode),
        (flags.CLONE_NEWIPC, spec.ipc_mode),
        # With the network of another instance comes its name.
        (flags.CLONE_NEWUTS, net if net.startswith("container:") else spec.uts_mode),
        (flags.CLONE_NEWNET, net),
    ):
        if mode != "host" and not mode.startswith("container:"):
            made |= flag
    return made | (flags.CLONE_NEWCGROUP if spec.cgroup_mode == "private" else 0)


def foreign_namespaces(pid: int, made: int = 0) -> int:
    """Return the CLONE_NEW* flags of the namespaces in which `pid` differs from us; those
    that were `made` for it do."""
    wanted = made
    for name, flag in _NAMESPACES:
        if made & flag:
            continue
        theirs = os.stat(f"/proc/{pid}/ns/{name}")
        ours = os.stat(f"/proc/self/ns/{name}")
        if (theirs.st_dev, theirs.st_ino) != (ours.st_dev, ours.st_ino):
            wanted |= flag
    return wanted


def _has_one_id() -> bool:
    from hutch.drivers.container.rootless import has_one_id

    return has_one_id()


def exec_assets(
    builder: AssetBuilder, request: ExecRequest, pidfd: int, group: Group, held: ExitStack
) -> tuple[ExecAssets, tuple[int, ...]]:
    """Return the assets of an exec and the descriptors beyond the pidfd in slot 0."""
    root = open_root(request.pid)
    held.callback(os.close, root)
    process = request.process
    user = resolve_user(process.user, process.groups, lambda path: read_beneath(root, path))
    namespaces = foreign_namespaces(request.pid, _made_namespaces(request.spec))
    privileged = request.privileged or request.spec.security.privileged
    extra: tuple[int, ...] = ()
    cgroup_slot = -1
    directory = group.open_dir()
    if directory is not None:
        held.callback(os.close, directory)
        extra, cgroup_slot = (directory,), 1
    capabilities = builder.confinement.capabilities(request.spec, privileged=privileged)
    assets = ExecAssets(
        user=user,
        env=environment(process, user, hostname=""),
        supervision=Supervision(
            stdin_open=process.stdin,
            stdin_once=process.stdin_once,
            tty=process.tty,
            linger=request.linger,
            name="hutch-exec",
        ),
        namespaces=namespaces,
        pid_namespace=bool(namespaces & flags.CLONE_NEWPID),
        cgroup_files=group.join_files(),
        cgroup_slot=cgroup_slot,
        ulimits=request.spec.ulimits,
        seccomp=b"" if privileged else builder.confinement.seccomp(request.spec, capabilities),
        capabilities=capabilities,
        apparmor=apparmor(request.spec, privileged=privileged),
        slots=1 + len(extra),
        skip_setgroups=os.geteuid() != 0 and _has_one_id(),
        rows=request.rows,
        columns=request.columns,
    )
    return assets, extra
