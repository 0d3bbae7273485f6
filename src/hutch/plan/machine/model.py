"""The pieces of a virtual machine, as data. `hutch.plan.machine.argv` makes QEMU's line of them.

A descriptor is its number in QEMU. Sockets to be listened on are bound and listening
already. A regular file's access mode must be what it is opened for: both ways for a
writable disk, reading only for a read-only one, writing only for a log.
"""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = [
    "MICROVM",
    "Q35",
    "Accelerator",
    "CacheMode",
    "Console",
    "Descriptor",
    "Disk",
    "DiskAio",
    "DiskFile",
    "Display",
    "Firmware",
    "HostDevice",
    "HostForward",
    "Kernel",
    "Machine",
    "Memory",
    "Nic",
    "NumaNode",
    "PluggedMemory",
    "Secret",
    "Shape",
    "Share",
    "Tap",
    "Throttle",
    "Tpm",
    "UserNet",
]

Q35 = "pc-q35-7.2"
"""Pinned, so that a machine migrates both ways between QEMU 7.2 and later ones."""
MICROVM = "microvm"

Accelerator = Literal["tcg", "kvm"]
CacheMode = Literal["writeback", "none", "unsafe"]
DiskAio = Literal["threads", "native", "io_uring"]


class Descriptor(msgspec.Struct, frozen=True):
    """An open file or socket, by its number in QEMU."""

    fd: int


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Where the guest's memory is.

    `plain` is QEMU's own. `file` is `path` (a template with `share`; a clone of one
    without), which QEMU opens itself; `sealed` says that nobody can write to it, so that QEMU
    may open it as if it could, and discard what a clone has of its own
    (native/preload/discard.c). `memfd` is shared with a device process such as virtiofsd.
    `huge_page` is a size in bytes, 0 for ordinary pages; with `file` the path
    must be on a hugetlbfs. `host_nodes` binds it to NUMA nodes of the host.
    """

    kind: Literal["plain", "file", "memfd"] = "plain"
    path: str = ""
    share: bool = False
    sealed: bool = False
    huge_page: int = 0
    preallocate: bool = False
    merge: bool = False
    host_nodes: tuple[int, ...] = ()


class NumaNode(msgspec.Struct, frozen=True, kw_only=True):
    """A NUMA node that the guest sees; the nodes' memory adds up to the machine's."""

    memory: int
    vcpus: tuple[int, ...]
    host_nodes: tuple[int, ...] = ()


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """Processors and memory. What differs here cannot be cloned from one template.

    `max_vcpus` and `max_memory` (bytes, with `memory_slots`) leave room for hot-plug; 0 is
    what is there from the start. `cpu` is QEMU's name of a model (`max`, `host`, `EPYC-v4`)
    with its flags. `tcg_threads` matters for TCG only: `auto` is one thread for one vcpu.
    """

    memory: int
    vcpus: int = 1
    max_vcpus: int = 0
    max_memory: int = 0
    memory_slots: int = 0
    machine: str = Q35
    accelerator: Accelerator = "tcg"
    tcg_threads: Literal["auto", "single", "multi"] = "auto"
    cpu: str = "max"
    cores: int = 0
    threads: int = 1
    numa: tuple[NumaNode, ...] = ()
    backend: Memory = Memory()
    lock_memory: bool = False


class PluggedMemory(msgspec.Struct, frozen=True, kw_only=True):
    """The device that gives memory beyond the machine's own (virtio-mem), at a port for hot-plug.

    It has room up to the shape's `max_memory`; the guest is asked to take `requested` bytes.
    """

    requested: int
    port: str


class Kernel(msgspec.Struct, frozen=True, kw_only=True):
    """Start this kernel (an ELF vmlinux with a PVH entry starts fastest), without firmware.

    Paths are QEMU's, in its root. See `hutch.plan.machine.kernel` for the command line.
    """

    path: str
    initrd: str = ""
    command_line: str = ""


class Firmware(msgspec.Struct, frozen=True, kw_only=True):
    """Start from disks: by UEFI with `code` and `variables` (a copy of one's own), else BIOS."""

    code: str = ""
    variables: str | Descriptor = ""
    menu: bool = False


class Secret(msgspec.Struct, frozen=True, kw_only=True):
    """A key by its name, in a file that QEMU reads at its start."""

    name: str
    file: Descriptor


class Throttle(msgspec.Struct, frozen=True, kw_only=True):
    """Limits per second; 0 is none. A total excludes its read and write parts."""

    bytes: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    operations: int = 0
    reads: int = 0
    writes: int = 0


class DiskFile(msgspec.Struct, frozen=True, kw_only=True):
    """An image file, or a block device of the host, with what it is based on. `key` is the
    name of the secret that opens an encrypted one."""

    file: str | Descriptor
    format: Literal["raw", "qcow2", "luks"] = "raw"
    key: str = ""
    block_device: bool = False
    backing: DiskFile | None = None


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """A disk. The guest finds it by `serial` (at most 20 characters).

    `unsafe` caching ignores flushes: for what need not outlive a crash of the host. With
    `none` a descriptor must have been opened with O_DIRECT (QEMU since 9.1 insists).
    `aio` is how QEMU has files read and written; `native` needs a cache of `none`.
    `queues` 0 is one, so that a template fits whatever host it is resumed on.
    """

    image: DiskFile
    serial: str
    read_only: bool = False
    cache: CacheMode = "writeback"
    aio: DiskAio = "threads"
    discard: bool = True
    detect_zeroes: bool = False
    throttle: Throttle | None = None
    kind: Literal["virtio", "cdrom"] = "virtio"
    queues: int = 0
    boot_index: int = -1


class Tap(msgspec.Struct, frozen=True, kw_only=True):
    """Tap descriptors, one per queue, with as many of vhost-net or none."""

    fds: tuple[int, ...]
    vhost_fds: tuple[int, ...] = ()


class HostForward(msgspec.Struct, frozen=True, kw_only=True):
    """A port of the host that leads into the guest, in a user network."""

    protocol: Literal["tcp", "udp"] = "tcp"
    address: str = ""
    port: int
    guest_port: int


class UserNet(msgspec.Struct, frozen=True, kw_only=True):
    """QEMU's own network, which needs no privilege; `restrict` lets nothing out."""

    forwards: tuple[HostForward, ...] = ()
    network: str = ""
    restrict: bool = False
    ipv6: bool = True


class Nic(msgspec.Struct, frozen=True, kw_only=True):
    """A network card. Without a back end its cable is unplugged, as in a template.

    `stream` back ends are a connected socket to passt or another QEMU.
    """

    mac: str
    backend: Tap | UserNet | Descriptor | None = None
    mtu: int = 0
    boot_index: int = -1


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """A directory of the host, served by a virtiofsd at the other end of `socket`. `port` is the
    root port that it is at, "" for a place of its own."""

    tag: str
    socket: str | Descriptor
    queue_size: int = 1024
    port: str = ""


class Console(msgspec.Struct, frozen=True, kw_only=True):
    """The first serial port: a listening socket, a log opened for writing only, or both; or
    a connected socket."""

    listen: Descriptor | None = None
    connected: Descriptor | None = None
    log: Descriptor | None = None


class Display(msgspec.Struct, frozen=True, kw_only=True):
    """A screen with keyboard and tablet. `vnc` is the path of a socket; empty for clients
    that come through the monitor (`hutch.qmp.machine.add_vnc_client`)."""

    vnc: str = ""


class Tpm(msgspec.Struct, frozen=True, kw_only=True):
    """A TPM 2.0, played by a swtpm at the other end of its control socket."""

    socket: str | Descriptor


class HostDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A PCI device of the host, bound to vfio-pci, by its address (`0000:01:00.0`).

    `file` is the device's own node, opened, for which the machine needs `iommu`. Without it
    QEMU opens the node of the device's group, whose number it reads from the link
    `iommu_group` in `directory`, by default that of sysfs; its last part is the address.
    """

    address: str
    file: Descriptor | None = None
    directory: str = ""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """A whole machine.

    `agent` is a connected socket, `monitor` a listening one, `control` a second monitor's
    connected one. With `reboot` a reset of the guest is one, else an end. `root_ports` are
    for hot-plug, named `rp0`, `rp1`, …; `volumes` are disks at the first of them. With
    `incoming` it waits to be told where its state comes from; with `paused` its processors
    wait for `cont`. `generation` is a VM generation ID, `iommu` is /dev/iommu, opened, for
    devices of the host that come opened.
    """

    name: str
    shape: Shape
    boot: Kernel | Firmware
    uuid: str = ""
    monitor: Descriptor | None = None
    control: Descriptor | None = None
    agent: Descriptor | None = None
    console: Console | None = None
    secrets: tuple[Secret, ...] = ()
    disks: tuple[Disk, ...] = ()
    nics: tuple[Nic, ...] = ()
    shares: tuple[Share, ...] = ()
    volumes: tuple[Disk, ...] = ()
    host_devices: tuple[HostDevice, ...] = ()
    iommu: Descriptor | None = None
    display: Display | None = None
    tpm: Tpm | None = None
    rng: bool = True
    balloon: bool = True
    generation: str = ""
    root_ports: int = 0
    plugged: PluggedMemory | None = None
    paused: bool = False
    reboot: bool = False
    incoming: bool = False
    sandbox: bool = True
