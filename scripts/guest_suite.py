"""Run tests in a virtual machine of our own, on a kernel that has what this host's may lack:
control groups of version 2 with all controllers, project quotas, fs-verity.

The machine boots Debian's kernel under emulation, its image is Debian with Python; the checkout is
copied in and the tests below are run there, as root, with hutch making containers in the machine.
Image and kernel are kept in build/guest: the first run takes about ten minutes, later ones fewer.
Needs root and the host's package mirror. Arguments are pytest's, in place of the tests below.
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
ROOT = CHECKOUT / "build" / "guest"
HUTCH = Path(sys.executable).parent / "hutch"
IMAGE = "guest-suite:1"
KERNEL = "linux-image-amd64"
PACKAGES = (
    "python3", "busybox-static", "e2fsprogs", "xfsprogs", "btrfs-progs", "qemu-utils",
    "qemu-system-common", "fuse3", "kmod", "libseccomp2", "iproute2", "nftables", "procps",
    "util-linux", "zstd", KERNEL,
)  # fmt: skip
LIBRARIES = ("msgspec", "isal", "zstandard", "urllib3", "pytest", "_pytest", "pluggy")
LIBRARIES += ("iniconfig", "packaging", "pygments", "py", "yaml", "hypothesis")
LIBRARIES += ("_hypothesis_globals", "sortedcontainers")
NAME = "guest-suite"
MODULES = "loop fuse ext4 xfs btrfs overlay quota_v2 zram crc32c_generic xxhash_generic"
TESTS = (
    "tests/linux/test_cgroup_v2.py",
    "tests/linux/test_cgroup_reclaim.py",
    "tests/resources/test_pressure.py",
    "tests/resources/test_guarantees.py",
    "tests/resources/test_storms.py",
    "tests/resources/test_swap.py",
    "tests/storage/test_pools.py",
    "tests/storage/test_sealing.py",
)
# A container has a /dev of its own, and its /sys read-only. The tests' files are on the machine's
# writable disk, beneath the overlay, which could not be the upper layer of another.
INSIDE = (
    "for m in {modules}; do modprobe -q $m; done; cd /opt/hutch && "
    "mount -t devtmpfs dev /dev && mkdir -p /dev/pts /dev/shm && "
    "mount -t devpts -o ptmxmode=666 devpts /dev/pts && mount -t tmpfs shm /dev/shm && "
    "mount -o remount,rw /sys && mount -o remount,rw /sys/fs/cgroup && "
    "for d in /dev/vd?; do mount -t ext4 $d /mnt 2>/dev/null && break; done; "
    "mkdir -p /mnt/tests /mnt/swaps && mount --bind /mnt/tests /tmp && "
    "mount --bind /mnt/swaps /var/tmp && "
    "exec env PYTHONPATH=/opt/hutch:/opt/hutch/src HUTCH_IN_GUEST=1 PYTHONDONTWRITEBYTECODE=1 "
    "python3 -m pytest -p no:cacheprovider -q {tests}"
)


def hutch(*arguments: str, input: bytes | None = None, check: bool = True) -> str:
    """Run the command line; its errors are ours."""
    done = subprocess.run([str(HUTCH), *arguments], input=input, stdout=subprocess.PIPE)
    if check and done.returncode:
        raise SystemExit(f"guest-suite: hutch {arguments[0]} ended with {done.returncode}")
    return done.stdout.decode()


def prepare() -> str:
    """Return the release of the kernel, with the image made where it is not there."""
    if IMAGE not in hutch("images", "--format", "{{.Repository}}:{{.Tag}}").split():
        print("making the image (two to five minutes)", flush=True)
        wanted = ",".join(PACKAGES)
        hutch("image", "bootstrap", "-q", "debian:bookworm", "-t", IMAGE, "-p", wanted)
    kernels = hutch("vm", "kernel", "ls", "--format", "{{.Release}}").split()
    return kernels[0] if kernels else hutch("vm", "kernel", "add", "-q", KERNEL).strip()


def checkout() -> bytes:
    """Return an archive of what runs inside: the library with what it imports, the tests."""
    buffer = io.BytesIO()

    def keep(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if "__pycache__" in entry.name else entry

    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("src", "tests", "pyproject.toml"):
            archive.add(CHECKOUT / name, f"hutch/{name}", filter=keep)
        for name in LIBRARIES:
            found = Path(str(import_module(name).__file__))
            source = found.parent if found.name == "__init__.py" else found
            archive.add(source, f"hutch/src/{source.name}", filter=keep)
    return buffer.getvalue()


def main() -> None:
    """Start the machine, run the tests in it, and leave nothing running."""
    if os.geteuid() != 0:
        raise SystemExit("guest-suite: run as root")
    if sys.version_info[:2] != (3, 11):
        raise SystemExit("guest-suite: needs Python 3.11, as the image has: modules are copied in")
    os.environ["HUTCH_ROOT"] = str(ROOT)
    ROOT.mkdir(mode=0o700, parents=True, exist_ok=True)
    release = prepare()
    hutch("rm", "-f", NAME, check=False)
    began = time.perf_counter()
    hutch(
        *("run", "-d", "--name", NAME, "--vm", "--no-template", "--cpus", "2", "--memory", "3G"),
        *("--privileged", "--network", "none", "--kernel", release, IMAGE, "sleep", "infinity"),
    )
    try:
        print(f"the machine runs after {time.perf_counter() - began:.1f} s", flush=True)
        hutch("cp", "-", f"{NAME}:/opt", input=checkout())
        tests = " ".join(sys.argv[1:] or TESTS)
        script = INSIDE.format(modules=MODULES, tests=tests)
        status = subprocess.run([str(HUTCH), "exec", NAME, "sh", "-c", script]).returncode
    finally:
        hutch("rm", "-f", NAME)
    print(f"{time.perf_counter() - began:.0f} s in all", flush=True)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
