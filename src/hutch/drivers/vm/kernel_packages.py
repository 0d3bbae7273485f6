"""Kernels out of Debian packages, by the host's apt, which checks them; nothing is installed.

Of a package only the kernel, its modules and the list of what is built in are read, straight
from the archive: nothing is written to a path that it names.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from hutch.drivers.vm.modules import Modules, builtin_names
from hutch.errors import IntegrityError, InvalidArgument, NotFound, Unavailable, Unsupported
from hutch.records import Progress, ProgressEvent, silent

__all__ = ["CLOUD", "KernelPackage", "fetch_kernel", "find_package"]

CLOUD = "linux-image-cloud-amd64"
"""Debian's package that depends on its newest kernel for virtual machines."""

_NAME = re.compile(r"^linux-image-[a-z0-9][a-z0-9+.~-]{1,100}$")
_IMAGE = re.compile(r"\b(linux-image-[0-9][a-z0-9+.~-]*)")
# Since Linux 7 Debian's kernel, its modules and the lists of what is in it come apart.
_PARTS = re.compile(r"\b(linux-(?:base|binary|modules)-[0-9][a-z0-9+.~-]*) \(= ")
_VMLINUZ = re.compile(r"^(?:\./)?(?:boot/vmlinuz-[^/]+|(?:usr/)?lib/modules/[^/]+/vmlinuz)$")
_MODULES = re.compile(
    r"^(?:\./)?(?:usr/)?lib/modules/[^/]+/(?:(?:kernel|updates)/(?:.*/)?)?([^/]+)$"
)
_LIMIT = 512 << 20
_ENV = {"LC_ALL": "C.UTF-8", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


class KernelPackage(msgspec.Struct, frozen=True, kw_only=True):
    """A package that holds a kernel, or whose `parts` do, and the version that apt would fetch."""

    name: str
    version: str
    parts: tuple[str, ...] = ()


def find_package(name: str | None = None) -> KernelPackage:
    """Return the package of a kernel: the named one, or what `CLOUD` depends on now.

    A package that only depends on a kernel is followed. Raises `NotFound` where apt knows
    no such package, `Unsupported` where there is no apt.
    """
    wanted = name or CLOUD
    if not _NAME.match(wanted):
        raise InvalidArgument(
            f"expected a package linux-image-…, got {wanted!r}",
            field="package",
            hint="apt-cache search linux-image lists what there is",
        )
    fields = _show(wanted)
    if not wanted.removeprefix("linux-image-")[:1].isdigit() or not _has_kernel(wanted):
        depends = _IMAGE.search(fields.get("Depends", ""))
        if depends is not None and depends[1] != wanted:
            wanted = depends[1]
            fields = _show(wanted)
    parts = _PARTS.findall(fields.get("Depends", ""))
    return KernelPackage(name=wanted, version=fields.get("Version", ""), parts=tuple(parts))


def _has_kernel(name: str) -> bool:
    """Tell a kernel's own package (`linux-image-6.1.0-40-amd64`) from one of a series
    (`linux-image-6.12-amd64`), whose version has but two numbers."""
    return name.removeprefix("linux-image-").partition("-")[0].count(".") >= 2


def _show(name: str) -> dict[str, str]:
    from hutch.process.run import run_command

    _require("apt-cache", "apt-get", "dpkg-deb")
    done = run_command(
        ["apt-cache", "show", "--no-all-versions", name], env=_environment(), timeout_s=60
    )
    fields: dict[str, str] = {}
    for line in done.stdout.decode(errors="replace").splitlines():
        if not line:
            break
        key, colon, value = line.partition(": ")
        if colon and not line.startswith(" "):
            fields[key] = value
    if done.returncode != 0 or "Version" not in fields:
        raise NotFound(
            f"package {name}: apt does not know it",
            hint="apt-get update, or apt-cache search linux-image for the names there are",
        )
    return fields


def _require(*programs: str) -> None:
    from hutch.host.programs import find_program

    for program in programs:
        if find_program(program) is None:
            raise Unsupported(
                f"kernel: {program} is not installed",
                hint="give a kernel of your own: hutch vm kernel add --file VMLINUZ --modules DIR",
            )


def _environment() -> dict[str, str]:
    import os

    proxies = ("http_proxy", "https_proxy", "no_proxy", "HOME", "APT_CONFIG")
    return _ENV | {name: os.environ[name] for name in proxies if name in os.environ}


@contextmanager
def fetch_kernel(
    package: KernelPackage, workspace: Path, *, progress: Progress = silent
) -> Iterator[tuple[bytes, Modules]]:
    """Fetch a package into `workspace` and yield its vmlinuz and its modules.

    The modules can be read until the block is left. Raises `Unavailable` where the package
    could not be had, `IntegrityError` where it holds no kernel.
    """
    debs = _download(package, workspace, progress)
    progress(ProgressEvent(item=package.name, phase="unpacking"))
    try:
        with ExitStack() as stack:
            archives = []
            for deb in debs:
                tar = deb.with_suffix(".tar")
                _unwrap(deb, tar)
                archives.append(stack.enter_context(tarfile.open(tar, "r:")))
            yield _read(package.name, archives)
    except tarfile.TarError as exc:
        raise IntegrityError(f"package {package.name}: {exc}") from exc


def _download(package: KernelPackage, workspace: Path, progress: Progress) -> list[Path]:
    from hutch.process.run import run_command

    progress(ProgressEvent(item=package.name, phase="downloading"))
    wanted = [f"{name}={package.version}" for name in package.parts or (package.name,)]
    # As root apt would drop to a user of its own, who may not write here.
    command = ["apt-get", "-o", "APT::Sandbox::User=root", "download", "-q", *wanted]
    done = run_command(command, cwd=str(workspace), env=_environment(), timeout_s=900)
    debs = sorted(workspace.glob("*.deb"))
    if done.returncode != 0 or len(debs) < len(wanted):
        lines = [
            line[2:].strip()
            for line in done.stderr.decode(errors="replace").splitlines()
            if line.startswith("E:")
        ]
        raise Unavailable(
            f"package {package.name}: {lines[0] if lines else 'apt-get failed'}",
            hint="does apt-get update work here?",
        )
    return debs


def _unwrap(deb: Path, target: Path) -> None:
    from hutch.process.run import run_command

    with open(target, "wb") as file:
        done = run_command(
            ["dpkg-deb", "--fsys-tarfile", str(deb)],
            stdout_fd=file,
            env=_environment(),
            timeout_s=300,
        )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        reason = said[0] if said else "dpkg-deb failed"
        if "No space left" in reason:
            raise OSError(28, "no space left on device", str(target))
        raise IntegrityError(f"package {deb.name}: {reason}")


def _read(name: str, archives: Sequence[tarfile.TarFile]) -> tuple[bytes, Modules]:
    vmlinuz = b""
    builtin = ""
    members: dict[str, tuple[tarfile.TarFile, tarfile.TarInfo]] = {}

    def content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
        file = archive.extractfile(member)
        if file is None or member.size > _LIMIT:
            raise IntegrityError(f"package {name}: {member.name}: cannot be read")
        return file.read()

    for archive in archives:
        for member in archive:
            if not member.isreg():
                continue
            if _VMLINUZ.match(member.name):
                vmlinuz = content(archive, member)
            elif match := _MODULES.match(member.name):
                if match[1] == "modules.builtin":
                    builtin = content(archive, member).decode(errors="replace")
                members[match[1]] = archive, member
    if not vmlinuz:
        raise IntegrityError(f"package {name}: holds no kernel")
    return vmlinuz, Modules(members, lambda one: content(*members[one]), builtin_names(builtin))
