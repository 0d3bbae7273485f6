"""QEMU's argument list for an instance's machine: its memory, disks, cards, and what it goes on
from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from hutch.drivers.base import Launch
from hutch.drivers.vm.assets import Assets, goes_on
from hutch.drivers.vm.backing import pooled_memory, private_memory, resumed_memory, share_devices
from hutch.drivers.vm.boot import Ports
from hutch.drivers.vm.cards import network_cards
from hutch.drivers.vm.diskkeys import DISK_KEY, secrets, writable_files
from hutch.drivers.vm.kernels import Kernels
from hutch.drivers.vm.machine import machine_argv
from hutch.drivers.vm.making import Parts, disk_cache, instance_disks, kernel_paths
from hutch.drivers.vm.placeholders import stub_kernel
from hutch.drivers.vm.sandbox import Descriptors, Sandbox
from hutch.drivers.vm.volumes import volume_disks
from hutch.plan.machine.model import Memory

__all__ = ["instance_argv"]


def instance_argv(
    kernels: Kernels, sandbox: Sandbox, launch: Launch, assets: Assets
) -> Callable[[Ports, Descriptors], Sequence[str]]:
    """Return what makes the list of an instance's machine from its assets."""
    parts, template, loaded = assets.parts, assets.template, assets.loaded
    shares, tpm = assets.shares, assets.tpm
    under_way = goes_on(launch)
    resumed = template is not None or under_way

    def argv(ports: Ports, descriptors: Descriptors) -> Sequence[str]:
        memory = Memory(kind="memfd" if shares else "plain")
        if template is not None:
            memory = resumed_memory(template, parts.shape, shares, descriptors)
        elif launch.memory >= 0 and not under_way:
            memory = pooled_memory(launch.memory, descriptors)
        elif loaded is not None and loaded.memory >= 0:
            memory = private_memory(loaded.memory, descriptors)
        return machine_argv(
            parts.host,
            ports,
            name=launch.id[:12],
            shape=parts.shape,
            memory=memory,
            kernel=_kernel(kernels, parts, descriptors, resumed=resumed, tpm=tpm is not None),
            secrets=secrets(launch, descriptors),
            disks=instance_disks(
                launch.root_disk,
                writable_files(launch),
                descriptors,
                cache=disk_cache(launch),
                aio=launch.spec.machine.disk_aio or "threads",
                key=DISK_KEY if launch.spec.machine.disk_key else "",
            ),
            nics=network_cards(
                launch.endpoints, assets.taps.taps if assets.taps else (), descriptors
            ),
            shares=()
            if template is not None
            else share_devices(shares, descriptors, port=assets.share_port),
            volumes=volume_disks(launch, descriptors) if template is None else (),
            tpm=tpm.device(descriptors) if tpm else None,
            passed=assets.passed.pieces(parts.host.version, sandbox, descriptors),
            incoming=resumed,
            # A machine that was saved while it ran would run before its cards are
            # unplugged.
            paused=under_way,
            plugged=parts.plugged,
        )

    return argv


def _kernel(
    kernels: Kernels, parts: Parts, descriptors: Descriptors, *, resumed: bool, tpm: bool
) -> tuple[str, str]:
    """Return kernel and initramfs. With a TPM the kernel is the one with a loader of its
    own: QEMU's for ELF files puts the initramfs where the firmware has the tables of ACPI,
    which with a TPM's log among them take more than QEMU keeps free."""
    if tpm:
        loading = kernels.vmlinuz(parts.kernel)
        return kernel_paths(msgspec.structs.replace(parts, vmlinux=loading), descriptors)
    if resumed:
        return stub_kernel(descriptors), ""
    return kernel_paths(parts, descriptors)
