"""Boot the machines that only become templates: of a kernel, and of an image.

Their cards lead nowhere, but settle with the back end what it can do, so that is of the
clones' kind: taps, or QEMU's own network.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from hutch.drivers.vm.boot import QMP_SOCKET, Booted, BootRequest, Ports, boot
from hutch.drivers.vm.cards import template_cards
from hutch.drivers.vm.images import DISK, ImageRequest
from hutch.drivers.vm.inside import write_back
from hutch.drivers.vm.kernels import KernelRecord
from hutch.drivers.vm.machine import Host, machine_argv
from hutch.drivers.vm.placeholders import empty_disks, stub_kernel
from hutch.drivers.vm.sandbox import Descriptors, Sandbox
from hutch.drivers.vm.setup import (
    ROOT_SERIAL,
    WRITABLE_SERIAL,
    image_setup,
    late_setup,
    setup_request,
)
from hutch.drivers.vm.templates import Making, Template
from hutch.errors import Unsupported
from hutch.network.taps import create_taps
from hutch.plan.machine.disks import node_name
from hutch.plan.machine.model import (
    CacheMode,
    Descriptor,
    Disk,
    DiskAio,
    DiskFile,
    Memory,
    PluggedMemory,
    Shape,
)
from hutch.plan.ops import Supervision
from hutch.process.guest import Guest
from hutch.process.launcher import Launcher
from hutch.process.vmm import MonitorConfig
from hutch.storage.sparse import copy_sparse

if TYPE_CHECKING:
    from hutch.drivers.base import Launch
    from hutch.qmp import Monitor

__all__ = [
    "Cards",
    "Parts",
    "TemplateMaker",
    "disk_cache",
    "instance_disks",
    "kernel_paths",
    "resume",
]

BOOT_S = 120.0
_SETTLE_S = 3.0
_WRITABLE = 1  # of the disks, in the order of `instance_disks`


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """What of a machine does not depend on the instance."""

    host: Host
    kernel: KernelRecord
    vmlinux: Path
    initramfs: Path
    shape: Shape
    plugged: PluggedMemory | None = None


class Cards(msgspec.Struct, frozen=True, kw_only=True):
    """How many network cards a template has, and whether its clones' are on taps."""

    count: int
    on_taps: bool


class TemplateMaker:
    """Boots machines that become templates."""

    def __init__(self, root: Path, launcher: Launcher, sandbox: Callable[[], Sandbox]) -> None:
        self._root = root
        self._launcher = launcher
        self._sandbox = sandbox

    def of_kernel(self, key: str, parts: Parts, cards: Cards, disk: int) -> Making:
        """Return how a template of a kernel is made: a boot with empty disks."""

        def boot(run: Path, memory: int) -> Booted:
            return self._boot(
                key,
                parts,
                cards,
                run,
                memory,
                kernel=lambda descriptors: kernel_paths(parts, descriptors),
                disks=lambda descriptors: empty_disks(descriptors, disk),
                config=MonitorConfig(
                    argv=(),
                    setup=setup_request(late_setup(parts.kernel.late, nics=cards.count)),
                    boot_timeout_s=BOOT_S,
                    volatile=True,
                ),
            )

        return Making(size=parts.shape.memory, boot=boot)

    def of_image(
        self, request: ImageRequest, parts: Parts, base: Template, directory: Path
    ) -> Making:
        """Return how a template of an image is made: the kernel's goes on with its disks."""
        disk = str(directory / DISK)

        def boot(run: Path, memory: int) -> Booted:
            copy_sparse(request.empty.path, disk)
            return self._boot(
                request.key,
                parts,
                Cards(count=request.nics, on_taps=request.on_taps),
                run,
                memory,
                kernel=lambda descriptors: (stub_kernel(descriptors), ""),
                disks=lambda descriptors: instance_disks(
                    request.root.path, (disk,), descriptors, cache="unsafe"
                ),
                incoming=True,
                config=MonitorConfig(
                    argv=(),
                    setup=setup_request(
                        image_setup(
                            volatile=request.volatile, files=request.files, nics=request.nics
                        )
                    ),
                    plan=request.plan,
                    boot_timeout_s=BOOT_S,
                    volatile=True,
                    hold=True,
                    park=True,
                ),
            )

        def bring_up(run: Path, booted: Booted) -> None:
            booted.monitor.wait_qemu()
            resume(str(run), base)
            booted.monitor.go()
            booted.monitor.wait_started(BOOT_S)
            write_back(Guest(str(run)))
            # What the guest's kernel puts off (its timers, freed pages, statistics) would be
            # done in each clone.
            time.sleep(_SETTLE_S)

        return Making(size=parts.shape.memory, source=base.memory, boot=boot, bring_up=bring_up)

    def _boot(
        self,
        key: str,
        parts: Parts,
        cards: Cards,
        run: Path,
        memory: int,
        *,
        kernel: Callable[[Descriptors], tuple[str, str]],
        disks: Callable[[Descriptors], Sequence[Disk]],
        config: MonitorConfig,
        incoming: bool = False,
    ) -> Booted:
        with ExitStack() as held:
            taps: tuple[int, ...] = ()
            if cards.count and cards.on_taps:
                made = create_taps(cards.count)
                for fd in (made.namespace, *made.taps):
                    held.callback(os.close, fd)
                taps = made.taps

            def argv(ports: Ports, descriptors: Descriptors) -> Sequence[str]:
                number = descriptors.add(os.dup(memory))
                return machine_argv(
                    parts.host,
                    ports,
                    name=f"template-{key[:12]}",
                    shape=parts.shape,
                    memory=Memory(kind="file", path=f"/proc/self/fd/{number}", share=True),
                    kernel=kernel(descriptors),
                    disks=disks(descriptors),
                    nics=template_cards(cards.count, taps, descriptors),
                    incoming=incoming,
                )

            return boot(
                self._launcher,
                BootRequest(
                    identifier=key,
                    root=self._root,
                    sandbox=self._sandbox(),
                    qemu=parts.host.qemu,
                    directory=str(run),
                    logs=str(run),
                    supervision=Supervision(linger=False, name="hutch-template"),
                    argv=argv,
                    config=config,
                    kvm=parts.host.accelerator == "kvm",
                ),
            )


