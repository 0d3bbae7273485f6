"""Put a machine together for one launch: host, kernel, template, disks, network; and boot it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

import msgspec

from hutch.drivers.base import Launch
from hutch.drivers.vm.boot import QMP_SOCKET, Booted, BootRequest, Ports, boot
from hutch.drivers.vm.cards import is_user_network, network_cards, template_cards
from hutch.drivers.vm.console import begin_logs
from hutch.drivers.vm.host import find_host, require_qemu
from hutch.drivers.vm.initramfs import Programs, ensure_initramfs
from hutch.drivers.vm.kernels import KernelRecord, Kernels
from hutch.drivers.vm.machine import (
    Host,
    MachineRecord,
    machine_argv,
    machine_type,
    save_record,
    shape_of,
    template_key,
)
from hutch.drivers.vm.placeholders import empty_disks, seen_size, stub_kernel
from hutch.drivers.vm.sandbox import Descriptors, Sandbox, choose_sandbox
from hutch.drivers.vm.setup import (
    ROOT_SERIAL,
    WRITABLE_SERIAL,
    bare_setup,
    late_setup,
    load_network,
    machine_setup,
    setup_request,
)
from hutch.drivers.vm.shares import TAG, ShareServer, copy_memory, plug, serve, shared
from hutch.drivers.vm.state import Loaded, opened, twin_setup
from hutch.drivers.vm.templates import Template, Templates
from hutch.errors import NotFound, Unavailable, WrongState
from hutch.linux.cgroup import Group
from hutch.network.taps import Taps, create_taps
from hutch.plan.assets import ResolvedUser
from hutch.plan.guest import SetupOp
from hutch.plan.machine.disks import node_name
from hutch.plan.machine.model import (
    MICROVM,
    Descriptor,
    Disk,
    DiskFile,
    Memory,
    PluggedMemory,
    Shape,
    Share,
)
from hutch.plan.ops import HealthProbe, Plan, Supervision
from hutch.plan.vm import GUEST_SHARES
from hutch.plan.wire import encode
from hutch.process.launcher import Launcher, launcher_path
from hutch.process.vmm import MonitorConfig
from hutch.spec.model import InstanceSpec
from hutch.storage.diskchain import chain, overlay_number, virtual_size

__all__ = ["MachineLauncher", "MachineStart", "supervision"]

_BOOT_S = 120.0
_WRITABLE = 1  # of the disks, in the order of `_disks`


class MachineStart(msgspec.Struct, frozen=True, kw_only=True):
    """A start under way. `template` or `loaded` is what it goes on from, if it is not booted."""

    booted: Booted
    taps: Taps | None
    template: Template | None
    shares: ShareServer | None
    loaded: Loaded | None
    record: MachineRecord


class _Parts(msgspec.Struct, frozen=True, kw_only=True):
    """What of a machine does not depend on the instance."""

    host: Host
    kernel: KernelRecord
    vmlinux: Path
    initramfs: Path
    shape: Shape
    plugged: PluggedMemory | None = None


class MachineLauncher:
    """Starts machines; holds what is the same for every launch of this process."""

    def __init__(self, root: Path, launcher: Launcher, kernels: Kernels) -> None:
        self.root = root
        self.launcher = launcher
        self._kernels = kernels
        self.templates = Templates(root, launcher)

    @cached_property
    def _programs(self) -> Programs:
        native = Path(launcher_path()).parent
        return Programs.load(native / "hutch-agent", native / "hutch-launcher")

    @cached_property
    def sandbox(self) -> Sandbox:
        """The namespaces that QEMU gets on this host."""
        return choose_sandbox(self.root)

    def proving_kernel(self) -> Path | None:
        """Return a guest kernel to try KVM with, None where the root has none yet."""
        try:
            return self._kernels.vmlinux(self._kernels.get(None))
        except NotFound:
            return None

    def check(self, spec: InstanceSpec) -> None:
        """Raise `Unsupported` where the host cannot run machines, or not this one."""
        require_qemu(self.root, machine_type(spec))

    def _parts(self, spec: InstanceSpec, loaded: Loaded | None = None) -> _Parts:
        kernel = self._kernels.get(spec.machine.kernel or None)
        vmlinux = self._kernels.vmlinux(kernel)
        host = find_host(self.root, spec.machine.accel, vmlinux)
        return _Parts(
            host=host,
            kernel=kernel,
            vmlinux=vmlinux,
            initramfs=ensure_initramfs(self._kernels, kernel, self._programs),
            shape=(loaded.machine.shape if loaded else None) or shape_of(spec, host),
            plugged=loaded.machine.plugged_memory() if loaded else None,
        )

    # ---- an instance's machine ----------------------------------------------------------

    def start(
        self,
        launch: Launch,
        plan: Plan,
        user: ResolvedUser,
        group: Group,
        held: ExitStack,
        health: HealthProbe | None = None,
    ) -> MachineStart:
        """Begin to start an instance's machine; the caller brings it up and owns the links.

        `held` closes, after the launch, what is only needed for it.
        """
        loaded = held.enter_context(opened(launch.saved)) if launch.saved else None
        parts = self._parts(launch.spec, loaded)
        nics = len(launch.endpoints)
        template = None
        # A machine without hot-plug has the device from the start, which no template can.
        pluggable = parts.shape.machine != MICROVM or not shared(launch)
        # Memory of a template is in ordinary pages.
        pluggable = pluggable and not launch.spec.placement.huge
        if launch.spec.machine.template and pluggable and loaded is None:
            template = self._held_template(parts, launch, held)
        shares = serve(self.launcher, self.root, launch, group, held)
        taps = None
        user_network = is_user_network(launch.endpoints)
        if nics and not user_network:
            taps = create_taps(nics)
            for fd in (taps.namespace, *taps.taps):
                held.callback(os.close, fd)
        begin_logs(launch.directory)
        record = msgspec.structs.replace(
            self._record(parts, template, user),
            shares=len(shared(launch)),
            overlays=tuple(map(overlay_number, chain(launch.directory)[1:])),
        )
        if loaded is not None:
            record = msgspec.structs.replace(record, memory=loaded.machine.memory)
        save_record(launch.directory, record)
        spec = launch.spec
        files = _files(launch)
        if loaded is not None:
            _check_cards(launch, loaded)
            setup = twin_setup(launch, files)
        else:
            setup = machine_setup(
                launch,
                modules=parts.kernel.late,
                resumed=template is not None,
                files=files,
                shares=((TAG, GUEST_SHARES),) if shares else (),
            )

        booted = boot(
            self.launcher,
            BootRequest(
                identifier=launch.id,
                root=self.root,
                sandbox=self.sandbox,
                qemu=parts.host.qemu,
                directory=f"{launch.directory}/run",
                logs=launch.directory,
                supervision=supervision(launch, health),
                argv=self._arguments(
                    parts,
                    launch,
                    template,
                    taps.taps if taps else (),
                    shares,
                    loaded=loaded,
                ),
                config=MonitorConfig(
                    argv=(),
                    setup=setup_request(setup),
                    plan=b"" if loaded else encode(plan),
                    boot_timeout_s=_BOOT_S,
                    shutdown_timeout_s=spec.stop_timeout_s,
                    # What it has mapped of a share must get there, if nothing else has to.
                    volatile=launch.volatile and shares is None,
                    tty=spec.process.tty,
                    hold=template is not None or loaded is not None,
                    adopt=loaded is not None,
                    control=True,
                    unacked=loaded.unacked if loaded else 0,
                ),
                kvm=parts.host.accelerator == "kvm",
                discards=template is not None and shares is None,
                rows=launch.rows,
                columns=launch.columns,
                group=group,
                namespace=taps.namespace if taps else -1,
                host_network=user_network,
                network=launch.attach_network is not None,
                attach=launch.attach,
                shares=shares.socket if shares else -1,
            ),
        )
        return MachineStart(
            booted=booted, taps=taps, template=template, loaded=loaded, shares=shares, record=record
        )

    def arguments(self, launch: Launch) -> tuple[str, ...]:
        """Return QEMU's argument list for a boot of its own; nothing is started or kept."""
        parts = self._parts(launch.spec)
        with ExitStack() as held:
            descriptors = Descriptors(held)

            def placeholder() -> int:
                return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)

            names = [field.name for field in msgspec.structs.fields(Ports)]
            ports = Ports(**{name: descriptors.add(placeholder()) for name in names})
            return tuple(self._arguments(parts, launch, None, ())(ports, descriptors))

    def start_bare(
        self, launch: Launch, directory: str, group: Group, held: ExitStack
    ) -> tuple[Booted, Template | None]:
        """Begin to start a machine with the disks of a stopped one, where no program runs.

        Its sockets are made in `directory`. It ends with its link to the supervisor.
        """
        parts = self._parts(launch.spec)
        template = (
            self._held_template(parts, launch, held) if launch.spec.machine.template else None
        )
        os.mkdir(directory, 0o700)
        setup = bare_setup(launch, modules=parts.kernel.late, resumed=template is not None)
        booted = boot(
            self.launcher,
            BootRequest(
                identifier=launch.id,
                root=self.root,
                sandbox=self.sandbox,
                qemu=parts.host.qemu,
                directory=directory,
                logs=directory,
                supervision=Supervision(linger=False, name="hutch-supervisor"),
                argv=self._arguments(parts, launch, template, ()),
                config=MonitorConfig(
                    argv=(),
                    setup=setup_request(setup),
                    boot_timeout_s=_BOOT_S,
                    volatile=True,  # whoever asked for it has it write out what it wrote
                    hold=template is not None,
                ),
                kvm=parts.host.accelerator == "kvm",
                group=group,
            ),
        )
        return booted, template

    def _arguments(
        self,
        parts: _Parts,
        launch: Launch,
        template: Template | None,
        taps: Sequence[int] = (),
        shares: ShareServer | None = None,
        *,
        loaded: Loaded | None = None,
    ) -> Callable[[Ports, Descriptors], Sequence[str]]:
        """Return what makes QEMU's argument list for an instance's disks and network;
        `loaded` is the saved state that it will go on from."""
        resumed = template is not None or loaded is not None

        def argv(ports: Ports, descriptors: Descriptors) -> Sequence[str]:
            page = next(iter(launch.spec.placement.huge), 0)
            memory = Memory(
                kind="memfd" if shares else "plain", huge_page=page, preallocate=bool(page)
            )
            if template is not None:
                memory = _resumed_memory(template, parts.shape, shares, descriptors)
            elif loaded is not None and loaded.memory >= 0:
                memory = _private_memory(loaded.memory, descriptors)
            return machine_argv(
                parts.host,
                ports,
                name=launch.id[:12],
                shape=parts.shape,
                memory=memory,
                kernel=(stub_kernel(descriptors), "")
                if resumed
                else _kernel_paths(parts, descriptors),
                disks=_disks(launch, descriptors),
                nics=network_cards(launch.endpoints, taps, descriptors),
                shares=_shares(shares, descriptors) if template is None else (),
                incoming=resumed,
                # A machine that was saved while it ran would run before its cards are
                # unplugged.
                paused=loaded is not None,
                plugged=parts.plugged,
            )

        return argv

    def _held_template(self, parts: _Parts, launch: Launch, held: ExitStack) -> Template:
        template = self._template(parts, launch)
        held.callback(os.close, template.memory)
        held.callback(os.close, template.state)
        return template

    def _record(
        self, parts: _Parts, template: Template | None, user: ResolvedUser
    ) -> MachineRecord:
        return MachineRecord(
            qemu=parts.host.qemu,
            qemu_version=str(parts.host.version),
            accelerator=parts.host.accelerator,
            accelerator_reason=parts.host.reason,
            kernel=parts.kernel.release,
            kernel_id=parts.kernel.id,
            machine=parts.shape.machine,
            cpu=parts.shape.cpu,
            memory=parts.shape.memory + (parts.plugged.requested if parts.plugged else 0),
            vcpus=parts.shape.vcpus,
            shape=parts.shape,
            plugged=parts.plugged.requested if parts.plugged else -1,
            template=template.key if template else "",
            user=user,
        )

    def network_modules(self, kernel_id: str) -> list[SetupOp]:
        """Return what loads the driver of network cards in a guest of that kernel."""
        return load_network(self._kernels.get(kernel_id).late)

    def resume(self, directory: str, template: Template, shares: ShareServer | None) -> None:
        """Load a template's state into the QEMU of a run directory, and let it run."""
        from hutch.qmp import conversation
        from hutch.qmp.blocks import resize_block
        from hutch.qmp.machine import cont
        from hutch.qmp.migration import MigrationFailed, load_state

        with conversation(f"{directory}/{QMP_SOCKET}") as monitor:
            try:
                load_state(monitor, template.state, ignore_shared=True)
            except MigrationFailed as exc:
                # Damaged, perhaps: whatever it is, nobody else is to meet with it.
                self.templates.discard(template)
                raise Unavailable(
                    f"template {template.key[:12]}: cannot be resumed: {exc.message}",
                    hint="it was removed: start again, and another is made",
                ) from exc
            if template.disk_size:
                resize_block(monitor, node_name(_WRITABLE), template.disk_size)
            if shares is not None:
                plug(monitor, shares)
            cont(monitor)

    # ---- templates ----------------------------------------------------------------------

    def _template(self, parts: _Parts, launch: Launch) -> Template:
        """Return the template for the launch's cards and the size of its writable disk; see
        `Template.disk_size`."""
        disk = virtual_size(os.path.dirname(launch.disk))
        seen, nics = seen_size(disk), len(launch.endpoints)
        on_taps = not is_user_network(launch.endpoints)
        key = template_key(
            parts.host, parts.shape, parts.kernel.id, parts.initramfs, (nics, on_taps, seen)
        )
        found = self.templates.ensure(
            key,
            parts.shape.memory,
            lambda run, memory: self._boot_template(parts, nics, on_taps, seen, key, run, memory),
            launch.progress,
        )
        return found if disk == seen else msgspec.structs.replace(found, disk_size=disk)

    def _boot_template(
        self,
        parts: _Parts,
        nics: int,
        on_taps: bool,
        disk: int,
        key: str,
        run: Path,
        memory: int,
    ) -> Booted:
        """Boot a machine with empty disks and cards that lead nowhere; its agent waits.

        The cards' drivers settle with the back end what it can do, so that is of the clones'
        kind: taps, or QEMU's own network.
        """
        taps: tuple[int, ...] = ()
        with ExitStack() as held:
            if nics and on_taps:
                made = create_taps(nics)
                for fd in (made.namespace, *made.taps):
                    held.callback(os.close, fd)
                taps = made.taps
            return self._boot_with(parts, nics, taps, disk, key, run, memory)

    def _boot_with(
        self,
        parts: _Parts,
        nics: int,
        taps: Sequence[int],
        disk: int,
        key: str,
        run: Path,
        memory: int,
    ) -> Booted:
        def argv(ports: Ports, descriptors: Descriptors) -> Sequence[str]:
            number = descriptors.add(os.dup(memory))
            return machine_argv(
                parts.host,
                ports,
                name=f"template-{key[:12]}",
                shape=parts.shape,
                memory=Memory(kind="file", path=f"/proc/self/fd/{number}", share=True),
                kernel=_kernel_paths(parts, descriptors),
                disks=empty_disks(descriptors, disk),
                nics=template_cards(nics, taps, descriptors),
            )

        return boot(
            self.launcher,
            BootRequest(
                identifier=key,
                root=self.root,
                sandbox=self.sandbox,
                qemu=parts.host.qemu,
                directory=str(run),
                logs=str(run),
                supervision=Supervision(linger=False, name="hutch-template"),
                argv=argv,
                config=MonitorConfig(
                    argv=(),
                    setup=setup_request(late_setup(parts.kernel.late, nics=nics)),
                    boot_timeout_s=_BOOT_S,
                    volatile=True,
                ),
                kvm=parts.host.accelerator == "kvm",
            ),
        )


