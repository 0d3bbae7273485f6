"""Disks that start by themselves: one sector of our own, and Linux behind UEFI or GRUB."""

from __future__ import annotations

import shutil
import struct
import tempfile
from pathlib import Path

from hutch.drivers.vm.cpio import Cpio
from hutch.drivers.vm.modules import Modules
from hutch.process.run import run_command

SECTOR = Path(__file__).with_name("bootsector.S")
SIZE = 1 << 20
STUB = Path("/usr/lib/systemd/boot/efi/linuxx64.efi.stub")
_MODULES = ("isofs", "nls_utf8", "virtio_pci", "virtio_blk", "virtio_net", "button", "evdev")
# What a busy host under emulation needs, and what makes it faster there.
_COMMAND_LINE = (
    b"console=ttyS0 quiet panic=-1 no_timer_check tsc=reliable random.trust_cpu=on "
    b"cryptomgr.notests mitigations=off init_on_alloc=0\0"
)
_INIT = b"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /seed
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in /m/*.ko; do insmod "$module"; done
acpid -l /dev/null
waited=0
while [ ! -b /dev/vdb ] && [ $waited -lt 50 ]; do sleep 0.1; waited=$((waited + 1)); done
mount -t iso9660 -o ro /dev/vdb /seed && cat /seed/meta-data
ip link set eth0 up && udhcpc -q -n -s /etc/lease -i eth0 2>/dev/null
export PS1='guest# '
exec setsid cttyhack sh
"""


GRUB = Path("/usr/lib/grub/i386-pc")
_FIRST = 2048  # sectors before the partition
_SMALL_MODULES = ("virtio_pci", "virtio_blk", "button", "evdev")
_SMALL_INIT = b"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /disk
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in /m/*.ko; do insmod "$module"; done
acpid -l /dev/null
mount -t ext4 /dev/vda1 /disk
export PS1='guest# '
exec setsid cttyhack sh
"""


def run(*argv: str | Path, input: bytes | None = None) -> bytes:
    done = run_command([str(word) for word in argv], input=input)
    assert done.returncode == 0, (argv, done.stderr)
    return done.stdout


def iso_file(iso: str | Path, name: str) -> bytes:
    """A file of an ISO image, by its Rock Ridge name."""
    return run("isoinfo", "-R", "-i", iso, "-x", f"/{name}")


def sector_disk(path: Path) -> Path:
    """A raw disk with the program of bootsector.S in its first sector."""
    made = path.with_suffix(".o")
    run("as", "--32", "-o", made, SECTOR)
    run("ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", "-o", path, made)
    assert path.stat().st_size == 512
    with open(path, "r+b") as file:
        file.truncate(SIZE)
    return path


def linux_disk(path: Path, kernel: bytes, modules: Modules) -> Path:
    """A disk that UEFI starts: Linux in one file with a busybox, on an EFI system partition
    without a partition table. It shows the data that it finds and the lease that it gets, ends
    by the power button, and gives a shell."""
    work = path.with_suffix(".d")
    work.mkdir()
    (work / "linux").write_bytes(kernel)
    (work / "initrd").write_bytes(_initramfs(modules))
    (work / "cmdline").write_bytes(_COMMAND_LINE)
    unified = work / "linux.efi"
    sections = (("cmdline", 0x30000), ("linux", 0x2000000), ("initrd", 0x4000000))
    words = [
        word
        for name, address in sections
        for word in (
            f"--add-section=.{name}={work / name}",
            f"--change-section-vma=.{name}={address:#x}",
        )
    ]
    run("objcopy", *words, STUB, unified)
    run("mkfs.vfat", "-C", path, str(48 << 10))
    run("mmd", "-i", path, "::/EFI", "::/EFI/BOOT")
    run("mcopy", "-i", path, unified, "::/EFI/BOOT/BOOTX64.EFI")
    shutil.rmtree(work)
    return path


def grub_disk(path: Path, tree: Path, *, size: int, command_line: str) -> Path:
    """A disk that BIOS starts: GRUB before the one partition, which has `tree` on it, with
    `vmlinuz` and `initrd.img` at its top."""
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        early = Path(work, "early.cfg")
        early.write_text(
            f"search.fs_label root root\nlinux /vmlinuz {command_line}\ninitrd /initrd.img\nboot\n"
        )
        run(
            *("grub-mkimage", "-O", "i386-pc", "-o", f"{work}/core", "-p", "/boot/grub"),
            *("-c", early, "biosdisk", "part_msdos", "ext2", "search", "search_label"),
            *("linux", "normal"),
        )
        core = Path(work, "core").read_bytes()
    code = Path(GRUB, "boot.img").read_bytes()[:440]
    sectors = size // 512 - _FIRST
    entry = struct.pack("<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", _FIRST, sectors)
    assert len(core) < (_FIRST - 1) * 512
    with open(path, "xb") as file:
        file.write(code.ljust(446, b"\0") + entry + bytes(48) + b"\x55\xaa" + core)
        file.truncate(size)
    run(
        *("mke2fs", "-q", "-F", "-t", "ext4", "-L", "root", "-d", tree),
        *("-E", f"offset={_FIRST * 512}", path, f"{sectors // 2}k"),
    )
    return path


def small_disk(path: Path, kernel: bytes, modules: Modules) -> Path:
    """A disk that BIOS starts to a shell on the serial console in seconds; its root is the
    initramfs, and `/disk` what is on it."""
    with tempfile.TemporaryDirectory(dir=path.parent) as tree:
        Path(tree, "vmlinuz").write_bytes(kernel)
        Path(tree, "initrd.img").write_bytes(_initramfs(modules, _SMALL_MODULES, _SMALL_INIT))
        return grub_disk(
            path, Path(tree), size=128 << 20, command_line=_COMMAND_LINE.rstrip(b"\0").decode()
        )


def _initramfs(modules: Modules, names: tuple[str, ...] = _MODULES, init: bytes = _INIT) -> bytes:
    archive = Cpio()
    archive.file("bin/busybox", Path("/bin/busybox").read_bytes(), 0o755)
    archive.file("init", init, 0o755)
    archive.file("etc/acpi/PWRF/00000080", b"#!/bin/busybox sh\npoweroff -f\n", 0o755)
    archive.file("etc/lease", b'#!/bin/busybox sh\necho "lease: $1 $ip"\n', 0o755)
    for index, content in enumerate(modules.order(names).values()):
        archive.file(f"m/{index:02}.ko", content)
    return archive.finish()
