"""The first file system of a guest: well formed, made once, and a real kernel runs its /init."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from hutch.drivers.vm.cpio import Cpio
from hutch.drivers.vm.initramfs import Programs, build_initramfs, ensure_initramfs, trim
from hutch.drivers.vm.kernels import Kernels
from hutch.errors import Unsupported
from tests.requires import requires
from tests.vm.conftest import Fetched
from tests.vm.elves import own_kernel

PROGRAMS = Programs(agent=b"agent", launcher=b"launcher")
INIT = """#!/bin/busybox sh
b=/bin/busybox
$b mkdir -p /proc && $b mount -t proc proc /proc
for module in $($b cat /etc/modules) {late}; do $b insmod $module || echo failed $module; done
echo systems $($b grep -wE 'erofs|overlay|ext4' /proc/filesystems)
echo modules $($b wc -l < /proc/modules)
echo guest-is-up $($b uname -r)
$b poweroff -f
"""
COMMAND_LINE = (
    "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check random.trust_cpu=on "
    "cryptomgr.notests mitigations=off init_on_alloc=0 apparmor=0"
)


@requires("busybox")
def test_an_archive_is_what_others_read(tmp_path: Path) -> None:
    archive = Cpio()
    archive.directory("proc", 0o555)
    archive.file("a/b/c", b"12345", 0o600)
    archive.symlink("link", "a/b/c")
    archive.file("empty", b"")
    (tmp_path / "out").mkdir()
    subprocess.run(
        ["busybox", "cpio", "-idm"],
        input=archive.finish(),
        cwd=tmp_path / "out",
        capture_output=True,
        check=True,
    )
    out = tmp_path / "out"
    assert (out / "a/b/c").read_bytes() == b"12345"
    assert stat.S_IMODE((out / "a/b/c").stat().st_mode) == 0o600
    assert stat.S_IMODE((out / "proc").stat().st_mode) == 0o555
    assert (out / "link").readlink() == Path("a/b/c")
    assert sorted(os.listdir(out)) == ["a", "empty", "link", "proc"]


@pytest.mark.parametrize("path", ["", "/etc", "a//b", "a/../b", ".", "x/" * 3000])
def test_a_path_that_is_not_inside_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="not a path inside"):
        Cpio().file(path, b"")


def test_a_path_is_added_once() -> None:
    archive = Cpio()
    archive.file("a", b"")
    with pytest.raises(ValueError, match="twice"):
        archive.file("a", b"")


def test_the_same_parts_give_the_same_bytes() -> None:
    one, two = (build_initramfs(PROGRAMS, {"m": b"module"}, ("m",)) for _ in range(2))
    assert one == two
    assert b"/lib/modules/m.ko\n" in one


def test_it_ends_with_a_page_so_that_the_tables_behind_it_stay_whole() -> None:
    for size in (0, 1, 2000, 4000):
        archive = Cpio()
        archive.file("init", b"x" * size)
        assert len(archive.finish()) % 4096 == 0


def test_it_is_made_once_per_kernel_and_programs(kernels: Kernels, tmp_path: Path) -> None:
    record = kernels.add_file(*own_kernel(tmp_path / "own"))
    path = ensure_initramfs(kernels, record, PROGRAMS)
    made = path.stat().st_ino
    assert ensure_initramfs(kernels, record, PROGRAMS) == path
    assert path.stat().st_ino == made
    other = ensure_initramfs(kernels, record, Programs(agent=b"new", launcher=b"launcher"))
    assert other != path
    kept = path.stat().st_mtime
    os.utime(other, (0, 0))
    assert trim(kernels, now=kept + 1) > 0
    assert path.exists()
    assert not other.exists()


def test_programs_that_were_not_built_are_told(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="hutch-agent: not built"):
        Programs.load(tmp_path / "hutch-agent", tmp_path / "hutch-launcher")


def boot(kernels: Kernels, kernel: Path, initramfs: Path) -> str:
    """Boot a guest to its end and return what it wrote to the console."""
    machine = "-M q35 -accel tcg -cpu max -m 256 -nodefaults -no-user-config -display none"
    done = subprocess.run(
        [
            *("qemu-system-x86_64", *machine.split(), "-no-reboot", "-serial", "stdio"),
            *("-kernel", str(kernel), "-initrd", str(initramfs), "-append", COMMAND_LINE),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(errors="replace")


@requires("apt-mirror", "qemu", "busybox")
@pytest.mark.integration
@pytest.mark.slow
def test_the_kernel_runs_init_and_takes_every_module(fetched: Fetched, tmp_path: Path) -> None:
    record = fetched.record
    late = " ".join(f"/lib/modules/{name}.ko" for name in record.late)
    names = (*record.boot, *record.late)
    modules = {name: fetched.kernels.module(record, name).read_bytes() for name in names}
    programs = Programs(agent=INIT.format(late=late).encode(), launcher=b"")
    shell = Cpio()
    shell.file("bin/busybox", Path(shutil.which("busybox") or "").read_bytes(), 0o755)
    initramfs = tmp_path / "initramfs"
    # The kernel unpacks one archive after the other.
    initramfs.write_bytes(build_initramfs(programs, modules, record.boot) + shell.finish())
    said = boot(fetched.kernels, fetched.kernels.vmlinux(record), initramfs)
    assert f"guest-is-up {record.release}" in said
    assert "failed" not in said
    assert f"modules {len(modules)}" in said
    for system in ("erofs", "overlay", "ext4"):
        assert system in said.partition("systems")[2].partition("\n")[0]
