"""Start `hutch-vmm` and QEMU: descriptors, sandbox, configuration; what every machine has.

An instance's machine, and one that is booted only to become a template, start in the same
way. The caller brings the argument list of QEMU, made when the descriptors are known.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import msgspec

from hutch.drivers import failures
from hutch.drivers.vm.sandbox import (
    Descriptors,
    Sandbox,
    host_binds,
    listen_at,
    make_skeleton,
    sandbox_user,
)
from hutch.errors import OperationTimeout, OutcomeUnknown, Unavailable
from hutch.host.facts import misc_minor
from hutch.linux.cgroup import Group
from hutch.linux.idmap import write_own_map
from hutch.plan.container import SYNC_IDMAP
from hutch.plan.ops import Plan, Supervision
from hutch.plan.vm import PassedGroup, SandboxAssets, compile_sandbox
from hutch.process.launcher import Launcher
from hutch.process.supervisor import Supervisor
from hutch.process.vmm import (
    MonitorConfig,
    MonitorLink,
    discard_path,
    encode_config,
    vmm_path,
)

__all__ = ["BootRequest", "Booted", "Ports", "boot", "ended_qemu", "map_ids"]

QMP_SOCKET = "qmp.sock"
AGENT_SOCKET = "agent.sock"
CONSOLE_SOCKET = "console.sock"
# Not to append: hutch-vmm keeps the file from growing.
_NOTHING = os.O_RDONLY | os.O_CLOEXEC
# How long the monitor may take to tell of QEMU's end.
_ENDED_S = 2.0
_LOG = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


class Ports(msgspec.Struct, frozen=True, kw_only=True):
    """The descriptors that every machine has, as QEMU numbers them: a connected socket for
    the agent, listening ones for QMP and the console, and a pipe for the console's log;
    `control`, the monitor's own QMP, where it has one. A machine without an agent has the
    serial port's socket for `agent`."""

    agent: int
    qmp: int
    console: int = -1
    console_log: int = -1
    control: int = -1


class BootRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What one start needs.

    `qemu` is the program, `directory` the run directory, where the sockets are made; `logs`
    where the console's and QEMU's words go. `argv` gets the standard ports and a collector
    for more descriptors. `config` is the monitor's configuration but for what is decided
    here. `namespace` holds a network namespace, -1 for a new, empty one; `host_network`
    stays in the host's. `userfaultfd` gives QEMU that device, by which post-copy fetches
    memory; `groups` are those of PCI devices whose nodes it opens. `discards` says that its
    memory is a sealed file, of which it is to give back what it has written itself. `shares` is
    the connection to the server of the shared directories, whose end ends the machine. `screen`,
    for a machine without an agent, is what the clients of its screen call at.
    """

    identifier: str
    root: Path
    sandbox: Sandbox
    qemu: str
    directory: str
    logs: str
    supervision: Supervision
    argv: Callable[[Ports, Descriptors], Sequence[str]]
    config: MonitorConfig
    kvm: bool = False
    discards: bool = False
    lock_memory: bool = False
    groups: tuple[PassedGroup, ...] = ()
    seccomp: bytes = b""
    rows: int = 0
    columns: int = 0
    group: Group | None = None
    namespace: int = -1
    host_network: bool = False
    network: bool = False
    screen: int = -1
    shares: int = -1
    userfaultfd: bool = False
    attach: int = 0
    env: dict[str, str] | None = None
    shared: tuple[tuple[str, str], ...] = ()


class Booted(msgspec.Struct, frozen=True, kw_only=True):
    """A machine under way: the supervisor's link, that of the monitor, and the plan."""

    supervisor: Supervisor
    monitor: MonitorLink
    plan: Plan


