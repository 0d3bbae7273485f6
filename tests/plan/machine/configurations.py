"""The machines whose argument lists are golden, made of stated or of real descriptors."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from hutch.plan.machine.kernel import kernel_command_line
from hutch.plan.machine.model import (
    MICROVM,
    Console,
    Descriptor,
    Disk,
    DiskFile,
    Display,
    Firmware,
    HostDevice,
    HostForward,
    Kernel,
    Machine,
    Memory,
    Nic,
    NumaNode,
    PluggedMemory,
    Shape,
    Share,
    Tap,
    Throttle,
    Tpm,
    UserNet,
)

__all__ = ["CONFIGURATIONS", "Hardware", "RealHardware", "StatedHardware"]

MIB = 1 << 20


class Hardware(Protocol):
    """Where a configuration gets its descriptors and paths from."""

    def listening(self) -> Descriptor: ...
    def connected(self) -> Descriptor: ...
    def file(self, flags: int, size: int = 0) -> Descriptor: ...
    def tap(self) -> int: ...
    def path(self, name: str) -> str: ...


class StatedHardware:
    """Descriptors counted from 8, as the starter of a machine hands them out."""

    def __init__(self) -> None:
        self._next = 7

    def listening(self) -> Descriptor:
        self._next += 1
        return Descriptor(self._next)

    connected = listening

    def file(self, flags: int, size: int = 0) -> Descriptor:
        return self.listening()

    def tap(self) -> int:
        return self.listening().fd

    def path(self, name: str) -> str:
        return f"/run/vm/{name}"


class RealHardware:
    """Real sockets and files, closed with the stack; `fds` are what QEMU must inherit."""

    def __init__(self, directory: Path, stack: ExitStack, kernel: bytes) -> None:
        self.fds: list[int] = []
        self._sockets: list[socket.socket] = []
        self._made = 0
        self.paths: dict[int, Path] = {}
        self._directory = directory
        self._stack = stack
        (directory / "vmlinux").write_bytes(kernel)
        (directory / "initrd").write_bytes(b"")

    def leave_to_qemu(self) -> None:
        """Close the sockets here, so that with QEMU's end nobody listens any more."""
        for sock in self._sockets:
            self.fds.remove(sock.fileno())
            sock.close()
        self._sockets.clear()

    def _new(self, kind: str) -> Path:
        self._made += 1
        return self._directory / f"{kind}{self._made}"

    def _keep(self, sock: socket.socket) -> Descriptor:
        self._stack.enter_context(sock)
        self._sockets.append(sock)
        self.fds.append(sock.fileno())
        return Descriptor(sock.fileno())

    def listening(self) -> Descriptor:
        path = self._new("socket")
        sock = socket.socket(socket.AF_UNIX)
        self.paths[sock.fileno()] = path
        sock.bind(str(path))
        sock.listen(1)
        return self._keep(sock)

    def connected(self) -> Descriptor:
        ours, theirs = socket.socketpair()
        self._stack.enter_context(ours)
        return self._keep(theirs)

    def file(self, flags: int, size: int = 0) -> Descriptor:
        path = self._new("file")
        path.touch()
        os.truncate(path, size)
        fd = os.open(path, flags | os.O_CLOEXEC)
        self._stack.callback(os.close, fd)
        self.fds.append(fd)
        return Descriptor(fd)

    def tap(self) -> int:
        import fcntl
        import struct

        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        self._stack.callback(os.close, fd)
        # TUNSETIFF: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR; the kernel picks the name, and the
        # device goes with its descriptor.
        fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", b"hutchtest%d", 0x5002))
        self.fds.append(fd)
        return fd

    def path(self, name: str) -> str:
        return str(self._directory / name)


def _machine(hw: Hardware, shape: Shape, **more: object) -> Machine:
    monitor = hw.listening()
    kernel = Kernel(
        path=hw.path("vmlinux"),
        initrd=hw.path("initrd"),
        command_line=kernel_command_line(accelerator=shape.accelerator, tsc_khz=2_100_000),
    )
    pieces: dict[str, object] = {
        "name": "box",
        "shape": shape,
        "boot": kernel,
        "monitor": monitor,
        "agent": hw.connected(),
        "paused": True,
    }
    return Machine(**{**pieces, **more})  # type: ignore[arg-type]


def _erofs(hw: Hardware) -> Disk:
    return Disk(image=DiskFile(file=hw.file(os.O_RDONLY, MIB)), serial="image", read_only=True)


def _writable(hw: Hardware) -> Disk:
    return Disk(image=DiskFile(file=hw.file(os.O_RDWR, MIB)), serial="rw", cache="unsafe")


