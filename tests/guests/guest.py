"""A QEMU guest with Debian's kernel and cgroup v2 alone, in which pytest runs this checkout.

The host that runs the suite has one kernel and one cgroup layout. The guest has others: the
distribution's own kernel (6.1 in bookworm, so an overlay without `lowerdir+`) and nothing
but cgroup v2. It is made of what is here: the interpreter, its packages, busybox, the
checkout. No network, no image, no second copy of the tests.
"""

from __future__ import annotations

import compileall
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["Kernel", "build_disk", "build_initramfs", "load_kernel", "run_guest"]

CHECKOUT = Path(__file__).parents[2]
_DEVELOPMENT = shutil.ignore_patterns(
    "*mypy*", "pip", "setuptools", "pkg_resources", "grimp*", "rich", "ruff*",
    "docker*", "hutch*", "__editable__*", "_distutils_hack", "*.pth", "importlinter",
)  # fmt: skip
MODULES = ("virtio_blk", "virtio_pci", "overlay", "loop")
_SKIPPED = shutil.ignore_patterns(
    "site-packages", "test", "tests", "idlelib", "ensurepip", "lib2to3", "turtledemo", "tkinter",
    "config-*", "_test*", "*.a", "pydoc_data",
)  # fmt: skip
_ABOUT_THE_SOURCE = shutil.ignore_patterns("*.egg-info")


class Kernel:
    """An unpacked package of Debian's kernel for clouds."""

    def __init__(self, directory: Path) -> None:
        self.image = next(directory.glob("boot/vmlinuz-*"))
        self.release = self.image.name.removeprefix("vmlinuz-")
        self._modules = next(directory.glob(f"**/lib/modules/{self.release}"))

    def modules(self, names: Iterable[str]) -> list[Path]:
        """Return the files of modules and of what they need, in the order to load them."""
        known = {p.name.split(".ko")[0].replace("-", "_"): p for p in self._modules.rglob("*.ko*")}
        found: dict[str, Path] = {}

        def add(name: str) -> None:
            if name in found or name not in known:
                return  # built in
            path = known[name]
            assert path.suffix == ".ko", "compressed modules are not known here"
            needed = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
            for other in needed[1].decode().split(",") if needed and needed[1] else ():
                add(other.replace("-", "_"))
            found[name] = path

        for name in names:
            add(name)
        return list(found.values())


def load_kernel() -> Kernel:
    """Return the newest kernel for clouds that the host's apt offers, kept between runs."""
    kept = Path(tempfile.gettempdir()) / f"hutch-test-kernel-{os.getuid()}"
    kept.mkdir(mode=0o700, exist_ok=True)
    assert kept.stat().st_uid == os.getuid()
    depends = _output("apt-cache", "depends", "linux-image-cloud-amd64")
    package = re.search(r"Depends: (linux-image-\S+)", depends)
    assert package, depends
    target = kept / package[1]
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=kept) as work:
            subprocess.run(["apt-get", "download", "-q", package[1]], cwd=work, check=True)
            archive = next(Path(work).glob("*.deb"))
            subprocess.run(["dpkg-deb", "-x", archive, f"{work}/x"], check=True)
            os.rename(f"{work}/x", target)
    return Kernel(target)


