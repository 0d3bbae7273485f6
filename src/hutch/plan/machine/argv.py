"""Make QEMU's argument list of a machine's pieces. Pure: the same pieces, the same list."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from hutch.errors import InvalidArgument, Unsupported
from hutch.plan.machine import slots
from hutch.plan.machine.disks import disk_arguments, secret_option, volume_arguments
from hutch.plan.machine.memory import memory_arguments, plugged_memory
from hutch.plan.machine.model import (
    Console,
    Descriptor,
    DiskFile,
    Firmware,
    Kernel,
    Machine,
    Shape,
)
from hutch.plan.machine.network import nic_arguments
from hutch.plan.machine.quoting import endpoint, options, path_of, plain
from hutch.plan.machine.slots import Places
from hutch.plan.machine.version import QemuVersion

__all__ = ["AGENT_PORT", "SANDBOX", "machine_arguments", "translated_code"]

# What a guest of Debian translates from its start to a prompt, with room.
_TRANSLATED_MIN = 64 << 20
AGENT_PORT = "org.hutch.agent"
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
"""With `spawn=deny` QEMU starts nothing: taps and sockets come as descriptors. `-runas` and
`-run-with user=` die by SIGSYS under it, so the privileges are dropped before exec."""


def machine_arguments(machine: Machine, *, version: QemuVersion, qemu: str) -> tuple[str, ...]:
    """Return the whole argument list, `qemu` (the program's path) first.

    Raise `InvalidArgument` naming the piece that does not fit the others, `Unsupported`
    where the machine type or the version lacks it.
    """
    places = Places(machine.shape.machine)
    _check(machine)
    return (
        qemu,
        *_identity(machine),
        *_descriptor_sets(machine),
        *_board(machine, places),
        *memory_arguments(machine.shape, version),
        *_boot(machine.boot),
        *_channels(machine, places),
        *_helpers(machine, places),
        *_secrets(machine),
        *disk_arguments(machine.disks, places),
        *nic_arguments(machine.nics, places),
        *_shares(machine, places, at_ports=False),
        *_passed_through(machine, places),
        *_display(machine, places),
        *_root_ports(machine, places),
        *_shares(machine, places, at_ports=True),
        *volume_arguments(machine.volumes, places),
        *_plugged(machine),
        *_start(machine),
    )


def _check(machine: Machine) -> None:
    shape = machine.shape
    shared = shape.backend.kind == "memfd" or (shape.backend.kind == "file" and shape.backend.share)
    if machine.shares and not shared:
        raise InvalidArgument(
            "memory shared with its server is needed (memfd, or a file with share)",
            field="machine.shares",
        )
    if machine.host_devices and machine.incoming:
        raise Unsupported("machine.host_devices: a device of the host does not migrate")
    if machine.iommu is None and any(device.file for device in machine.host_devices):
        raise InvalidArgument("an opened device needs /dev/iommu", field="machine.iommu")
    if machine.plugged is not None and shape.max_memory <= shape.memory:
        raise InvalidArgument("there is no room for more memory", field="machine.plugged")
    if "," in shape.machine or "," in machine.name:
        raise InvalidArgument("a comma is not allowed", field="machine.name")
    serials = [disk.serial for disk in (*machine.disks, *machine.volumes)]
    if len(set(serials)) < len(serials):
        raise InvalidArgument("two disks have one serial", field="machine.disks")


def _identity(machine: Machine) -> Iterator[str]:
    yield from ("-name", options(f"guest={machine.name}", debug_threads=True))
    if machine.uuid:
        yield from ("-uuid", plain(machine.uuid, field="machine.uuid"))
    yield from ("-nodefaults", "-no-user-config", "-display", "none")
    if not machine.reboot:
        yield "-no-reboot"
    yield from ("-msg", "timestamp=on")
    if machine.sandbox:
        yield from ("-sandbox", SANDBOX)


# ---- descriptors ----------------------------------------------------------------------


def _descriptor_sets(machine: Machine) -> Iterator[str]:
    """Yield a set for every file that comes as a descriptor, numbered as the descriptor."""
    seen: set[int] = set()
    for fd in _file_descriptors(machine):
        if fd not in seen:
            seen.add(fd)
            yield from ("-add-fd", f"fd={fd},set={fd}")


def _file_descriptors(machine: Machine) -> Iterator[int]:
    if machine.console is not None and machine.console.log is not None:
        yield machine.console.log.fd
    if isinstance(machine.boot, Firmware) and isinstance(machine.boot.variables, Descriptor):
        yield machine.boot.variables.fd
    for disk in (*machine.disks, *machine.volumes):
        image: DiskFile | None = disk.image
        while image is not None:
            if isinstance(image.file, Descriptor):
                yield image.file.fd
            image = image.backing


# ---- board ----------------------------------------------------------------------------


def _board(machine: Machine, places: Places) -> Iterator[str]:
    shape = machine.shape
    memory = None if shape.numa else "ram"
    common = {"memory_backend": memory, "dump_guest_core": False, "mem_merge": shape.backend.merge}
    firmware = machine.boot if isinstance(machine.boot, Firmware) else None
    if places.micro:
        if firmware is not None:
            raise Unsupported("boot: a machine of type microvm starts a kernel, no firmware")
        board = options(shape.machine, **common, acpi=True, rtc=True, isa_serial=True)
    else:
        uefi = firmware is not None and bool(firmware.code)
        board = options(
            shape.machine,
            **common,
            smm=False,
            vmport=False,
            # The guest would look for a keyboard that nobody types on.
            i8042=machine.display is not None or firmware is not None,
            sata=any(disk.kind == "cdrom" for disk in machine.disks),
            # Without a screen SeaBIOS talks on the serial port: what it cannot start is told.
            graphics=False if firmware and not uefi and machine.display is None else None,
            pflash0="uefi-code" if uefi else None,
            pflash1="uefi-variables" if uefi else None,
        )
    yield from ("-machine", board)
    if places.micro:
        # virtiofsd's device speaks the protocol since 1.0 only.
        yield from ("-global", "virtio-mmio.force-legacy=false")
    yield from ("-accel", _accelerator(shape))
    yield from ("-cpu", plain(shape.cpu, field="machine.shape.cpu"))
    yield from ("-smp", _processors(shape))


def translated_code(memory: int) -> int:
    """Return how many bytes of translated code an emulated machine of that memory may keep."""
    return max(memory // 4 >> 20 << 20, _TRANSLATED_MIN)


def _accelerator(shape: Shape) -> str:
    if shape.accelerator == "kvm":
        return "kvm"
    several = max(shape.vcpus, shape.max_vcpus) > 1
    threads = shape.tcg_threads
    if threads == "auto":
        threads = "multi" if several else "single"
    # QEMU's own limit is a gigabyte, which would be the control group's to bear.
    return f"tcg,thread={threads},tb-size={translated_code(shape.memory) >> 20}"


def _processors(shape: Shape) -> str:
    most = max(shape.vcpus, shape.max_vcpus)
    if shape.vcpus < 1:
        raise InvalidArgument(f"at least 1, got {shape.vcpus}", field="machine.shape.vcpus")
    # One socket each where nothing is said, which can be plugged one by one.
    cores = shape.cores or 1
    per_socket = cores * shape.threads
    if most % per_socket:
        raise InvalidArgument(
            f"{most} processors do not fill sockets of {cores} × {shape.threads}",
            field="machine.shape.cores",
        )
    sockets = most // per_socket
    return (
        f"cpus={shape.vcpus},maxcpus={most},sockets={sockets},cores={cores},threads={shape.threads}"
    )


def _boot(boot: Kernel | Firmware) -> Iterator[str]:
    if isinstance(boot, Kernel):
        yield from ("-kernel", plain(boot.path, field="machine.boot.path"))
        if boot.initrd:
            yield from ("-initrd", plain(boot.initrd, field="machine.boot.initrd"))
        if boot.command_line:
            yield from ("-append", plain(boot.command_line, field="machine.boot.command_line"))
        return
    if boot.code:
        if not boot.variables:
            raise InvalidArgument("UEFI needs a store of its own", field="machine.boot.variables")
        code = {"node-name": "uefi-code", "read-only": True, **_raw(boot.code)}
        variables = {"node-name": "uefi-variables", "read-only": False, **_raw(boot.variables)}
        yield from ("-blockdev", msgspec.json.encode(code).decode())
        yield from ("-blockdev", msgspec.json.encode(variables).decode())
    yield from ("-boot", options(menu=boot.menu, strict=True))


def _raw(file: str | Descriptor) -> dict[str, object]:
    return {"driver": "raw", "file": {"driver": "file", "filename": path_of(file)}}


# ---- devices --------------------------------------------------------------------------


def _channels(machine: Machine, places: Places) -> Iterator[str]:
    """Yield monitor, serial port and agent port."""
    if machine.monitor is not None:
        yield from (
            "-chardev",
            options("socket", id="monitor", fd=machine.monitor.fd, server=True, wait=False),
        )
        yield from ("-mon", "chardev=monitor,mode=control")
    if machine.control is not None:
        yield from ("-chardev", options("socket", id="control", fd=machine.control.fd))
        yield from ("-mon", "chardev=control,mode=control")
    if machine.console is not None:
        yield from ("-chardev", _console(machine.console), "-serial", "chardev:console")
    if machine.agent is not None:
        yield from ("-chardev", options("socket", id="agent", fd=machine.agent.fd))
        where = places.single(slots.AGENT)
        serial = options(places.virtio("virtio-serial"), "max_ports=4", id="ports", **where)
        port = options(
            "virtserialport", id="agent-dev", bus="ports.0", nr=1, chardev="agent", name=AGENT_PORT
        )
        yield from ("-device", serial, "-device", port)


def _console(console: Console) -> str:
    log = path_of(console.log) if console.log is not None else None
    if console.connected is not None:
        return options("socket", id="console", fd=console.connected.fd)
    if console.listen is None:
        if log is None:
            return options("null", id="console")
        return options("file", id="console", path=log, append=True)
    return options(
        "socket",
        id="console",
        fd=console.listen.fd,
        server=True,
        wait=False,
        logfile=log,
        logappend=None if log is None else True,
    )


def _helpers(machine: Machine, places: Places) -> Iterator[str]:
    """Yield entropy, balloon, generation ID and TPM."""
    if machine.rng:
        yield from ("-object", "rng-builtin,id=entropy")
        where = places.single(slots.RNG)
        yield from (
            "-device",
            options(places.virtio("virtio-rng"), id="rng", **where, rng="entropy"),
        )
    if machine.balloon:
        where = places.single(slots.BALLOON)
        balloon = options(
            places.virtio("virtio-balloon"),
            id="balloon",
            **where,
            # What was made ahead is kept: given back, it would have to be had again.
            free_page_reporting=not machine.shape.backend.preallocate,
            deflate_on_oom=True,
        )
        yield from ("-device", balloon)
    if machine.generation:
        if places.micro:
            raise Unsupported("machine.generation: a machine of type microvm has no vmgenid")
        yield from ("-device", options("vmgenid", id="generation", guid=machine.generation))
    if machine.tpm is not None:
        if places.micro:
            raise Unsupported("machine.tpm: a machine of type microvm has no TPM")
        yield from ("-chardev", options("socket", id="tpm", **endpoint(machine.tpm.socket)))
        yield from ("-tpmdev", "emulator,id=tpm0,chardev=tpm")
        yield from ("-device", "tpm-crb,id=tpm-dev,tpmdev=tpm0")


def _secrets(machine: Machine) -> Iterator[str]:
    for secret in machine.secrets:
        yield from ("-object", secret_option(secret.name, secret.file.fd))


def _shares(machine: Machine, places: Places, *, at_ports: bool) -> Iterator[str]:
    for index, share in enumerate(machine.shares):
        if bool(share.port) != at_ports:
            continue
        where = places.many("shares", index, len(machine.shares))
        if at_ports:
            where = {"bus": share.port}
        yield from ("-chardev", options("socket", id=f"share{index}", **endpoint(share.socket)))
        device = options(
            places.virtio("vhost-user-fs"),
            id=f"share{index}-dev",
            **where,
            chardev=f"share{index}",
            tag=share.tag,
            queue_size=share.queue_size,
        )
        yield from ("-device", device)


def _passed_through(machine: Machine, places: Places) -> Iterator[str]:
    if machine.iommu is not None and machine.host_devices:
        yield from ("-object", f"iommufd,id=iommu,fd={machine.iommu.fd}")
    for index, device in enumerate(machine.host_devices):
        where = places.many("host_devices", index, len(machine.host_devices))
        opened = device.file is not None
        yield from (
            "-device",
            options(
                "vfio-pci",
                id=f"host{index}",
                **where,
                host=None if opened or device.directory else device.address,
                sysfsdev=None if opened else device.directory or None,
                fd=device.file.fd if device.file is not None else None,
                iommufd="iommu" if opened else None,
            ),
        )


def _display(machine: Machine, places: Places) -> Iterator[str]:
    if machine.display is None:
        return
    if places.micro:
        raise Unsupported("machine.display: a machine of type microvm has no screen")
    yield from ("-device", options("VGA", id="video", **places.single(slots.VIDEO)))
    yield from ("-device", options("qemu-xhci", id="usb", **places.single(slots.USB)))
    yield from ("-device", "usb-tablet,id=tablet,bus=usb.0")
    vnc = machine.display.vnc
    yield from ("-vnc", options(f"unix:{vnc}") if vnc else "none")


def _root_ports(machine: Machine, places: Places) -> Iterator[str]:
    for index in range(machine.root_ports):
        where = places.root_port(index, machine.root_ports)
        port = options(
            "pcie-root-port", id=f"rp{index}", **where, chassis=index + 1, slot=index + 1
        )
        yield from ("-device", port)


def _plugged(machine: Machine) -> Iterator[str]:
    if machine.plugged is None:
        return
    shared = machine.shape.backend.kind == "memfd"
    backend, device = plugged_memory(machine.shape, machine.plugged, shared=shared)
    yield from ("-object", options(backend[0], **backend[1]))
    yield from ("-device", options(device[0], **device[1]))


def _start(machine: Machine) -> Iterator[str]:
    if machine.paused:
        yield "-S"
    if machine.incoming:
        yield from ("-incoming", "defer")