def plain(hw: Hardware) -> Machine:
    """The least: a kernel, an agent, a monitor."""
    return _machine(hw, Shape(memory=128 * MIB), rng=False, balloon=False)


def ordinary(hw: Hardware) -> Machine:
    """A container image as a machine, as `hutch run --vm` has it."""
    return _machine(
        hw,
        Shape(memory=256 * MIB),
        uuid="3c1d5b3e-0f5b-4d1c-9a80-0d3c7d4f1a11",
        console=Console(listen=hw.listening(), log=hw.file(os.O_WRONLY | os.O_APPEND)),
        disks=(_erofs(hw), _writable(hw)),
        nics=(Nic(mac="52:54:00:00:00:01", backend=Tap(fds=(hw.tap(),)), mtu=1450),),
        root_ports=4,
    )


def template(hw: Hardware) -> Machine:
    """Memory in a shared file, cards without a cable, ports for what clones plug."""
    memory = Memory(kind="file", path=hw.path("template.mem"), share=True)
    return _machine(
        hw,
        Shape(memory=256 * MIB, backend=memory),
        nics=(Nic(mac="52:54:00:00:00:01"),),
        generation="324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87",
        root_ports=2,
    )


def clone(hw: Hardware) -> Machine:
    """The same devices, memory private, waiting for the template's state."""
    memory = Memory(kind="file", path=hw.path("template.mem"), share=False)
    return _machine(
        hw,
        Shape(memory=256 * MIB, backend=memory),
        nics=(Nic(mac="52:54:00:00:00:01"),),
        generation="324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87",
        root_ports=2,
        paused=False,
        incoming=True,
    )


def micro(hw: Hardware) -> Machine:
    """The fast profile."""
    return _machine(
        hw,
        Shape(memory=256 * MIB, machine=MICROVM),
        console=Console(log=hw.file(os.O_WRONLY | os.O_APPEND)),
        disks=(_erofs(hw), _writable(hw)),
        nics=(
            Nic(
                mac="52:54:00:00:00:01",
                backend=UserNet(forwards=(HostForward(port=20801, guest_port=80),)),
            ),
        ),
    )


def rootless(hw: Hardware) -> Machine:
    """QEMU's own network, with published ports, and a socket to another."""
    forwards = (
        HostForward(address="127.0.0.1", port=20802, guest_port=80),
        HostForward(protocol="udp", port=20803, guest_port=53),
    )
    return _machine(
        hw,
        Shape(memory=128 * MIB),
        nics=(
            Nic(
                mac="52:54:00:00:00:01",
                backend=UserNet(forwards=forwards, network="10.0.7.0/24", restrict=True),
            ),
            Nic(mac="52:54:00:00:00:02", backend=hw.connected()),
        ),
    )


def large(hw: Hardware) -> Machine:
    """NUMA, hot-plug of processors and memory, threads, named model."""
    shape = Shape(
        memory=256 * MIB,
        vcpus=2,
        max_vcpus=4,
        max_memory=1024 * MIB,
        memory_slots=4,
        cpu="Haswell-v4,-hle",
        cores=2,
        numa=(
            NumaNode(memory=128 * MIB, vcpus=(0, 1)),
            NumaNode(memory=128 * MIB, vcpus=(2, 3)),
        ),
        backend=Memory(kind="memfd", preallocate=True, merge=True),
    )
    return _machine(hw, shape, nics=(Nic(mac="52:54:00:00:00:01", backend=Tap(fds=(hw.tap(),))),))


def growing(hw: Hardware) -> Machine:
    """One that goes on with processors and memory that it was given while it ran."""
    shape = Shape(
        memory=128 * MIB,
        vcpus=2,
        max_vcpus=8,
        max_memory=4096 * MIB,
        memory_slots=1,
        backend=Memory(kind="memfd"),
    )
    return _machine(
        hw,
        shape,
        root_ports=5,
        plugged=PluggedMemory(requested=512 * MIB, port="rp4"),
        incoming=True,
    )


def huge_pages(hw: Hardware) -> Machine:
    """Memory of the host's huge pages, all of them there from the start; threads of a core."""
    shape = Shape(
        memory=256 * MIB,
        vcpus=4,
        max_memory=1024 * MIB,
        memory_slots=1,
        cores=2,
        threads=2,
        backend=Memory(huge_page=2 * MIB, preallocate=True),
    )
    plugged = PluggedMemory(requested=0, port="rp4")
    return _machine(hw, shape, root_ports=5, plugged=plugged)


def locked(hw: Hardware) -> Machine:
    """Memory that is never swapped."""
    return _machine(hw, Shape(memory=64 * MIB, lock_memory=True))


