"""What machines run with on this host: QEMU, its version, and the accelerator with the reason."""

from __future__ import annotations

import os
from pathlib import Path

from hutch.drivers.vm.machine import Host
from hutch.host.qemu import AcceleratorWish, choose_accelerator, load_qemu, load_tsc_khz

__all__ = ["find_host", "require_qemu"]


def require_qemu(root: Path, machine: str = "") -> None:
    """Raise `Unsupported` with the cure where QEMU is missing or lacks a machine type."""
    qemu = load_qemu(root / "cache")
    if machine:
        qemu.require_machine(machine)


def find_host(root: Path, accel: AcceleratorWish, kernel: Path | None) -> Host:
    """Return what machines run with here. `kernel` is the guests' own, by which KVM is
    proven the first time after a start of the host (None: by one of the host's)."""
    cache = root / "cache"
    qemu = load_qemu(cache)
    chosen = choose_accelerator(cache, qemu, accel, kernel=kernel)
    return Host(
        qemu=qemu.path,
        version=qemu.version,
        accelerator=chosen.accelerator,
        reason=chosen.reason,
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        processors=os.cpu_count() or 1,
        tsc_khz=load_tsc_khz(cache) if chosen.accelerator == "tcg" else 0,
    )
