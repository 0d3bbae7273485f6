"""The programs of the host that hutch can use: whether they are there, and which version."""

from __future__ import annotations

import os

import msgspec

__all__ = ["PROGRAMS", "Program", "find_program", "version_of"]

_SYSTEM_PATHS = ("/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin", "/bin")


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """A program, the Debian package that brings it, and what is lost without it."""

    name: str
    package: str
    use: str
    version_argument: str | None = "--version"


PROGRAMS: tuple[Program, ...] = (
    Program(
        name="mmdebstrap",
        package="mmdebstrap",
        use="image bootstrap of Debian and Ubuntu suites",
    ),
    Program(
        name="busybox",
        package="busybox-static",
        use="image bootstrap busybox (without it the package is fetched by apt-get)",
        version_argument=None,
    ),
    Program(
        name="mkfs.erofs",
        package="erofs-utils",
        use="root disks of virtual machines",
        version_argument=None,
    ),
    Program(
        name="mke2fs",
        package="e2fsprogs",
        use="writable disks of virtual machines",
        version_argument=None,
    ),
    Program(
        name="qemu-img",
        package="qemu-utils",
        use="disk images of virtual machines in other formats than raw",
    ),
    Program(
        name="qemu-storage-daemon",
        package="qemu-system-common",
        use="volumes that are encrypted, and pools of kind qcow2",
    ),
    Program(
        name="mkfs.btrfs",
        package="btrfs-progs",
        use="storage pools of kind btrfs",
    ),
    Program(
        name="mkfs.xfs",
        package="xfsprogs",
        use="storage pools of kind xfs",
        version_argument="-V",
    ),
    Program(
        name="genisoimage",
        package="genisoimage",
        use="cloud-init's data for machines that start from a disk",
    ),
    Program(
        name="nft",
        package="nftables",
        use="looking at the rules that hutch makes (hutch itself does not need it)",
    ),
    Program(
        name="slirp4netns",
        package="slirp4netns",
        use="networks of containers without root",
    ),
    Program(
        name="newuidmap",
        package="uidmap",
        use="more than one user id in containers without root",
        version_argument=None,
    ),
    Program(
        name="fuse-overlayfs",
        package="fuse-overlayfs",
        use="root file systems without root where the kernel refuses overlay",
    ),
    Program(name="skopeo", package="skopeo", use="nothing but tests of images against a peer"),
    Program(name="runc", package="runc", use="nothing but the bench"),
    Program(name="crun", package="crun", use="nothing but the bench"),
)


def find_program(name: str) -> str | None:
    """Return the path of a program on PATH or in the system's own directories."""
    paths = [*os.environ.get("PATH", os.defpath).split(os.pathsep), *_SYSTEM_PATHS]
    for directory in paths:
        if not directory:
            continue
        path = os.path.join(directory, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


def version_of(path: str, argument: str = "--version") -> str:
    """Return the first line that a program prints about its version, or an empty text."""
    from hutch.errors import HutchError
    from hutch.process.run import run_command

    try:
        done = run_command([path, argument], timeout_s=10)
    except (OSError, HutchError):
        return ""
    lines = (done.stdout or done.stderr).decode(errors="replace").splitlines()
    return lines[0].strip() if lines else ""
