"""System call filters: the program for an instance, compiled once and kept on disk."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hutch.errors import Unsupported
from hutch.linux.capabilities import to_mask
from hutch.linux.seccomp_default import TABLE_TEXT, default_profile

if TYPE_CHECKING:
    from hutch.linux.seccomp_profile import Profile

__all__ = [
    "cached_program",
    "compile_program",
    "default_profile",
    "is_available",
    "library_version",
    "parse_profile",
]

_SONAME = "libseccomp.so.2"
_DIGEST_SIZE = 32
_FORM = 2  # of the programs made from one profile; another one is another name in the cache
_RELEVANT_IN_DEFAULT = to_mask(
    f"CAP_{name}"
    for name in (
        "BPF DAC_READ_SEARCH PERFMON SYSLOG SYS_ADMIN SYS_BOOT SYS_CHROOT SYS_MODULE SYS_NICE "
        "SYS_PACCT SYS_PTRACE SYS_RAWIO SYS_TIME SYS_TTY_CONFIG"
    ).split()
)


def parse_profile(text: bytes | str, *, field: str = "seccomp") -> Profile:
    """Return a profile from Docker's (or the OCI's) JSON; `InvalidArgument` names the place."""
    from hutch.linux import seccomp_profile

    return seccomp_profile.parse_profile(text, field=field)


def library_version() -> str:
    """Return the version of libseccomp; `Unsupported` where it is not installed.

    The name of its file tells it on most hosts, much faster than loading it.
    """
    for directory in (f"/usr/lib/{os.uname().machine}-linux-gnu", "/usr/lib64", "/usr/lib"):
        try:
            return os.readlink(f"{directory}/{_SONAME}").removeprefix(f"{_SONAME}.")
        except OSError:
            continue
    from hutch.linux.libseccomp import loaded_version

    return loaded_version()


def is_available() -> bool:
    """Return whether this host has libseccomp and a kernel that filters."""
    if not os.path.exists("/proc/sys/kernel/seccomp/actions_avail"):
        return False
    try:
        library_version()
    except Unsupported:
        return False
    return True


def compile_program(
    profile: Profile | None,
    capabilities: int,
    *,
    machine: str | None = None,
    kernel: tuple[int, int] | None = None,
) -> bytes:
    """Return the program (an array of struct sock_filter) of a profile; None is the default.

    `capabilities` is the mask of the instance's bounding set. Takes some 30 ms. Raises
    `Unsupported` where libseccomp is missing.
    """
    from hutch.linux.libseccomp import compile_profile
    from hutch.linux.seccomp_compact import compact

    program = compile_profile(
        default_profile() if profile is None else profile,
        capabilities,
        machine=machine or os.uname().machine,
        kernel=kernel or _kernel(os.uname().release),
    )
    return compact(program)


def cached_program(
    directory: str | os.PathLike[str],
    profile: Profile | None,
    capabilities: int,
    *,
    machine: str | None = None,
    kernel: tuple[int, int] | None = None,
) -> bytes:
    """Return the program, from the directory if it was compiled before.

    Several processes may use one directory: a program is written beside its name and
    renamed, and one that is damaged is compiled again. The directory is made if missing.
    """
    host = os.uname()
    machine = machine or host.machine
    kernel = kernel or _kernel(host.release)
    path = os.path.join(directory, f"{_key(profile, capabilities, machine, kernel)}.bpf")
    program = _read(path)
    if program is None:
        program = compile_program(profile, capabilities, machine=machine, kernel=kernel)
        _write(path, program)
    return program


def _kernel(release: str) -> tuple[int, int]:
    major, _, rest = release.partition(".")
    minor = "".join(digit for digit in rest.partition(".")[0] if digit.isdigit())
    return int(major), int(minor or 0)


def _key(profile: Profile | None, capabilities: int, machine: str, kernel: tuple[int, int]) -> str:
    if profile is None:
        what = TABLE_TEXT
        capabilities &= _RELEVANT_IN_DEFAULT
    else:
        what = repr(profile)
    text = f"{_FORM}|{library_version()}|{machine}|{kernel}|{capabilities:x}|{what}"
    return _digest(text.encode()).hex()


def _digest(data: bytes) -> bytes:
    # hashlib loads OpenSSL, 3 ms on the way of every start; this is the same function.
    try:
        from _blake2 import blake2b
    except ImportError:
        from hashlib import blake2b
    return blake2b(data, digest_size=_DIGEST_SIZE).digest()


def _read(path: str) -> bytes | None:
    """Return a program that is whole: the file begins with the digest of the rest."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        content = os.read(fd, 1 << 20)
    finally:
        os.close(fd)
    digest, program = content[:_DIGEST_SIZE], content[_DIGEST_SIZE:]
    if len(program) % 8 or _digest(program) != digest:
        return None
    return program


def _write(path: str, program: bytes) -> None:
    directory = os.path.dirname(path)
    os.makedirs(directory, mode=0o700, exist_ok=True)
    partial = f"{path}.{os.getpid()}.{os.urandom(4).hex()}"
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.write(fd, _digest(program) + program)
        finally:
            os.close(fd)
        os.rename(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
