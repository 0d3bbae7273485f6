"""Capabilities: their names and numbers, Docker's default set, and the masks of processes."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from hutch.errors import InvalidArgument

__all__ = [
    "CAPABILITIES",
    "DEFAULT",
    "CapabilitySets",
    "from_mask",
    "last_capability",
    "own_sets",
    "parse",
    "to_mask",
]

# In the order of linux/capability.h: the index is the number.
_NAMES = """
CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE
NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO
SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME
SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG
WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
""".split()

CAPABILITIES: dict[str, int] = {f"CAP_{name}": number for number, name in enumerate(_NAMES)}

DEFAULT: tuple[str, ...] = (
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)


class CapabilitySets(msgspec.Struct, frozen=True, kw_only=True):
    """The five sets of a process, as masks."""

    inheritable: int
    permitted: int
    effective: int
    bounding: int
    ambient: int


def to_mask(names: Iterable[str]) -> int:
    """Return the mask of capability names written in full (`CAP_KILL`)."""
    mask = 0
    for name in names:
        mask |= 1 << CAPABILITIES[name]
    return mask


def from_mask(mask: int) -> tuple[str, ...]:
    """Return the names in a mask, by number; bits without a name are left out."""
    return tuple(name for name, number in CAPABILITIES.items() if mask >> number & 1)


def last_capability(proc: str = "/proc") -> int:
    """Return the highest capability number that the running kernel knows."""
    try:
        with open(f"{proc}/sys/kernel/cap_last_cap", "rb") as file:
            return int(file.read())
    except OSError:
        return len(_NAMES) - 1


def _number(name: object, field: str) -> int:
    if isinstance(name, str):
        upper = name.strip().upper()
        number = CAPABILITIES.get(upper if upper.startswith("CAP_") else f"CAP_{upper}")
        if number is not None:
            return number
    raise InvalidArgument(
        f"unknown capability {name!r}", field=field, hint="see capabilities(7) for the names"
    )


def _is_all(name: object) -> bool:
    return isinstance(name, str) and name.strip().upper() in ("ALL", "CAP_ALL")


def parse(
    add: Iterable[str] = (),
    drop: Iterable[str] = (),
    *,
    privileged: bool = False,
    last: int | None = None,
    base: Iterable[str] = DEFAULT,
) -> int:
    """Return the mask of the capabilities an instance gets.

    `ALL` in `drop` starts from nothing and `ALL` in `add` from everything the kernel
    has; a name in both lists is dropped when `add` has ALL, and added otherwise, as in
    Docker. `CAP_` and case are optional. `last` is the kernel's highest number.
    """
    highest = last_capability() if last is None else last
    everything = (1 << highest + 1) - 1
    adds, drops = list(add), list(drop)
    added = dropped = 0
    for index, name in enumerate(adds):
        if not _is_all(name):
            added |= 1 << _number(name, f"cap_add[{index}]")
    for index, name in enumerate(drops):
        if not _is_all(name):
            dropped |= 1 << _number(name, f"cap_drop[{index}]")
    if privileged:
        return everything
    if any(map(_is_all, adds)):
        return everything & ~dropped
    start = 0 if any(map(_is_all, drops)) else to_mask(base)
    return (start & ~dropped | added) & everything


def own_sets(pid: int | str = "self", proc: str = "/proc") -> CapabilitySets:
    """Return the capability sets of a process from /proc."""
    found: dict[str, int] = {}
    with open(f"{proc}/{pid}/status", "rb") as status:
        for line in status:
            if line.startswith(b"Cap"):
                key, _, value = line.partition(b":")
                found[key.decode()] = int(value, 16)
    return CapabilitySets(
        inheritable=found.get("CapInh", 0),
        permitted=found.get("CapPrm", 0),
        effective=found.get("CapEff", 0),
        bounding=found.get("CapBnd", 0),
        ambient=found.get("CapAmb", 0),
    )
