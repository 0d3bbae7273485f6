"""Exercise the KVM path where no KVM is: in a virtual machine of our own that emulates one.

The outer machine is hutch's, under emulation, on an emulated EPYC with AMD's extensions; its
image is Debian with QEMU and two kernels: the full one, which has kvm_amd and which it boots,
and the cloud flavour for the machines within. There `bench/nested.py` runs them on KVM. Image
and kernel are kept in build/nested; the first run takes about five minutes, later ones two.
Needs root and the host's package mirror.
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

CHECKOUT = Path(__file__).resolve().parents[1]
ROOT = CHECKOUT / "build" / "nested"
HUTCH = Path(sys.executable).parent / "hutch"
IMAGE = "nested-kvm:1"
KERNEL = "linux-image-amd64"
PACKAGES = (
    "python3", "qemu-system-x86", "erofs-utils", "e2fsprogs", "busybox-static", "kmod",
    "libseccomp2", KERNEL, "linux-image-cloud-amd64",
)  # fmt: skip
LIBRARIES = ("msgspec", "isal", "zstandard", "urllib3")
NAME = "nested-kvm"
INSIDE = "modprobe kvm_amd && cd /opt && exec env PYTHONPATH=/opt python3 -m bench.nested"


def hutch(*arguments: str, input: bytes | None = None, check: bool = True) -> str:
    """Run the command line; its errors are ours."""
    done = subprocess.run([str(HUTCH), *arguments], input=input, stdout=subprocess.PIPE)
    if check and done.returncode:
        raise SystemExit(f"nested-kvm: hutch {arguments[0]} ended with {done.returncode}")
    return done.stdout.decode()


def prepare() -> str:
    """Return the release of the full kernel, with the image made where it is not there."""
    if IMAGE not in hutch("images", "--format", "{{.Repository}}:{{.Tag}}").split():
        print("making the outer image (two to four minutes)", flush=True)
        wanted = ",".join(PACKAGES)
        hutch("image", "bootstrap", "-q", "debian:bookworm", "-t", IMAGE, "-p", wanted)
    kernels = hutch("vm", "kernel", "ls", "--format", "{{.Release}}").split()
    return kernels[0] if kernels else hutch("vm", "kernel", "add", "-q", KERNEL).strip()


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


def main() -> None:
    """Start the outer machine, run the inner ones in it, and leave nothing running."""
    if os.geteuid() != 0:
        raise SystemExit("nested-kvm: run as root")
    if sys.version_info[:2] != (3, 11):
        raise SystemExit("nested-kvm: needs Python 3.11, as the image has: modules are copied in")
    os.environ["HUTCH_ROOT"] = str(ROOT)
    ROOT.mkdir(mode=0o700, parents=True, exist_ok=True)
    release = prepare()
    hutch("rm", "-f", NAME, check=False)
    began = time.perf_counter()
    hutch(
        *("run", "-d", "--name", NAME, "--vm", "--accel", "tcg", "--no-template"),
        *("--cpu-model", "EPYC,+svm", "--cpus", "2", "--memory", "3G", "--privileged"),
        *("--shm-size", "1G"),
        *("--network", "none", "--kernel", release, IMAGE, "sleep", "infinity"),
    )
    try:
        print(f"the outer machine runs after {time.perf_counter() - began:.1f} s", flush=True)
        hutch("cp", "-", f"{NAME}:/opt", input=checkout())
        status = subprocess.run([str(HUTCH), "exec", NAME, "sh", "-c", INSIDE]).returncode
    finally:
        hutch("rm", "-f", NAME)
    print(f"{time.perf_counter() - began:.0f} s in all", flush=True)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