def _output(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


# ---- the root file system -------------------------------------------------------------


def build_disk(path: Path, start: str) -> None:
    """Make an ext4 file system of the interpreter, the checkout, busybox and `start`."""
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        root = Path(work)
        for name in (
            "proc",
            "sys",
            "dev",
            "tmp",
            "run",
            "mnt",
            "root",
            "etc",
            "bin",
            "sbin",
            "var",
        ):
            (root / name).mkdir()
        _busybox(root)
        (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
        (root / "etc/group").write_text("root:x:0:\n")
        _python(root)
        for name in ("src", "tests"):
            shutil.copytree(CHECKOUT / name, root / "hutch" / name, ignore=_ABOUT_THE_SOURCE)
        shutil.copy2(CHECKOUT / "pyproject.toml", root / "hutch")
        # Compiled here: under emulation it would take longer than the tests.
        compileall.compile_dir(root / "hutch", quiet=1, stripdir=root)
        (root / "sbin/start").write_text(start)
        (root / "sbin/start").chmod(0o755)
        with path.open("wb") as file:
            file.truncate(640 << 20)
        subprocess.run(["/sbin/mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", root, path],
                       check=True)  # fmt: skip


def _busybox(root: Path) -> None:
    busybox = shutil.which("busybox")
    assert busybox
    shutil.copy2(busybox, root / "bin/busybox")
    (root / "usr/bin").mkdir(parents=True)
    shutil.copy2(busybox, root / "usr/bin/busybox")
    for applet in _output(busybox, "--list").split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")


def _python(root: Path) -> None:
    """Copy the interpreter and what it loads, each to the path that it has here."""
    real = Path(sys.executable).resolve()
    library = Path(sysconfig.get_path("stdlib"))
    shutil.copytree(library, root / str(library)[1:], ignore=_SKIPPED)
    site = Path(sysconfig.get_path("purelib"))
    shutil.copytree(site, root / "hutch/site", ignore=_DEVELOPMENT)
    objects = [real, *library.glob("lib-dynload/*.so"), *(root / "hutch/site").rglob("*.so")]
    _place(root, real)
    (root / "bin/python").symlink_to(real)
    for path in _libraries(objects):
        _place(root, path)


def _place(root: Path, path: Path) -> None:
    target = root / str(path)[1:]
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(path, target)
    target.chmod(0o755)


def _libraries(objects: Iterable[Path]) -> Iterator[Path]:
    done = subprocess.run(["ldd", *map(str, objects)], capture_output=True, text=True)
    found = set(re.findall(r"(?:=> |^\s+)(/\S+) \(0x", done.stdout, re.MULTILINE))
    cache = _output("/sbin/ldconfig", "-p")
    for name in ("libseccomp.so.2", "libc.so.6"):
        found |= set(re.findall(rf"{re.escape(name)} .*x86-64.* => (\S+)", cache))
    return (Path(name) for name in sorted(found))


# ---- the initramfs --------------------------------------------------------------------

_INIT = """#!/bin/busybox sh
for module in $(/bin/busybox cat /order); do
    /bin/busybox insmod /$module || echo "$module failed"
done
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox mount -t ext4 /dev/vda /root
exec /bin/busybox switch_root /root /sbin/start
"""


def build_initramfs(path: Path, modules: list[Path]) -> None:
    """Make the archive that loads the modules and goes on from the disk."""
    busybox = Path(shutil.which("busybox") or "")
    with path.open("wb") as file:
        for name in ("dev", "root", "bin"):
            file.write(_entry(name, stat.S_IFDIR | 0o755, b""))
        file.write(_entry("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes()))
        file.write(_entry("init", stat.S_IFREG | 0o755, _INIT.encode()))
        order = "\n".join(m.name for m in modules).encode()
        file.write(_entry("order", stat.S_IFREG | 0o644, order))
        for module in modules:
            file.write(_entry(module.name, stat.S_IFREG | 0o644, module.read_bytes()))
        file.write(_entry("TRAILER!!!", 0, b""))


def _entry(name: str, mode: int, data: bytes) -> bytes:
    """Return an entry of a cpio archive in the form `newc`; see initramfs-buffer-format.rst."""
    fields = [0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


# ---- the machine ----------------------------------------------------------------------


def run_guest(kernel: Kernel, initramfs: Path, disk: Path, *, timeout_s: float) -> str:
    """Boot, wait until the guest has powered itself off, and return what it wrote."""
    arguments = (
        # A busy host spoils the measurement of the TSC: the guest's clock would run away.
        "console=ttyS0 quiet panic=-1 clocksource=acpi_pm no_timer_check random.trust_cpu=on"
        " cryptomgr.notests rcupdate.rcu_expedited=1 audit=0 mitigations=off init_on_alloc=0"
        " apparmor=0"
    )
    command = [
        "qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max",
        "-smp", "2", "-m", "768", "-nodefaults", "-no-user-config", "-no-reboot",
        "-display", "none", "-serial", "stdio",
        "-drive", f"if=none,id=root,file={disk},format=raw,cache=unsafe",
        "-device", "virtio-blk-pci,drive=root",
        "-kernel", str(kernel.image), "-initrd", str(initramfs), "-append", arguments,
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as exc:
        said = (exc.stdout or b"").decode(errors="replace")
        raise AssertionError(f"the guest did not end; it wrote:\n{said}") from None
    return done.stdout.decode(errors="replace").replace("\r\n", "\n")