def boot(launcher: Launcher, request: BootRequest) -> Booted:
    """Start the supervisor, which starts `hutch-vmm`, which starts QEMU.

    Returns before any of that has happened (but for a user namespace, whose ids are mapped
    here): the links, the caller's to close, tell.
    """
    with ExitStack() as held, ExitStack() as undo:
        link, slots = _descriptors(request, held)
        undo.callback(link.close)
        inherited = len(slots)
        namespace = _add(slots, request.namespace)
        cgroup_files: tuple[str, ...] = ()
        cgroup_slot = -1
        if request.group is not None:
            cgroup_files = request.group.join_files()
            directory = request.group.open_dir()
            if directory is not None:
                held.callback(os.close, directory)
                cgroup_slot = _add(slots, directory)
        plan = compile_sandbox(
            SandboxAssets(
                supervision=request.supervision,
                skeleton=str(make_skeleton(request.root / "cache" / "machine-root")),
                vmm=vmm_path(),
                binds=host_binds(request.qemu),
                shared=request.shared,
                user=sandbox_user(request.sandbox, request.identifier),
                namespaces=request.sandbox.namespaces,
                host_network=request.host_network,
                kvm=request.kvm,
                userfaultfd=misc_minor("userfaultfd") if request.userfaultfd else -1,
                lock_memory=request.lock_memory,
                groups=request.groups,
                cgroup_files=cgroup_files,
                cgroup_slot=cgroup_slot,
                namespace=namespace,
                network=request.network,
                inherit=tuple(range(inherited)),
                slots=len(slots),
                seccomp=request.seccomp,
                tty=request.config.tty,
                rows=request.rows,
                columns=request.columns,
            )
        )
        supervisor = launcher.start(plan, slots, attach=request.attach, env=request.env)
        undo.callback(supervisor.close)
        if request.sandbox.namespaces == "user":
            with failures.launching(plan, "start"):
                map_ids(supervisor)
        undo.pop_all()
        return Booted(supervisor=supervisor, monitor=link, plan=plan)


def map_ids(supervisor: Supervisor) -> None:
    """Make us root of the user namespace of what a supervisor starts, at its sync point."""
    pid = supervisor.wait_pid()
    supervisor.wait_sync(SYNC_IDMAP)
    write_own_map(pid)
    supervisor.go(SYNC_IDMAP)


def _add(slots: list[int], fd: int) -> int:
    if fd < 0:
        return -1
    slots.append(fd)
    return len(slots) - 1


def _ports(
    request: BootRequest, qemu: Descriptors, holding: Callable[[int], int]
) -> tuple[Ports, int, int]:
    """Give QEMU what every machine has; return that, and the monitor's ends of the agent's
    socket and of the pipe for the console's log."""
    config, control = request.config, -1
    if config.console or config.control:
        mine, its = socket.socketpair()
        qemu.add(mine.detach())  # the first: it is the monitor's own, and kept from QEMU
        control = qemu.add(its.detach())
    vmm_end, qemu_end = socket.socketpair()
    agent = holding(vmm_end.detach())
    ports = Ports(
        control=control,
        agent=qemu.add(qemu_end.detach()),
        qmp=qemu.add(listen_at(request.directory, QMP_SOCKET)),
    )
    said, console_log = os.pipe2(os.O_CLOEXEC)
    holding(said)
    if config.console:
        os.close(console_log)
        return ports, agent, said
    ports = msgspec.structs.replace(
        ports,
        console_log=qemu.add(console_log),
        console=qemu.add(listen_at(request.directory, CONSOLE_SOCKET)),
    )
    return ports, agent, said


def _descriptors(request: BootRequest, held: ExitStack) -> tuple[MonitorLink, list[int]]:
    """Return our end of the link to the monitor, and the descriptors it gets, in order."""

    def holding(fd: int) -> int:
        held.callback(os.close, fd)
        return fd

    qemu = Descriptors(held)
    ports, agent, said = _ports(request, qemu, holding)
    argv = tuple(request.argv(ports, qemu))
    env = request.config.env
    if request.discards:
        library = qemu.add(os.open(discard_path(), os.O_RDONLY | os.O_CLOEXEC))
        env = (*env, f"LD_PRELOAD=/proc/self/fd/{library}")
    config = msgspec.structs.replace(request.config, argv=argv, env=env, qemu_fds=len(qemu.fds))
    memory = holding(os.memfd_create("hutch-machine", os.MFD_CLOEXEC))
    _write_all(memory, encode_config(config))
    listener = request.screen
    if not request.config.console:
        listener = holding(listen_at(request.directory, AGENT_SOCKET))
    logs = [
        holding(os.open(f"{request.logs}/{name}", _LOG, 0o600))
        for name in ("qemu.log", "console.log")
    ]
    link, theirs = MonitorLink.create()
    status = holding(theirs.detach())
    shares = request.shares if request.shares >= 0 else holding(os.open(os.devnull, _NOTHING))
    return link, [memory, agent, listener, status, *logs, said, shares, *qemu.fds]


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


@contextmanager
def ended_qemu(monitor: MonitorLink) -> Iterator[None]:
    """Where QEMU does not answer since it has ended, raise what its monitor says of that; a
    `MigrationFailed` says enough."""
    try:
        yield
    except (OutcomeUnknown, Unavailable) as exc:
        from hutch.qmp.migration import MigrationFailed

        if isinstance(exc, MigrationFailed):
            raise
        with suppress(OperationTimeout):
            monitor.wait_ready(_ENDED_S)
        raise
