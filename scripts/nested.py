"""A machine of our own that stands for a host with hardware this one lacks: KVM, an IOMMU.

It is hutch's, under emulation, on an emulated EPYC with AMD's extensions, and has an emulated
IOMMU by Intel with two devices to spare behind it; its image is Debian with QEMU and two
kernels: the full one, which has the drivers and which it boots, and the cloud flavour for the
machines within. Image and kernel are kept in build/nested. Needs root and the host's package
mirror.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import time
from importlib import import_module
from pathlib import Path

from hutch.host.qemu import load_qemu
from scripts.debian import ROOT as CHECKOUT

__all__ = ["run_inside"]

ROOT = CHECKOUT / "build" / "nested"
HUTCH = Path(sys.executable).parent / "hutch"
IMAGE = "nested:2"
KERNEL = "linux-image-amd64"
PACKAGES = (
    "python3", "qemu-system-x86", "erofs-utils", "e2fsprogs", "busybox-static", "kmod",
    "libseccomp2", KERNEL, "linux-image-cloud-amd64",
)  # fmt: skip
LIBRARIES = ("msgspec", "isal", "zstandard", "urllib3")
# What hutch's machines do not have. Devices behind the IOMMU must ask it (iommu_platform).
HARDWARE = (
    "-device intel-iommu,intremap=on "
    "-netdev user,id=spare,restrict=on "
    "-device virtio-net-pci,netdev=spare,mac=52:54:00:5a:5a:5a,bus=pcie.0,addr=0x5,"
    "iommu_platform=on,disable-legacy=on,romfile= "
    "-device virtio-rng-pci,bus=pcie.0,addr=0x7,iommu_platform=on,disable-legacy=on"
)
WRAPPER = """#!/bin/sh
# QEMU with more hardware, for the machine itself and not for questions to QEMU.
case " $* " in
*name=org.hutch.agent*) exec {qemu} {hardware} "$@" ;;
*) exec {qemu} "$@" ;;
esac
"""


def hutch(*arguments: str, input: bytes | None = None, check: bool = True) -> str:
    """Run the command line; its errors are ours."""
    done = subprocess.run([str(HUTCH), *arguments], input=input, stdout=subprocess.PIPE)
    if check and done.returncode:
        raise SystemExit(f"nested: hutch {arguments[0]} ended with {done.returncode}")
    return done.stdout.decode()


def say(text: str) -> None:
    """Print a line, at once."""
    print(text, flush=True)


def prepare() -> str:
    """Return the release of the full kernel, with the image made where it is not there."""
    if IMAGE not in hutch("images", "--format", "{{.Repository}}:{{.Tag}}").split():
        say("making the outer image (one to four minutes)")
        wanted = ",".join(PACKAGES)
        hutch("image", "bootstrap", "-q", "debian:bookworm", "-t", IMAGE, "-p", wanted)
    kernels = hutch("vm", "kernel", "ls", "--format", "{{.Release}}").split()
    return kernels[0] if kernels else hutch("vm", "kernel", "add", "-q", KERNEL).strip()


def with_hardware() -> Path:
    """Return a program that is QEMU with that hardware."""
    directory = ROOT / "hardware" / "bin"
    directory.mkdir(parents=True, exist_ok=True)
    wrapper = directory / "qemu-system-x86_64"
    wrapper.write_text(WRAPPER.format(qemu=load_qemu(None).path, hardware=HARDWARE))
    wrapper.chmod(0o755)
    return wrapper


def checkout() -> bytes:
    """Return an archive of what runs inside: the library with what it imports, the bench."""
    buffer = io.BytesIO()

    def keep(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if "__pycache__" in entry.name else entry

    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(CHECKOUT / "src" / "hutch", "hutch", filter=keep)
        archive.add(CHECKOUT / "bench", "bench", filter=keep)
        for name in LIBRARIES:
            package = import_module(name).__file__
            if package is not None:
                archive.add(Path(package).parent, name, filter=keep)
    return buffer.getvalue()


def run_inside(name: str, module: str) -> int:
    """Run a module of the checkout in such a machine, which ends with it; return its status."""
    if os.geteuid() != 0:
        raise SystemExit("nested: run as root")
    if sys.version_info[:2] != (3, 11):
        raise SystemExit("nested: needs Python 3.11, as the image has: modules are copied in")
    ROOT.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ["HUTCH_ROOT"] = str(ROOT)
    release = prepare()
    os.environ["HUTCH_QEMU"] = str(with_hardware())
    hutch("rm", "-f", name, check=False)
    began = time.perf_counter()
    try:
        hutch(
            *("run", "-d", "--name", name, "--vm", "--accel", "tcg", "--no-template"),
            *("--cpu-model", "EPYC,+svm", "--cpus", "2", "--memory", "3G", "--privileged"),
            *("--shm-size", "1G", "--network", "none", "--kernel", release),
            *(IMAGE, "sleep", "infinity"),
        )
        say(f"the outer machine runs after {time.perf_counter() - began:.1f} s")
        hutch("cp", "-", f"{name}:/opt", input=checkout())
        inside = f"cd /opt && exec env PYTHONPATH=/opt python3 -m {module}"
        status = subprocess.run([str(HUTCH), "exec", name, "sh", "-c", inside]).returncode
    finally:
        hutch("rm", "-f", name, check=False)
    say(f"{time.perf_counter() - began:.0f} s in all")
    return status