def resume(
    directory: str, template: Template, plugged: Callable[[Monitor], None] | None = None
) -> None:
    """Load a template's state into the QEMU of a run directory, and let it run; `plugged` adds
    what no template can have. Raises `MigrationFailed` where it cannot be loaded."""
    from hutch.qmp import conversation
    from hutch.qmp.blocks import resize_block
    from hutch.qmp.machine import cont
    from hutch.qmp.migration import load_state, set_parameters

    with conversation(f"{directory}/{QMP_SOCKET}", timeout_s=BOOT_S) as monitor:
        # QEMU would have the guest tell the network of the addresses that the template has.
        set_parameters(monitor, announce_rounds=0)
        load_state(monitor, template.state, ignore_shared=True)
        if monitor.version.opens_disks_late:
            cont(monitor)  # the agent is not greeted yet: nothing reads them
        if template.disk_size:
            resize_block(monitor, node_name(_WRITABLE), template.disk_size)
        if plugged is not None:
            plugged(monitor)
        cont(monitor)


def kernel_paths(parts: Parts, descriptors: Descriptors) -> tuple[str, str]:
    """Return kernel and initramfs as QEMU opens them: nothing of the root is in its view."""
    opened = (
        descriptors.add(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        for path in (parts.vmlinux, parts.initramfs)
    )
    vmlinux, initramfs = (f"/proc/self/fd/{number}" for number in opened)
    return vmlinux, initramfs


def instance_disks(
    root: str,
    writable: Sequence[str],
    descriptors: Descriptors,
    *,
    cache: CacheMode,
    aio: DiskAio = "threads",
    key: str = "",
) -> tuple[Disk, ...]:
    """Return the image's disk, shared by all machines of that image, and the writable one: its
    files, the lowest first, or one that is opened by the secret `key`; with how they are read
    and written."""
    direct = os.O_DIRECT if cache == "none" else 0

    def opened(path: str, mode: int, backing: DiskFile | None = None, *, key: str = "") -> DiskFile:
        fd = _open_disk(path, mode | os.O_CLOEXEC | os.O_NOFOLLOW)
        return DiskFile(
            file=Descriptor(descriptors.add(fd)),
            format="qcow2" if backing or key else "raw",
            backing=backing,
            key=key,
        )

    *frozen, top = writable
    below: DiskFile | None = None
    for path in frozen:
        below = opened(path, os.O_RDONLY | direct, below)
    return (
        Disk(image=opened(root, os.O_RDONLY), serial=ROOT_SERIAL, read_only=True, discard=False),
        Disk(
            image=opened(top, os.O_RDWR | direct, below, key=key),
            serial=WRITABLE_SERIAL,
            cache=cache,
            aio=aio,
            detect_zeroes=True,
        ),
    )


def disk_cache(launch: Launch) -> CacheMode:
    """Return how a machine's writable disk is cached."""
    return launch.spec.machine.disk_cache or ("unsafe" if launch.volatile else "writeback")


def _open_disk(path: str, mode: int) -> int:
    try:
        return os.open(path, mode)
    except OSError as exc:
        # EINVAL of open(2): the file system has no O_DIRECT.
        if exc.errno != errno.EINVAL or not mode & os.O_DIRECT:
            raise
        raise Unsupported(
            f"disk_cache: the file system of {path} caches whatever is read and written",
            hint="leave out --disk-cache none",
        ) from exc
