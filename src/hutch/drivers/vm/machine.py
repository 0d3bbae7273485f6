"""What a start has decided about a machine: QEMU, accelerator, kernel, shape; and its record."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from hutch.decoding import decode_json
from hutch.drivers.vm.boot import Ports
from hutch.drivers.vm.limits import max_memory_of, max_vcpus_of, memory_of, vcpus_of
from hutch.errors import NotFound, Unsupported
from hutch.plan.assets import ResolvedUser
from hutch.plan.machine.argv import machine_arguments
from hutch.plan.machine.kernel import kernel_command_line
from hutch.plan.machine.model import (
    MICROVM,
    Q35,
    Accelerator,
    CacheMode,
    Console,
    Descriptor,
    Disk,
    DiskAio,
    HostDevice,
    Kernel,
    Machine,
    Memory,
    Nic,
    NumaNode,
    PluggedMemory,
    Secret,
    Shape,
    Share,
    Tpm,
)
from hutch.plan.machine.version import QemuVersion, parse_version
from hutch.spec.model import CpuTopology, InstanceSpec

__all__ = ["Host", "MachineRecord", "load_record", "machine_argv", "machine_type"]
__all__ += ["save_record", "shape_of", "template_key", "template_shape"]

RECORD = "machine.json"
_TYPES = {"": Q35, "q35": Q35, "microvm": MICROVM}
# A change of how templates are made, or of the agent's protocol, makes all of them stale.
_TEMPLATE_FORMAT = 7
ROOT_PORTS = 5
MEMORY_PORT = "rp4"
"""The last of them: where more memory comes from while the machine runs."""
# With "enhanced rep movsb" a guest copies and clears memory a byte at a time, which costs an
# emulated CPU eight times the steps of doing it by words. One that has "fast short rep movsb"
# (QEMU 8 on) and not that is no real CPU's, and Linux 6.1 does not get on with it.
_EMULATED_CPU = "max,-erms,-fsrm"
# A processor by AMD, as `max` is, tells of its threads by what QEMU does not emulate.
_THREADED_CPU = f"{_EMULATED_CPU},vendor=GenuineIntel"


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """The host's side, as found: QEMU, the accelerator with the reason for it, and the bytes
    of memory and the processors that it has."""

    qemu: str
    version: QemuVersion
    accelerator: Accelerator
    reason: str
    tsc_khz: int = 0
    memory: int = 0
    processors: int = 1


class MachineRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What later calls need to know of a machine that was started; in its directory.

    `template` is the name of what it went on from, "" for a boot of its own. `memory` and
    `vcpus` are what it uses now, `shape` what QEMU must be started with to take its state
    over (its `vcpus` are those that are plugged), and `plugged` the memory beyond that which
    it was asked to take, -1 where it has no device for that yet; `overlays` are the numbers of
    those that its disk had when it started (`hutch.storage.diskchain`). `pinned` says that each
    processor keeps to one of the host's, `disk_cache` and `disk_aio` how its writable disk is
    read and written. `host_devices` are the addresses of the PCI devices that it has whole.
    `shares_move`: the server of its directories can hand over what is open; `share_port` is where
    that device was plugged, "" for one that was there from the start.
    """

    qemu: str
    qemu_version: str
    accelerator: str
    accelerator_reason: str
    kernel: str
    kernel_id: str
    machine: str
    cpu: str
    memory: int
    vcpus: int
    template: str
    user: ResolvedUser
    shares: int = 0
    shares_move: bool = False
    share_port: str = ""
    volumes: int = 0
    tpm: bool = False
    shape: Shape | None = None
    plugged: int = -1
    overlays: tuple[int, ...] = ()
    pinned: bool = False
    disk_cache: CacheMode = "writeback"
    disk_aio: DiskAio = "threads"
    host_devices: tuple[str, ...] = ()

    @property
    def holds_shares(self) -> bool:
        """Whether it has directories of the host that keep it there while it runs."""
        version = parse_version(self.qemu_version)
        return self.shares > 0 and not (self.shares_move and version.moves_shares)

    @property
    def memory_max(self) -> int:
        """The bytes of memory that it may come to have while it runs."""
        return self.memory if self.shape is None else max(self.shape.memory, self.shape.max_memory)

    @property
    def vcpus_max(self) -> int:
        """The processors that it may come to have while it runs."""
        return self.vcpus if self.shape is None else max(self.shape.vcpus, self.shape.max_vcpus)

    @property
    def memory_started(self) -> int:
        """The bytes of memory that it was started with, in one block."""
        return self.memory if self.shape is None else self.shape.memory

    def plugged_memory(self) -> PluggedMemory | None:
        """Return the device for more memory, where it has one."""
        if self.plugged < 0:
            return None
        return PluggedMemory(requested=self.plugged, port=MEMORY_PORT)


def save_record(directory: str, record: MachineRecord) -> None:
    """Keep the record, replaced whole."""
    partial = f"{directory}/.{RECORD}"
    with open(partial, "wb") as file:
        file.write(msgspec.json.encode(record))
    os.replace(partial, f"{directory}/{RECORD}")


def load_record(directory: str) -> MachineRecord:
    """Return the record of a machine that was started once."""
    try:
        with open(f"{directory}/{RECORD}", "rb") as file:
            return decode_json(file.read(), MachineRecord)
    except FileNotFoundError:
        raise NotFound("the machine was never started") from None


