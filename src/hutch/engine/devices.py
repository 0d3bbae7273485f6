"""Devices by name at a start: what their vendors' files change in the instance."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import msgspec

from hutch.engine.records import InstanceRecord, ResolvedMount
from hutch.errors import InvalidArgument, Unsupported
from hutch.spec.model import DeviceNode, InstanceSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hutch.engine.context import Context
    from hutch.resources.cdi import DeviceNodeEdit, Edits, MountEdit

__all__ = ["check_devices", "with_devices"]

_VFIO = "vfio="
_PROPAGATION = frozenset(
    ("private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable", "runbindable")
)
# Those of a mount that binds what is there; what a bind mount has anyway is passed over.
_OPTIONS = frozenset(("bind", "rbind", "rw", "ro", "nosuid", "nodev", "exec", "noexec", "suid"))


def check_devices(context: Context, spec: InstanceSpec) -> None:
    """Raise for devices that this host has not, or that this kind of instance cannot have."""
    if spec.device_names or spec.gpus:
        vfio = [name for name in spec.device_names if name.startswith(_VFIO)]
        if spec.isolation == "vm":
            _only_vfio(spec)
            for name in vfio:
                from hutch.resources.vfio import check_vfio

                device = check_vfio(name.removeprefix(_VFIO))
                raise Unsupported(
                    f"device {name}: is ready (IOMMU group {device.group}), but QEMU's sandbox "
                    "has no way to it yet"
                )
        elif vfio:
            raise InvalidArgument(
                f"{vfio[0]} is for virtual machines",
                field="devices",
                hint="add --vm, or name the device's nodes",
            )
        else:
            _edits(context, spec)


def _only_vfio(spec: InstanceSpec) -> None:
    named = [name for name in spec.device_names if not name.startswith(_VFIO)]
    if named or spec.gpus:
        raise Unsupported(
            f"devices: {named[0] if named else 'gpus'} is described for containers",
            hint="give a virtual machine the whole device: --device vfio=0000:01:00.0",
        )


def with_devices(context: Context, record: InstanceRecord) -> InstanceRecord:
    """Return a container's record with the nodes, mounts, variables and groups of its devices."""
    spec = record.spec
    if spec.isolation == "vm" or not (spec.device_names or spec.gpus):
        return record
    edits = _edits(context, spec)
    process = msgspec.structs.replace(
        spec.process,
        env=(*spec.process.env, *edits.env),
        groups=(*spec.process.groups, *(str(gid) for gid in edits.additional_gids if gid)),
    )
    devices = (*spec.devices, *(_node(edit) for edit in edits.device_nodes))
    spec = msgspec.structs.replace(spec, process=process, devices=devices)
    mounts = (*record.mounts, *(_mount(edit) for edit in edits.mounts))
    return msgspec.structs.replace(record, spec=spec, mounts=mounts)


def _edits(context: Context, spec: InstanceSpec) -> Edits:
    from hutch.resources.cdi import load_registry
    from hutch.resources.settings import load_settings

    registry = load_registry(load_settings(context.root).cdi)
    names = (*spec.device_names, *(registry.choose_gpus(spec.gpus) if spec.gpus else ()))
    return registry.resolve(names)


def _node(edit: DeviceNodeEdit) -> DeviceNode:
    if edit.type not in ("", "c", "u", "b"):
        raise Unsupported(f"CDI device node {edit.path}: type {edit.type!r} is not possible here")
    permissions = edit.permissions or "rwm"
    _absolute(edit.path)
    return DeviceNode(
        source=edit.host_path or edit.path,
        target=edit.path,
        permissions="".join(letter for letter in "rwm" if letter in permissions),
        mode=None if edit.file_mode is None else stat.S_IMODE(edit.file_mode),
        uid=edit.uid,
        gid=edit.gid,
    )


def _mount(edit: MountEdit) -> ResolvedMount:
    _absolute(edit.container_path)
    _absolute(edit.host_path)
    if edit.type not in ("", "bind", "none"):
        raise Unsupported(f"CDI mount {edit.container_path}: type {edit.type!r} is not possible")
    unknown = [o for o in edit.options if o not in _OPTIONS | _PROPAGATION]
    if unknown:
        raise Unsupported(f"CDI mount {edit.container_path}: option {unknown[0]!r} is not possible")
    return ResolvedMount(
        type="bind",
        source=edit.host_path,
        target=edit.container_path,
        read_only="ro" in edit.options,
        recursive="bind" not in edit.options or "rbind" in edit.options,
        propagation=_last(edit.options, _PROPAGATION),
    )


def _last(options: Sequence[str], among: frozenset[str]) -> str:
    found = [option for option in options if option in among]
    return found[-1] if found else ""


def _absolute(path: str) -> None:
    if not path.startswith("/") or "/../" in f"{path}/":
        raise InvalidArgument(f"must be a whole path, got {path[:80]!r}", field="CDI path")
