"""Virtual machines: an image's root as disks, a kernel, QEMU, and the program in the guest.

The supervisor of an instance holds `hutch-vmm` as it holds a container's program; streams,
signals and the exit code pass through it. What else is asked of the guest goes to its agent.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import msgspec

from hutch.drivers import failures
from hutch.drivers.base import ExecRequest, Launch, Started
from hutch.drivers.confinement import environment
from hutch.drivers.users import LayeredReader, resolve_user
from hutch.drivers.vm import inside
from hutch.drivers.vm.boot import QMP_SOCKET, ended_qemu
from hutch.drivers.vm.images import sync_directory
from hutch.drivers.vm.launching import MachineStart
from hutch.drivers.vm.limits import (
    check_spec,
    disk_in_memory,
    group_limits,
    memory_of,
    memory_wanted,
    vcpus_wanted,
)
from hutch.drivers.vm.machine import MachineRecord, load_record, machine_type, save_record
from hutch.drivers.vm.passing import LEDGER, give_back_devices, take_devices
from hutch.drivers.vm.pinning import pin_processors
from hutch.drivers.vm.running import RunningMachines
from hutch.drivers.vm.shares import check_mounts, guest_binds
from hutch.drivers.vm.state import (
    connect_cards,
    load_machine,
    receive_machine,
)
from hutch.drivers.vm.throttling import check_rates, set_rates, start_rates
from hutch.drivers.vm.tpm import check_tpm, guest_devices
from hutch.drivers.vm.volumes import check_volumes, volumes
from hutch.errors import (
    Busy,
    InternalError,
    NotFound,
    Unsupported,
    WrongState,
)
from hutch.linux.cgroup import Group, Limits
from hutch.plan.assets import ResolvedUser
from hutch.plan.container import SYNC_NETWORK
from hutch.plan.machine.model import MICROVM
from hutch.plan.ops import HealthProbe, Plan
from hutch.plan.vm import GuestAssets, GuestBind, compile_guest, compile_guest_exec
from hutch.process.guest import guest_silence
from hutch.process.records import read_pid
from hutch.process.supervisor import Supervisor
from hutch.spec.model import InstanceSpec, ProcessSpec, Resources

if TYPE_CHECKING:
    from collections.abc import Callable

    from hutch.drivers.base import TemplateUse
    from hutch.network.model import Endpoint
    from hutch.qmp import Monitor

__all__ = ["VmDriver"]

_BRING_UP_S = 150.0
# Free pages are reported to QEMU after at most two seconds.
_LOWER_S = 6.0


class VmDriver(RunningMachines):
    """The driver of virtual machines on this host; see `hutch.drivers.base.Driver`."""

    def check(self, spec: InstanceSpec) -> None:
        """Raise for what a machine cannot have, and where QEMU is missing."""
        check_spec(spec)
        check_mounts(spec)
        check_volumes(spec, machine_type(spec))
        check_rates(spec)
        if spec.device_names and machine_type(spec) == MICROVM:
            raise Unsupported("devices: a machine of type microvm has none", hint="use q35")
        group_limits(spec.resources, memory_of(spec))
        self._machines.check(spec)
        if spec.machine.tpm:
            check_tpm(machine_type(spec))
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
            binds=(*guest_binds(launch), *guest_devices(launch.spec)),
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
            passed = take_devices(launch, undo)
            limits = group_limits(
                launch.spec.resources,
                memory_of(launch.spec),
                disk=disk_in_memory(launch.directory),
                nodes=passed.numbers(),
                userfaultfd=launch.arrival is not None and launch.arrival.streams.post_copy,
            )
            group = self._hierarchy.create(launch.id, limits)
            undo.callback(group.remove)
            undo.callback(group.kill_all)
            with ExitStack() as held:
                health = self._health(launch, assets.user)
                started = self._machines.start(
                    launch, plan, assets.user, group, held, health, passed
                )
                undo.callback(started.booted.supervisor.close)
                held.callback(started.booted.monitor.close)
                pid = self._bring_up(launch, started, plan)
            if launch.spec.machine.cpu_pin:
                pin_processors(group.pids(), launch.spec.resources.cpuset_cpus)
            known = read_pid(f"{launch.directory}/run")
            if known is None or known.pid != pid:
                raise InternalError(f"the supervisor of {launch.name} left no record of it")
            undo.pop_all()
            self._machines.wish(started.assets.wanted)
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
        assets = started.assets
        attach = launch.attach_network
        # A guest that boots finds its network there; one that goes on is let go further down,
        # and QEMU can start meanwhile.
        is_held = assets.template is not None or assets.loaded is not None
        with failures.launching(started.booted.plan, "start"):
            pid = supervisor.wait_pid()
            if attach is not None:
                # Only now is the process in the namespace of the taps.
                supervisor.wait_sync(SYNC_NETWORK)
                if not is_held:
                    attach(pid, assets.taps.indexes if assets.taps else ())
                supervisor.go(SYNC_NETWORK)
            supervisor.wait_started()
            if attach is not None and is_held:
                attach(pid, assets.taps.indexes if assets.taps else ())
        for server in (assets.shares, assets.tpm):
            if server is not None:
                server.wait_started()
        with failures.machine_failures(f"start of {launch.name}", launch.directory):
            if assets.parked is not None and not launch.volatile:
                # The disk has just come to its name, and the guest's own writes are no safer
                # than that. QEMU starts meanwhile.
                sync_directory(launch.directory)
            monitor.wait_qemu()
            with ended_qemu(monitor):
                if launch.spec.machine.disk_key is not None:
                    # To open it takes QEMU seconds of processor time before it answers.
                    _await_qmp(f"{launch.directory}/run")
                start_rates(launch.directory, launch.spec.resources, image=True)
            if assets.template is not None:
                run, shares = f"{launch.directory}/run", assets.shares
                self._machines.resume(run, assets.template, monitor, shares, volumes(launch))
                monitor.go()
            elif assets.loaded is not None:
                load_machine(launch.directory, assets.loaded)
                monitor.go()
            elif launch.arrival is not None:
                monitor.go(unacked=receive_machine(launch.directory, launch.arrival))
            monitor.wait_ready(_BRING_UP_S)
            if assets.loaded is not None:
                connect_cards(launch.directory, assets.loaded.cards)
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
            disk = disk_in_memory(directory)
            group.update(group_limits(resources, max(memory, record.memory), disk=disk))
            if self._has_agent(identifier):
                inside.limit_processes(self._guest(identifier), resources.pids)
            set_rates(monitor, resources, image=self._has_agent(identifier), running=True)
            self._resize(monitor, identifier, record, memory, vcpus)
        if record.pinned:
            pin_processors(group.pids(), resources.cpuset_cpus)
        if memory < record.memory:
            _lower(group, group_limits(resources, memory, disk=disk))

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
            self._make_room(identifier, size)
            if self._has_agent(identifier):
                grow_disk(monitor, self._guest(identifier), size)
            else:
                resize_block(monitor, node_name(0), size)

    def _make_room(self, identifier: str, size: int) -> None:
        """Let QEMU have the memory that a larger disk takes there, before it is larger."""
        present = disk_in_memory(self._directory(identifier))
        group = self._group(identifier)
        limit = group.stats().memory.limit
        if present and limit is not None:
            more = limit + max(0, size - present)
            group.update(Limits(memory=more, memory_swap=2 * more))

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

    def cleanup(self, identifier: str) -> None:
        """Remove the control group, and give its devices back to the host."""
        super().cleanup(identifier)
        if os.path.exists(f"{self._directory(identifier)}/{LEDGER}"):
            give_back_devices(self._directory(identifier))

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


def _await_qmp(run: str) -> None:
    from hutch.qmp import conversation

    with conversation(f"{run}/{QMP_SOCKET}", timeout_s=_BRING_UP_S):
        pass