def disks(hw: Hardware) -> Machine:
    """Every mode of a disk."""
    limits = Throttle(read_bytes=10 * MIB, write_bytes=5 * MIB, operations=200)
    base = DiskFile(file=hw.path("base,v1.qcow2"), format="qcow2")
    overlay = DiskFile(file=hw.path("overlay.qcow2"), format="qcow2", backing=base)
    return _machine(
        hw,
        Shape(memory=128 * MIB),
        disks=(
            _erofs(hw),
            Disk(image=overlay, serial="root", detect_zeroes=True),
            Disk(
                image=DiskFile(file=hw.file(os.O_RDWR | os.O_DIRECT, MIB)),
                serial="data",
                cache="none",
                aio="native",
                throttle=limits,
                discard=False,
                queues=2,
            ),
        ),
    )


def uefi(hw: Hardware) -> Machine:
    """A full machine: UEFI, installer, screen, TPM."""
    return _machine(
        hw,
        Shape(memory=256 * MIB),
        boot=Firmware(code="/usr/share/OVMF/OVMF_CODE_4M.fd", variables=hw.file(os.O_RDWR, 540672)),
        agent=None,
        disks=(
            Disk(image=DiskFile(file=hw.file(os.O_RDWR, MIB)), serial="root", boot_index=0),
            Disk(
                image=DiskFile(file=hw.file(os.O_RDONLY, MIB)),
                serial="cd",
                kind="cdrom",
                read_only=True,
                boot_index=1,
            ),
        ),
        display=Display(vnc=hw.path("vnc.sock")),
    )


def from_disk(hw: Hardware) -> Machine:
    """What a disk of one's own starts: BIOS, a serial port on stdio, a way to the button."""
    return _machine(
        hw,
        Shape(memory=256 * MIB),
        boot=Firmware(),
        agent=None,
        control=hw.connected(),
        console=Console(connected=hw.connected()),
        reboot=True,
        disks=(
            Disk(image=DiskFile(file=hw.file(os.O_RDWR, MIB)), serial="disk", boot_index=1),
            Disk(
                image=DiskFile(file=hw.file(os.O_RDONLY, MIB)),
                serial="seed",
                kind="cdrom",
                read_only=True,
            ),
        ),
        nics=(Nic(mac="52:54:00:00:00:01", backend=UserNet()),),
        display=Display(),
    )


def tpm(hw: Hardware) -> Machine:
    """A TPM by the path of its socket."""
    return _machine(hw, Shape(memory=128 * MIB), tpm=Tpm(socket=hw.path("swtpm.sock")))


def shared_directories(hw: Hardware) -> Machine:
    """Directories served by virtiofsd, with the memory shared that it needs."""
    return _machine(
        hw,
        Shape(memory=128 * MIB, backend=Memory(kind="memfd")),
        shares=tuple(Share(tag=f"share{n}", socket=hw.path(f"fs{n}.sock")) for n in range(5)),
    )


def volumes(hw: Hardware) -> Machine:
    """Volumes as disks, which share the first port for hot-plug."""
    return _machine(
        hw,
        Shape(memory=128 * MIB),
        root_ports=2,
        volumes=tuple(
            Disk(image=DiskFile(file=hw.file(os.O_RDWR, MIB)), serial=f"volume{n}")
            for n in range(2)
        ),
    )


def kvm(hw: Hardware) -> Machine:
    """Hardware virtualization, with several queues."""
    shape = Shape(memory=128 * MIB, vcpus=2, accelerator="kvm", cpu="host")
    return _machine(
        hw,
        shape,
        nics=(Nic(mac="52:54:00:00:00:01", backend=Tap(fds=(hw.tap(), hw.tap()))),),
        display=Display(),
    )


def devices_of_groups(hw: Hardware) -> Machine:
    """Devices of the host whose groups' nodes QEMU opens."""
    return _machine(
        hw,
        Shape(memory=128 * MIB),
        host_devices=(
            HostDevice(address="0000:01:00.0", directory="/dev/passed/0000:01:00.0"),
            HostDevice(address="0000:01:00.1"),
        ),
    )


def devices_opened(hw: Hardware) -> Machine:
    """Devices of the host that come opened."""
    return _machine(
        hw,
        Shape(memory=128 * MIB),
        host_devices=(HostDevice(address="0000:01:00.0", file=hw.connected()),),
        iommu=hw.connected(),
    )


CONFIGURATIONS: dict[str, Callable[[Hardware], Machine]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        *(plain, ordinary, template, clone, micro, rootless, large, growing, locked, disks),
        huge_pages,
        *(uefi, from_disk, tpm, shared_directories, volumes, kvm),
        *(devices_of_groups, devices_opened),
    )
}
