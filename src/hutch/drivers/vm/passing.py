"""PCI devices of the host for one machine: taken from their drivers, given to QEMU, given back.

QEMU gets a device opened where it and the kernel can do that (QEMU 9, Linux 6.6 with its
`vfio` character devices), and then sees nothing of the host but the descriptors. Elsewhere its
`/dev` has the nodes of the devices' groups, and those only.

The machine's memory is pinned for the devices, all of it. That is its control group's to bear,
as memory that is locked by request; an ordinary user's is bound by RLIMIT_MEMLOCK.
"""

from __future__ import annotations

import os
import resource
from contextlib import ExitStack
from pathlib import Path

import msgspec

from hutch.drivers.base import Launch
from hutch.drivers.vm.limits import memory_of
from hutch.drivers.vm.sandbox import Descriptors, Sandbox
from hutch.errors import Busy, Denied
from hutch.plan.machine.model import Descriptor, HostDevice
from hutch.plan.machine.version import QemuVersion
from hutch.plan.vm import PASSED, PassedGroup
from hutch.resources.vfio_binding import LEDGER, VfioNodes, give_back, lend, nodes_of

__all__ = ["LEDGER", "Passed", "give_back_devices", "take_devices"]

_IOMMU = "/dev/iommu"
_VFIO = (10, 196)
# What is pinned besides: the queues of the devices, firmware, video memory.
_MEMLOCK_SLACK = 64 << 20


class Passed(msgspec.Struct, frozen=True, kw_only=True):
    """The devices of one machine, in the hands of vfio-pci: address to nodes. `planned` are the
    addresses of those of a start that is only shown."""

    nodes: dict[str, VfioNodes] = {}
    planned: tuple[str, ...] = ()

    def numbers(self) -> tuple[tuple[int, int], ...]:
        """Return the numbers (major, minor) of all nodes that QEMU may open."""
        groups = dict.fromkeys(found.group_numbers for found in self.nodes.values())
        return (_VFIO, *groups) if groups else ()

    def come_opened(self, version: QemuVersion) -> bool:
        """Tell whether QEMU gets them as descriptors."""
        can = version.takes_opened_devices and os.path.exists(_IOMMU)
        return can and all(found.character for found in self.nodes.values())

    def groups(self, version: QemuVersion) -> tuple[PassedGroup, ...]:
        """Return the groups whose nodes QEMU opens by itself; none where the devices come
        opened."""
        if self.come_opened(version):
            return ()
        members: dict[tuple[int, tuple[int, int]], list[str]] = {}
        for address, found in self.nodes.items():
            members.setdefault((found.group, found.group_numbers), []).append(address)
        return tuple(
            PassedGroup(group=group, numbers=numbers, addresses=tuple(addresses))
            for (group, numbers), addresses in members.items()
        )

    def pieces(
        self, version: QemuVersion, sandbox: Sandbox, descriptors: Descriptors
    ) -> tuple[tuple[HostDevice, ...], Descriptor | None]:
        """Return the machine's devices and, where they come opened, /dev/iommu."""
        if not self.nodes:
            return tuple(HostDevice(address=address) for address in self.planned), None
        if not self.come_opened(version):
            own_root = sandbox.namespaces != "none"
            return tuple(
                HostDevice(address=address, directory=f"{PASSED}/{address}" if own_root else "")
                for address in self.nodes
            ), None
        devices = tuple(
            HostDevice(address=address, file=_opened(found.character or "", address, descriptors))
            for address, found in self.nodes.items()
        )
        return devices, _opened(_IOMMU, "", descriptors)


def _opened(path: str, address: str, descriptors: Descriptors) -> Descriptor:
    try:
        return Descriptor(descriptors.add(os.open(path, os.O_RDWR | os.O_CLOEXEC)))
    except PermissionError as exc:
        raise Denied(f"{path}: may not be opened", hint="run hutch as root") from exc
    except OSError as exc:
        reason = (exc.strerror or str(exc)).lower()
        raise Busy(f"device vfio={address}: {path}: {reason}") from exc


def take_devices(launch: Launch, undo: ExitStack) -> Passed:
    """Take a machine's devices from their drivers; `undo` gives them back."""
    if not launch.host_devices:
        return Passed()
    _check_limit(launch)
    undo.callback(give_back_devices, launch.directory)
    lend(launch.host_devices, Path(launch.directory, LEDGER))
    return Passed(nodes={address: nodes_of(address) for address in launch.host_devices})


def _check_limit(launch: Launch) -> None:
    """An ordinary user may not pin what is above its limit, whatever its control group."""
    if os.geteuid() == 0:
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    needed = memory_of(launch.spec) + _MEMLOCK_SLACK
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise Denied(
            f"devices: the machine's memory is pinned, and this user may pin {limit >> 20} MiB",
            hint=f"raise the limit to {needed >> 20} MiB (memlock in limits.conf), or run hutch "
            "as root",
        )


def give_back_devices(directory: str) -> tuple[str, ...]:
    """Return what a machine that has ended had taken; safe to repeat.

    Returns the addresses of devices that their drivers did not take back.
    """
    ledger = Path(directory, LEDGER)
    return give_back(ledger) if ledger.exists() else ()
