"""Bare QEMU as the peer of `hutch run --vm`: the same kernel, initramfs and tuning, nothing else.

`python -m bench.vm_bare --kernel VMLINUX --initrd INITRAMFS` measures alone; `bench.run`
puts the two functions beside hutch. The guest's agent answers a greeting on its port: from
exec to the first byte of that answer is what is measured, in a cold boot and in a clone of
a template whose memory is a file mapped privately.
"""

from __future__ import annotations

import argparse
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from bench.measure import measure, render
from hutch.host.qemu import load_qemu, load_tsc_khz
from hutch.plan.machine.kernel import kernel_command_line
from hutch.qmp import Monitor, machine, migration

__all__ = ["Guest", "Template", "clone_once", "cold_boot", "greetings", "guest", "template"]

MIB = 1 << 20
BOOT_S = 120.0
_NONCE = 0x6875746368
# A HELLO of the agent channel: channel, type, flag, zero, length; nonce and version.
_HELLO = struct.pack("<IBBHIQI", 0, 1, 0, 0, 12, _NONCE, 1)


class Guest(msgspec.Struct, frozen=True, kw_only=True):
    """What is booted: `vmlinux` (ELF) and an initramfs whose agent answers a HELLO."""

    kernel: Path
    initrd: Path
    qemu: str = "qemu-system-x86_64"
    machine: str = "pc-q35-7.2"
    memory_mib: int = 256
    tsc_khz: int = 0
    accelerator: Literal["tcg", "kvm"] = "tcg"


def guest(kernel: Path, initrd: Path, memory_mib: int = 256) -> Guest:
    """Return a guest for this host's QEMU and processor."""
    return Guest(
        kernel=kernel,
        initrd=initrd,
        qemu=load_qemu(None).path,
        memory_mib=memory_mib,
        tsc_khz=load_tsc_khz(None),
    )


