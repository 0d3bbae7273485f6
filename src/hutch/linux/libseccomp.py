"""libseccomp: from a profile to the BPF program that the kernel loads.

The library knows the system calls of its own time. A call that is newer fails with
ENOSYS, so that programs take the older way, unless the profile names it; a short program
before the library's own sees to that. (The numbers from 424 on are the same on every
architecture.)
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from hutch.errors import InternalError, InvalidArgument, Unsupported
from hutch.linux.capabilities import CAPABILITIES
from hutch.linux.seccomp_profile import ACTIONS, COMPARISONS, Profile, Rule

__all__ = ["SONAME", "compile_profile", "docker_arch", "loaded_version"]

SONAME = "libseccomp.so.2"

_ATTR_ACT_BADARCH = 2
_ATTR_CTL_NNP = 3
_ATTR_CTL_OPTIMIZE = 8
_BINARY_TREE = 2
_SCMP_ERROR = -1

# Per machine: Docker's name, the native architecture, those that the kernel runs beside it.
_MACHINES = {
    "x86_64": ("amd64", "SCMP_ARCH_X86_64", ("SCMP_ARCH_X86", "SCMP_ARCH_X32")),
    "i686": ("x86", "SCMP_ARCH_X86", ()),
    "aarch64": ("arm64", "SCMP_ARCH_AARCH64", ("SCMP_ARCH_ARM",)),
    "armv7l": ("arm", "SCMP_ARCH_ARM", ()),
    "riscv64": ("riscv64", "SCMP_ARCH_RISCV64", ()),
    "ppc64le": ("ppc64le", "SCMP_ARCH_PPC64LE", ()),
    "s390x": ("s390x", "SCMP_ARCH_S390X", ("SCMP_ARCH_S390",)),
}
_LIBRARY_NAME = {
    "SCMP_ARCH_X86_64": b"x86_64",
    "SCMP_ARCH_X86": b"x86",
    "SCMP_ARCH_X32": b"x32",
    "SCMP_ARCH_AARCH64": b"aarch64",
    "SCMP_ARCH_ARM": b"arm",
    "SCMP_ARCH_RISCV64": b"riscv64",
    "SCMP_ARCH_PPC64LE": b"ppc64le",
    "SCMP_ARCH_S390X": b"s390x",
    "SCMP_ARCH_S390": b"s390",
}
_AUDIT_ARCH = {
    "SCMP_ARCH_X86_64": 0xC000003E,
    "SCMP_ARCH_X86": 0x40000003,
    "SCMP_ARCH_AARCH64": 0xC00000B7,
    "SCMP_ARCH_ARM": 0x40000028,
    "SCMP_ARCH_RISCV64": 0xC00000F3,
    "SCMP_ARCH_PPC64LE": 0xC0000015,
    "SCMP_ARCH_S390X": 0x80000016,
    "SCMP_ARCH_S390": 0x00000016,
}

_FIRST_COMMON = 424
_COMMON = """
pidfd_send_signal io_uring_setup io_uring_enter io_uring_register open_tree move_mount fsopen
fsconfig fsmount fspick pidfd_open clone3 close_range openat2 pidfd_getfd faccessat2
process_madvise epoll_pwait2 mount_setattr quotactl_fd landlock_create_ruleset
landlock_add_rule landlock_restrict_self memfd_secret process_mrelease futex_waitv
set_mempolicy_home_node cachestat fchmodat2 map_shadow_stack futex_wake futex_wait
futex_requeue statmount listmount lsm_get_self_attr lsm_set_self_attr lsm_list_modules mseal
setxattrat getxattrat listxattrat removexattrat open_tree_attr file_getattr file_setattr
listns
""".split()
_COMMON_NUMBER = {name: _FIRST_COMMON + offset for offset, name in enumerate(_COMMON)}


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


class _Version(ctypes.Structure):
    _fields_ = (("major", ctypes.c_uint), ("minor", ctypes.c_uint), ("micro", ctypes.c_uint))


def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(SONAME)
    except OSError as exc:
        raise Unsupported(
            f"seccomp: {SONAME} is not installed",
            hint="install libseccomp2 (libseccomp on Fedora), or use seccomp=unconfined",
        ) from exc
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_release.argtypes = [ctypes.c_void_p]
    library.seccomp_release.restype = None
    library.seccomp_arch_resolve_name.restype = ctypes.c_uint32
    library.seccomp_arch_add.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
    library.seccomp_attr_set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32]
    library.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.c_void_p,
    ]
    library.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.seccomp_version.restype = ctypes.POINTER(_Version)
    return library


def loaded_version() -> str:
    """Return the version of the library, as it says itself."""
    version = _library().seccomp_version().contents
    return f"{version.major}.{version.minor}.{version.micro}"


def docker_arch(machine: str) -> str:
    """Return what profiles call this machine in `includes.arches`."""
    return _MACHINES[machine][0] if machine in _MACHINES else machine


def compile_profile(
    profile: Profile, capabilities: int, *, machine: str, kernel: tuple[int, int]
) -> bytes:
    """Return the program, an array of struct sock_filter.

    `capabilities` is the mask of the instance's bounding set. Names that neither the
    library nor this module knows are skipped, as Docker does.
    """
    if machine not in _MACHINES:
        raise Unsupported(f"seccomp: no filter can be made for {machine}")
    library = _library()
    rules = [rule for rule in profile.rules if _counts(rule, capabilities, machine, kernel)]
    default = _action(profile.default_action, profile.default_errno)
    architectures = _architectures(profile, machine)
    with _context(library, default) as context:
        for name in architectures:
            _add_architecture(library, context, name)
        _set(library, context, _ATTR_CTL_NNP, 0)
        # Before 2.5 there is only the linear program; it is right, and slower.
        library.seccomp_attr_set(context, _ATTR_CTL_OPTIMIZE, _BINARY_TREE)
        newer: dict[int, int] = {}
        for rule in rules:
            _add_rule(library, context, rule, default, newer)
        program = _export(library, context)
    if default != _action("SCMP_ACT_ERRNO", errno.EPERM):
        return program
    return _newer_calls(profile, architectures, newer) + program


def _counts(rule: Rule, capabilities: int, machine: str, kernel: tuple[int, int]) -> bool:
    def has(name: str) -> bool:
        number = CAPABILITIES.get(name)
        return number is not None and bool(capabilities >> number & 1)

    arch = docker_arch(machine)
    return (
        all(map(has, rule.include_caps))
        and not any(map(has, rule.exclude_caps))
        and (not rule.include_arches or arch in rule.include_arches)
        and arch not in rule.exclude_arches
        and (rule.min_kernel is None or kernel >= rule.min_kernel)
    )


def _action(name: str, number: int | None) -> int:
    value = ACTIONS[name]
    if name in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE"):
        value |= errno.EPERM if number is None else number
    return value


def _architectures(profile: Profile, machine: str) -> tuple[str, ...]:
    _, native, others = _MACHINES[machine]
    if profile.architectures is not None and native in profile.architectures:
        others = profile.architectures[native]
    return native, *others


@contextmanager
def _context(library: ctypes.CDLL, default: int) -> Iterator[int]:
    context = library.seccomp_init(default)
    if not context:
        raise InternalError("seccomp_init failed")
    try:
        yield context
    finally:
        library.seccomp_release(context)


def _set(library: ctypes.CDLL, context: int, attribute: int, value: int) -> None:
    result = library.seccomp_attr_set(context, attribute, value)
    if result < 0:
        raise InternalError(f"seccomp_attr_set({attribute}): {os.strerror(-result)}")


def _add_architecture(library: ctypes.CDLL, context: int, name: str) -> None:
    token = library.seccomp_arch_resolve_name(_LIBRARY_NAME.get(name, b"?"))
    if not token:
        raise InvalidArgument(f"unknown architecture {name!r}", field="seccomp.architectures")
    result = library.seccomp_arch_add(context, token)
    if result < 0 and result != -errno.EEXIST:
        raise InternalError(f"seccomp_arch_add({name}): {os.strerror(-result)}")


def _add_rule(
    library: ctypes.CDLL, context: int, rule: Rule, default: int, newer: dict[int, int]
) -> None:
    action = _action(rule.action, rule.errno_ret)
    if action == default:
        return
    for name in rule.names:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number == _SCMP_ERROR:
            if name in _COMMON_NUMBER and not rule.args:
                newer.setdefault(_COMMON_NUMBER[name], action)
            continue
        for comparisons in _alternatives(rule):
            array = (_Comparison * len(comparisons))(*comparisons) if comparisons else None
            result = library.seccomp_rule_add_array(
                context, action, number, len(comparisons), array
            )
            # A rule that an earlier one covers is no error.
            if result < 0 and result != -errno.EEXIST:
                raise InvalidArgument(
                    f"cannot add a rule for {name}: {os.strerror(-result)}", field="seccomp"
                )


def _alternatives(rule: Rule) -> list[list[_Comparison]]:
    """Return the sets of conditions of which one must hold.

    Conditions on different arguments must hold together; libseccomp takes one condition
    per argument, so several on the same one are alternatives, as in Docker's profiles.
    """
    comparisons = [
        _Comparison(arg.index, COMPARISONS[arg.op], arg.value, arg.value_two) for arg in rule.args
    ]
    if len({arg.index for arg in rule.args}) < len(rule.args):
        return [[comparison] for comparison in comparisons]
    return [comparisons]


def _export(library: ctypes.CDLL, context: int) -> bytes:
    fd = os.memfd_create("hutch-seccomp", os.MFD_CLOEXEC)
    try:
        result = library.seccomp_export_bpf(context, fd)
        if result < 0:
            raise InternalError(f"seccomp_export_bpf: {os.strerror(-result)}")
        size = os.fstat(fd).st_size
        program = os.pread(fd, size, 0)
    finally:
        os.close(fd)
    if not program or len(program) % 8:
        raise InternalError(f"seccomp_export_bpf wrote {len(program)} bytes")
    return program


_LD, _JA, _JEQ, _JGT, _JGE, _RET = 0x20, 0x05, 0x15, 0x25, 0x35, 0x06
_NR, _ARCH = 0, 4
_X32_BIT = 0x40000000


def _newer_calls(profile: Profile, architectures: tuple[str, ...], newer: dict[int, int]) -> bytes:
    """Return the program to run first: it answers newer calls, and falls through for others."""
    named = [_COMMON_NUMBER[n] for rule in profile.rules for n in rule.names if n in _COMMON_NUMBER]
    highest = max(named, default=_FIRST_COMMON + 24)
    body: list[tuple[int, int, int, int]] = []
    for number, action in sorted(newer.items()):
        body += [(_JEQ, 0, 1, number), (_RET, 0, 0, action)]
    body += [(_JGT, 0, 1, highest), (_RET, 0, 0, _action("SCMP_ACT_ERRNO", errno.ENOSYS))]
    audit = [_AUDIT_ARCH[name] for name in architectures if name in _AUDIT_ARCH]
    code = [(_LD, 0, 0, _ARCH)]
    code += [(_JEQ, len(audit) - index, 0, token) for index, token in enumerate(audit)]
    code += [(_JA, 0, 0, 4 + len(body))]
    code += [(_LD, 0, 0, _NR)]
    # Calls of x32 are numbered from the bit on; the library's program knows them.
    code += [(_JGE, 1, 0, _X32_BIT), (_JGE, 1, 0, _FIRST_COMMON), (_JA, 0, 0, len(body))]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code + body)
