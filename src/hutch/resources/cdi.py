"""Devices by a vendor's names: files of the Container Device Interface (CDI), versions 0.3–1.0.

A file in /etc/cdi or /var/run/cdi (JSON or YAML) lists devices of one kind and what a container
needs to use each: device nodes, mounts, variables, groups. See the CDI specification of the
CNCF's container device working group.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from hutch.decoding import decode_json, prepare
from hutch.errors import InvalidArgument, NotFound, Unsupported

__all__ = ["Edits", "Registry", "load_registry", "merge"]

_MAX_FILE = 4 << 20
_MAX_FILES = 1000
_VERSIONS = ("0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0")
_KIND = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*[A-Za-z0-9]/[A-Za-z](?:[A-Za-z0-9_-]*[A-Za-z0-9])?")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.:-]*[A-Za-z0-9])?")


class DeviceNodeEdit(msgspec.Struct, frozen=True, rename="camel"):
    """A device node; `type` is c, u, p or b, and numbers are those of the host's where left out."""

    path: str
    host_path: str = ""
    type: str = ""
    major: int | None = None
    minor: int | None = None
    file_mode: int | None = None
    permissions: str = ""
    uid: int | None = None
    gid: int | None = None


class MountEdit(msgspec.Struct, frozen=True, rename="camel"):
    """A mount of the host's; `options` as those of mount(8)."""

    host_path: str
    container_path: str
    type: str = ""
    options: tuple[str, ...] = ()


class HookEdit(msgspec.Struct, frozen=True, rename="camel"):
    """A program to be run at a point of the start."""

    hook_name: str
    path: str
    args: tuple[str, ...] = ()


class Edits(msgspec.Struct, frozen=True, rename="camel"):
    """What is changed in a container that gets a device."""

    env: tuple[str, ...] = ()
    device_nodes: tuple[DeviceNodeEdit, ...] = ()
    mounts: tuple[MountEdit, ...] = ()
    hooks: tuple[HookEdit, ...] = ()
    additional_gids: tuple[int, ...] = msgspec.field(default=(), name="additionalGids")
    intel_rdt: dict[str, Any] | None = msgspec.field(default=None, name="intelRdt")
    net_devices: tuple[dict[str, Any], ...] = msgspec.field(default=(), name="netDevices")


class Device(msgspec.Struct, frozen=True, rename="camel"):
    """One device of a file."""

    name: str
    container_edits: Edits = Edits()


class SpecFile(msgspec.Struct, frozen=True, rename="camel"):
    """One file."""

    cdi_version: str
    kind: str
    devices: tuple[Device, ...] = ()
    container_edits: Edits = Edits()


class Registry(msgspec.Struct, frozen=True, kw_only=True):
    """The devices of all files by their whole names (`vendor.com/class=name`), the edits that go
    with every device of a file, and why files and devices were passed over."""

    devices: dict[str, tuple[Edits, Edits]]
    problems: dict[str, str]

    def resolve(self, names: Sequence[str]) -> Edits:
        """Return the edits for devices; those of a file count once. Raises `NotFound` for a name
        that no file has, with what was wrong with files."""
        chosen: list[Edits] = []
        for name in dict.fromkeys(names):
            if name not in self.devices:
                raise NotFound(f"device {name}: {self._why(name)}", hint=self._hint())
            common, own = self.devices[name]
            if not any(common is earlier for earlier in chosen):
                chosen.append(common)
            chosen.append(own)
        return merge(chosen)

    def _why(self, name: str) -> str:
        if name in self.problems:
            return self.problems[name]
        wrong = [f"{path}: {problem}" for path, problem in self.problems.items() if path[0] == "/"]
        return f"no CDI file has it{f' ({wrong[0]})' if wrong else ''}"

    def _hint(self) -> str:
        known = ", ".join(sorted(self.devices)[:8])
        return f"there are {known}" if known else "put the vendor's CDI file into /etc/cdi"

    def choose_gpus(self, wanted: str) -> tuple[str, ...]:
        """Return the names of graphics processors: `all`, a number, or `device=0,1`."""
        gpus = {name: name.partition("=") for name in self.devices if "/gpu=" in name}
        if not gpus:
            wrong = next(iter(self.problems.values()), "")
            raise NotFound(
                f"gpus: no CDI file has devices of class gpu{f' ({wrong})' if wrong else ''}",
                hint="`nvidia-ctk cdi generate --output /etc/cdi/nvidia.yaml` makes one",
            )
        if wanted.startswith("device="):
            return tuple(self._gpu(gpus, d) for d in wanted.removeprefix("device=").split(","))
        kinds = sorted({kind for kind, _, _ in gpus.values()})
        if wanted == "all":
            return tuple(name for kind in kinds for name in self._all_of(gpus, kind))
        single = [name for kind in kinds for name in self._each_of(gpus, kind)]
        if int(wanted) > len(single):
            raise NotFound(f"gpus: {wanted} wanted, there are {len(single)}")
        return tuple(single[: int(wanted)])

    def _gpu(self, gpus: dict[str, tuple[str, str, str]], device: str) -> str:
        matches = [n for n, (_, _, own) in gpus.items() if own.lower() in (device, f"gpu{device}")]
        if len(matches) != 1:
            how = "is there more than once" if matches else "no CDI file has it"
            known = ", ".join(sorted(gpus))
            raise NotFound(f"gpus: device {device}: {how}", hint=f"there are {known}")
        return matches[0]

    def _all_of(self, gpus: dict[str, tuple[str, str, str]], kind: str) -> list[str]:
        """Return the vendor's own device for all of them, else each."""
        return [f"{kind}=all"] if f"{kind}=all" in gpus else self._each_of(gpus, kind)

    def _each_of(self, gpus: dict[str, tuple[str, str, str]], kind: str) -> list[str]:
        """Return each processor once: vendors list them by number and by serial number."""
        own = [own for k, _, own in gpus.values() if k == kind and own != "all"]
        numbered = sorted((n for n in own if n.isdigit()), key=int)
        return [f"{kind}={name}" for name in numbered or sorted(own)]