def _kernel_paths(parts: _Parts, descriptors: Descriptors) -> tuple[str, str]:
    """Return kernel and initramfs as QEMU opens them: nothing of the root is in its view."""
    opened = (
        descriptors.add(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        for path in (parts.vmlinux, parts.initramfs)
    )
    vmlinux, initramfs = (f"/proc/self/fd/{number}" for number in opened)
    return vmlinux, initramfs


def _check_cards(launch: Launch, loaded: Loaded) -> None:
    if len(launch.endpoints) != loaded.cards:
        raise WrongState(
            f"the saved machine has {loaded.cards} network cards, and the instance "
            f"{len(launch.endpoints)}",
            hint="connect it to as many networks as when it was saved",
        )


def _resumed_memory(
    template: Template, shape: Shape, shares: ShareServer | None, descriptors: Descriptors
) -> Memory:
    """Return a template's memory: mapped privately, or a copy that a server can share."""
    if shares is None:
        return _private_memory(template.memory, descriptors)
    number = descriptors.add(copy_memory(template.memory, shape.memory))
    return Memory(kind="file", path=f"/proc/self/fd/{number}", share=True)


def _private_memory(file: int, descriptors: Descriptors) -> Memory:
    number = descriptors.add(os.dup(file))
    return Memory(kind="file", path=f"/proc/self/fd/{number}", sealed=True)


def _shares(server: ShareServer | None, descriptors: Descriptors) -> tuple[Share, ...]:
    if server is None:
        return ()
    number = descriptors.add(os.dup(server.socket))
    return (Share(tag=TAG, socket=Descriptor(number)),)


def _disks(launch: Launch, descriptors: Descriptors) -> tuple[Disk, ...]:
    """Return the image's disk, shared by all machines of that image, and the writable one."""

    def opened(path: str, mode: int, backing: DiskFile | None = None) -> DiskFile:
        fd = os.open(path, mode | os.O_CLOEXEC | os.O_NOFOLLOW)
        return DiskFile(
            file=Descriptor(descriptors.add(fd)),
            format="qcow2" if backing else "raw",
            backing=backing,
        )

    *frozen, top = chain(os.path.dirname(launch.disk))
    below: DiskFile | None = None
    for path in frozen:
        below = opened(path, os.O_RDONLY, below)

    return (
        Disk(
            image=opened(launch.root_disk, os.O_RDONLY),
            serial=ROOT_SERIAL,
            read_only=True,
            discard=False,
        ),
        Disk(
            image=opened(top, os.O_RDWR, below),
            serial=WRITABLE_SERIAL,
            cache="unsafe" if launch.volatile else "writeback",
            detect_zeroes=True,
        ),
    )


def _files(launch: Launch) -> list[tuple[str, bytes]]:
    """Return the files of ours (hosts, hostname, resolv.conf), which the guest gets as copies."""
    found = []
    for mount in launch.mounts:
        if mount.ours:
            with open(mount.source, "rb") as file:
                found.append((os.path.basename(mount.target), file.read()))
    return found


def supervision(launch: Launch, health: HealthProbe | None) -> Supervision:
    spec = launch.spec
    return Supervision(
        directory=f"{launch.directory}/run",
        log_path="" if spec.logs.driver == "none" else f"{launch.directory}/log",
        log_max_bytes=spec.logs.max_bytes,
        log_max_files=spec.logs.max_files,
        stdin_open=spec.process.stdin,
        stdin_once=spec.process.stdin_once,
        tty=spec.process.tty,
        exit_command=launch.exit_command,
        exit_command_always=launch.exit_command_always,
        health=health,
        name="hutch-supervisor",
    )
