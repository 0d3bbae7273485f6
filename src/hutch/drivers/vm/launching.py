"""Put a machine together for one launch: host, kernel, template, disks, network; and boot it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hutch.drivers.base import Launch, LaunchMount
from hutch.drivers.supervision import instance_supervision
from hutch.drivers.vm.arguments import instance_argv
from hutch.drivers.vm.assets import (
    Assets,
    before_of,
    lend_taps,
    machine_record,
    may_have_template,
    monitor_config,
)
from hutch.drivers.vm.boot import Booted, BootRequest, Ports, boot, ended_qemu
from hutch.drivers.vm.cards import is_user_network
from hutch.drivers.vm.console import begin_logs
from hutch.drivers.vm.diskkeys import writable_size
from hutch.drivers.vm.host import find_host, require_qemu
from hutch.drivers.vm.images import (
    ImageRequest,
    ImageTemplates,
    Parked,
    image_request,
    most_kept,
)
from hutch.drivers.vm.initramfs import Programs, ensure_initramfs
from hutch.drivers.vm.kernels import Kernels
from hutch.drivers.vm.machine import (
    Host,
    MachineRecord,
    machine_type,
    save_record,
    shape_of,
    template_key,
    template_shape,
)
from hutch.drivers.vm.making import (
    BOOT_S,
    Cards,
    Parts,
    TemplateMaker,
    resume,
)
from hutch.drivers.vm.passing import Passed
from hutch.drivers.vm.placeholders import seen_size
from hutch.drivers.vm.sandbox import Descriptors, Sandbox, choose_sandbox
from hutch.drivers.vm.setup import (
    bare_setup,
    load_network,
    setup_request,
)
from hutch.drivers.vm.shares import PORT, ShareServer, plug, serve
from hutch.drivers.vm.state import opened
from hutch.drivers.vm.templates import Template, Templates
from hutch.drivers.vm.tpm import serve_tpm
from hutch.drivers.vm.volumes import plug_volumes
from hutch.errors import (
    Busy,
    HutchError,
    InternalError,
    NotFound,
    Unavailable,
)
from hutch.host.qemu import AcceleratorWish
from hutch.linux.cgroup import Group
from hutch.plan.assets import ResolvedUser
from hutch.plan.guest import SetupOp
from hutch.plan.machine.model import Shape
from hutch.plan.ops import Exec, HealthProbe, Plan, SetsidTty, Supervision
from hutch.process.launcher import Launcher, launcher_path
from hutch.process.vmm import MonitorConfig, MonitorLink
from hutch.records import Progress, silent
from hutch.spec.model import InstanceSpec
from hutch.storage.disks import Disks

if TYPE_CHECKING:
    from hutch.qmp import Monitor

__all__ = ["MachineLauncher", "MachineStart"]


class MachineStart(msgspec.Struct, frozen=True, kw_only=True):
    """A start under way, and what it was made from."""

    booted: Booted
    assets: Assets


class MachineLauncher:
    """Starts machines; holds what is the same for every launch of this process."""

    def __init__(self, root: Path, launcher: Launcher, kernels: Kernels) -> None:
        self.root = root
        self.launcher = launcher
        self._kernels = kernels
        self.templates = Templates(root, launcher)
        self.images = ImageTemplates(root, self.templates, most=most_kept(os.environ))
        self._disks = Disks(root)
        self._maker = TemplateMaker(root, launcher, lambda: self.sandbox)

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

    def _parts_of(self, spec: InstanceSpec, before: MachineRecord | None = None) -> Parts:
        machine = spec.machine
        parts = self._parts(machine.kernel, machine.accel, lambda host: shape_of(spec, host))
        if before is None:
            return parts
        return msgspec.structs.replace(
            parts, shape=before.shape or parts.shape, plugged=before.plugged_memory()
        )

    def _parts(self, name: str, accel: AcceleratorWish, shape: Callable[[Host], Shape]) -> Parts:
        kernel = self._kernels.get(name or None)
        vmlinux = self._kernels.vmlinux(kernel)
        host = find_host(self.root, accel, vmlinux)
        return Parts(
            host=host,
            kernel=kernel,
            vmlinux=vmlinux,
            initramfs=ensure_initramfs(self._kernels, kernel, self._programs),
            shape=shape(host),
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
        passed: Passed | None = None,
    ) -> MachineStart:
        """Begin to start an instance's machine; the caller brings it up and owns the links.

        `held` closes, after the launch, what is only needed for it. `passed` are devices of the
        host, which no template can have.
        """
        passed = passed or Passed()
        loaded = held.enter_context(opened(launch.saved)) if launch.saved else None
        before = before_of(launch, loaded)
        parts = self._parts_of(launch.spec, before)
        template, parked, wanted = None, None, None
        if may_have_template(launch, parts, passed):
            template, parked, wanted = self._going_on(_as_template(parts), launch, plan, held)
        shares = serve(self.launcher, self.root, launch, group, held)
        tpm = None
        if launch.spec.machine.tpm:
            tpm = serve_tpm(self.launcher, self.sandbox, self.root, launch, group, held)
        assets = Assets(
            parts=parts,
            template=template,
            parked=parked,
            wanted=wanted,
            loaded=loaded,
            taps=lend_taps(launch, held),
            shares=shares,
            share_port=_share_port(shares, template, before),
            tpm=tpm,
            passed=passed,
        )
        begin_logs(launch.directory)
        save_record(launch.directory, machine_record(launch, assets, user, before))
        booted = boot(self.launcher, self._request(launch, plan, assets, group, health))
        return MachineStart(booted=booted, assets=assets)

    def _request(
        self,
        launch: Launch,
        plan: Plan,
        assets: Assets,
        group: Group,
        health: HealthProbe | None,
    ) -> BootRequest:
        parts, taps, shares = assets.parts, assets.taps, assets.shares
        return BootRequest(
            identifier=launch.id,
            root=self.root,
            sandbox=self.sandbox,
            qemu=parts.host.qemu,
            directory=f"{launch.directory}/run",
            logs=launch.directory,
            supervision=instance_supervision(launch, health),
            argv=instance_argv(self._kernels, self.sandbox, launch, assets),
            config=monitor_config(launch, plan, assets),
            kvm=parts.host.accelerator == "kvm",
            lock_memory=parts.shape.lock_memory or bool(assets.passed.nodes),
            groups=assets.passed.groups(parts.host.version),
            discards=shares is None and assets.maps_privately,
            rows=launch.rows,
            columns=launch.columns,
            group=group,
            namespace=taps.namespace if taps else -1,
            host_network=is_user_network(launch.endpoints),
            network=launch.attach_network is not None,
            attach=launch.attach,
            shares=shares.socket if shares else -1,
            userfaultfd=launch.arrival is not None and launch.arrival.streams.post_copy,
        )

    def arguments(self, launch: Launch) -> tuple[str, ...]:
        """Return QEMU's argument list for a boot of its own; nothing is started or kept."""
        parts = self._parts_of(launch.spec)
        with ExitStack() as held:
            descriptors = Descriptors(held)

            def placeholder() -> int:
                return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)

            names = [field.name for field in msgspec.structs.fields(Ports)]
            ports = Ports(**{name: descriptors.add(placeholder()) for name in names})
            planned = Passed(planned=launch.host_devices)
            assets = Assets(parts=parts, passed=planned)
            argv = instance_argv(self._kernels, self.sandbox, launch, assets)
            return tuple(argv(ports, descriptors))

    def start_bare(
        self, launch: Launch, directory: str, group: Group, held: ExitStack
    ) -> tuple[Booted, Template | None]:
        """Begin to start a machine with the disks of a stopped one, where no program runs.

        Its sockets are made in `directory`. It ends with its link to the supervisor.
        """
        parts = self._parts_of(launch.spec)
        template = (
            self._held_template(_as_template(parts), launch, held)
            if launch.spec.machine.template and template_shape(parts.shape) is not None
            else None
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
                argv=instance_argv(
                    self._kernels, self.sandbox, launch, Assets(parts=parts, template=template)
                ),
                config=MonitorConfig(
                    argv=(),
                    setup=setup_request(setup),
                    boot_timeout_s=BOOT_S,
                    volatile=True,  # whoever asked for it has it write out what it wrote
                    hold=template is not None,
                ),
                kvm=parts.host.accelerator == "kvm",
                group=group,
            ),
        )
        return booted, template

    def network_modules(self, kernel_id: str) -> list[SetupOp]:
        """Return what loads the driver of network cards in a guest of that kernel."""
        return load_network(self._kernels.get(kernel_id).late)

    def resume(
        self,
        directory: str,
        template: Template,
        link: MonitorLink,
        shares: ShareServer | None = None,
        disks: Sequence[LaunchMount] = (),
    ) -> None:
        """Load a template's state into the QEMU of a run directory, and let it run."""
        from hutch.qmp.migration import MigrationFailed

        def plugged(qmp: Monitor) -> None:
            plug_volumes(qmp, disks, first=1 if shares else 0)
            if shares:
                plug(qmp, shares, shared_port=bool(disks))

        try:
            with ended_qemu(link):
                resume(directory, template, plugged)
        except MigrationFailed as exc:
            # Damaged, perhaps: whatever it is, nobody else is to meet with it.
            self.templates.discard(template)
            raise Unavailable(
                f"template {template.key[:12]}: cannot be resumed: {exc.message}",
                hint="it was removed: start again, and another is made",
            ) from exc

    # ---- templates ----------------------------------------------------------------------

    def _base_key(self, parts: Parts, cards: Cards, disk: int) -> str:
        devices = (cards.count, cards.on_taps, seen_size(disk))
        return template_key(parts.host, parts.shape, parts.kernel.id, parts.initramfs, devices)

    def _template(
        self, parts: Parts, cards: Cards, disk: int, progress: Progress = silent
    ) -> Template:
        """Return the kernel's template for these cards and the size of the writable disk; see
        `Template.disk_size`."""
        key = self._base_key(parts, cards, disk)
        seen = seen_size(disk)
        making = self._maker.of_kernel(key, parts, cards, seen)
        found = self.templates.ensure(key, making, progress)
        return found if disk == seen else msgspec.structs.replace(found, disk_size=disk)

    def _held_template(self, parts: Parts, launch: Launch, held: ExitStack) -> Template:
        size = writable_size(launch)
        template = self._template(parts, _cards(launch), size, launch.progress)
        _hold(template, held)
        return template

    def _going_on(
        self, parts: Parts, launch: Launch, plan: Plan, held: ExitStack
    ) -> tuple[Template, Parked | None, ImageRequest | None]:
        """Return the template to go on from: that of the image with the rest of the launch,
        or that of the kernel and what the other would have been."""
        cards = _cards(launch)
        found = image_request(
            launch,
            plan,
            self._disks,
            base=self._base_key(parts, cards, writable_size(launch)),
            shape=parts.shape,
            on_taps=cards.on_taps,
        )
        wanted = None
        if found is not None:
            request, parked = found
            template, is_missing = self.images.take(request, launch.disk)
            if template is not None:
                _hold(template, held)
                return template, parked, None
            wanted = request if is_missing else None
        return self._held_template(parts, launch, held), None, wanted

    def wish(self, request: ImageRequest | None) -> None:
        """Have the template of an image made, in a process of its own, when a start would
        have gone on from it before. What fails here is no failure of the start."""
        with suppress(OSError, HutchError):
            key = self.images.wish(request) if request is not None else None
            if key is not None:
                self._start_preparing(key)

    def _start_preparing(self, key: str) -> None:
        program = sys.executable or "/usr/bin/python3"
        argv = (program, "-m", "hutch", "--root", str(self.root), "_template", key)
        env = tuple(f"{name}={value}" for name, value in os.environ.items())
        plan = Plan(
            child=(SetsidTty(), Exec(argv=argv, env=env)),
            supervision=Supervision(name="hutch-template"),
        )
        with self.launcher.start(plan) as supervisor:
            supervisor.wait_started()

    def prepare(self, key: str) -> None:
        """Make a template of an image that was asked for, unless somebody does already.

        A request that failed stays for a while, so that not every start fails it again.
        """
        with suppress(Busy), self.templates.locked(key, timeout_s=0):
            request = self.images.requested(key)
            if request is not None:
                self._prepare(request)
                self.images.made(key)

    def _prepare(self, request: ImageRequest) -> None:
        parts = self._parts(request.kernel, request.accel, lambda host: request.shape)
        cards = Cards(count=request.nics, on_taps=request.on_taps)
        if self._base_key(parts, cards, request.empty.size) != request.base:
            return  # another QEMU, kernel or version of hutch than a moment ago
        with ExitStack() as held:
            present = self.templates.find(request.key)
            if present is not None:
                _hold(present, held)
                return
            base = self._template(parts, cards, request.empty.size)
            _hold(base, held)
            directory = self.templates.directory(request.key)
            making = self._maker.of_image(request, parts, base, directory)
            _hold(self.templates.make(request.key, making), held)


def _hold(template: Template, held: ExitStack) -> None:
    held.callback(os.close, template.memory)
    held.callback(os.close, template.state)


def _share_port(
    shares: ShareServer | None, template: Template | None, before: MachineRecord | None
) -> str:
    """Return the port of the shares' device: nothing that goes on from a template has it from
    the start, and what comes from another host has it where it was there."""
    if shares is None or (template is None and before is None):
        return ""
    return PORT if before is None or before.share_port else ""


def _as_template(parts: Parts) -> Parts:
    """Return the parts of the template that a machine with these goes on from."""
    shape = template_shape(parts.shape)
    if shape is None:
        raise InternalError("a machine of this shape has no template")
    return msgspec.structs.replace(parts, shape=shape)


def _cards(launch: Launch) -> Cards:
    return Cards(count=len(launch.endpoints), on_taps=not is_user_network(launch.endpoints))