def load_registry(directories: Sequence[str]) -> Registry:
    """Read all files; a later directory's devices go before an earlier one's, two of one
    directory with the same name cancel each other. Nothing is raised for a bad file: a
    device that nobody asks for must not keep others from their work."""
    devices: dict[str, tuple[Edits, Edits]] = {}
    problems: dict[str, str] = {}
    for directory in directories:
        found: dict[str, tuple[Edits, Edits]] = {}
        origin: dict[str, str] = {}
        twins: dict[str, str] = {}
        for path in _files(directory):
            try:
                spec = _load(path)
            except (InvalidArgument, OSError, Unsupported) as exc:
                problems[path] = str(exc)
                continue
            for device in spec.devices:
                name = f"{spec.kind}={device.name}"
                if name in found:
                    twins[name] = f"{origin[name]} and {path} both have it"
                origin[name] = path
                found[name] = (spec.container_edits, device.container_edits)
        for name, edits in found.items():
            devices[name] = edits
            problems.pop(name, None)
        for name, why in twins.items():
            del devices[name]
            problems[name] = why
    return Registry(devices=devices, problems=problems)


def _files(directory: str) -> list[str]:
    try:
        names = sorted(os.listdir(directory))[:_MAX_FILES]
    except OSError:
        return []
    return [f"{directory}/{name}" for name in names if name.endswith((".json", ".yaml", ".yml"))]


def _load(path: str) -> SpecFile:
    with open(path, "rb") as file:
        data = file.read(_MAX_FILE + 1)
    if len(data) > _MAX_FILE:
        raise InvalidArgument(f"larger than {_MAX_FILE} bytes")
    try:
        plain = decode_json(data, object) if path.endswith(".json") else _yaml(data)
        prepare(SpecFile)
        spec: SpecFile = msgspec.convert(plain, SpecFile)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise InvalidArgument(str(exc)) from exc
    _check(spec)
    return spec


def _yaml(data: bytes) -> Any:
    import yaml

    try:
        return yaml.safe_load(data)
    except yaml.YAMLError as exc:
        raise InvalidArgument(f"not YAML: {str(exc).splitlines()[0]}") from exc


def _check(spec: SpecFile) -> None:
    """Raise for a version that is not known, and for names that nobody could ask for."""
    version = spec.cdi_version.removeprefix("v")
    if version not in _VERSIONS:
        raise Unsupported(f"cdiVersion: {version[:40]!r} is not one of {', '.join(_VERSIONS)}")
    if not _KIND.fullmatch(spec.kind):
        raise InvalidArgument(f"expected VENDOR/CLASS, got {spec.kind[:80]!r}", field="kind")
    for index, device in enumerate(spec.devices):
        if not _NAME.fullmatch(device.name):
            raise InvalidArgument(f"bad name {device.name[:80]!r}", field=f"devices[{index}].name")


def merge(several: Sequence[Edits]) -> Edits:
    """Return several edits as one. Raises `Unsupported` for what is not done here."""
    for edits in several:
        if edits.hooks:
            hook = edits.hooks[0]
            raise Unsupported(
                f"CDI hook {hook.hook_name} ({hook.path}): hooks are not run",
                hint="leave the hooks out of the file, as with "
                "`nvidia-ctk cdi generate --disable-hook=all`",
            )
        if edits.intel_rdt or edits.net_devices:
            what = "intelRdt" if edits.intel_rdt else "netDevices"
            raise Unsupported(f"CDI {what}: is not possible here")
    return Edits(
        env=tuple(entry for edits in several for entry in edits.env),
        device_nodes=tuple(node for edits in several for node in edits.device_nodes),
        mounts=tuple(mount for edits in several for mount in edits.mounts),
        additional_gids=tuple(gid for edits in several for gid in edits.additional_gids),
    )
