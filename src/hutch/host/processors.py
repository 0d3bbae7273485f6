"""What decides whether a machine's memory can go on here: processors, and userfaultfd."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from hutch.errors import HutchError
from hutch.host.facts import has_capability, misc_minor

__all__ = ["HostProcessor", "host_processor", "missing_features", "userfaultfd_obstacle"]

_ASK_S = 30.0
_SYS_ADMIN, _MKNOD = 21, 27
_QUESTION = (
    b'{"execute": "qmp_capabilities"}\n'
    b'{"execute": "query-cpu-definitions", "id": "models"}\n'
    b'{"execute": "quit"}\n'
)


class HostProcessor(msgspec.Struct, frozen=True, kw_only=True):
    """The host's processor as Linux tells of it."""

    vendor: str = ""
    flags: tuple[str, ...] = ()


class _Model(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    name: str
    unavailable_features: list[str] = []


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    id: str = ""
    result: list[_Model] = msgspec.field(name="return", default_factory=list)


def host_processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> HostProcessor:
    """Return the first of the host's processors; mixed ones are not told apart."""
    fields: dict[str, str] = {}
    with open(cpuinfo) as file:
        for line in file:
            name, colon, value = line.partition(":")
            if not colon:
                break
            fields[name.strip()] = value.strip()
    return HostProcessor(
        vendor=fields.get("vendor_id", ""), flags=tuple(fields.get("flags", "").split())
    )


def missing_features(qemu: str, accelerator: str, model: str) -> tuple[str, ...] | None:
    """Return the features of a processor model that this host cannot give a guest, sorted;
    None where QEMU does not know the model. QEMU is run for it (0.1 s)."""
    for known in _models(qemu, accelerator):
        if known.name == model:
            return tuple(sorted(set(known.unavailable_features)))
    return None


def _models(qemu: str, accelerator: str) -> list[_Model]:
    from hutch.process.run import run_command

    command = [qemu, "-machine", f"none,accel={accelerator}", "-nodefaults", "-no-user-config"]
    command += ["-display", "none", "-qmp", "stdio"]
    done = run_command(command, input=_QUESTION, timeout_s=_ASK_S)
    for line in done.stdout.splitlines():
        if b'"models"' not in line:
            continue
        try:
            return msgspec.json.decode(line, type=_Answer).result
        except msgspec.DecodeError as exc:
            raise HutchError(f"{qemu}: cannot be asked for its processors: {exc}") from exc
    raise HutchError(f"{qemu}: does not tell its processors")


def userfaultfd_obstacle() -> str:
    """Return why a QEMU of ours could not fetch memory as it is touched; nothing if it can."""
    try:
        allowed = Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip()
    except FileNotFoundError:
        return "the kernel is built without it"
    if allowed == "1":
        return ""
    if misc_minor("userfaultfd") < 0:
        return "the kernel has no /dev/userfaultfd (Linux 6.1; or sysctl unprivileged_userfaultfd)"
    if os.geteuid() or not (has_capability(_MKNOD) and has_capability(_SYS_ADMIN)):
        return "it takes root to hand it out (or sysctl vm.unprivileged_userfaultfd=1)"
    return ""