def _argv(guest: Guest, agent_fd: int, monitor_fd: int, memory: str) -> list[str]:
    micro = guest.machine == "microvm"
    transport = "device" if micro else "pci"
    board = guest.machine + (",acpi=on,rtc=on" if micro else ",smm=off,vmport=off,sata=off")
    line = kernel_command_line(accelerator=guest.accelerator, tsc_khz=guest.tsc_khz)
    kvm = guest.accelerator == "kvm"
    processors = ("kvm", "-cpu", "host") if kvm else ("tcg,thread=single", "-cpu", "max")
    return [
        *(guest.qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", f"{board},memory-backend=ram", "-accel", *processors),
        *("-m", f"{guest.memory_mib}M", "-object", memory),
        *("-kernel", str(guest.kernel), "-initrd", str(guest.initrd), "-append", line),
        *("-chardev", f"socket,id=monitor,fd={monitor_fd}", "-mon", "chardev=monitor,mode=control"),
        *("-chardev", f"socket,id=agent,fd={agent_fd}"),
        *("-device", f"virtio-serial-{transport},id=ports"),
        *("-device", "virtserialport,bus=ports.0,chardev=agent,name=org.hutch.agent"),
        *("-chardev", "null,id=console", "-serial", "chardev:console"),
    ]


class _Running(msgspec.Struct, frozen=True, kw_only=True):
    """A QEMU that was just started, with our ends of its agent port and its monitor."""

    agent: socket.socket
    monitor: socket.socket
    began: float


@contextmanager
def _started(guest: Guest, memory: str, *more: str) -> Iterator[_Running]:
    """Run QEMU for the length of the block; it is killed by its process id at the end."""
    with ExitStack() as stack:
        agent, agent_end = map(stack.enter_context, socket.socketpair())
        monitor, monitor_end = map(stack.enter_context, socket.socketpair())
        argv = _argv(guest, agent_end.fileno(), monitor_end.fileno(), memory)
        began = time.perf_counter()
        process = subprocess.Popen(
            [*argv, *more],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            pass_fds=(agent_end.fileno(), monitor_end.fileno()),
        )
        try:
            agent_end.close()
            monitor_end.close()
            agent.settimeout(BOOT_S)
            yield _Running(agent=agent, monitor=monitor, began=began)
        finally:
            process.kill()
            process.wait()


def _wait_answer(agent: socket.socket) -> None:
    """Greet the agent and wait for the first byte of its answer."""
    agent.sendall(_HELLO)
    if not agent.recv(4096):
        raise RuntimeError("QEMU ended before its agent answered")


def _memory(guest: Guest, file: Path | None = None, *, share: bool = False) -> str:
    size = f"id=ram,size={guest.memory_mib * MIB}"
    if file is None:
        return f"memory-backend-ram,{size}"
    return f"memory-backend-file,{size},mem-path={file},share={'on' if share else 'off'}"


def greetings(guest: Guest, count: int = 5) -> list[float]:
    """Return the seconds of so many round trips to the agent of a guest that runs: what any
    exec costs at least."""
    took = []
    with _started(guest, _memory(guest)) as running:
        _wait_answer(running.agent)
        for _ in range(count):
            began = time.perf_counter()
            _wait_answer(running.agent)
            took.append(time.perf_counter() - began)
    return took


def cold_boot(guest: Guest) -> float:
    """Return the seconds from exec to the agent's first byte."""
    with _started(guest, _memory(guest)) as running:
        _wait_answer(running.agent)
        return time.perf_counter() - running.began


class Template(msgspec.Struct, frozen=True, kw_only=True):
    """A booted guest as files: its memory, and the rest of its state (a descriptor)."""

    guest: Guest
    memory: Path
    state_fd: int


@contextmanager
def template(guest: Guest, directory: Path) -> Iterator[Template]:
    """Boot a guest, save it under `directory` (best a tmpfs), and have it for the block."""
    memory = directory / "template.mem"
    state = os.open(directory / "template.state", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with _started(guest, _memory(guest, memory, share=True)) as running:
            _wait_answer(running.agent)
            # The monitor's socket is ours and the monitor closes it, so it gets a copy.
            with Monitor(running.monitor.dup()) as monitor:
                machine.stop(monitor)
                migration.save_state(monitor, state, ignore_shared=True)
        yield Template(guest=guest, memory=memory, state_fd=state)
    finally:
        os.close(state)
        memory.unlink(missing_ok=True)
        (directory / "template.state").unlink(missing_ok=True)


def clone_once(made: Template) -> float:
    """Return the seconds from exec to the answer of an agent that was resumed."""
    memory = _memory(made.guest, made.memory)
    with _started(made.guest, memory, "-incoming", "defer") as running:
        with Monitor(running.monitor.dup()) as monitor:
            migration.load_state(monitor, made.state_fd, ignore_shared=True)
            machine.cont(monitor)
        _wait_answer(running.agent)
        return time.perf_counter() - running.began


def main(arguments: list[str] | None = None) -> None:
    """Measure both and print minimum and median."""
    parser = argparse.ArgumentParser(prog="bench.vm_bare", description=__doc__)
    parser.add_argument("--kernel", type=Path, required=True, help="ELF vmlinux")
    parser.add_argument("--initrd", type=Path, required=True, help="initramfs with the agent")
    parser.add_argument("--machine", default="pc-q35-7.2", help="or microvm")
    parser.add_argument("--memory", type=int, default=256, metavar="MIB")
    parser.add_argument("--qemu", help="another QEMU than the host's")
    parser.add_argument("--boots", type=int, default=3)
    parser.add_argument("--clones", type=int, default=20)
    options = parser.parse_args(arguments)
    guest = Guest(
        kernel=options.kernel,
        initrd=options.initrd,
        qemu=load_qemu(None, program=options.qemu).path,
        machine=options.machine,
        memory_mib=options.memory,
        tsc_khz=load_tsc_khz(None),
    )
    rows = [measure("bare cold boot", {"qemu": lambda: cold_boot(guest)}, rounds=options.boots)]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shm, template(guest, Path(shm)) as made:
        rows.append(
            measure("bare clone", {"qemu": lambda: clone_once(made)}, rounds=options.clones)
        )
    print(render(rows), end="")


if __name__ == "__main__":
    main()
