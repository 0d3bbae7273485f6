"""Virtual machines: an image's root as disks, a kernel, QEMU, and the program in the guest.

The supervisor of an instance holds `hutch-vmm` as it holds a container's program; streams,
signals and the exit code pass through it. What else is asked of the guest goes to its agent.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hutch.drivers import failures
from hutch.drivers.base import ExecRequest, Launch, ProcessRow, Started
from hutch.drivers.confinement import Confinement, environment
from hutch.drivers.users import LayeredReader, resolve_user
from hutch.drivers.vm import inside
from hutch.drivers.vm.awake import check_awake
from hutch.drivers.vm.boot import QMP_SOCKET
from hutch.drivers.vm.images import sync_directory
from hutch.drivers.vm.kernels import Kernels
from hutch.drivers.vm.launching import MachineLauncher, MachineStart
from hutch.drivers.vm.limits import (
    check_spec,
    group_limits,
    memory_of,
    memory_wanted,
    vcpus_wanted,
)
from hutch.drivers.vm.machine import MachineRecord, load_record, save_record
from hutch.drivers.vm.pinning import pin_processors
from hutch.drivers.vm.shares import check_mounts, guest_binds
from hutch.drivers.vm.state import (
    connect_cards,
    fork_machine,
    load_machine,
    receive_machine,
    save_machine,
)
from hutch.drivers.vm.throttling import check_rates, set_rates, start_rates
from hutch.errors import (
    Busy,
    HutchError,
    InternalError,
    NotFound,
    OperationTimeout,
    OutcomeUnknown,
    Unavailable,
    Unsupported,
    WrongState,
)
from hutch.linux.cgroup import Group, Hierarchy, Limits, Stats
from hutch.plan.assets import ResolvedUser
from hutch.plan.container import SYNC_NETWORK
from hutch.plan.ops import HealthProbe, Plan
from hutch.plan.vm import GuestAssets, GuestBind, compile_guest, compile_guest_exec
from hutch.process.guest import Guest, guest_silence
from hutch.process.launcher import Launcher
from hutch.process.records import read_pid
from hutch.process.supervisor import Supervisor
from hutch.resources.groups import InstanceGroups
from hutch.spec.model import InstanceSpec, ProcessSpec, Resources
from hutch.storage.disks import Disks
from hutch.storage.snapshots import QCOW2_FILE

if TYPE_CHECKING:
    from collections.abc import Callable

    from hutch.drivers.base import ForkedState, GuestFiles, TemplateUse
    from hutch.drivers.moving import Departure, Streams
    from hutch.network.model import Endpoint
    from hutch.process.vmm import MonitorLink
    from hutch.qmp import Monitor

__all__ = ["VmDriver"]

_BRING_UP_S = 150.0
# Free pages are reported to QEMU after at most two seconds.
_LOWER_S = 6.0
_ENDED_S = 2.0


class VmDriver:
    """The driver of virtual machines on this host; see `hutch.drivers.base.Driver`."""

    def __init__(self, root: Path, launcher: Launcher, kernels: Kernels) -> None:
        self._root = root
        self._groups = InstanceGroups(root)
        self._confinement = Confinement(root)
        self._machines = MachineLauncher(root, launcher, kernels)

    @property
    def _hierarchy(self) -> Hierarchy:
        return self._groups.hierarchy

    def check(self, spec: InstanceSpec) -> None:
        """Raise for what a machine cannot have, and where QEMU is missing."""
        check_spec(spec)
        check_mounts(spec)
        check_rates(spec)
        group_limits(spec.resources, memory_of(spec))
        self._machines.check(spec)
        if spec.machine.from_disk is not None:
            from hutch.drivers.vm.fromdisk import check_from_disk

            check_from_disk(spec)

    # ---- start ------------------------------------------------------------------------

    def plan(self, launch: Launch) -> Plan:
        """Return the plan by which the guest would start the program; nothing is done."""
        if launch.spec.machine.from_disk is not None:
            raise Unsupported(f"plan of {launch.name}: what its disk starts is not ours to plan")
        return compile_guest(launch.spec, self._launch_assets(launch))

    def arguments(self, launch: Launch) -> tuple[str, ...]:
        """Return the argument list that QEMU would be started with, without a template."""
        if launch.spec.machine.from_disk is not None:
            raise Unsupported(f"arguments of {launch.name}: only a start knows its descriptors")
        return self._machines.arguments(launch)

    def _launch_assets(self, launch: Launch) -> GuestAssets:
        process = launch.spec.process
        user = resolve_user(process.user, process.groups, LayeredReader(launch.lower))
        files = tuple((os.path.basename(m.target), m.target) for m in launch.mounts if m.ours)
        return self._assets(
            launch.spec,
            process,
            user,
            hostname=launch.spec.hostname,
            files=files,
            binds=guest_binds(launch),
            rows=launch.rows,
            columns=launch.columns,
        )

    def _assets(
        self,
        spec: InstanceSpec,
        process: ProcessSpec,
        user: ResolvedUser,
        *,
        hostname: str = "",
        privileged: bool = False,
        files: tuple[tuple[str, str], ...] = (),
        binds: tuple[GuestBind, ...] = (),
        rows: int = 0,
        columns: int = 0,
    ) -> GuestAssets:
        privileged = privileged or spec.security.privileged
        capabilities = self._confinement.capabilities(spec, privileged=privileged)
        return GuestAssets(
            user=user,
            env=environment(process, user, hostname=hostname),
            files=files,
            binds=binds,
            ulimits=spec.ulimits,
            seccomp=b"" if privileged else self._confinement.seccomp(spec, capabilities),
            capabilities=capabilities,
            rows=rows,
            columns=columns,
        )

    def start(self, launch: Launch) -> Started:
        """Start the machine and the program in it; on failure nothing of it is left."""
        if launch.spec.machine.from_disk is not None:
            from hutch.drivers.vm.fromdisk import start_from_disk

            return start_from_disk(self._machines, self._hierarchy, launch)
        with ExitStack() as undo, failures.translated(f"start of {launch.name}"):
            assets = self._launch_assets(launch)
            plan = compile_guest(launch.spec, assets)
            limits = group_limits(
                launch.spec.resources,
                memory_of(launch.spec),
                userfaultfd=launch.arrival is not None and launch.arrival.streams.post_copy,
            )
            group = self._hierarchy.create(launch.id, limits)
            undo.callback(group.remove)
            undo.callback(group.kill_all)
            with ExitStack() as held:
                health = self._health(launch, assets.user)
                started = self._machines.start(launch, plan, assets.user, group, held, health)
                undo.callback(started.booted.supervisor.close)
                held.callback(started.booted.monitor.close)
                pid = self._bring_up(launch, started, plan)
            if launch.spec.machine.cpu_pin:
                pin_processors(group.pids(), launch.spec.resources.cpuset_cpus)
            known = read_pid(f"{launch.directory}/run")
            if known is None or known.pid != pid:
                raise InternalError(f"the supervisor of {launch.name} left no record of it")
            undo.pop_all()
            self._machines.wish(started.wanted)
            return Started(
                pid=pid, start_time=known.start_time, supervisor=started.booted.supervisor
            )

    def _health(self, launch: Launch, user: ResolvedUser) -> HealthProbe | None:
        check = launch.spec.health
        if check is None:
            return None
        from hutch.drivers.vm.health import health_probe

        spec = launch.spec
        process = msgspec.structs.replace(spec.process, argv=check.command, tty=False, stdin=False)
        plan = compile_guest_exec(
            process,
            self._assets(spec, process, user),
            no_new_privileges=spec.security.no_new_privileges and not spec.security.privileged,
            linger=False,
        )
        return health_probe(check, plan, f"{launch.directory}/run")

    def _bring_up(self, launch: Launch, started: MachineStart, plan: Plan) -> int:
        """Serve the sync point, restore the template, wait until the program runs."""
        supervisor, monitor = started.booted.supervisor, started.booted.monitor
        with failures.launching(started.booted.plan, "start"):
            pid = supervisor.wait_pid()
            if launch.attach_network is not None:
                # Only now is the process in the namespace of the taps.
                supervisor.wait_sync(SYNC_NETWORK)
                launch.attach_network(pid, started.taps.indexes if started.taps else ())
                supervisor.go(SYNC_NETWORK)
            supervisor.wait_started()
        if started.shares is not None:
            started.shares.wait_started()
        with failures.machine_failures(f"start of {launch.name}", launch.directory):
            if started.new_disk:
                # While QEMU starts. The guest's own writes are no safer than the file's name.
                sync_directory(launch.directory)
            monitor.wait_qemu()
            with _ended_qemu(monitor):
                if launch.spec.machine.disk_key is not None:
                    # To open it takes QEMU seconds of processor time before it answers.
                    _await_qmp(f"{launch.directory}/run")
                start_rates(launch.directory, launch.spec.resources, image=True)
                if started.template is not None:
                    run = f"{launch.directory}/run"
                    self._machines.resume(run, started.template, started.shares)
                    monitor.go()
                elif started.loaded is not None:
                    load_machine(launch.directory, started.loaded)
                    monitor.go()
                elif launch.arrival is not None:
                    monitor.go(unacked=receive_machine(launch.directory, launch.arrival))
            monitor.wait_ready(_BRING_UP_S)
            if started.loaded is not None:
                connect_cards(launch.directory, started.loaded.cards)
        with failures.launching(plan, "start"):
            monitor.wait_started(_BRING_UP_S)
        return pid

    # ---- further processes --------------------------------------------------------------

    def exec(self, request: ExecRequest) -> Supervisor:
        """Start a process in the guest, in the program's namespaces."""
        with failures.translated(f"exec in {request.id[:12]}"):
            guest = self._guest(request.id)
            privileged = request.privileged or request.spec.security.privileged
            assets = self._assets(
                request.spec,
                request.process,
                self._exec_user(request),
                privileged=request.privileged,
                rows=request.rows,
                columns=request.columns,
            )
            plan = compile_guest_exec(
                request.process,
                assets,
                no_new_privileges=request.spec.security.no_new_privileges and not privileged,
                linger=request.linger,
            )
            supervisor = guest.exec(plan, attach=request.attach)
        with ExitStack() as undo:
            undo.callback(supervisor.close)
            with failures.launching(plan, "exec"), guest_silence("the start of the program"):
                supervisor.wait_started()
            undo.pop_all()
        return supervisor

    def _exec_user(self, request: ExecRequest) -> ResolvedUser:
        """Return the user's numbers: the program's own where it is the same, else as the
        guest's files have them now."""
        process, own = request.process, request.spec.process
        if (process.user, process.groups) == (own.user, own.groups):
            return load_record(self._directory(request.id)).user
        tree = self.tree(request.id)

        def read(path: str) -> bytes | None:
            try:
                return tree.read(path, limit=4 << 20)
            except NotFound:
                return None

        return resolve_user(process.user, process.groups, read)

    def _directory(self, identifier: str) -> str:
        return str(self._root / "instances" / identifier)

    def _guest(self, identifier: str) -> Guest:
        if not self._has_agent(identifier):
            raise Unsupported(
                f"instance {identifier[:12]}: a machine that starts from a disk has no agent",
                hint="use `hutch console`, or SSH over its network",
            )
        self._check_awake(identifier)
        return Guest(f"{self._directory(identifier)}/run")

    def _monitor(self, identifier: str) -> AbstractContextManager[Monitor]:
        """Return a conversation with the machine's QEMU."""
        from hutch.qmp import conversation

        self._check_awake(identifier)
        return conversation(f"{self._directory(identifier)}/run/{QMP_SOCKET}")

    def _check_awake(self, identifier: str) -> None:
        with suppress(NotFound):
            pids = self._hierarchy.load(identifier).pids()
            check_awake(f"machine {identifier[:12]}", pids)

    def _has_agent(self, identifier: str) -> bool:
        return not os.path.exists(f"{self._directory(identifier)}/{QCOW2_FILE}")

    # ---- what is inside -----------------------------------------------------------------

    def tree(self, identifier: str) -> GuestFiles:
        """Return the files of a running machine's program."""
        from hutch.drivers.vm.files import GuestTree

        return GuestTree(self._guest(identifier))

    @contextmanager
    def stored(self, launch: Launch) -> Iterator[GuestFiles]:
        """Hold the files of a stopped machine; the caller has the instance's lock."""
        from hutch.drivers.vm.files import GuestTree
        from hutch.drivers.vm.maintenance import maintained

        with maintained(self._machines, self._hierarchy, launch) as guest:
            yield GuestTree(guest)

    def process_rows(self, identifier: str) -> list[ProcessRow]:
        """Return the processes of the program, as the guest numbers them."""
        return inside.process_rows(self._guest(identifier))

    def stats(self, identifier: str) -> Stats:
        """Return what the machine costs the host in processor time, and what the guest uses
        of its memory."""
        used = self._group(identifier).stats()
        if not self._has_agent(identifier):
            return used
        found = inside.combined(used, inside.stats(self._guest(identifier)))
        # What a balloon has taken is part of the guest's total all the same.
        most = load_record(self._directory(identifier)).memory
        if found.memory.limit is not None and found.memory.limit > most:
            limited = msgspec.structs.replace(found.memory, limit=most)
            return msgspec.structs.replace(found, memory=limited)
        return found

    def processes(self, identifier: str) -> list[int]:
        """Return the host pids of the monitor and QEMU."""
        return list(self._group(identifier).pids())

    def oom_kills(self, identifier: str) -> int:
        """Return how often a kernel killed for lack of memory, the host's or the guest's."""
        from hutch.drivers.vm.console import count_oom_kills

        count = 0
        with suppress(NotFound):
            count = self._hierarchy.load(identifier).oom_kills()
        with suppress(NotFound):
            directory = self._directory(identifier)
            load_record(directory)  # there was a start
            count += count_oom_kills(directory)
        return count

    def why_lost(self, identifier: str) -> str:
        """Return the monitor's last words, where it was not the program that ended."""
        from hutch.drivers.vm.console import monitors_words

        return monitors_words(self._directory(identifier))

    def record(self, identifier: str) -> MachineRecord | None:
        """Return what the last start decided about a machine; None before the first."""
        try:
            return load_record(self._directory(identifier))
        except NotFound:
            return None

    # ---- life ---------------------------------------------------------------------------

    def _group(self, identifier: str) -> Group:
        try:
            return self._hierarchy.load(identifier)
        except NotFound as exc:
            raise WrongState(
                f"instance {identifier[:12]} has no control group: it is not running"
            ) from exc

    def pause(self, identifier: str) -> None:
        """Stop the machine's processors."""
        from hutch.qmp.machine import query_status, stop

        with self._monitor(identifier) as monitor:
            if query_status(monitor) == "io-error":
                raise WrongState(
                    "the machine stands still: the host has no room for what it writes",
                    hint="make room, and it goes on by itself",
                )
            stop(monitor)

    def unpause(self, identifier: str) -> None:
        """Let them run, and what was frozen in the guest; its clock is set, which stood still."""
        from hutch.qmp.machine import cont

        with self._monitor(identifier) as monitor:
            cont(monitor)
        if self._has_agent(identifier):
            inside.renew(self._guest(identifier))
            inside.freeze(self._guest(identifier), frozen=False)

    def freeze_programs(self, identifier: str) -> None:
        """Stop the program and all beside it, but for the agent."""
        inside.freeze(self._guest(identifier), frozen=True)

    def save(self, identifier: str, target: str, *, cards: int, end_as: str = "") -> None:
        """Save a running machine to a directory; see `hutch.drivers.base.Savable`."""
        directory = self._directory(identifier)
        self._check_awake(identifier)
        with failures.translated(f"save of {identifier[:12]}"):
            if self._has_agent(identifier):
                disks = Disks(self._root)
                save_machine(directory, target, disks, cards=cards, end_as=end_as)
                return
            from hutch.drivers.vm.disk_state import save_disk_machine

            save_disk_machine(directory, target, cards=cards, end_as=end_as)

    def awaken(self, identifier: str) -> bool:
        """Let a running machine go on whose saver was killed; see `hutch.drivers.base.Savable`."""
        if self._has_agent(identifier):
            return False  # its monitor sees to that
        from hutch.drivers.vm.disk_state import awaken

        return awaken(self._directory(identifier))

    def fork(self, identifier: str, target: str, *, cards: int) -> ForkedState:
        """Save a running machine for twins; see `hutch.drivers.base.Savable`."""
        self._check_awake(identifier)
        with failures.translated(f"fork of {identifier[:12]}"):
            directory = self._directory(identifier)
            return fork_machine(directory, target, Disks(self._root), cards=cards)

    # ---- to another host and from there -------------------------------------------------

    def proving_kernel(self) -> Path | None:
        """Return a guest kernel to try KVM with, None where the root has none yet."""
        return self._machines.proving_kernel()

    def blockers(self, identifier: str, *, cards: int) -> list[str]:
        """Return what holds a running machine on this host, nothing if nothing does."""
        from hutch.drivers.vm.state import check_movable

        try:
            with self._monitor(identifier) as monitor:
                check_movable(monitor, cards)
        except Unsupported as exc:
            return [exc.message + (f" ({exc.hint})" if exc.hint else "")]
        return []

    def depart(
        self, identifier: str, *, cards: int, streams: Streams, bandwidth: int, downtime_s: float
    ) -> AbstractContextManager[Departure]:
        """Copy a running machine to another host; see `hutch.drivers.moving.Movable`."""
        from hutch.drivers.vm.departing import departing

        return departing(
            self._directory(identifier),
            cards=cards,
            streams=streams,
            bandwidth=bandwidth,
            downtime_s=downtime_s,
        )

    def describe(self, identifier: str) -> bytes:
        """Return the record of a running machine, for another host's driver."""
        return msgspec.json.encode(load_record(self._directory(identifier)))

    def run_on(self, identifier: str) -> None:
        """Let a machine go on whose copying was cut short."""
        from hutch.drivers.vm.departing import run_on

        run_on(self._directory(identifier))

    def plug_in(self, identifier: str, *, cards: int) -> None:
        """Plug in the cards of a machine that has arrived, and set its clock."""
        connect_cards(self._directory(identifier), cards)
        inside.renew(self._guest(identifier))

    def wait_arrived(self, identifier: str, fd: int) -> None:
        """With post-copy: wait until all the memory of a machine that has arrived is there."""
        from hutch.drivers.vm.landing import wait_arrived

        wait_arrived(self._directory(identifier), fd)

    def answers(self, identifier: str) -> bool:
        """Tell whether the agent of a machine answers."""
        try:
            inside.stats(self._guest(identifier))
        except HutchError:
            return False
        return True

    def update(self, identifier: str, resources: Resources) -> None:
        """Change the host's limits, the guest's limit of processes, and what hardware it has."""
        from hutch.drivers.vm.resize import check_room

        directory = self._directory(identifier)
        record = load_record(directory)
        memory, vcpus = memory_wanted(resources), vcpus_wanted(resources)
        check_room(record, vcpus=vcpus, memory=memory)
        group = self._group(identifier)
        with (
            failures.translated(f"update of {identifier[:12]}"),
            self._monitor(identifier) as monitor,
        ):
            _require_running(monitor)
            group.update(group_limits(resources, max(memory, record.memory)))
            if self._has_agent(identifier):
                inside.limit_processes(self._guest(identifier), resources.pids)
            set_rates(monitor, resources, image=self._has_agent(identifier), running=True)
            self._resize(monitor, identifier, record, memory, vcpus)
        if record.pinned:
            pin_processors(group.pids(), resources.cpuset_cpus)
        if memory < record.memory:
            _lower(group, group_limits(resources, memory))

    def _resize(
        self, monitor: Monitor, identifier: str, record: MachineRecord, memory: int, vcpus: int
    ) -> None:
        if (memory, vcpus) == (record.memory, record.vcpus):
            return
        from hutch.drivers.vm.resize import Resizer

        directory = self._directory(identifier)
        guest = self._guest(identifier) if self._has_agent(identifier) else None
        resizer = Resizer(monitor, guest, record, lambda new: save_record(directory, new))
        if vcpus != record.vcpus:
            resizer.processors(vcpus)
        if memory != record.memory:
            resizer.memory(memory)

    def grow_disk(self, identifier: str, size: int) -> None:
        """Let the writable disk grow, and where there is an agent the file system with it."""
        from hutch.drivers.vm.hotplug import grow_disk
        from hutch.plan.machine.disks import node_name
        from hutch.qmp.blocks import resize_block

        with (
            failures.translated("disk"),
            self._monitor(identifier) as monitor,
        ):
            if self._has_agent(identifier):
                grow_disk(monitor, self._guest(identifier), size)
            else:
                resize_block(monitor, node_name(0), size)

    # ---- networks while it runs ---------------------------------------------------------

    def plug_network(
        self, identifier: str, pid: int, endpoint: Endpoint, join: Callable[[int, int], None]
    ) -> None:
        """Give the machine a further network card."""
        from hutch.drivers.vm.hotplug import plug_card

        directory = self._directory(identifier)
        modules = self._machines.network_modules(load_record(directory).kernel_id)
        with (
            failures.translated(f"network {endpoint.network}"),
            self._monitor(identifier) as monitor,
        ):
            plug_card(monitor, self._guest(identifier), pid, endpoint, join, modules=modules)

    def unplug_network(
        self, identifier: str, pid: int, endpoint: Endpoint, successor: Endpoint | None
    ) -> None:
        """Take a network card away, or put aside one that was there from the start."""
        from hutch.drivers.vm.hotplug import unplug_card
        from hutch.drivers.vm.setup import default_routes

        routes = default_routes(successor) if successor is not None else []
        with self._monitor(identifier) as monitor:
            unplug_card(monitor, self._guest(identifier), pid, endpoint, routes)

    def kill_all(self, identifier: str) -> None:
        """Kill the monitor and QEMU."""
        with suppress(NotFound):
            self._hierarchy.load(identifier).kill_all()

    def cleanup(self, identifier: str) -> None:
        """Remove the control group."""
        with suppress(NotFound):
            self._hierarchy.load(identifier).remove()

    # ---- what is not an instance's --------------------------------------------------------

    def templates(self) -> list[TemplateUse]:
        """Return the templates of the root and what they take."""
        return self._machines.templates.usage()

    def prepare_template(self, key: str) -> None:
        """Make the template of an image that earlier starts have asked for."""
        self._machines.prepare(key)

    def prune_templates(self) -> int:
        """Let go of all templates; return how many there were."""
        self._machines.images.forget()
        return self._machines.templates.prune()


def _lower(group: Group, limits: Limits) -> None:
    """Lower a group's limits; what the guest has given up reaches the host a moment later."""
    deadline = time.monotonic() + _LOWER_S
    while True:
        try:
            group.update(limits)
            return
        except Busy:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def _require_running(monitor: Monitor) -> None:
    from hutch.qmp.machine import query_status

    if query_status(monitor) != "running":
        raise WrongState("the machine is paused: its guest cannot help", hint="unpause it first")


@contextmanager
def _ended_qemu(monitor: MonitorLink) -> Iterator[None]:
    """Where QEMU does not answer since it has ended, raise what its monitor says of that."""
    try:
        yield
    except (OutcomeUnknown, Unavailable):
        with suppress(OperationTimeout):
            monitor.wait_ready(_ENDED_S)
        raise


def _await_qmp(run: str) -> None:
    from hutch.qmp import conversation

    with conversation(f"{run}/{QMP_SOCKET}", timeout_s=_BRING_UP_S):
        pass
