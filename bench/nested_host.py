"""Make of a container's view in a machine what a host has, for what `scripts/nested.py` runs."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import hutch

__all__ = ["ROOT", "add_kernel", "make_host", "row", "say", "timed"]

ROOT = Path("/var/lib/hutch")
_CGROUP = Path("/sys/fs/cgroup")


def say(text: str) -> None:
    """Print a line, at once."""
    print(text, flush=True)


def make_host(*modules: str) -> None:
    """Load drivers; have the kernel's own /dev, and a root group that may give controllers to
    its children, which wants no process in it."""
    for name in modules:
        subprocess.run(["modprobe", name], check=True)
    if not os.path.exists("/dev/pts/ptmx") or not os.path.exists("/dev/kmsg"):
        run = subprocess.run
        run(["mount", "-t", "devtmpfs", "dev", "/dev"], check=True)
        run(["mount", "-t", "devpts", "-o", "ptmxmode=0666", "devpts", "/dev/pts"], check=True)
        os.makedirs("/dev/shm", exist_ok=True)
        run(["mount", "-t", "tmpfs", "-o", "size=1G,mode=1777", "shm", "/dev/shm"], check=True)
    own = _CGROUP / "init"
    own.mkdir(exist_ok=True)
    for pid in (_CGROUP / "cgroup.procs").read_text().split():
        (own / "cgroup.procs").write_text(pid)


def add_kernel(engine: hutch.Engine) -> Path:
    """Have the machines within start with the cloud kernel; return the directory it is kept in.

    QEMU is started once: read for the first time, and by emulated processors, it outlasts what
    it is given otherwise.
    """
    subprocess.run(["qemu-system-x86_64", "-accel", "help"], stdout=subprocess.DEVNULL, check=True)
    (kernel,) = Path("/boot").glob("vmlinuz-*-cloud-amd64")
    release = kernel.name.removeprefix("vmlinuz-")
    engine.kernels.add(file=kernel, modules=f"/lib/modules/{release}")
    (made,) = (ROOT / "kernels").glob("*/vmlinux")
    return made.parent


def timed(action: Callable[[], object]) -> float:
    """Return how many seconds it takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def row(name: str, ours: list[float], bare: list[float] | None = None) -> None:
    """Print the best of several times, beside the best of bare QEMU's where there are some."""
    best = min(ours)
    beside = f"   bare QEMU {min(bare):7.2f} s   {best / min(bare):.2f} x" if bare else ""
    say(f"  {name:34} {best:7.2f} s{beside}")