def machine_type(spec: InstanceSpec) -> str:
    """Return QEMU's full name of the machine's type."""
    asked = spec.machine.machine
    known = _TYPES.get(asked, asked)
    if known != MICROVM and not known.startswith("pc-q35-"):
        raise Unsupported(f"machine: {asked!r} is not supported", hint="use q35 or microvm")
    return known


def shape_of(spec: InstanceSpec, host: Host) -> Shape:
    """Return processors and memory of a specification on this host."""
    model = spec.machine.cpu_model or ("host" if host.accelerator == "kvm" else _EMULATED_CPU)
    machine, wish = machine_type(spec), spec.machine
    memory, vcpus = memory_of(spec), vcpus_of(spec)
    fixed = machine == MICROVM
    topology = wish.cpu_topology or CpuTopology()
    page = next(iter(spec.placement.huge), 0)
    ahead = bool(page) or spec.placement.prealloc or spec.placement.memory == "pool"
    # What is locked is all of it, the room included; and nodes have what they were given.
    most = memory if fixed or wish.memory_lock or wish.numa else max_memory_of(spec, host.memory)
    return Shape(
        memory=memory,
        vcpus=vcpus,
        max_memory=most if most > memory else 0,
        memory_slots=1 if most > memory else 0,
        max_vcpus=max_vcpus_of(spec, 0 if fixed else host.processors),
        cores=topology.cores,
        threads=topology.threads,
        numa=tuple(
            NumaNode(memory=node.memory, vcpus=node.cpus, host_nodes=node.host_nodes)
            for node in wish.numa
        ),
        backend=Memory(huge_page=page, preallocate=ahead, merge=spec.placement.merge),
        lock_memory=wish.memory_lock,
        machine=machine,
        accelerator=host.accelerator,
        cpu=model if topology.threads == 1 or model != _EMULATED_CPU else _THREADED_CPU,
    )


def machine_argv(
    host: Host,
    ports: Ports,
    *,
    name: str,
    shape: Shape,
    memory: Memory,
    kernel: tuple[str, str],
    disks: Sequence[Disk],
    nics: Sequence[Nic],
    shares: Sequence[Share] = (),
    secrets: Sequence[Secret] = (),
    volumes: Sequence[Disk] = (),
    tpm: Tpm | None = None,
    passed: tuple[tuple[HostDevice, ...], Descriptor | None] = ((), None),
    incoming: bool = False,
    plugged: PluggedMemory | None = None,
    paused: bool = False,
) -> tuple[str, ...]:
    """Return QEMU's argument list; `kernel` are the paths of vmlinux and initramfs in QEMU,
    `passed` devices of the host with /dev/iommu, where they come opened."""
    line = ""
    if not incoming:
        line = kernel_command_line(
            accelerator=host.accelerator,
            tsc_khz=host.tsc_khz,
            memory=shape.memory,
            max_memory=shape.max_memory,
        )
    machine = Machine(
        name=name,
        shape=msgspec.structs.replace(shape, backend=_backend(shape.backend, memory)),
        boot=Kernel(path=kernel[0], initrd=kernel[1], command_line=line),
        monitor=Descriptor(ports.qmp),
        control=Descriptor(ports.control) if ports.control >= 0 else None,
        agent=Descriptor(ports.agent),
        console=Console(listen=Descriptor(ports.console), log=Descriptor(ports.console_log)),
        secrets=tuple(secrets),
        disks=tuple(disks),
        nics=tuple(nics),
        shares=tuple(shares),
        volumes=tuple(volumes),
        tpm=tpm,
        host_devices=passed[0],
        iommu=passed[1],
        root_ports=0 if shape.machine == MICROVM else ROOT_PORTS,
        plugged=plugged,
        incoming=incoming,
        paused=paused,
    )
    return machine_arguments(machine, version=host.version, qemu=host.qemu)


def _backend(wish: Memory, memory: Memory) -> Memory:
    """Return where memory is, with what is wished of it."""
    return msgspec.structs.replace(
        wish, kind=memory.kind, path=memory.path, share=memory.share, sealed=memory.sealed
    )


def template_shape(shape: Shape) -> Shape | None:
    """Return the shape of the template from which a machine may go on; None for no template.

    How the host holds the memory is no part of a template. But one that is a file cannot be
    made of huge pages, nor be spread over nodes; and memory that comes page by page, as it is
    touched, is not there before.
    """
    if shape.numa or shape.backend.preallocate:
        return None
    return msgspec.structs.replace(shape, backend=Memory(), lock_memory=False)


def template_key(
    host: Host, shape: Shape, kernel_id: str, initramfs: Path, devices: tuple[int, ...]
) -> str:
    """Return what a template is called: a digest of all that its state depends on.

    `devices` are numbers of the devices that the guest's drivers have seen."""
    binary = os.stat(host.qemu)
    parts = (
        _TEMPLATE_FORMAT,
        host.qemu,
        str(host.version),
        binary.st_size,
        binary.st_mtime_ns,
        _host_cpu() if shape.cpu.split(",")[0] in ("host", "max") else "",
        shape,
        kernel_id,
        initramfs.name,
        devices,
        host.tsc_khz,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _host_cpu() -> str:
    """Return the host's CPU model and flags: what `host` and `max` mean depends on them."""
    with open("/proc/cpuinfo") as file:
        lines = file.read().split("\n\n", 1)[0].splitlines()
    kept = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features")
    return "\n".join(line for line in lines if line.partition(":")[0].strip() in kept)
