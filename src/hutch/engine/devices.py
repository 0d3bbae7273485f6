"""Devices by name at a start: what their vendors' files change in the instance."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import msgspec

from hutch.engine.records import InstanceRecord, ResolvedMount
from hutch.errors import InvalidArgument, NotFound, Unsupported
from hutch.spec.model import DeviceNode, InstanceSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hutch.engine.context import Context
    from hutch.resources.cdi import DeviceNodeEdit, Edits, MountEdit

__all__ = ["check_devices", "machine_devices", "with_devices"]

_VFIO = "vfio="
_PROPAGATION = frozenset(
    ("private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable", "runbindable")
)
# Those of a mount that binds what is there; what a bind mount has anyway is passed over.
_OPTIONS = frozenset(("bind", "rbind", "rw", "ro", "nosuid", "nodev", "exec", "noexec", "suid"))


def check_devices(context: Context, spec: InstanceSpec) -> None:
    """Raise for devices that this host has not, or that this kind of instance cannot have."""
    if spec.isolation == "vm":
        addresses = machine_devices(context, spec)
        if not addresses:
            return
        from hutch.resources.vfio import check_vfio

        for address in addresses:
            check_vfio(address, together=addresses)
    elif spec.device_names or spec.gpus:
        vfio = [name for name in spec.device_names if name.startswith(_VFIO)]
        if vfio:
            raise InvalidArgument(
                f"{vfio[0]} is for virtual machines",
                field="devices",
                hint="add --vm, or name the device's nodes",
            )
        _edits(context, spec)


def machine_devices(context: Context, spec: InstanceSpec) -> tuple[str, ...]:
    """Return the addresses of the PCI devices that a machine is to have, those of its devices
    by a vendor's names included: a vendor lists nodes of VFIO for what is meant for machines."""
    found: list[str] = []
    for name in spec.device_names:
        if name.startswith(_VFIO):
            found.append(name.removeprefix(_VFIO))
        else:
            found += _behind_name(context, spec, name)
    if spec.gpus:
        raise Unsupported(
            "gpus: chooses among what is described for containers",
            hint="give a virtual machine the whole device: --device vfio=0000:01:00.0",
        )
    return tuple(dict.fromkeys(found))


def _behind_name(context: Context, spec: InstanceSpec, name: str) -> tuple[str, ...]:
    from hutch.resources.vfio import devices_of_nodes

    edits = _edits(context, msgspec.structs.replace(spec, device_names=(name,), gpus=""))
    nodes = [edit.host_path or edit.path for edit in edits.device_nodes]
    addresses = devices_of_nodes(nodes)
    if not nodes or addresses is None:
        raise Unsupported(
            f"device {name}: is described for containers",
            hint="give a virtual machine the whole device: --device vfio=0000:01:00.0",
        )
    if not addresses:
        raise NotFound(
            f"device {name}: there is nothing behind {', '.join(nodes)}",
            hint="the vendor's tool writes its file anew when devices came or went",
        )
    return addresses


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
