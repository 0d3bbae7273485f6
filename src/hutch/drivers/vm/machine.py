"""What a start has decided about a machine: QEMU, accelerator, kernel, shape; and its record."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from hutch.decoding import decode_json
from hutch.drivers.vm.boot import Ports
from hutch.drivers.vm.limits import memory_of, vcpus_of
from hutch.errors import NotFound, Unsupported
from hutch.plan.assets import ResolvedUser
from hutch.plan.machine.argv import machine_arguments
from hutch.plan.machine.kernel import kernel_command_line
from hutch.plan.machine.model import (
    MICROVM,
    Q35,
    Accelerator,
    Console,
    Descriptor,
    Disk,
    Kernel,
    Machine,
    Memory,
    Nic,
    Shape,
    Share,
)
from hutch.plan.machine.version import QemuVersion
from hutch.spec.model import InstanceSpec

__all__ = ["Host", "MachineRecord", "load_record", "machine_argv", "machine_type"]
__all__ += ["save_record", "shape_of", "template_key"]

RECORD = "machine.json"
_TYPES = {"": Q35, "q35": Q35, "microvm": MICROVM}
# A change of how templates are made, or of the agent's protocol, makes all of them stale.
_TEMPLATE_FORMAT = 3
_ROOT_PORTS = 4
# With "enhanced rep movsb" a guest copies and clears memory a byte at a time, which costs an
# emulated CPU eight times the steps of doing it by words.
_EMULATED_CPU = "max,-erms"


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """The host's side, as found: QEMU, and the accelerator with the reason for it."""

    qemu: str
    version: QemuVersion
    accelerator: Accelerator
    reason: str
    tsc_khz: int = 0


class MachineRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What later calls need to know of a machine that was started; in its directory.

    `template` is the name of what it went on from, "" for a boot of its own; `console_start`
    where this start's part of the console's log begins.
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
    console_start: int = 0


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
    return Shape(
        memory=memory_of(spec),
        vcpus=vcpus_of(spec),
        machine=machine_type(spec),
        accelerator=host.accelerator,
        cpu=model,
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
    incoming: bool = False,
) -> tuple[str, ...]:
    """Return QEMU's argument list; `kernel` are the paths of vmlinux and initramfs in QEMU."""
    line = ""
    if not incoming:
        line = kernel_command_line(accelerator=host.accelerator, tsc_khz=host.tsc_khz)
    machine = Machine(
        name=name,
        shape=msgspec.structs.replace(shape, backend=memory),
        boot=Kernel(path=kernel[0], initrd=kernel[1], command_line=line),
        monitor=Descriptor(ports.qmp),
        agent=Descriptor(ports.agent),
        console=Console(listen=Descriptor(ports.console), log=Descriptor(ports.console_log)),
        disks=tuple(disks),
        nics=tuple(nics),
        shares=tuple(shares),
        root_ports=0 if shape.machine == MICROVM else _ROOT_PORTS,
        incoming=incoming,
    )
    return machine_arguments(machine, version=host.version, qemu=host.qemu)


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
