"""The guest's first file system: the agent as /init, the launcher, and the kernel's modules.

Not compressed: a few megabytes are read faster from the page cache than an emulated CPU
unpacks them. Made once per kernel and set of programs, beside the kernel.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import msgspec

from hutch.drivers.vm.cpio import Cpio
from hutch.drivers.vm.kernels import KernelRecord, Kernels
from hutch.errors import Unsupported
from hutch.storage.faults import disk_errors

__all__ = ["AGENT", "LAUNCHER", "Programs", "build_initramfs", "ensure_initramfs"]

AGENT = "bin/hutch-agent"
LAUNCHER = "bin/hutch-launcher"
MODULES = "lib/modules"
_PREFIX, _SUFFIX = "initramfs-", ".cpio"
_KEPT_S = 24 * 3600.0


class Programs(msgspec.Struct, frozen=True, kw_only=True):
    """The static programs that the guest starts with."""

    agent: bytes
    launcher: bytes

    @classmethod
    def load(cls, agent: Path, launcher: Path) -> Programs:
        """Read both; raise `Unsupported` where one was not built."""
        found = []
        for path in (agent, launcher):
            try:
                found.append(path.read_bytes())
            except FileNotFoundError as exc:
                raise Unsupported(
                    f"{path.name}: not built for this host", hint="make setup"
                ) from exc
        return cls(agent=found[0], launcher=found[1])


def build_initramfs(programs: Programs, modules: dict[str, bytes], boot: tuple[str, ...]) -> bytes:
    """Return the archive. `modules` are all that go in, `boot` those to be loaded first.

    `/etc/modules` lists the paths of the latter, one a line, in order.
    """
    archive = Cpio()
    for name in ("proc", "sys", "dev", "run", "tmp"):
        archive.directory(name)
    # Before /dev is mounted the kernel opens the standard streams of init on it.
    archive.node("dev/console", stat.S_IFCHR, 5, 1)
    archive.file(AGENT, programs.agent, 0o755)
    archive.file(LAUNCHER, programs.launcher, 0o755)
    archive.symlink("init", AGENT)
    archive.file("etc/modules", "".join(f"/{module_path(n)}\n" for n in boot).encode())
    for name, content in modules.items():
        archive.file(module_path(name), content)
    return archive.finish()


def module_path(name: str) -> str:
    """Return where a module is in the guest, without the leading slash."""
    return f"{MODULES}/{name}.ko"


def ensure_initramfs(kernels: Kernels, kernel: KernelRecord, programs: Programs) -> Path:
    """Return the initramfs for a kernel and these programs, made where it is not there yet.

    Several may make the same at once: each writes a file of its own, and the last rename
    puts the same bytes in place.
    """
    directory = kernels.directory(kernel.id)
    path = directory / f"{_PREFIX}{_key(kernel, programs)}{_SUFFIX}"
    try:
        os.utime(path)  # in use: `trim` leaves it alone
    except FileNotFoundError:
        pass
    else:
        return path
    with disk_errors(f"initramfs of kernel {kernel.release}"):
        names = (*kernel.boot, *kernel.late)
        modules = {name: kernels.module(kernel, name).read_bytes() for name in names}
        partial = directory / f".{path.name}.{os.urandom(6).hex()}"
        try:
            partial.write_bytes(build_initramfs(programs, modules, kernel.boot))
            os.rename(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    return path


def _key(kernel: KernelRecord, programs: Programs) -> str:
    """Return a digest of everything that goes in, and of how it is put together."""
    import hashlib

    # The layout is this module's: a change of it is a change of its source.
    digest = hashlib.sha256(f"2 {kernel.id}\n".encode())
    for program in (programs.agent, programs.launcher):
        digest.update(hashlib.sha256(program).digest())
    return digest.hexdigest()[:16]


def trim(kernels: Kernels, *, now: float) -> int:
    """Remove initramfs files that nobody asked for within a day (those of other versions
    of hutch) and what was left half-written; return the bytes freed."""
    freed = 0
    for kernel in kernels.list():
        try:
            entries = list(os.scandir(kernels.directory(kernel.id)))
        except FileNotFoundError:
            continue
        for entry in entries:
            if entry.name.lstrip(".").startswith(_PREFIX):
                status = entry.stat(follow_symlinks=False)
                if status.st_mtime < now - _KEPT_S:
                    Path(entry.path).unlink(missing_ok=True)
                    freed += status.st_blocks * 512
    return freed
